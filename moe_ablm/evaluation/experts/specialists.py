"""The specialist of a class: the expert chosen on one half of the clones, measured on the other.

The largest of many noisy values is biased upwards. Each half chooses an expert, which is measured
on the other half; the mean of the two has no such bias.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_ablm.evaluation.experts.specialisation import (
    Jackknifed,
    Replicates,
    excess,
    gain,
    replicates,
    share,
)
from moe_ablm.evaluation.experts.traits import Contrast

# of a class with others in its strata, for its excess to be compared with that of other classes
LEAST_OVERLAP = 0.5
DECIMALS = 6  # of gains: where strata leave nothing to gain, rounding must not choose


class Half(NamedTuple):
    """One direction: who is chosen on one half, and what the other half says of everybody.

    Attributes:
      gain: `[X, E]` of the half that chooses: share of a class's assignments that an expert takes
        beyond what the strata predict.
      excess, share: of the other half, `[X, E]`.
    """

    gain: np.ndarray
    excess: Replicates
    share: Replicates


def halves(table: np.ndarray, contrast: Contrast) -> tuple[Half, Half]:
    """Both directions, from sums `[groups, C, E]` of a layer."""

    def half(choosing: np.ndarray, judging: np.ndarray) -> Half:
        return Half(
            gain(choosing.sum(0, dtype=np.float64)[None], contrast)[0],
            replicates(judging, lambda t: excess(t, contrast)),
            replicates(judging, lambda t: share(t, contrast)),
        )

    even, odd = table[::2], table[1::2]
    return half(even, odd), half(odd, even)


def chosen(layer: tuple[Half, Half], label: int) -> int:
    """The expert of a layer that both halves together choose for a class."""
    return int(np.argmax(np.round(layer[0].gain[label] + layer[1].gain[label], DECIMALS)))


def exclusive(contrast: Contrast) -> np.ndarray:
    """Excess of an expert that takes exactly its class, `[X]`; NaN where strata say most of it.

    It is larger for small classes: their share of what the strata expect is less.
    """
    overlap = contrast.overlap()
    return -np.log2(np.where(overlap >= LEAST_OVERLAP, np.maximum(1 - overlap, 1e-9), np.nan))


def specialists(
    layers: Sequence[tuple[Half, Half]], contrast: Contrast
) -> dict[str, list[Jackknifed]]:
    """What the specialist of each class among all experts of some layers does.

    It is the expert that takes most of the class beyond what is expected, so that one that sees
    five tokens in all is not it.

    Returns:
      `excess`, `share` (of the class's assignments), `relative` (the excess over that of an expert
      that takes exactly the class: comparable between large and small classes) and `over_others`
      (`relative` less the mean of all other classes' specialists); the last two only of contrasts
      whose strata leave them to be compared.
    """
    by_metric: dict[str, list] = {"excess": [], "share": [], "relative": [], "over_others": []}
    most = exclusive(contrast)
    for direction in zip(*layers, strict=True):
        experts = [_choice(direction, label) for label in range(len(most))]
        for metric in ("excess", "share"):
            parts = [getattr(direction[m], metric).at(x, e) for x, (m, e) in enumerate(experts)]
            by_metric[metric].append(
                Replicates(*(np.stack(p, -1) for p in zip(*parts, strict=True)))
            )
        relative = by_metric["excess"][-1].map(lambda value: value / most)
        by_metric["relative"].append(relative)
        by_metric["over_others"].append(relative.map(over_others))
    if not np.isfinite(most).all():
        del by_metric["relative"], by_metric["over_others"]
    return {name: _mean(*both) for name, both in by_metric.items()}


def _choice(direction: Sequence[Half], label: int) -> tuple[int, int]:
    gains = np.round([half.gain[label] for half in direction], DECIMALS)
    layer, expert = np.unravel_index(np.argmax(gains), gains.shape)
    return int(layer), int(expert)


def over_others(values: np.ndarray) -> np.ndarray:
    """Each class's value less the mean of all others', `[..., X]`."""
    others = values.sum(-1, keepdims=True) - values
    return values - others / (values.shape[-1] - 1)


def _mean(a: Replicates, b: Replicates) -> list[Jackknifed]:
    """Mean of two independent estimates `[X]`, one a class."""
    one, other = a.estimate(), b.estimate()
    value, groups = (one.value + other.value) / 2, one.groups + other.groups - 1
    error, bias = np.hypot(one.error, other.error) / 2, np.full((), math.nan)
    return [Jackknifed(v, e, bias, groups) for v, e in zip(value, error, strict=True)]
