"""The mixture-of-experts block: route, dispatch, experts, combine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moe_ablm.model import routers
from moe_ablm.model.dispatch import dropless, limited, sharded_experts, softly, sum_over_antibodies
from moe_ablm.model.experts import ExpertWeights, narrow_experts, split_wide
from moe_ablm.model.families import Queued, Router
from moe_ablm.model.layers import HIDDEN, Balance, FeedForward, constant, normal
from moe_ablm.model.linear import wide
from moe_ablm.model.packing import Packing
from moe_ablm.model.routers import Tokens
from moe_ablm.model.routing import Plan, RouterStats, RowSums, SoftPlan, summarise
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import BATCH_AXES, EXPERT_AXIS


class RouterWeights(NamedTuple):
    """The arrays of a router.

    Attributes:
      kernel: `[D, E]`, of soft-MoE `[D, E, S]`.
      scale: a scalar; None: the router is not normalised.
      balance: `[E]`, the bias of auxiliary-loss-free balancing; None: no bias.
    """

    kernel: jax.Array
    scale: jax.Array | None
    balance: jax.Array | None


class Rows(NamedTuple):
    """The input of a block, `[B, ...]`; on a mesh, a device's own rows of it.

    Attributes:
      x: `[B, L, D]`.
      seen: `[B, L, D]`, the router's input.
      valid: bool `[B, L]`, False at padding.
      packing: where the antibodies of a row are; None: a row is one antibody.
      plan: of the whole batch, where all its tokens compete; None: rows are not routed yet.
    """

    x: jax.Array
    seen: jax.Array
    valid: jax.Array
    packing: Packing | None
    plan: Plan | None


class Routed(NamedTuple):
    """What a block reports.

    Attributes:
      assigned: `[B, L, E]`, 1 where the expert computed for the token; in soft-MoE the expert's
        share of the output.
      stats: statistics of the batch.
      plan: the router's decisions; None unless observed.
    """

    assigned: jax.Array
    stats: RouterStats
    plan: Plan | SoftPlan | None = None


class Done(NamedTuple):
    """What a device computed for its rows.

    Attributes:
      out: `[B, L, D]`.
      assigned: as in `Routed`.
      sums: router sums of the rows; None where the whole batch was routed before.
      plan: as in `Routed`.
    """

    out: jax.Array
    assigned: jax.Array
    sums: RowSums | None
    plan: Plan | SoftPlan | None


@dataclass(frozen=True)
class Layer:
    """The block as a pure function of its arrays."""

    spec: EncoderSpec
    execution: Execution
    training: bool
    packed: bool
    observed: bool  # whether plans are returned

    @property
    def router(self) -> Router:
        """The router's spec."""
        assert self.spec.moe is not None  # a dense layer has no `Layer`
        return self.spec.moe

    def route(
        self, rows: Rows, tokens: Tokens, router: RouterWeights
    ) -> tuple[Plan | SoftPlan, RowSums]:
        """Plan and sums of tokens `[B, L]` that compete within their row or antibody."""
        logits = router_logits(rows.seen, router)
        return routers.plan(self.router, logits, tokens, router.balance, self.training)

    def route_batch(self, rows: Rows, router: RouterWeights) -> tuple[Plan, RowSums]:
        """Plan and sums where all tokens of the batch compete: they are routed as one row."""
        flat = rows._replace(seen=rows.seen.reshape(1, -1, rows.seen.shape[-1]))
        plan, sums = self.route(flat, Tokens(rows.valid.reshape(1, -1)), router)
        assert isinstance(plan, Plan)
        shape = (*rows.valid.shape, -1)
        return Plan(plan.experts.reshape(shape), plan.gates.reshape(shape), None), sums

    def __call__(
        self,
        rows: Rows,
        router: RouterWeights,
        most: jax.Array | None,
        weights: ExpertWeights,
        axis: str | None,
    ) -> Done:
        """Routes the rows, unless they have a plan, and computes the experts.

        Args:
          rows: the rows of this device.
          router: weights of the router.
          most: antibodies in the fullest packed row of the batch; None: rows are not packed.
          weights: the experts of this device.
          axis: mesh axis that shards the experts; None: this device has all of them.
        """
        if self.router.slots_of_expert and most is not None:
            return self._one_antibody_at_a_time(rows, router, most, weights, axis)
        plan: Plan | SoftPlan | None = rows.plan
        sums = None
        if plan is None:
            tokens = Tokens(rows.valid, rows.packing and rows.packing.antibody)
            plan, sums = self.route(rows, tokens, router)
        return self._compute(rows.x, plan, sums, weights, axis)

    def _compute(self, x, plan, sums, weights, axis) -> Done:
        spec, moe = self.spec, self.router
        if isinstance(plan, Plan):
            plan = checkpoint_name(plan, "plan")
        assigned, seen = plan.assigned(moe.experts), plan if self.observed else None
        experts = sharded_experts(weights, spec.activation, self.execution, axis)
        if isinstance(plan, SoftPlan):
            return Done(softly(x, plan, experts, self.execution), assigned, sums, seen)
        if moe.travels(self.training, self.packed):
            assert isinstance(moe, Queued)
            places = moe.places(x.shape[1])
            out = limited(x, plan, places, moe.experts, experts, self.execution.backend)
            return Done(out, assigned, sums, seen)
        if not moe.equal:
            plan = split_wide(plan, narrow_experts(spec.expert_widths, spec.chunk))
        out = dropless(x, plan, weights, spec.activation, self.execution, axis)
        return Done(out, assigned, sums, seen)

    def _one_antibody_at_a_time(self, rows, router, most, weights, axis) -> Done:
        """Soft-MoE on packed rows: each antibody has its own slots, and rows hold any number."""

        def one(valid, values):
            x, seen, router, weights = values
            plan, sums = self.route(rows._replace(seen=seen), Tokens(valid), router)
            return self._compute(x, plan, sums, weights, axis)

        return sum_over_antibodies(
            lambda a, values, antibody: one(antibody == a, values),
            most,
            (rows.x, rows.seen, router, weights),
            rows.packing.antibody,
        )


