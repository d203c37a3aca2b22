"""Spearman's rank correlation with a bootstrap interval."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_ablm.evaluation.estimates import DRAWS, Number, draw_counts, interval

_AT_ONCE = 1 << 22  # entries of the tables of draws that are held


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation of mid-ranks, by which ties are shared (Spearman 1904; Kendall 1945).

    Args:
      x, y: `[n]`, without NaN.
      counts: int `[draws, n]`, how often each entry is there; None: once.

    Returns:
      float64 `[draws]`, or a scalar; NaN where x or y is constant.
    """
    weights = np.ones((1, len(x)), int) if counts is None else counts
    a, b = (_centred_ranks(values, weights) for values in (x, y))
    covariance, *variances = ((weights * p * q).sum(1) for p, q in ((a, b), (a, a), (b, b)))
    scale = np.sqrt(variances[0] * variances[1])
    rho = np.clip(covariance / np.where(scale > 0, scale, np.nan), -1, 1)
    return rho[0] if counts is None else rho


def _centred_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mid-ranks of entries that are there `counts [draws, n]` times, less their mean."""
    order = np.argsort(values, kind="stable")
    firsts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    tied = np.add.reduceat(counts[:, order], firsts, axis=1)
    below = np.cumsum(tied, axis=1) - tied
    group = np.empty(len(values), int)
    group[order] = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(values)))
    return (below + (tied - counts.sum(1, keepdims=True)) / 2)[:, group]


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
    values = []
    if len(names) > 1:
        counts = draw_counts(tuple(names.tolist()), draws)
        step = max(_AT_ONCE // len(x), 1)
        values = [spearman(x, y, counts[i : i + step][:, index]) for i in range(0, draws, step)]
    low, high = interval(np.concatenate(values) if values else np.zeros(0))
    return Number("spearman", float(spearman(x, y)), labels, low, high, len(x))
