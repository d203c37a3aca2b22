"""Numbers with uncertainty: means, rank correlations, and differences between kinds of model.

Intervals are percentiles of a bootstrap over units (clonal clusters): equal units are drawn equally
often for every model and metric, so that comparisons are paired.

Between kinds of model both antibodies and training seeds vary. Two or three seeds of a kind are too
few to be drawn with replacement - with two, a nominal 95 % interval covers the truth about 70 times
in 100 - so the error of a mean of seeds is drawn from Student's t with the standard deviation
between seeds of each kind (Davison & Hinkley 1997, section 3.8 on hierarchical data; Welch 1947,
with Satterthwaite's degrees of freedom: kinds differ in how much their seeds vary).
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
      x, y: `[n]`.
      units: what is drawn again, one an entry; entries of one unit are drawn together.
      labels: of the number.
      draws: of the bootstrap.
    """
    correlate = RankCorrelation(x, y)
    index, counts = resampled(units, draws)
    low, high = interval(np.array([correlate(count[index]) for count in counts]))
    value = correlate(np.ones(len(x), int))
    return Number("spearman", value, labels, low, high, len(x))


@dataclass(frozen=True)
class Estimate:
    """The mean of a kind, or a difference between two kinds.

    Attributes:
      value: mean over seeds.
      low, high: ends of the 95 % interval; with one seed of a kind it is of these models alone.
      units: how many the models have in common.
      seeds: fewest of a kind that went into it.
      seed_sd: standard deviation between seeds of the kind; NaN with one.
      reference_sd: the same of the kind that is subtracted; NaN where none is.
      p: two-sided, of the value being 0; NaN with one seed of a kind.
    """

    value: float
    low: float
    high: float
    units: int
    seeds: int
    seed_sd: float
    reference_sd: float = math.nan
    p: float = math.nan

    def turned(self) -> "Estimate":
        """The difference the other way round."""
        turned = replace(self, value=-self.value, low=-self.high, high=-self.low)
        return replace(turned, seed_sd=self.reference_sd, reference_sd=self.seed_sd)


@dataclass(frozen=True, eq=False)
class Kinds:
    """One metric of models of several kinds on the units that all have.

    Attributes:
      values: of each kind `[seeds]`.
      drawn: of each kind, bootstrap means over its seeds `[draws]`.
      units: how many there are.
    """

    values: Mapping[str, np.ndarray]
    drawn: Mapping[str, np.ndarray]
    units: int

    def seed_sd(self, kind: str) -> float:
        """Between seeds of a kind."""
        return float(self.values[kind].std(ddof=1)) if len(self.values[kind]) > 1 else math.nan

    def mean(self, kind: str) -> Estimate:
        """Of a kind."""
        return self._estimate({kind: 1})

    def difference(self, kind: str, reference: str) -> Estimate:
        """A kind minus the reference kind."""
        return self._estimate({kind: 1, reference: -1})

    def _estimate(self, signs: Mapping[str, int]) -> Estimate:
        value = sum(sign * float(self.values[kind].mean()) for kind, sign in signs.items())
        drawn = np.sum([sign * self.drawn[kind] for kind, sign in signs.items()], axis=0)
        seeds = [len(self.values[kind]) for kind in signs]
        sds = [self.seed_sd(kind) for kind in signs]
        error, degrees = welch(sds, seeds)
        ends = blurred(drawn, error, degrees) if error > 0 else interval(drawn)
        p = blurred_p(drawn, error, degrees) if min(seeds) > 1 else math.nan
        reference_sd = sds[1] if len(sds) > 1 else math.nan
        return Estimate(value, *ends, self.units, min(seeds), sds[0], reference_sd, p)


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


def over_seeds(values: Sequence[float], widths: Sequence[float]) -> tuple[float, float, float]:
    """Mean of one number a seed, and its 95 % interval: Student's t over the seeds.

    What the antibodies are, which all seeds share, is no part of what seeds differ by: its error is
    added, as squares are.

    Args:
      values: of each seed.
      widths: of each seed's interval over antibodies.

    Returns:
      Mean, low, high; without ends where there is one seed.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = math.hypot(special.stdtrit(n - 1, (1 + LEVEL) / 2) * error, float(np.mean(widths)) / 2)
    return mean, mean - half, mean + half


def blurred_p(drawn: np.ndarray, error: float, degrees: float) -> float:
    """Two-sided p of 0 among bootstrap values, to each of which error x Student's t is added.

    The number of draws bounds it from below, as they cannot tell what is rarer.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return math.nan
    if error > 0:
        below = float(special.stdtr(degrees, -drawn / error).mean())
        above = float(special.stdtr(degrees, drawn / error).mean())
    else:
        below, above = float((drawn <= 0).mean()), float((drawn >= 0).mean())
    return min(max(2 * min(below, above), 1 / (len(drawn) + 1)), 1.0)


def holm(p: Sequence[float]) -> np.ndarray:
    """P-values adjusted for their number by Holm (1979); NaN stays and does not count."""
    values = np.asarray(p, float)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    adjusted = np.full(values.shape, math.nan)
    steps = np.arange(len(order), 0, -1) * values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


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


def kinds_of(samples: Mapping[str, Sequence[Sample]], draws: int = DRAWS) -> Kinds | None:
    """A metric of each seed of each kind, on the units that all models have.

    Args:
      samples: of each kind, one a seed.
      draws: bootstrap draws.

    Returns:
      None where they have fewer than two units in common.
    """
    tables = [merged(s.units, s.total, s.weight) for each in samples.values() for s in each]
    names = np.array(tables[0].units, dtype=np.str_)
    for table in tables[1:]:
        if table.units != tables[0].units:
            names = np.intersect1d(names, np.array(table.units, dtype=np.str_))
    if len(names) < 2:
        return None
    places = [np.searchsorted(np.array(t.units, dtype=np.str_), names) for t in tables]
    total = np.stack([t.total[at] for t, at in zip(tables, places, strict=True)], 1)
    weight = np.stack([t.weight[at] for t, at in zip(tables, places, strict=True)], 1)
    counts = draw_counts(tuple(names.tolist()), draws).astype(float)
    scale = next(iter(samples.values()))[0].scale
    values = scaled(ratio(total.sum(0), weight.sum(0)), scale)
    drawn = scaled(ratio(counts @ total, counts @ weight), scale)
    ends = np.cumsum([len(each) for each in samples.values()])[:-1]
    return Kinds(
        dict(zip(samples, np.split(values, ends), strict=True)),
        {k: d.mean(1) for k, d in zip(samples, np.split(drawn, ends, axis=1), strict=True)},
        len(names),
    )