def router_logits(x: jax.Array, router: RouterWeights) -> jax.Array:
    """Logits `[B, L, E]`, of soft-MoE `[B, L, E, S]`, at least float32, of inputs `x [B, L, D]`.

    A normalised router gives inputs and weights unit length and multiplies by a learned scale.
    """
    x, kernel = x.astype(wide(x.dtype)), router.kernel
    if router.scale is not None:
        x, kernel = _unit(x, -1), router.scale * _unit(kernel, 0)
    return jnp.tensordot(x, kernel, 1, precision=jax.lax.Precision.HIGHEST)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)


def antibody_means(x: jax.Array, valid: jax.Array, packing: Packing | None) -> jax.Array:
    """Mean of the tokens of every token's antibody, at least float32 `[B, L, D]`."""
    x = jnp.where(valid[..., None], x.astype(wide(x.dtype)), 0.0)
    if packing is None:
        mean = x.sum(1, keepdims=True) / jnp.maximum(valid.sum(1), 1)[:, None, None]
        return jnp.broadcast_to(mean, x.shape)
    same = packing.same().astype(x.dtype)
    total = jnp.einsum("blm,bmd->bld", same, x, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(same.sum(-1, keepdims=True), 1)


def on_each_device(
    layer: Callable[..., Done],
    rows: Rows,
    router: RouterWeights,
    most: jax.Array | None,
    weights: ExpertWeights,
) -> Done:
    """Runs `layer` on each device's own rows if there is a mesh that divides the rows.

    Experts stay sharded if the expert axis divides their number. Otherwise every device gathers all
    of them for this call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or rows.x.shape[0] % mesh.size:
        return layer(rows, router, most, weights, axis=None)
    ways = mesh.shape[EXPERT_AXIS]
    axis = EXPERT_AXIS if ways > 1 and weights.up.shape[0] % ways == 0 else None
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
        assert spec.moe is not None  # a dense layer has a FeedForward
        moe, d, f = spec.moe, spec.d_model, spec.chunk
        n = sum(spec.expert_widths) // f  # stored experts of equal width; E unless widths differ
        self.spec, self.moe, self.execution = spec, moe, execution
        slots = (moe.slots_of_expert,) if moe.slots_of_expert else ()
        self.router = normal(rngs, (d, moe.experts, *slots), "D." + "." * len(slots))
        scale = moe.initial_scale(d)
        self.scale = None if scale is None else constant(scale, (), "")
        self.balance = constant(0.0, (moe.experts,), ".", Balance) if moe.balance_step else None
        self.up = normal(rngs, (n, d, HIDDEN[spec.activation] * f), "EDF")
        self.up_bias = constant(0.0, (n, HIDDEN[spec.activation] * f), "EF")
        self.down = normal(rngs, (n, f, d), "EFD")
        self.down_bias = constant(0.0, (moe.experts, d), "ED")
        self.shared = FeedForward(spec, spec.shared_ffn, execution, rngs) if moe.shared else None

    def weights(self) -> ExpertWeights:
        """The experts; those of unequal width as several of equal width."""
        down_bias = self.down_bias[...]
        if not self.moe.equal:
            # only the first part of an expert has its bias, so that it is added once
            first = np.cumsum([0, *self.spec.expert_widths[:-1]]) // self.spec.chunk
            zeros = jnp.zeros((self.up.shape[0], down_bias.shape[1]), down_bias.dtype)
            down_bias = zeros.at[first].set(down_bias)
        return ExpertWeights(self.up[...], self.up_bias[...], self.down[...], down_bias)

    def router_weights(self) -> RouterWeights:
        """The router's arrays."""
        scale, balance = (None if v is None else v[...] for v in (self.scale, self.balance))
        return RouterWeights(self.router[...], scale, balance)

    def _seen(self, x, valid, packing, key) -> jax.Array:
        """The router's input: tokens or their antibody's mean, with jitter if there is a key."""
        moe = self.moe
        seen = antibody_means(x, valid, packing) if moe.per_antibody else x
        if key is None or not moe.noise:
            return seen
        # Fedus et al. 2022, appendix; `wide`, since bfloat16 has only five values from .99 to 1.01
        low, high = 1 - moe.noise, 1 + moe.noise
        return seen * jax.random.uniform(key, x.shape, wide(x.dtype), low, high)

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        packing: Packing | None = None,
        training: bool = False,
        key: jax.Array | None = None,
        observed: bool = False,
    ) -> tuple[jax.Array, Routed]:
        """Output `[B, L, D]` and what the router did.

        Args:
          x: `[B, L, D]`.
          valid: bool `[B, L]`, False at padding.
          packing: where the antibodies of a row are; None: a row is one antibody.
          training: whether token choice obeys the capacity; in inference it is dropless.
          key: key of the router's jitter; None: no jitter.
          observed: whether the plan is returned.
        """
        layer = Layer(self.spec, self.execution, training, packing is not None, observed)
        rows = Rows(x, self._seen(x, valid, packing, key), valid, packing, None)
        router, weights, sums = self.router_weights(), self.weights(), None
        if self.moe.in_batch:
            plan, sums = layer.route_batch(rows, router)
            rows = rows._replace(plan=plan)
        most = None if packing is None else packing.antibody.max().astype(jnp.int32)
        done = on_each_device(layer, rows, router, most, weights)
        sums = done.sums if sums is None else sums
        assert sums is not None
        stats = summarise(sums, balanced=self.moe.token_choice)
        out = done.out if self.shared is None else done.out + self.shared(x)
        return out, Routed(done.assigned, stats, done.plan)
