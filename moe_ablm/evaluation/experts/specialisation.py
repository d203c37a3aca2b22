"""Statistics of experts' specialisation, from sums of assignments over cells.

Every statistic is computed on all groups of clones and with each group left out in turn; intervals
and corrections for bias are those of the delete-a-group jackknife (Kott 2001; Efron & Tibshirani
1993, chapter 11), which clones keep honest where residues of one are alike.

Axes: R tables at once, C cells, X classes, E experts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from moe_ablm.evaluation.estimates import LEVEL
from moe_ablm.evaluation.experts.traits import Contrast

SMOOTHING = 0.5  # assignments, added to observed and expected counts
TOGETHER = 1 << 22  # cells of tables in one go
ROUNDING = 1e-6  # smaller standard errors are rounding


class Jackknifed(NamedTuple):
    """`value` with its standard `error` and `bias`, arrays of one shape; NaN under two groups."""

    value: np.ndarray
    error: np.ndarray
    bias: np.ndarray
    groups: int

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval, by Student's t."""
        half = stats.t.ppf((1 + LEVEL) / 2, max(self.groups - 1, 1)) * self.error
        return self.value - half, self.value + half

    def p_value(self) -> np.ndarray:
        """Two-sided, of the value being 0; 1 where there is no error to compare it with."""
        t = np.abs(self.value) / np.maximum(self.error, ROUNDING)
        p = 2 * stats.t.sf(t, max(self.groups - 1, 1))
        return np.where(np.isfinite(p), p, 1.0)

    def corrected(self) -> "Jackknifed":
        """Less its bias, of which the term of order 1 / groups is known."""
        return self._replace(value=self.value - self.bias, bias=np.zeros_like(self.bias))


class Replicates(NamedTuple):
    """A statistic `value [...]` of all groups, and `without [groups, ...]` each of them in turn."""

    value: np.ndarray
    without: np.ndarray

    def at(self, *place: int) -> "Replicates":
        """One of its entries."""
        index: tuple[int | slice, ...] = (slice(None), *place)
        return Replicates(self.value[place], self.without[index])

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Replicates":
        """A function of it, of arrays with any leading axes."""
        return Replicates(function(self.value), function(self.without))

    def estimate(self) -> Jackknifed:
        """With error and bias."""
        groups = len(self.without)
        if groups < 2:
            nothing = np.full(np.shape(self.value), math.nan)
            return Jackknifed(self.value, nothing, nothing, groups)
        mean = self.without.mean(0)
        squares = np.square(self.without - mean).sum(0)
        error = np.sqrt((groups - 1) / groups * squares)
        return Jackknifed(self.value, error, (groups - 1) * (mean - self.value), groups)


