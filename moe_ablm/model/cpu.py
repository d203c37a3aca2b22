"""Kernels for XLA:CPU that other backends neither need nor use.

Each computes what its generic counterpart computes (`layers.gelu`, `attention.attend_by_blocks`,
`experts.grouped_ffn`), up to rounding. `Execution.backend` selects it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_ablm.model.linear import dot, dot_transposed, partitioned, row_major, wide

# activations


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_backward(x, gradient):
    # Barrier against fusion: XLA:CPU would recompute erf in every consumer, also in transposed
    # ones, which makes the gradient of an FFN take 2.4 times as long.
    x, gradient = lax.optimization_barrier((x, gradient))
    _, vjp = jax.vjp(partial(jax.nn.gelu, approximate=False), x)
    return lax.optimization_barrier(vjp(gradient))


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


# attention


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(q, k, v, bias, keep, operands, rate):
    """Attention whose backward pass reuses the weights; its gradient is 4x faster than autodiff's.

    Args:
      q: `[B, Q, H, D/H]`, scaled already.
      k, v: `[B, L, H, D/H]`.
      bias: `[B, 1, Q or 1, L]`, added to the scores.
      keep: bool `[B, H, Q, L]`, weights that dropout keeps; None: all.
      operands: dtype of matmul factors.
      rate: dropout rate.

    Returns:
      `[B, Q, H, D/H]` in the dtype of `q`.
    """
    if partitioned() or keep is not None:
        return _attend_forward(q, k, v, bias, keep, operands, rate)[0]
    return _attend_row_by_row(q, k, v, bias, operands)


def _attend_row_by_row(q, k, v, bias, operands):
    """The forward pass without a gradient: the weights of one row at a time stay in the cache.

    It makes the 8M encoder 1.1 (float32) to 1.2 times (bfloat16 operands) faster.
    """

    def attend_one(row):
        q, k, v, bias = row
        scores = dot_transposed(q, k, operands) + bias
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        # outputs are divided instead of weights, since there are fewer of them
        return dot(weights, v, operands) / weights.sum(-1, keepdims=True)

    heads = [_heads_first(x, operands) for x in (q, k, v)]
    out = lax.map(attend_one, (*heads, bias))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _heads_first(x: jax.Array, dtype: str) -> jax.Array:
    return row_major(jnp.swapaxes(x, 1, 2).astype(dtype), "cpu")


def _drop(weights, keep, rate):
    return weights if keep is None else jnp.where(keep, weights * (1 / (1 - rate)), 0)


def _attend_forward(q, k, v, bias, keep, operands, rate):
    dtype = q.dtype
    q, k, v = (_heads_first(x, operands) for x in (q, k, v))
    weights = jax.nn.softmax(dot_transposed(q, k, operands) + bias, axis=-1).astype(operands)
    out = dot(_drop(weights, keep, rate), v, operands)
    kept = (q, k, v, weights, keep, out, jnp.zeros((), dtype))
    return jnp.swapaxes(out, 1, 2).astype(dtype), kept


def _attend_backward(operands, rate, residuals, gradient):
    """Gradients of q, k and v; the factors of every product are row-major with heads first."""
    q, k, v, weights, keep, out, like = residuals
    gradient = row_major(jnp.swapaxes(gradient, 1, 2).astype(wide(operands)), "cpu")
    mean = (gradient * out).sum(-1, keepdims=True)
    dropped = _drop(weights, keep, rate)
    dv = dot(row_major(jnp.swapaxes(dropped, 2, 3), "cpu"), gradient, operands)
    dweights = _drop(dot_transposed(gradient, v, operands), keep, rate)
    dscores = (weights.astype(wide(operands)) * (dweights - mean)).astype(operands)
    dq = dot(dscores, k, operands)
    dk = dot(row_major(jnp.swapaxes(dscores, 2, 3), "cpu"), q, operands)
    return *(jnp.swapaxes(d, 1, 2).astype(like.dtype) for d in (dq, dk, dv)), None, None


attend.defvjp(_attend_forward, _attend_backward)


# experts


def _reader(block: int):
    """Functions that read and write block i of an array of rows, `block` rows each."""

    def take(x: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * block, block)

    def put(x: jax.Array, rows: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), i * block, 0)

    return take, put


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_ffn(x, weights, groups, block, activate, operands):
    """`down_e(activate(up_e(x)))` of the expert e of each row, computed block by block.

    The loop ends at the last block in use, so unused blocks cost no time. The hidden units of a
    block stay in the cache from one product to the next.

    Args:
      x: `[rows, D]`, each expert's rows padded to whole blocks.
      weights: `experts.ExpertWeights` of all experts.
      groups: `experts.Groups` of the rows.
      block: rows of a block.
      activate: the activation function.
      operands: dtype of matmul factors.

    Returns:
      `[rows, D]` in the dtype of `x`; 0 beyond the blocks in use.
    """
    return _grouped_forward(x, weights, groups, block, activate, operands)[0]


def _grouped_forward(x, weights, groups, block, activate, operands):
    take, put = _reader(block)
    up, down = weights.up.astype(operands), weights.down.astype(operands)

    def body(i, carry):
        y, hidden = carry
        e = groups.expert[i]
        h = dot(take(x, i), up[e], operands) + weights.up_bias[e]
        out = dot(activate(h), down[e], operands) + weights.down_bias[e]
        return put(y, out, i), put(hidden, h, i)

    empty = jnp.zeros_like(x), jnp.zeros((x.shape[0], up.shape[-1]), x.dtype)
    y, hidden = lax.fori_loop(0, groups.used, body, empty)
    return y, (x, weights, groups, hidden)


def _grouped_backward(block, activate, operands, residuals, gradient):
    x, weights, groups, hidden = residuals
    take, put = _reader(block)
    up, down = weights.up.astype(operands), weights.down.astype(operands)
    sums = wide(operands)

    def body(i, carry):
        dx, d = carry
        e = groups.expert[i]
        g, xi = take(gradient, i), take(x, i)
        a, activation_vjp = jax.vjp(activate, take(hidden, i).astype(sums))
        (dh,) = activation_vjp(dot_transposed(g, down[e], operands))
        d = type(weights)(
            up=d.up.at[e].add(dot(row_major(xi.astype(operands).T, "cpu"), dh, operands)),
            up_bias=d.up_bias.at[e].add(dh.sum(0)),
            down=d.down.at[e].add(dot(row_major(a.astype(operands).T, "cpu"), g, operands)),
            down_bias=d.down_bias.at[e].add(g.astype(sums).sum(0)),
        )
        return put(dx, dot_transposed(dh, up[e], operands), i), d

    zeros = jax.tree.map(jnp.zeros_like, weights)
    dx, dweights = lax.fori_loop(0, groups.used, body, (jnp.zeros_like(x), zeros))
    return dx, dweights, None


grouped_ffn.defvjp(_grouped_forward, _grouped_backward)
