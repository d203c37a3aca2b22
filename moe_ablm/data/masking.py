"""Dynamic masking for masked language modelling: a function of (seed, record, epoch, position).

Draws come from a counter-based hash, not from a generator with state: any batch can be made again
from its step alone, on any host, and adding records never changes another record's masks.
"""

import numpy as np

from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID, MASK

# BERT (Devlin et al. 2019): of the selected tokens 80 % become <mask>, 10 % a random amino acid
REPLACED_BY_MASK = 0.8
REPLACED_BY_RANDOM = 0.1

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele et al. 2014): uint64 to well-mixed uint64, any shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(seed: int, key: np.ndarray, epoch: np.ndarray, length: int) -> np.ndarray:
    """Random bits `[B, length]` (uint64) for records `key` (uint64 `[B]`) in `epoch` (`[B]`)."""
    with np.errstate(over="ignore"):
        row = mix(key + mix(np.uint64(seed) * _GOLDEN + epoch.astype(np.uint64)))
        return mix(row[:, None] + np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN)


def mask_tokens(
    tokens: np.ndarray, rate: np.ndarray, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts tokens for masked language modelling.

    Args:
      tokens: uint8 `[B, L]`.
      rate: probability `[B, L]` that a position is selected; 0 for special tokens and padding.
      bits: uint64 `[B, L]` of `draw`.

    Returns:
      The corrupted tokens `[B, L]` and the mask `[B, L]` of positions that count in the loss.
    """
    chance = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    selected = chance < rate
    share = chance[selected] / rate[selected]
    low = bits[selected] & np.uint64(0xFFFFFFFF)
    letter = (low * np.uint64(len(AMINO_ACIDS))) >> np.uint64(32)
    random = FIRST_AMINO_ACID + letter.astype(np.uint8)
    new = np.where(share < REPLACED_BY_MASK + REPLACED_BY_RANDOM, random, tokens[selected])
    corrupted = tokens.copy()
    corrupted[selected] = np.where(share < REPLACED_BY_MASK, MASK, new)
    return corrupted, selected
