"""Numbers with uncertainty: means over antibodies, and intervals by drawing antibodies again."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LEVEL = 0.95
DRAWS = 1000


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
    """

    metric: str
    units: Sequence[str]
    total: np.ndarray
    weight: np.ndarray
    labels: Mapping[str, str] = field(default_factory=dict)
    scale: str = "identity"
    unit: str = ""

    def number(self, draws: int = DRAWS) -> Number:
        """Value and interval."""
        table = merged(self.units, self.total, self.weight)
        value = scaled(ratio(table.total.sum(), table.weight.sum()), self.scale)
        low, high = interval(scaled(redrawn(table, draws), self.scale))
        observations = int(round(float(table.weight.sum())))
        return Number(self.metric, float(value), self.labels, low, high, observations, self.unit)


@dataclass(frozen=True, eq=False)
class Merged:
    """Units, each once and sorted, with `total` and `weight`, float64 `[n]`."""

    units: tuple[str, ...]
    total: np.ndarray
    weight: np.ndarray


def merged(units: Sequence[str], total: np.ndarray, weight: np.ndarray) -> Merged:
    """Entries of the same unit added up; units without weight are left out."""
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    sums = [np.bincount(index, np.asarray(x, float), len(names)) for x in (total, weight)]
    kept = sums[1] > 0
    return Merged(tuple(names[kept].tolist()), sums[0][kept], sums[1][kept])


def quotient(a: Sample, b: Sample, draws: int = DRAWS) -> Number:
    """How many times `b` is `a`, on the scale on which they are told; without a unit.

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
    """The value on the scale on which it is told."""
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


def derived(
    metric: str,
    units: Sequence[str],
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
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    table = np.zeros((len(names), *sums.shape[1:]))
    np.add.at(table, index, sums)
    low = high = math.nan
    if len(names) > 1:
        counts = draw_counts(tuple(names.tolist()), draws)
        low, high = interval(formula(np.tensordot(counts, table, 1)))
    return Number(metric, float(formula(table.sum(0))), labels, low, high, len(units), unit)
