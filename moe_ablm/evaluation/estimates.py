"""Numbers of one model with their uncertainty: means, ratios and rank correlations.

Intervals are percentiles of a bootstrap over units (clonal clusters). Equal units are drawn equally
often for every model and metric, so that comparisons are paired.

A mean of a few repeats or training seeds has an error of its own. Two or three are too few to be
drawn with replacement: with two, a nominal 95 % interval covers the truth about 70 times in 100. So
Student's t with the standard deviation between them is added to every bootstrap value (Davison &
Hinkley 1997, section 3.8 on hierarchical data).
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import optimize, special

LEVEL = 0.95
DRAWS = 1000

Units = Sequence[str] | np.ndarray  # what the bootstrap draws, one an entry


@dataclass(frozen=True)
class Number:
    """One result.

    Attributes:
      metric: what it is, as "cross_entropy".
      value: the estimate; NaN where it is not defined.
      labels: which part of the data it is of, as {"region": "CDRH3", "chain": "heavy"}.
      low, high: ends of the 95 % interval; NaN where there is none.
      n: how many observations it rests on.
      unit: "nats", "share", ...
    """

    metric: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    unit: str = ""


@dataclass(frozen=True, eq=False)
class Sample:
    """A mean of which every antibody's part is kept, so that two models can be compared on them.

    Its value is sum(total) / sum(weight), or exp of that (`scale` "exp").

    Attributes:
      metric, labels, unit: as of `Number`.
      units: what is drawn again, one an entry (`cohort.Annotated.unit`); entries of a unit that
        appears twice are added up.
      total, weight: float64 `[n]`.
      scale: "identity", or "exp" of the mean, as for perplexity.
      repeats: the value in each repeat of a random procedure of which it is the mean (head seeds
        and folds of a classifier), whose error is a part of the interval's.
    """

    metric: str
    units: Units
    total: np.ndarray
    weight: np.ndarray
    labels: Mapping[str, str] = field(default_factory=dict)
    scale: str = "identity"
    unit: str = ""
    repeats: tuple[float, ...] = ()

    def number(self, draws: int = DRAWS) -> Number:
        """Value and interval."""
        table = merged(self.units, self.total, self.weight)
        value = scaled(ratio(table.total.sum(), table.weight.sum()), self.scale)
        low, high = repeated_interval(scaled(redrawn(table, draws), self.scale), self.repeats)
        observations = int(round(float(table.weight.sum())))
        return Number(self.metric, float(value), self.labels, low, high, observations, self.unit)


@dataclass(frozen=True, eq=False)
class Merged:
    """Units, each once and sorted, with `total` and `weight`, float64 `[n]`."""

    units: tuple[str, ...]
    total: np.ndarray
    weight: np.ndarray


def merged(units: Units, total: np.ndarray, weight: np.ndarray) -> Merged:
    """Entries of the same unit added up; units without weight are left out."""
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    sums = [np.bincount(index, np.asarray(x, float), len(names)) for x in (total, weight)]
    kept = sums[1] > 0
    return Merged(tuple(names[kept].tolist()), sums[0][kept], sums[1][kept])


def quotient(a: Sample, b: Sample, draws: int = DRAWS) -> Number:
    """`a` over `b` on their reported scale; without a unit.

    Paired: of the units that both have, each draw takes the same ones for both (Efron &
    Tibshirani 1993, chapter 6); metric and labels are those of `a`.
    """
    tables = [merged(sample.units, sample.total, sample.weight) for sample in (a, b)]
    common = set(tables[0].units) & set(tables[1].units)
    values, drawn = [], []
    for sample, table in zip((a, b), tables, strict=True):
        kept = [i for i, name in enumerate(table.units) if name in common]
        table = Merged(tuple(table.units[i] for i in kept), table.total[kept], table.weight[kept])
        values.append(scaled(ratio(table.total.sum(), table.weight.sum()), sample.scale))
        drawn.append(scaled(redrawn(table, draws), sample.scale))
    low, high = interval(ratio(*drawn))
    return Number(a.metric, float(ratio(*values)), a.labels, low, high, len(common))


def ratio(total: np.ndarray | float, weight: np.ndarray | float) -> np.ndarray:
    """total / weight, NaN where the weight is 0."""
    weight = np.asarray(weight, float)
    return np.asarray(total) / np.where(weight > 0, weight, np.nan)


def scaled(value: np.ndarray, scale: str) -> np.ndarray:
    """The value on its reported scale."""
    return np.exp(value) if scale == "exp" else np.asarray(value)


@functools.lru_cache(maxsize=8)
def draw_counts(units: tuple[str, ...], draws: int) -> np.ndarray:
    """How often each unit is drawn, int64 `[draws, n]`: a nonparametric bootstrap over units.

    The draws depend on the units alone: equal units are drawn equally often for every model and
    metric, which makes differences paired (Efron & Tibshirani 1993, chapter 6).
    """
    digest = hashlib.sha256("\n".join(units).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    n = len(units)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws)


def resampled(units: Units, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """The prologue of a bootstrap: draws of units, for entries of which several may share one.

    Returns:
      The unit of each entry, int64 `[n]`, and how often each draw takes each unit, int64
      `[draws, units]`; no draws where there are under two units.
    """
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    if len(names) < 2:
        return index, np.zeros((0, len(names)), np.int64)
    return index, draw_counts(tuple(names.tolist()), draws)


def redrawn(table: Merged, draws: int) -> np.ndarray:
    """The mean of each bootstrap draw, float64 `[draws]`; none where there are under two units."""
    n = len(table.units)
    if n < 2:
        return np.zeros(0)
    counts = draw_counts(table.units, draws)
    return ratio(counts @ table.total, counts @ table.weight)


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrap values; NaN where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def repeated_interval(drawn: np.ndarray, repeats: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of bootstrap values of a mean of repeats, with the error of that mean.

    Args:
      drawn: `[draws]`.
      repeats: the value in each repeat; with one or none that part is missing.
    """
    if len(repeats) < 2:
        return interval(drawn)
    error, degrees = welch([float(np.std(repeats, ddof=1))], [len(repeats)])
    return blurred(drawn, error, degrees) if error > 0 else interval(drawn)


