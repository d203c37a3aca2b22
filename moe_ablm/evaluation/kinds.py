"""Kinds of model, several training seeds of each: their means, and differences between them.

Antibodies and training seeds both vary. Antibodies are drawn again, the same ones for every model;
the error of a mean of seeds is that of Welch 1947, with Satterthwaite's degrees of freedom: kinds
differ in how much their seeds vary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from moe_ablm.evaluation.estimates import (
    DRAWS,
    LEVEL,
    Sample,
    blurred,
    draw_counts,
    interval,
    merged,
    ratio,
    scaled,
    welch,
)


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
