"""Log-probabilities of tokens at every position, or at one position of each row with less work."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from moe_ablm.inference.buckets import Batch
from moe_ablm.model.encoder import Encoder


@dataclass(frozen=True)
class EveryPosition:
    """Log-probabilities of all tokens at all positions, float32 `[B, L, V]`."""

    reads_head: ClassVar[bool] = True

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        return jax.nn.log_softmax(encoder(batch.tokens, batch.valid).logits, axis=-1)


@dataclass(frozen=True)
class OnePosition:
    """Log-probabilities of all tokens at position `at` of each row, float32 `[B, V]`.

    The values are those of `EveryPosition`. Of the last layer and the head only what this position
    needs is computed.
    """

    reads_head: ClassVar[bool] = True

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        logits = encoder(batch.tokens, batch.valid, at=batch.at).logits
        return jax.nn.log_softmax(logits[:, 0], axis=-1)
