"""Limited experts: who finds a place when more tokens ask for an expert than it may take."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_ablm.model.spec import MoESpec


def capacity(tokens: int, spec: MoESpec) -> int:
    """C, the places of an expert for `tokens` that compete: ceil(limit * K * tokens / E)."""
    # 1e-9: a product such as 0.1 * 30 must not become 4 places by its last bit
    places = math.ceil(spec.limit * spec.k * tokens / spec.experts - 1e-9)
    return max(places, min(tokens, 1))


def places(tokens: jax.Array, most: int, spec: MoESpec) -> jax.Array:
    """`capacity` of an array of token counts, each at most `most`; int32."""
    table = np.array([capacity(n, spec) for n in range(most + 1)], np.int32)
    return jnp.asarray(table)[tokens]


def place_in_queue(queue: jax.Array, score: jax.Array) -> jax.Array:
    """How many of the same queue come before: those of higher score, and earlier ones of the same.

    Args:
      queue: int32 `[B, N]`.
      score: float `[B, N]`.

    Returns:
      int32 `[B, N]`.
    """
    n = queue.shape[-1]
    index = lax.broadcasted_iota(jnp.int32, queue.shape, 1)
    # ties are broken by the index: the third operand is a key, too
    queue, _, order = lax.sort((queue, -lax.stop_gradient(score), index), num_keys=3)
    starts = jnp.where(queue != jnp.roll(queue, 1, axis=-1), index, 0)
    place = index - lax.cummax(starts, axis=1)
    rows = lax.broadcasted_iota(jnp.int32, queue.shape, 0)
    return jnp.zeros((queue.shape[0], n), jnp.int32).at[rows, order].set(place)


def tokens_of_antibody(antibody: jax.Array) -> jax.Array:
    """How many tokens belong to the antibody of each token.

    Args:
      antibody: integers `[B, L]`, 0 at padding.

    Returns:
      int32 `[B, L]`; at padding, the number of pads.
    """
    same = antibody[:, :, None] == antibody[:, None, :]
    return same.sum(-1, dtype=jnp.int32)
