"""Differences between kinds of model: antibodies and training seeds both vary.

Antibodies: a bootstrap over units, in which every model is given the same antibodies (paired).
Seeds: two or three of a kind are too few to be drawn with replacement - with two, what is called a
95 % interval holds the truth about 70 times in 100 - so the error of a mean of seeds is drawn from
Student's t with the standard deviation between seeds, pooled over the kinds (Davison & Hinkley
1997, section 3.8 on hierarchical data; Satterthwaite's degrees of freedom with equal variances).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special

from moe_ablm.evaluation.statistics.estimates import (
    DRAWS,
    LEVEL,
    Sample,
    draw_counts,
    interval,
    merged,
    ratio,
    scaled,
)


@dataclass(frozen=True)
class Estimate:
    """Of a kind, or of a difference.

    Attributes:
      value: mean over seeds.
      low, high: ends of the 95 % interval.
      units: how many the models have in common.
      seeds: fewest of a kind that went into it.
      seed_sd: standard deviation between seeds, pooled over all kinds; NaN with one seed of each.
    """

    value: float
    low: float
    high: float
    units: int
    seeds: int
    seed_sd: float

    def turned(self) -> "Estimate":
        """The difference the other way round."""
        return replace(self, value=-self.value, low=-self.high, high=-self.low)


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

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the standard deviation between seeds."""
        return sum(len(v) - 1 for v in self.values.values())

    @property
    def seed_sd(self) -> float:
        """Between seeds of a kind, pooled."""
        squares = sum(float(((v - v.mean()) ** 2).sum()) for v in self.values.values())
        return math.sqrt(squares / self.degrees) if self.degrees else math.nan

    def mean(self, kind: str) -> Estimate:
        """Of a kind."""
        return self._estimate({kind: 1})

    def difference(self, kind: str, reference: str) -> Estimate:
        """How much more a kind is than another."""
        return self._estimate({kind: 1, reference: -1})

    def _estimate(self, signs: Mapping[str, int]) -> Estimate:
        value = sum(sign * float(self.values[kind].mean()) for kind, sign in signs.items())
        drawn = sum(sign * self.drawn[kind] for kind, sign in signs.items())
        error = self.seed_sd * math.sqrt(sum(1 / len(self.values[kind]) for kind in signs))
        ends = blurred(drawn, error, self.degrees) if error > 0 else interval(drawn)
        seeds = min(len(self.values[kind]) for kind in signs)
        return Estimate(value, *ends, self.units, seeds, self.seed_sd)


def blurred(drawn: np.ndarray, error: float, degrees: int) -> tuple[float, float]:
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
