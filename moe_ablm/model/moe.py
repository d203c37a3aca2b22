"""A mixture-of-experts block: route, dispatch, experts, combine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_ablm.model import routers
from moe_ablm.model.attention import Packing
from moe_ablm.model.capacity import capacity
from moe_ablm.model.dispatch import dropless, limited, sharded_experts, softly, sum_over_antibodies
from moe_ablm.model.experts import ExpertWeights, narrow_experts, split_wide
from moe_ablm.model.ffn import HIDDEN, FeedForward
from moe_ablm.model.layers import constant, normal
from moe_ablm.model.routers import Tokens
from moe_ablm.model.routing import Plan, RouterStats, RowSums, summarise
from moe_ablm.model.spec import TOKEN_ROUTERS, EncoderSpec, Execution
from moe_ablm.parallel.mesh import BATCH_AXES, EXPERT_AXIS


class RouterWeights(NamedTuple):
    """A router: `kernel [D, E]`, or of soft-MoE `[D, E, S]`.

    `scale []`, where soft-MoE normalises; `balance [E]`, where choices are biased.
    """

    kernel: jax.Array
    scale: jax.Array | None
    balance: jax.Array | None


class Rows(NamedTuple):
    """Arrays `[B, ...]` that a block works on, each device on its own rows.

    `seen [B, L, D]` is what the router sees of `x`; `plan` is given when the whole batch was routed
    at once.
    """

    x: jax.Array
    seen: jax.Array
    valid: jax.Array
    packing: Packing | None
    plan: Plan | None


class Routed(NamedTuple):
    """What a block reports.

    Attributes:
      assigned: float32 `[B, L, E]`, 1 where the expert computed for the token; of soft-MoE the
        expert's share of the output.
      stats: of the batch.
    """

    assigned: jax.Array
    stats: RouterStats


@dataclass(frozen=True)
class Layer:
    """The block as a pure function of its arrays."""

    spec: EncoderSpec
    operands: str
    training: bool
    packed: bool

    @property
    def travels(self) -> bool:
        """Whether rows go to the experts (there are fixed numbers of them), or weights to rows."""
        moe = self.spec.moe
        if moe.router == "soft":
            return True
        queues = moe.limit is not None and (self.training or moe.router not in TOKEN_ROUTERS)
        return queues and moe.group == "sequence" and moe.widths is None and not self.packed

    def route(self, rows: Rows, router: RouterWeights) -> tuple[Plan, RowSums]:
        """Plan and sums, antibody by antibody or over the batch; not of soft-MoE."""
        moe = self.spec.moe
        logits = jnp.einsum(
            "bld,de->ble",
            rows.seen.astype(jnp.float32),
            router.kernel,
            precision=jax.lax.Precision.HIGHEST,
        )
        if moe.group == "sequence":
            tokens = Tokens(rows.valid, rows.packing and rows.packing.antibody)
            return routers.route(logits, tokens, moe, router.balance, self.training)
        flat = logits.reshape(1, -1, moe.experts)
        tokens = Tokens(rows.valid.reshape(1, -1))
        plan, sums = routers.route(flat, tokens, moe, router.balance, self.training)
        shape = (*rows.valid.shape, -1)
        return Plan(plan.experts.reshape(shape), plan.gates.reshape(shape), None), sums

    def soft_logits(self, x: jax.Array, router: RouterWeights) -> jax.Array:
        """float32 `[B, L, E, S]`; with both sides of unit length and a learned scale if `l2`."""
        x, kernel = x.astype(jnp.float32), router.kernel
        if router.scale is not None:
            x, kernel = _unit(x, -1), router.scale * _unit(kernel, 0)
        return jnp.einsum("bld,des->bles", x, kernel, precision=jax.lax.Precision.HIGHEST)

    def __call__(
        self,
        rows: Rows,
        router: RouterWeights,
        most: jax.Array | None,
        weights: ExpertWeights,
        axis: str | None,
    ) -> tuple[jax.Array, jax.Array, RowSums | None]:
        """Output `[B, L, D]`, assigned `[B, L, E]`, sums (None when routed before).

        Args:
          rows: of this device.
          router: weights.
          most: antibodies in the fullest packed row of the batch; None: rows are not packed.
          weights: experts of this device.
          axis: mesh axis over which the experts are spread; None: all are here.
        """
        moe = self.spec.moe
        experts = sharded_experts(weights, self.spec.activation, self.operands, axis)
        if moe.router == "soft":
            return self._soft(rows, router, most, weights, axis)
        plan, sums = (rows.plan, None) if rows.plan else self.route(rows, router)
        assigned = plan.assigned(moe.experts)
        if self.travels:
            places = capacity(rows.x.shape[1], moe)
            return limited(rows.x, plan, places, moe.experts, experts), assigned, sums
        if moe.widths is not None:
            plan = split_wide(plan, narrow_experts(moe.widths, self.spec.chunk))
        out = dropless(rows.x, plan, weights, self.spec.activation, self.operands)
        return out, assigned, sums

    def _soft(self, rows, router, most, weights, axis):
        def one(valid, values):
            x, seen, router, weights = values
            experts = sharded_experts(weights, self.spec.activation, self.operands, axis)
            plan, sums = routers.soft(self.soft_logits(seen, router), valid)
            assigned = plan.assigned(self.spec.moe.experts)
            return softly(x, plan, experts, self.operands), assigned, sums

        values = (rows.x, rows.seen, router, weights)
        if most is None:
            return one(rows.valid, values)
        return sum_over_antibodies(
            lambda a, values, antibody: one(antibody == a, values),
            most,
            values,
            rows.packing.antibody,
        )


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)


def antibody_means(x: jax.Array, valid: jax.Array, packing: Packing | None) -> jax.Array:
    """Every token's antibody as the mean of its tokens, float32 `[B, L, D]`."""
    x = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0)
    if packing is None:
        mean = x.sum(1, keepdims=True) / jnp.maximum(valid.sum(1), 1)[:, None, None]
        return jnp.broadcast_to(mean, x.shape)
    same = packing.same().astype(jnp.float32)
    total = jnp.einsum("blm,bmd->bld", same, x, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(same.sum(-1, keepdims=True), 1)


def on_each_device(
    layer: Callable, rows: Rows, router: RouterWeights, most: jax.Array | None,
    weights: ExpertWeights, travels: bool,
):  # fmt: skip
    """`layer` on each device's own rows, where there is a mesh that divides them.

    Experts that `travels` says to stay where they are do so if the mesh divides their number; all
    others are gathered for the time of the call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or rows.x.shape[0] % mesh.size:
        return layer(rows, router, most, weights, axis=None)
    ways = mesh.shape[EXPERT_AXIS]
    axis = EXPERT_AXIS if travels and ways > 1 and weights.up.shape[0] % ways == 0 else None
    batch = P(BATCH_AXES)
    return jax.shard_map(
        lambda *arrays: layer(*arrays, axis=axis),
        in_specs=(batch, P(), P(), P(axis)),
        out_specs=batch,
        check_vma=False,
    )(rows, router, most, weights)


class MoE(nnx.Module):
    """Experts in the place of an FFN."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        moe, d, f = spec.moe, spec.d_model, spec.chunk
        n = sum(spec.expert_widths) // f  # experts of equal width; E unless widths differ
        self.spec, self.operands = spec, execution.operands
        soft = moe.router == "soft"
        shape, axes = ((d, moe.experts, moe.slots), "D..") if soft else ((d, moe.experts), "D.")
        self.router = normal(rngs, shape, axes)
        self.scale = constant(1.0, (), "") if soft and moe.l2 else None
        self.balance = constant(0.0, (moe.experts,), ".") if moe.balance_rate else None
        self.up = normal(rngs, (n, d, HIDDEN[spec.activation] * f), "EDF")
        self.up_bias = constant(0.0, (n, HIDDEN[spec.activation] * f), "EF")
        self.down = normal(rngs, (n, f, d), "EFD")
        self.down_bias = constant(0.0, (moe.experts, d), "ED")
        self.shared = FeedForward(spec, spec.shared_ffn, execution, rngs) if moe.shared else None

    def weights(self) -> ExpertWeights:
        """The experts, those of unequal width as several of equal width."""
        down_bias = self.down_bias[...]
        if self.spec.moe.widths is not None:
            # the first part of an expert adds its bias, so that it is added once
            first = np.cumsum([0, *self.spec.expert_widths[:-1]]) // self.spec.chunk
            zeros = jnp.zeros((self.up.shape[0], down_bias.shape[1]), down_bias.dtype)
            down_bias = zeros.at[first].set(down_bias)
        return ExpertWeights(self.up[...], self.up_bias[...], self.down[...], down_bias)

    def router_weights(self) -> RouterWeights:
        """The router; a balance is no parameter of any loss."""
        scale = None if self.scale is None else self.scale[...]
        balance = None if self.balance is None else jax.lax.stop_gradient(self.balance[...])
        return RouterWeights(self.router[...], scale, balance)

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        packing: Packing | None = None,
        training: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routed]:
        """Output `[B, L, D]` and what the router did.

        Args:
          x: `[B, L, D]`.
          valid: bool `[B, L]`, False at padding.
          packing: given when rows hold several antibodies.
          training: whether token choice obeys the capacity; in inference it is dropless.
          key: of the router's jitter; None: no jitter.
        """
        moe = self.spec.moe
        layer = Layer(self.spec, self.operands, training, packing is not None)
        seen = antibody_means(x, valid, packing) if moe.router == "sequence" else x
        if key is not None and moe.jitter:
            low, high = 1 - moe.jitter, 1 + moe.jitter  # Fedus et al. 2022, appendix
            seen = seen * jax.random.uniform(key, x.shape, x.dtype, low, high)
        rows = Rows(x, seen, valid, packing, None)
        router, weights = self.router_weights(), self.weights()
        sums = None
        if moe.group == "batch" and moe.router != "soft":
            plan, sums = layer.route(rows, router)
            rows = rows._replace(plan=plan)
        most = None if packing is None else packing.antibody.max().astype(jnp.int32)
        out, assigned, found = on_each_device(layer, rows, router, most, weights, layer.travels)
        stats = summarise(sums or found, balanced=moe.router in TOKEN_ROUTERS)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, Routed(assigned, stats)
