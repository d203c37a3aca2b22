"""Log-probabilities of tokens: at every position, or at one position of each row for less work."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_ablm.inference.buckets import Batch
from moe_ablm.model.attention import SelfAttention, attention_bias, attention_weights, rotary
from moe_ablm.model.encoder import Block, Context, Encoder
from moe_ablm.model.linear import dot, linear

ONE_BY_ONE = ("topk", "topp")  # routers that decide for each token without the others


@dataclass(frozen=True)
class EveryPosition:
    """float32 `[B, L, V]`: log-probabilities of all tokens at all positions."""

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        return jax.nn.log_softmax(encoder(batch.tokens, batch.valid).logits, axis=-1)


@dataclass(frozen=True)
class OnePosition:
    """float32 `[B, V]`: log-probabilities of all tokens at position `at` of each row.

    The same as `EveryPosition` there. Of the last layer only what that position needs is computed,
    of the head only that position.
    """

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        x, context = encoder.embed(batch.tokens, batch.valid), Context(batch.valid)
        *first, last = encoder.layers
        for layer in first:
            x, _ = layer(x, context)
        if last.sparse and encoder.spec.moe.router not in ONE_BY_ONE:
            x = _take(last(x, context)[0], batch.at)
        else:
            x = _block_at(last, x, batch)
        logits = encoder.head(encoder.final_norm(x), encoder.embedding[...])
        return jax.nn.log_softmax(logits[:, 0], axis=-1)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """`[B, L, ...]` -> `[B, 1, ...]`."""
    return x[jnp.arange(x.shape[0]), at][:, None]


def _block_at(block: Block, x: jax.Array, batch: Batch) -> jax.Array:
    """The block's output at one position of each row, `[B, 1, D]`."""
    one = _take(x, batch.at)
    one = one + _attend_from(block.attention, block.attention_norm(x), batch)
    y = block.ffn_norm(one)
    if not block.sparse:
        return one + block.ffn(y)
    return one + block.ffn(y, jnp.ones(y.shape[:2], bool))[0]


def _attend_from(attention: SelfAttention, x: jax.Array, batch: Batch) -> jax.Array:
    """Attention of one position of each row to all valid ones, `[B, 1, D]`."""
    b, length, d = x.shape
    heads, operands = (attention.heads, attention.head_dim), attention.operands
    kernel, bias = attention.qkv.kernel[...], attention.qkv.bias[...]
    q = linear(_take(x, batch.at), kernel[:, :d], bias[:d], operands)
    # rotated at its own place in a row of zeros
    rows = jnp.zeros_like(x).at[jnp.arange(b), batch.at].set(q[:, 0])
    q = _take(rotary(rows.reshape(b, length, *heads) * attention.head_dim**-0.5), batch.at)
    kv = linear(x, kernel[:, d:], bias[d:], operands).reshape(b, length, 2, *heads)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, rotary(kv[:, :, 0]), kv[:, :, 1]))
    weights = attention_weights(q, k, attention_bias(batch.valid), operands)
    out = jnp.swapaxes(dot(weights, v, operands), 1, 2).astype(x.dtype)
    return attention.out(out.reshape(b, 1, d))
