"""Brings tokens to experts and back: three ways, chosen by what the plan looks like.

* `dropless`: every assignment is computed, in blocks sorted by expert. Tokens stay where they are;
  on a mesh the experts' weights are gathered to them.
* `limited`: every antibody has C rows of every expert. On a mesh the weights stay where they are
  and the rows travel, by one all-to-all there and one back.
* `softly`: the rows of an expert are weighted means of tokens; they travel like those of `limited`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_ablm.model.experts import ExpertWeights, expert_ffn
from moe_ablm.model.grouped import block_rows, grouped_ffn, take_rows
from moe_ablm.model.linear import matmul
from moe_ablm.model.routing import Plan, SoftPlan

Experts = Callable[[jax.Array], jax.Array]  # `[E, T, D] -> [E, T, D]`


def dropless(
    x: jax.Array, plan: Plan, weights: ExpertWeights, activation: str, operands: str
) -> jax.Array:
    """Sends every token to all of its experts and sums their outputs by gate.

    Args:
      x: `[B, L, D]`.
      plan: experts and gates `[B, L, K]`.
      weights: of all E experts.
      activation: of `ffn.ACTIVATE`.
      operands: dtype of matmul factors.

    Returns:
      `[B, L, D]`; 0 for tokens that are not routed.
    """
    b, length, d = x.shape
    k = plan.experts.shape[-1]
    blocks = block_rows(plan.experts.reshape(-1, k), weights.up.shape[0])
    rows = take_rows(x.reshape(-1, d), blocks.assignment // k, blocks.slot)
    out = grouped_ffn(rows, weights, blocks.expert, blocks.used, activation, operands)
    chosen = take_rows(out, blocks.slot, blocks.assignment[:, None])
    gates = plan.gates.reshape(-1, k, 1)
    return (chosen * gates).sum(1).astype(x.dtype).reshape(b, length, d)


def sharded_experts(
    weights: ExpertWeights, activation: str, operands: str, axis: str | None
) -> Experts:
    """All experts as one function of their rows `[E, T, D]`.

    Args:
      weights: this device's experts.
      activation: of `ffn.ACTIVATE`.
      operands: dtype of matmul factors.
      axis: mesh axis over which the experts are spread; None: they are all here.
    """
    compute = partial(expert_ffn, weights=weights, activation=activation, operands=operands)
    if axis is None:
        return compute

    def travel(x: jax.Array) -> jax.Array:
        there = lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True)
        return lax.all_to_all(compute(there), axis, split_axis=1, concat_axis=0, tiled=True)

    return travel


def limited(x: jax.Array, plan: Plan, capacity: int, count: int, experts: Experts) -> jax.Array:
    """Gathers the admitted tokens into `[E, B * C, D]` and adds the experts' outputs by gate.

    Nothing of size tokens x experts x capacity is built, only indices of the E * C rows.

    Args:
      x: `[B, L, D]`.
      plan: with places in the queues, those of admitted tokens below `capacity`.
      capacity: C.
      count: E.
      experts: `[E, B * C, D] -> [E, B * C, D]`.

    Returns:
      `[B, L, D]`; 0 for tokens that no expert took.
    """
    b, length, d = x.shape
    k = plan.experts.shape[-1]
    taken = plan.experts < count
    slot = jnp.where(taken, plan.experts * capacity + plan.place, count * capacity)
    row = lax.broadcasted_iota(jnp.int32, (b, length * k), 0)
    # which assignment sits in each slot; `length * k`: none
    assignment = jnp.full((b, count * capacity), length * k, jnp.int32)
    assignment = assignment.at[row, slot.reshape(b, -1)].set(
        lax.broadcasted_iota(jnp.int32, row.shape, 1), mode="drop"
    )
    token = jnp.where(assignment < length * k, row[:, :1] * length + assignment // k, b * length)
    flat = jnp.concatenate([x.reshape(-1, d), jnp.zeros((1, d), x.dtype)])
    rows = flat[_by_expert(token, count)]
    gates = jnp.pad(plan.gates.reshape(b, -1), ((0, 0), (0, 1)))
    gates = _by_expert(jnp.take_along_axis(gates, assignment, axis=1), count)
    out = experts(rows) * gates[..., None]
    total = jnp.zeros((b * length + 1, d), jnp.float32).at[_by_expert(token, count)].add(out)
    return total[:-1].astype(x.dtype).reshape(b, length, d)


def _by_expert(x: jax.Array, count: int) -> jax.Array:
    """`[B, E * C, ...] -> [E, B * C, ...]`."""
    b = x.shape[0]
    return x.reshape(b, count, -1, *x.shape[2:]).swapaxes(0, 1).reshape(count, -1, *x.shape[2:])


def softly(x: jax.Array, plan: SoftPlan, experts: Experts, operands: str) -> jax.Array:
    """Slots as weighted means of tokens, tokens as weighted means of the experts' outputs.

    Args:
      x: `[B, L, D]`.
      plan: weights `[B, L, E, S]`.
      experts: `[E, B * S, D] -> [E, B * S, D]`.
      operands: dtype of matmul factors.
    """
    b, length, e, s = plan.dispatch.shape
    dispatch = plan.dispatch.reshape(b, length, e * s).swapaxes(1, 2).astype(x.dtype)
    slots = matmul(dispatch, x, operands)
    out = experts(_by_expert(slots, e))
    out = out.reshape(e, b, s, -1).swapaxes(0, 1).reshape(b, e * s, -1)
    return matmul(plan.combine.reshape(b, length, e * s).astype(x.dtype), out, operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_antibodies(
    function: Callable[[jax.Array, Any, Any], Any], most: jax.Array, values: Any, constants: Any
) -> Any:
    """`sum_a function(a, values, constants)` for a = 1 to `most`, the largest number in any row.

    A loop of dynamic length with a gradient: packed rows hold a few antibodies, seldom many.
    """
    shapes = jax.eval_shape(function, jnp.int32(1), values, constants)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(a, total):
        return jax.tree.map(jnp.add, total, function(a, values, constants))

    return lax.fori_loop(1, most + 1, body, zeros)


def _sum_forward(function, most, values, constants):
    return sum_over_antibodies(function, most, values, constants), (most, values, constants)


def _sum_backward(function, residuals, gradient):
    most, values, constants = residuals

    def body(a, total):
        _, vjp = jax.vjp(lambda v: function(a, v, constants), values)
        return jax.tree.map(jnp.add, total, vjp(gradient)[0])

    total = lax.fori_loop(1, most + 1, body, jax.tree.map(jnp.zeros_like, values))
    return None, total, None


sum_over_antibodies.defvjp(_sum_forward, _sum_backward)
