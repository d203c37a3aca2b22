"""Bidirectional self-attention, with rotary positions unless positions are learned.

Padding takes no part in it.

`attend` selects one of three implementations: cuDNN's fused kernel (GPU, bfloat16, no dropout),
`cpu.attend` (CPU), or `attend_by_blocks` (everything else), which never holds all weights at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_ablm.model import cpu
from moe_ablm.model.dropout import kept_weights
from moe_ablm.model.layers import Linear
from moe_ablm.model.linear import affine, dot_transposed, wide
from moe_ablm.model.packing import Packing
from moe_ablm.model.spec import EncoderSpec, Execution

MASKED = -1e30
QUERIES = 64  # in a block of `attend_by_blocks`, which holds weights [B, H, 64, L]


class Dropped(NamedTuple):
    """Dropout of attention weights: `dropout.token_counters`, uint32 `[B, L]`, and a layer key."""

    counters: jax.Array
    key: jax.Array


def rotary(
    x: jax.Array,
    position: jax.Array | None = None,
    length: int | None = None,
    base: float = 10_000.0,
) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, eq. 34; halves rotated as in ESM-2).

    Args:
      x: queries or keys `[B, L, H, D/H]`.
      position: integers `[B, L]`, each below `length`; None: 0 to L - 1 in every row.
      length: number of positions; None: L.
      base: base of the geometric series of wavelengths.

    Returns:
      An array like `x`; a token at position p is rotated by p times the frequencies.
    """
    length, dim, dtype = length or x.shape[1], x.shape[-1], wide(x.dtype)
    frequency = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.outer(np.arange(length), np.concatenate([frequency, frequency]))[:, None, :]
    cos, sin = jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)
    if position is not None:
        cos, sin = cos[position], sin[position]
    left, right = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([-right, left], axis=-1) * sin).astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    execution: Execution,
    packing: Packing | None = None,
    dropped: Dropped | None = None,
    rate: float = 0.0,
) -> jax.Array:
    """Attention of queries to the valid keys of their row, or of their antibody when packed.

    Args:
      q: `[B, Q, H, D/H]`, scaled already; Q is L, or fewer where rows are not packed.
      k, v: `[B, L, H, D/H]`.
      valid: bool `[B, L]`, False at padding, which stands at the end of each row.
      execution: backend and dtypes.
      packing: where the antibodies of a row are; None: a row is one antibody.
      dropped: counters and key of the dropout; None: no weights are dropped.
      rate: dropout rate.

    Returns:
      `[B, Q, H, D/H]`, in the dtype of `q`; undefined for queries at padding.
    """
    heads, head_dim = q.shape[2:]
    if execution.backend == "gpu" and q.dtype == jnp.bfloat16 and not head_dim % 8 and not dropped:
        return _attend_cudnn(q, k, v, valid, packing)
    bias = attention_bias(valid, packing)
    if execution.backend != "cpu":
        return checkpoint_name(
            attend_by_blocks(q, k, v, bias, execution, dropped, rate), "attended"
        )
    keep = None
    if dropped:
        keep = kept_weights(dropped.counters, dropped.counters, heads, rate, dropped.key)
    return checkpoint_name(cpu.attend(q, k, v, bias, keep, execution.operands, rate), "attended")


def _attend_cudnn(q, k, v, valid, packing):
    lengths = valid.sum(-1, dtype=jnp.int32)
    fused = partial(jax.nn.dot_product_attention, scale=1.0, implementation="cudnn")
    if packing is None:
        queries = jnp.minimum(lengths, q.shape[1])
        return fused(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=lengths)
    return fused(q, k, v, mask=packing.same()[:, None])


