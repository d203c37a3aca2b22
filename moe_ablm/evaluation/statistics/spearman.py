"""Spearman's rank correlation of observations that count several times, and its interval."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_ablm.evaluation.statistics.estimates import DRAWS, Number, draw_counts, interval


class RankCorrelation:
    """Spearman correlation of two variables; what weights do not change is sorted once."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        """Args: x, y: `[n]` each, without NaN."""
        self._sorted = [_Sorted(values) for values in (x, y)]

    def __call__(self, weights: np.ndarray) -> float:
        """The correlation where observation i counts `weights[i]` times; NaN for a constant.

        Args:
          weights: whole numbers `[n]`; those of a bootstrap draw, or ones.
        """
        total = weights.sum()
        if total == 0:
            return np.nan
        x, y = (known.ranks(weights) for known in self._sorted)
        x, y = x - weights @ x / total, y - weights @ y / total
        scale = np.sqrt((weights @ x**2) * (weights @ y**2))
        # ranks of a constant differ from their mean by rounding alone
        return float(weights @ (x * y) / scale) if scale > 1e-9 * total else np.nan


class _Sorted:
    def __init__(self, values: np.ndarray):
        distinct, self._tie = np.unique(values, return_inverse=True)
        self._ties = len(distinct)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Mean ranks, less a half, float64 `[n]`: ties share the mean of theirs."""
        size = np.bincount(self._tie, weights, self._ties)
        return (np.cumsum(size) - size / 2)[self._tie]


def spearman_number(
    x: np.ndarray,
    y: np.ndarray,
    units: Sequence[str],
    labels: Mapping[str, str],
    draws: int = DRAWS,
) -> Number:
    """Correlation and its percentile interval; ranks are taken anew in each draw.

    Args:
      x, y: `[n]`.
      units: what is drawn again, one an entry; entries of one unit are drawn together.
      labels: of the number.
      draws: of the bootstrap.
    """
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    correlate = RankCorrelation(x, y)
    counts = draw_counts(tuple(names.tolist()), draws) if len(names) > 1 else []
    low, high = interval(np.array([correlate(count[index]) for count in counts]))
    value = correlate(np.ones(len(x), int))
    return Number("spearman", value, labels, low, high, len(x))
