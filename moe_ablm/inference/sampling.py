"""How `infill` chooses residues. This file needs no jax, so wrong values are refused at once."""

import math
import operator
from dataclasses import dataclass

from moe_ablm.errors import ArgumentError

AMINO_ACIDS = 20  # candidates for a place
MOST = 1 << 63  # seeds are smaller


@dataclass(frozen=True)
class Sampling:
    """How residues are chosen.

    Attributes:
      samples: drawn completions of each antibody; 0: one, with the most probable residues.
      temperature: above 1 draws vary more, below 1 they are closer to the most probable residues.
      seed: seed of the draws. A draw depends only on it, the sequence and the number of the sample.
      top: number of candidates to report.

    Raises:
      ArgumentError: a value out of range.
    """

    samples: int = 0
    temperature: float = 1.0
    seed: int = 0
    top: int = 5

    def __post_init__(self) -> None:
        _whole("samples", self.samples, 0, 1 << 31, "0 (the most probable) or more")
        _whole("seed", self.seed, 0, MOST, "0 or more, less than 2^63")
        _whole("top", self.top, 1, AMINO_ACIDS + 1, f"1 to {AMINO_ACIDS} amino acids")
        number = isinstance(self.temperature, (int, float)) and self.temperature is not True
        if not (number and 0 < self.temperature < math.inf):
            raise ArgumentError("temperature", self.temperature, "expected more than 0, finite")


def _whole(name: str, value: int, least: int, end: int, expected: str) -> None:
    try:
        holds = not isinstance(value, bool) and least <= operator.index(value) < end
    except TypeError:
        holds = False
    if not holds:
        raise ArgumentError(name, value, f"expected {expected}")
