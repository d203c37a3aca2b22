"""Masked-language-model loss, in sums by region, so that any grouping adds up exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# cells of the tables below: (segment - 1) * REGIONS + region; see data.regions for both codes
REGIONS = 8
CELLS = 2 * REGIONS


class RegionSums(NamedTuple):
    """Sums over the masked positions of each (chain, region) cell, float32 `[CELLS]`."""

    loss: jax.Array  # nats
    correct: jax.Array
    tokens: jax.Array


def cells(batch: dict[str, jax.Array]) -> jax.Array:
    """Cell of every position, int32 `[B, L]`; padding falls in cell 0, where no mask ever is."""
    segment = batch["segment"].astype(jnp.int32)
    return jnp.maximum(segment - 1, 0) * REGIONS + batch["region"].astype(jnp.int32)


def region_sums(logits: jax.Array, batch: dict[str, jax.Array]) -> RegionSums:
    """Cross-entropy and hits at the masked positions.

    Args:
      logits: float32 `[B, L, V]`.
      batch: `targets`, `loss_mask`, `segment`, `region`, each `[B, L]`.
    """
    targets = batch["targets"].astype(jnp.int32)
    # a gather along V would have a scatter as its gradient
    chosen = (logits * jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)).sum(-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    correct = (logits.argmax(-1) == targets).astype(jnp.float32)
    counted = batch["loss_mask"]
    one_hot = jax.nn.one_hot(cells(batch), CELLS, dtype=jnp.float32)
    sums = jnp.einsum(
        "nbl,blc->nc",
        jnp.stack([jnp.where(counted, x, 0.0) for x in (loss, correct, jnp.ones_like(loss))]),
        one_hot,
        precision=jax.lax.Precision.HIGHEST,
    )
    return RegionSums(*sums)
