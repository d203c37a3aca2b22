"""The experts' weights, and all experts at work on equally many rows each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_ablm.model.ffn import ACTIVATE
from moe_ablm.model.linear import matmul
from moe_ablm.model.routing import Plan


class ExpertWeights(NamedTuple):
    """All experts: `up [E, D, H]`, `up_bias [E, H]`, `down [E, F, D]`, `down_bias [E, D]`.

    H is F, or 2 F where the activation is gated.
    """

    up: jax.Array
    up_bias: jax.Array
    down: jax.Array
    down_bias: jax.Array


def expert_ffn(x: jax.Array, weights: ExpertWeights, activation: str, operands: str) -> jax.Array:
    """`down_e(activate(up_e(x_e)))`: `[E, T, D] -> [E, T, D]`, in the dtype of `x`."""
    up_bias, down_bias = (b[:, None].astype(x.dtype) for b in (weights.up_bias, weights.down_bias))
    hidden = ACTIVATE[activation](matmul(x, weights.up, operands) + up_bias)
    return matmul(hidden, weights.down, operands) + down_bias


def narrow_experts(widths: tuple[int, ...], chunk: int) -> np.ndarray:
    """Which experts of width `chunk` make up each of the wide ones.

    Returns:
      int32 `[E + 1, widest / chunk]`, filled up with their number N; the last row, for no expert,
      is all N.
    """
    counts = [width // chunk for width in widths]
    ends = np.cumsum(counts)
    table = np.full((len(widths) + 1, max(counts)), ends[-1], np.int32)
    for e, count in enumerate(counts):
        table[e, :count] = np.arange(ends[e] - count, ends[e])
    return table


def split_wide(plan: Plan, table: np.ndarray) -> Plan:
    """Replaces experts of unequal width by the equal ones that they consist of.

    An FFN is the sum over its hidden units, so a wide expert is the sum of narrow ones with the
    same gate, each computing for the same tokens.
    """
    experts = jnp.asarray(table)[plan.experts]
    gates = jnp.where(experts < table.max(), plan.gates[..., None], 0.0)
    shape = (*experts.shape[:2], -1)
    return Plan(experts.reshape(shape), gates.reshape(shape), None)