def welch(sds: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Standard error of a sum of means of `counts` values with standard deviations `sds`.

    Returns:
      The error and its degrees of freedom (Satterthwaite 1946); NaN and 0 where a count is 1.
    """
    parts = np.square(np.asarray(sds, float)) / np.asarray(counts)
    total = float(parts.sum())
    if not total > 0:
        return total, 0.0
    return math.sqrt(total), float(total**2 / (parts**2 / (np.asarray(counts) - 1)).sum())


def blurred(drawn: np.ndarray, error: float, degrees: float) -> tuple[float, float]:
    """Percentile interval of bootstrap values, to each of which error x Student's t is added."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    ends = []
    for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        shift = error * special.stdtrit(degrees, level)

        def beyond(x: float, level: float = level) -> float:
            return special.stdtr(degrees, (x - drawn) / error).mean() - level

        low, high = float(drawn.min()) + shift, float(drawn.max()) + shift
        # ends of the bracket have the right sign but for rounding
        margin = 1e-6 * error + 4 * np.spacing(max(abs(low), abs(high)))
        ends.append(optimize.brentq(beyond, low - margin, high + margin, xtol=1e-4 * error))
    return ends[0], ends[1]


def derived(
    metric: str,
    units: Units,
    sums: np.ndarray,
    formula: Callable[[np.ndarray], np.ndarray],
    labels: Mapping[str, str],
    unit: str = "",
    draws: int = DRAWS,
) -> Number:
    """A function of sums over antibodies, as a ratio of two means, with its interval.

    Args:
      metric, labels, unit: as of `Number`.
      units: what is drawn again, one an antibody.
      sums: float64 `[n, ...]`, each antibody's part.
      formula: from sums `[..., *sums.shape[1:]]` to values `[...]`.
      draws: of the bootstrap.
    """
    index, counts = resampled(units, draws)
    table = np.zeros((counts.shape[1], *sums.shape[1:]))
    np.add.at(table, index, sums)
    low, high = interval(formula(np.tensordot(counts, table, 1)))
    return Number(metric, float(formula(table.sum(0))), labels, low, high, len(units), unit)


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
    units: Units,
    labels: Mapping[str, str],
    draws: int = DRAWS,
) -> Number:
    """Correlation and its percentile interval; ranks are taken anew in each draw.

    Args:
      x: `[n]`; or `[T, n]` of T repeats of a random procedure, whose correlations are averaged and
        whose error is a part of the interval's (`repeated_interval`).
      y: `[n]`.
      units: what is drawn again, one an entry; entries of one unit are drawn together.
      labels: of the number.
      draws: of the bootstrap.
    """
    correlate = [RankCorrelation(each, y) for each in np.atleast_2d(x)]
    index, counts = resampled(units, draws)
    drawn = [np.mean([c(count[index]) for c in correlate]) for count in counts]
    values = [c(np.ones(len(y), int)) for c in correlate]
    low, high = repeated_interval(np.array(drawn), values)
    return Number("spearman", float(np.mean(values)), labels, low, high, len(y))


def why_undefined(results: Iterable[Any]) -> list[str]:
    """A note for each correlation among results that has no value."""
    return [
        f"{result.metric} of {', '.join(result.labels.values())} is not defined: all predictions, "
        "or all of what they are compared with, are equal"
        for result in results
        if isinstance(result, Number)
        and result.metric.startswith("spearman")
        and np.isnan(result.value)
    ]


def spearman_of_folds(
    x: np.ndarray,
    y: np.ndarray,
    units: Units,
    folds: np.ndarray,
    labels: Mapping[str, str],
    draws: int = DRAWS,
) -> Number:
    """Mean over folds of their correlations, and its interval; as `spearman_number`.

    Args:
      x, y, units, labels, draws: as there.
      folds: `[n]`; those in which a correlation is not defined are left out.
    """
    parts = [np.flatnonzero(folds == fold) for fold in np.unique(folds).tolist()]
    correlate = [RankCorrelation(x[part], y[part]) for part in parts]

    def mean(weights: np.ndarray) -> float:
        each = [c(weights[part]) for c, part in zip(correlate, parts, strict=True)]
        return float(np.mean([e for e in each if np.isfinite(e)] or [np.nan]))

    index, counts = resampled(units, draws)
    low, high = interval(np.array([mean(count[index]) for count in counts]))
    return Number("spearman, mean of folds", mean(np.ones(len(x), int)), labels, low, high, len(x))
