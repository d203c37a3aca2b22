"""Log-probabilities of tokens: at every position, or at one position of each row for less work."""

from dataclasses import dataclass

import jax

from moe_ablm.inference.buckets import Batch
from moe_ablm.model.encoder import Encoder


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
        logits = encoder(batch.tokens, batch.valid, at=batch.at).logits
        return jax.nn.log_softmax(logits[:, 0], axis=-1)
