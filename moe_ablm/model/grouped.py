"""Dropless expert FFNs: rows sorted by expert, padded to blocks, one small FFN a block.

Nothing of size tokens x experts x capacity is built, and the loop ends at the last block in use:
padding and idle experts cost no time. (`lax.ragged_dot` expands to E dense products on XLA:CPU.)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_ablm.model.experts import ExpertWeights
from moe_ablm.model.ffn import ACTIVATE
from moe_ablm.model.linear import dot, dot_transposed, row_major

BLOCK = 128  # rows; twice as many where experts have rows enough
MANY = 512  # rows an expert: larger blocks then waste little, and add up fewer weight gradients


def block_size(assignments: int, experts: int) -> int:
    """Rows of a block for so many assignments."""
    return BLOCK * (2 if assignments >= MANY * experts else 1)


class Blocks(NamedTuple):
    """Where every assignment sits in the blocked rows.

    Attributes:
      slot: int32 `[T, K]`, row of each assignment; `rows` where it is not routed.
      assignment: int32 `[rows]`, assignment `t * K + k` of each row; `T * K` where it is empty.
      expert: int32 `[blocks]`, the expert of each block.
      used: int32, number of blocks that hold at least one row.
    """

    slot: jax.Array
    assignment: jax.Array
    expert: jax.Array
    used: jax.Array


def block_rows(chosen: jax.Array, experts: int) -> Blocks:
    """Sorts assignments by expert and pads each expert's rows to whole blocks.

    Args:
      chosen: int32 `[T, K]`, E where an assignment is not routed.
      experts: E.
    """
    t, k = chosen.shape
    size = block_size(t * k, experts)
    blocks = -(-t * k // size) + experts
    rows = blocks * size
    one_hot = jax.nn.one_hot(chosen.reshape(-1), experts, dtype=jnp.int32)
    position = ((jnp.cumsum(one_hot, axis=0) - 1) * one_hot).sum(-1).reshape(t, k)
    blocks_of = -(-one_hot.sum(0) // size)
    ends = jnp.cumsum(blocks_of)
    starts = jnp.append(ends - blocks_of, blocks)
    slot = jnp.where(chosen < experts, starts[chosen] * size + position, rows)
    assignment = jnp.full(rows, t * k, jnp.int32)
    assignment = assignment.at[slot.reshape(-1)].set(
        jnp.arange(t * k, dtype=jnp.int32), mode="drop", unique_indices=False
    )
    expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return Blocks(slot, assignment, jnp.minimum(expert, experts - 1).astype(jnp.int32), ends[-1])


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[index]` with zeros where `index` equals the number of rows; its gradient is a gather too.

    Args:
      x: `[N, D]`.
      index: int32, any shape, 0..N.
      inverse: int32 `[N, M]`, the flat positions of `index` that read each row, padded with
        `index.size`: the gradient of row n is the sum of those M rows.
    """
    return _with_zero_row(x)[index]


def _with_zero_row(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.zeros((1, x.shape[-1]), x.dtype)])


def _take_rows_forward(x, index, inverse):
    return take_rows(x, index, inverse), inverse


def _take_rows_backward(inverse, gradient):
    rows = gradient.reshape(-1, gradient.shape[-1])
    return _with_zero_row(rows)[inverse].sum(1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def _reader(blocks: int):
    """Functions that read and write block i of an array of so many blocks."""

    def take(x: jax.Array, i: jax.Array) -> jax.Array:
        size = x.shape[0] // blocks
        return lax.dynamic_slice_in_dim(x, i * size, size)

    def put(x: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), i * block.shape[0], 0)

    return take, put


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_ffn(
    x: jax.Array,
    weights: ExpertWeights,
    expert: jax.Array,
    used: jax.Array,
    activation: str,
    operands: str,
) -> jax.Array:
    """`down_e(activate(up_e(x)))` block by block.

    Args:
      x: `[rows, D]`, in blocks of equally many rows.
      weights: of all experts.
      expert: int32 `[blocks]`.
      used: blocks to compute; the rest of the result is 0.
      activation: of `ffn.ACTIVATE`.
      operands: dtype of matmul factors.

    Returns:
      `[rows, D]` in the dtype of `x`.
    """
    return _grouped_forward(x, weights, expert, used, activation, operands)[0]


def _grouped_forward(x, weights, expert, used, activation, operands):
    activate = ACTIVATE[activation]
    take, put = _reader(expert.shape[0])
    up, down = weights.up.astype(operands), weights.down.astype(operands)

    def body(i, carry):
        y, hidden = carry
        e = expert[i]
        h = dot(take(x, i), up[e], operands) + weights.up_bias[e]
        out = dot(activate(h), down[e], operands) + weights.down_bias[e]
        return put(y, out, i), put(hidden, h, i)

    empty = jnp.zeros_like(x), jnp.zeros((x.shape[0], up.shape[-1]), x.dtype)
    y, hidden = lax.fori_loop(0, used, body, empty)
    return y, (x, weights, expert, used, hidden)


def _grouped_backward(activation, operands, residuals, gradient):
    x, weights, expert, used, hidden = residuals
    take, put = _reader(expert.shape[0])
    up, down = weights.up.astype(operands), weights.down.astype(operands)

    def body(i, carry):
        dx, d = carry
        e = expert[i]
        g, xi = take(gradient, i), take(x, i)
        a, activation_vjp = jax.vjp(ACTIVATE[activation], take(hidden, i).astype(jnp.float32))
        (dh,) = activation_vjp(dot_transposed(g, down[e], operands))
        d = ExpertWeights(
            up=d.up.at[e].add(dot(row_major(xi.astype(operands).T), dh, operands)),
            up_bias=d.up_bias.at[e].add(dh.sum(0)),
            down=d.down.at[e].add(dot(row_major(a.astype(operands).T), g, operands)),
            down_bias=d.down_bias.at[e].add(g.astype(jnp.float32).sum(0)),
        )
        return put(dx, dot_transposed(dh, up[e], operands), i), d

    zeros = jax.tree.map(jnp.zeros_like, weights)
    dx, dweights = lax.fori_loop(0, used, body, (jnp.zeros_like(x), zeros))
    return dx, dweights, None, None


grouped_ffn.defvjp(_grouped_forward, _grouped_backward)
