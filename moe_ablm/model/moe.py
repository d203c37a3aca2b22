"""A mixture-of-experts block: route, dispatch, experts, combine."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_ablm.model import routers
from moe_ablm.model.grouped import ExpertWeights, block_rows, grouped_ffn, take_rows
from moe_ablm.model.layers import constant, normal
from moe_ablm.model.routers import RouterStats, TokenChoice
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import BATCH_AXES


def dropless(x: jax.Array, plan: TokenChoice, weights: ExpertWeights, operands: str) -> jax.Array:
    """Sends every token to all of its experts and sums their outputs by gate.

    Args:
      x: `[B, L, D]`.
      plan: experts and gates `[B, L, K]`.
      weights: of all E experts.
      operands: dtype of matmul factors.

    Returns:
      `[B, L, D]`; 0 for tokens that are not routed.
    """
    b, length, d = x.shape
    k = plan.experts.shape[-1]
    blocks = block_rows(plan.experts.reshape(-1, k), weights.up.shape[0])
    rows = take_rows(x.reshape(-1, d), blocks.assignment // k, blocks.slot)
    out = grouped_ffn(rows, weights, blocks.expert, blocks.used, operands)
    chosen = take_rows(out, blocks.slot, blocks.assignment[:, None])
    gates = plan.gates.reshape(-1, k, 1).astype(x.dtype)
    return (chosen * gates).sum(1).reshape(b, length, d)


def dropless_per_device(
    x: jax.Array, plan: TokenChoice, weights: ExpertWeights, operands: str
) -> jax.Array:
    """`dropless` on each device's own rows of the batch, experts replicated."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return dropless(x, plan, weights, operands)
    rows = P(BATCH_AXES)
    return jax.shard_map(
        lambda *args: dropless(*args, operands),
        in_specs=(rows, rows, P()),
        out_specs=rows,
        check_vma=False,
    )(x, plan, weights)


class MoE(nnx.Module):
    """Experts in the place of an FFN, chosen token by token."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        e, d, f = spec.moe.experts, spec.d_model, spec.ffn
        self.spec, self.operands = spec.moe, execution.operands
        self.router = normal(rngs, (d, e), "D.")
        self.up = normal(rngs, (e, d, f), "EDF")
        self.up_bias = constant(0.0, (e, f), "EF")
        self.down = normal(rngs, (e, f, d), "EFD")
        self.down_bias = constant(0.0, (e, d), "ED")

    def route(self, x: jax.Array, valid: jax.Array) -> tuple[TokenChoice, RouterStats]:
        """Plan and statistics for `x [B, L, D]`; the logits are float32 whatever the precision."""
        logits = jnp.einsum(
            "bld,de->ble",
            x.astype(jnp.float32),
            self.router[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        return routers.top_k(logits, valid, self.spec)

    def __call__(
        self, x: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, TokenChoice, RouterStats]:
        """`x [B, L, D]`, `valid` bool `[B, L]` -> output `[B, L, D]`, plan, statistics."""
        plan, stats = self.route(x, valid)
        weights = ExpertWeights(
            self.up[...], self.up_bias[...], self.down[...], self.down_bias[...]
        )
        return dropless_per_device(x, plan, weights, self.operands), plan, stats