def attend_by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    execution: Execution,
    dropped: Dropped | None = None,
    rate: float = 0.0,
) -> jax.Array:
    """Attention for `QUERIES` queries at a time, weights recomputed in the backward pass.

    As in Rabe & Staats (2021), without their blocks of keys: rows are short. Arguments and result
    are those of `attend`; `bias` is that of `attention_bias`.
    """
    b, queries, heads, n = q.shape
    length, dtype = k.shape[1], wide(q.dtype)
    # batched products; `wide`, so that gradients of keys and values are summed in this dtype
    keys = k.transpose(0, 2, 3, 1).reshape(b * heads, n, length).astype(dtype)
    values = v.transpose(0, 2, 1, 3).reshape(b * heads, length, n).astype(dtype)
    size = min(queries, QUERIES)
    blocks = -(-queries // size)

    def split(x: jax.Array, axis: int) -> jax.Array:
        """Pads an axis of queries and splits it: `[blocks, ..., size, ...]`."""
        extra = [(0, 0)] * x.ndim
        extra[axis] = (0, blocks * size - queries)
        shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, extra).reshape(shape), axis, 0)

    @jax.checkpoint
    def attend_block(block):
        rows, bias, counters = block
        scores = affine(rows.reshape(b * heads, size, n).astype(dtype), keys, None, execution)
        weights = jax.nn.softmax(scores.reshape(b, heads, size, length) + bias, axis=-1)
        if dropped:
            keep = kept_weights(counters, dropped.counters, heads, rate, dropped.key)
            weights = jnp.where(keep, weights * (1 / (1 - rate)), 0)
        out = affine(weights.reshape(b * heads, size, length), values, None, execution)
        return out.reshape(b, heads, size, n).astype(q.dtype)

    rows = split(jnp.swapaxes(q, 1, 2), 2)
    each = (
        rows,
        jnp.broadcast_to(bias, (blocks, *bias.shape)) if bias.shape[2] == 1 else split(bias, 2),
        split(dropped.counters, 1) if dropped else jnp.zeros((blocks, 0)),
    )
    out = (
        attend_block(jax.tree.map(lambda x: x[0], each))[None]
        if blocks == 1
        else lax.map(attend_block, each)
    )
    out = jnp.moveaxis(out, 0, 2).reshape(b, heads, blocks * size, n)[:, :, :queries]
    return jnp.swapaxes(out, 1, 2)


def attention_bias(valid: jax.Array, packing: Packing | None = None) -> jax.Array:
    """float32 `[B, 1, 1, L]`, packed `[B, 1, L, L]`: 0 for attended keys, `MASKED` for others."""
    allowed = valid[:, None, None, :] if packing is None else packing.same()[:, None]
    return jnp.where(allowed, 0.0, MASKED).astype(jnp.float32)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        d = spec.d_model
        self.heads, self.head_dim, self.rate = spec.heads, spec.head_dim, spec.attention_dropout
        self.execution, self.rotates = execution, not spec.learned_positions
        self.qkv = Linear(d, 3 * d, "DF", execution, rngs)
        self.out = Linear(d, d, "FD", execution, rngs)

    def _project(
        self, x: jax.Array, packing: Packing | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (scaled), keys and values `[B, L, H, D/H]`."""
        b, length, _ = x.shape
        qkv = checkpoint_name(self.qkv(x), "qkv")
        qkv = qkv.reshape(b, length, 3, self.heads, self.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q = q * self.head_dim**-0.5
        if not self.rotates:
            return q, k, v
        position = None if packing is None else packing.position
        return rotary(q, position), rotary(k, position), v

    def _project_one(self, x: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`_project`, but with only the query of one position of each row: `[B, 1, H, D/H]`."""
        b, length, d = x.shape
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
        one = take_position(x, at)
        q = affine(one, kernel[:, :d], bias[:d], self.execution)
        q = q.reshape(b, 1, self.heads, self.head_dim) * self.head_dim**-0.5
        kv = affine(x, kernel[:, d:], bias[d:], self.execution)
        kv = kv.reshape(b, length, 2, self.heads, self.head_dim)
        k, v = kv[:, :, 0], kv[:, :, 1]
        return (rotary(q, at[:, None], length), rotary(k), v) if self.rotates else (q, k, v)

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        packing: Packing | None = None,
        at: jax.Array | None = None,
        dropped: Dropped | None = None,
    ) -> jax.Array:
        """`[B, L, D] -> [B, L, D]`, or `[B, 1, D]` of one position of each row.

        Args:
          x: `[B, L, D]`.
          valid: bool `[B, L]`.
          packing: where the antibodies of a row are; None: a row is one antibody.
          at: integers `[B]`, the position, where rows are not packed; None: all positions.
          dropped: dropout of the weights in training; None: no dropout.
        """
        q, k, v = self._project(x, packing) if at is None else self._project_one(x, at)
        out = attend(q, k, v, valid, self.execution, packing, dropped, self.rate)
        return checkpoint_name(self.out(out.reshape(*out.shape[:2], -1)), "attention_out")

    def weights(self, x: jax.Array, valid: jax.Array, packing: Packing | None = None) -> jax.Array:
        """Attention weights of `__call__`, at least float32 `[B, H, L, L]`; 0 for padding keys.

        Undefined for queries at padding.
        """
        q, k, _ = self._project(x, packing)
        q, k = (jnp.swapaxes(a, 1, 2) for a in (q, k))
        scores = dot_transposed(q, k, self.execution.operands)
        return jax.nn.softmax(scores + attention_bias(valid, packing), axis=-1)


def take_position(x: jax.Array, at: jax.Array) -> jax.Array:
    """`[B, L, ...]` -> `[B, 1, ...]`: position `at [B]` of each row."""
    return x[jnp.arange(x.shape[0]), at][:, None]