def replicates(table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Replicates:
    """A statistic of the sum of groups.

    Args:
      table: `[groups, C, E]`.
      statistic: `[R, C, E]` to `[R, ...]`.
    """
    table = table.astype(np.float64)
    total = table.sum(0)
    step = max(TOGETHER // total.size, 1)
    parts = [statistic(total - table[i : i + step]) for i in range(0, len(table), step)]
    return Replicates(statistic(total[None])[0], np.concatenate(parts))


def jackknife(table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Jackknifed:
    """Jackknifed of a statistic of the sum of groups; arguments of `replicates`."""
    return replicates(table, statistic).estimate()


def summed(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sums `[R, C, ...]` over cells of a code (0, 1, ..., each occurs): `[R, codes, ...]`."""
    order = np.argsort(codes, kind="stable")
    return np.add.reduceat(table[:, order], np.flatnonzero(np.diff(codes[order], prepend=-1)), 1)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)


def observed(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Assignments of classes to experts, `[R, X, E]`."""
    return summed(table, contrast.label)


def independent(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Those to be expected if every class went to experts by their load, `[R, X, E]`."""
    load = table.sum(1, keepdims=True)
    return observed(table, contrast).sum(-1, keepdims=True) * quotient(
        load, load.sum(-1)[..., None]
    )


def matched(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Those to be expected if only the stratum decided, `[R, X, E]`.

    sum over strata s of P(expert | s) n(s, class): indirect standardisation. P is over all classes,
    the class itself included, which makes what exceeds it an understatement where strata and
    classes coincide.
    """
    of_stratum = summed(table, contrast.stratum)
    share = quotient(of_stratum, of_stratum.sum(-1, keepdims=True))[:, contrast.stratum]
    return summed(table.sum(-1, keepdims=True) * share, contrast.label)


def log_ratio(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """log2 of both, smoothed."""
    return np.log2((counts + SMOOTHING) / (expected + SMOOTHING))


def composition(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Share of each expert's assignments that are of a class, `[R, X, E]`."""
    counts = observed(table, contrast)
    return quotient(counts, counts.sum(1, keepdims=True))


def enrichment(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """log2 of P(expert | class) over P(expert), `[R, X, E]`."""
    return log_ratio(observed(table, contrast), independent(table, contrast))


def predicted(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Enrichment to be expected if only the stratum decided, `[R, X, E]`."""
    return log_ratio(matched(table, contrast), independent(table, contrast))


def excess(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """log2 of the class's assignments over those that the strata predict, `[R, X, E]`."""
    return log_ratio(observed(table, contrast), matched(table, contrast))


def share(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Share of a class's assignments that an expert takes, `[R, X, E]`."""
    counts = observed(table, contrast)
    return quotient(counts, counts.sum(-1, keepdims=True))


def gain(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """`share` less the one that the strata predict, `[R, X, E]`."""
    counts = observed(table, contrast)
    return quotient(counts - matched(table, contrast), counts.sum(-1, keepdims=True))


def entropy(counts: np.ndarray) -> np.ndarray:
    """Of the distribution `[R, ...]` of counts, in bits, `[R]`."""
    flat = counts.reshape(len(counts), -1)
    p = quotient(flat, flat.sum(1, keepdims=True))
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(1)


def information(table: np.ndarray, contrast: Contrast) -> np.ndarray:
    """Of a random assignment, in bits (Cover & Thomas 2006, chapter 2); plug-in estimates.

    Returns:
      `[R, 4, 2]`: H(expert), I(expert; class), I(expert; stratum), I(expert; class | stratum), and
      each over H(expert).
    """
    by_class, by_stratum = observed(table, contrast), summed(table, contrast.stratum)
    expert, cell = entropy(table.sum(1)), entropy(table.sum(-1))
    stratum, both = entropy(by_stratum.sum(-1)), entropy(by_stratum)
    of_class = expert + entropy(by_class.sum(-1)) - entropy(by_class)
    within = both + cell - entropy(table) - stratum
    bits = np.stack([expert, of_class, expert + stratum - both, within], 1)
    return np.stack([bits, quotient(bits, expert[:, None])], 2)


def held_out_information(table: np.ndarray, contrast: Contrast) -> Jackknifed:
    """A lower bound of I(expert; class | stratum), in bits and over H(expert), `[2]`.

    The plug-in estimate is too large where cells are few, by more than a jackknife removes. Here
    P(expert | class, stratum) is estimated on one half of the clones and tried on the other: the
    mean of log2 of it over P(expert | stratum) is the information less what the estimates are off
    by (the Kullback-Leibler divergence of the truth from them), so that it errs downwards.

    Args:
      table: `[groups, C, E]`; of one group there is no half to hold out, and all is NaN.
      contrast: of the cells.
    """
    if len(table) < 2:
        nothing = np.full(2, math.nan)
        return Jackknifed(nothing, nothing, nothing, len(table))
    bounds = []
    for known, asked in ((table[::2], table[1::2]), (table[1::2], table[::2])):
        score = _scores(known.sum(0, dtype=np.float64), contrast)

        def gained(t: np.ndarray, score: np.ndarray = score) -> np.ndarray:
            bits = quotient((t * score).sum((1, 2)), t.sum((1, 2)))
            return np.stack([bits, quotient(bits, entropy(t.sum(1)))], -1)

        bounds.append(jackknife(asked, gained))
    one, other = bounds
    value, error = (one.value + other.value) / 2, np.hypot(one.error, other.error) / 2
    return Jackknifed(value, error, np.zeros(2), one.groups + other.groups - 1)


def _scores(known: np.ndarray, contrast: Contrast) -> np.ndarray:
    """log2 of P(expert | class, stratum) over P(expert | stratum), `[C, E]`, of counts of half.

    Cells are shrunk towards their stratum, and strata towards the load, by one assignment an expert
    (Dirichlet priors): what was not seen changes nothing.
    """
    prior = known.shape[-1]
    load = known.sum(0)
    load = (load + 1) / (load + 1).sum()
    of_stratum = summed(known[None], contrast.stratum)[0]
    stratum = (of_stratum + prior * load) / (of_stratum.sum(-1, keepdims=True) + prior)
    stratum = stratum[contrast.stratum]
    cell = (known + prior * stratum) / (known.sum(-1, keepdims=True) + prior)
    return np.log2(cell / stratum)


def discoveries(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values of a family of any shape."""
    return stats.false_discovery_control(p.reshape(-1)).reshape(p.shape)
