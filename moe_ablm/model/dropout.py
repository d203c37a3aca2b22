"""Counter-based dropout: the bits are a hash of the step, the antibody and the position.

The bits of a token do not depend on the mesh, on the row or the neighbours with which an antibody
is packed, or on how often a run was resumed.
"""

import jax
import jax.numpy as jnp

from moe_ablm.model.packing import Packing

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: consecutive counters land far apart


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def token_counters(
    tokens: jax.Array, valid: jax.Array, packing: Packing | None, key: jax.Array
) -> jax.Array:
    """uint32 `[B, L]`: a number for every token, from its antibody's tokens and its position.

    Args:
      tokens: integers `[B, L]`, the encoder's input, masks included.
      valid: bool `[B, L]`, False at padding.
      packing: where the antibodies of a row are; None: a row is one antibody.
      key: key of the step.
    """
    length = tokens.shape[1]
    position = jnp.arange(length) if packing is None else packing.position
    place = mix((position.astype(jnp.uint32) + 1) * jnp.uint32(_GOLDEN))
    letter = jnp.where(valid, mix(place + tokens.astype(jnp.uint32) + 1), 0)
    # sums of integers are exact in any order, so they do not depend on sharding
    if packing is None:
        antibody = letter.sum(-1, keepdims=True, dtype=jnp.uint32)
    else:
        antibody = jnp.where(packing.same(), letter[:, None, :], 0).sum(-1, dtype=jnp.uint32)
    return mix(mix(antibody ^ jax.random.bits(key, (), jnp.uint32)) + place)


def drop(x: jax.Array, counters: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeros units of `x [B, L, D]` with probability `rate` and rescales the rest.

    Args:
      x: activations.
      counters: uint32 `[B, L]`, from `token_counters`.
      rate: dropout rate; 0 returns `x`.
      key: key of the layer and of the place in it.
    """
    if not rate:
        return x
    counters = mix(counters ^ jax.random.bits(key, (), jnp.uint32))
    kept = _kept(counters[..., None], jnp.arange(x.shape[-1], dtype=jnp.uint32), rate)
    return jnp.where(kept, x * (1 / (1 - rate)), 0).astype(x.dtype)


def kept_weights(
    queries: jax.Array, keys: jax.Array, heads: int, rate: float, key: jax.Array
) -> jax.Array:
    """bool `[B, H, Q, L]`: which attention weights are kept.

    Args:
      queries, keys: counters uint32 `[B, Q]` and `[B, L]`.
      heads: H.
      rate: dropout rate.
      key: key of the layer.
    """
    queries = mix(queries ^ jax.random.bits(key, (), jnp.uint32))
    head = mix((jnp.arange(heads, dtype=jnp.uint32) + 1) * jnp.uint32(_GOLDEN))
    # the keys' counters are rotated, so that the pair (i, j) differs from (j, i)
    pair = queries[:, None, :, None] + (keys << 7 | keys >> 25)[:, None, None, :]
    return mix(pair ^ head[:, None, None]) >= jnp.uint32(round(rate * 2**32))


def _kept(counters: jax.Array, unit: jax.Array, rate: float) -> jax.Array:
    return mix(counters + unit * jnp.uint32(_GOLDEN)) >= jnp.uint32(round(rate * 2**32))
