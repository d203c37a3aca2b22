"""Specialisation of a router in excess of routers that know no region.

Three nulls: smooth random routers by position, of which the scale with the largest mean counts;
the same router with the positions of other antibodies of equal length (shuffled); and the same
encoder untrained. Against position-only routers the interval is over those routers, against the
others over clones. A verdict needs several seeds (`reporting.claims`).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.estimates import Number, interval
from moe_ablm.evaluation.experts import position_only
from moe_ablm.evaluation.experts.assignments import add_cells
from moe_ablm.evaluation.experts.matching import PROFILE, position_correlations
from moe_ablm.evaluation.experts.position_only import ROUTERS, SCALES, TOGETHER, Places
from moe_ablm.evaluation.experts.shuffled import chain_places, recipients
from moe_ablm.evaluation.experts.specialisation import Jackknifed, summed
from moe_ablm.evaluation.experts.specialists import halves, specialists
from moe_ablm.evaluation.experts.traits import Contrast
from moe_ablm.evaluation.nulls import POSITION, SHUFFLED, UNTRAINED
from moe_ablm.model.families import Router

COMPARED = ("excess", "over_others")  # of `specialists`

Specialists = Mapping[str, list[Jackknifed]]


class References:
    """Sums of the assignments of the shuffled and of the untrained router."""

    def __init__(
        self,
        antibodies: Sequence[Annotated],
        contrasts: Sequence[Contrast],
        group: np.ndarray,
        shape: tuple[int, int],
    ):
        """Args: contrasts of regions; group of each antibody; shape: layers, experts."""
        self._contrasts, self._group = contrasts, group
        self._places, self._recipients = chain_places(antibodies), recipients(antibodies)
        self._tables = {
            null: [np.zeros((group.max() + 1, len(c.label), *shape), np.float32) for c in contrasts]
            for null in (SHUFFLED, UNTRAINED)
        }

    def add_shuffled(self, index: int, assigned: np.ndarray) -> None:
        """Gives the routing `[residues, M, E]` of an antibody's chains to those of others."""
        middle = np.diff(self._places[index, 0])[0]
        for c, part in enumerate(np.split(assigned, [middle])):
            target = self._recipients[index, c]
            if target >= 0:
                here = slice(*self._places[target, c].tolist())
                tables = self._tables[SHUFFLED]
                add_cells(tables, self._contrasts, self._group[target], here, part)

    def add_untrained(self, index: int, assigned: np.ndarray) -> None:
        """Adds the routing of an antibody by the untrained encoder."""
        here = slice(self._places[index, 0, 0], self._places[index, -1, 1])
        add_cells(self._tables[UNTRAINED], self._contrasts, self._group[index], here, assigned)

    def specialists(self, number: int) -> dict[str, Specialists]:
        """Of a contrast, by null."""
        contrast = self._contrasts[number]
        return {
            null: specialists(
                [halves(tables[number][:, :, m], contrast) for m in range(tables[number].shape[2])],
                contrast,
            )
            for null, tables in self._tables.items()
        }

    def unmoved(self) -> float:
        """Share of the chains that keep their own routing when antibodies are shuffled."""
        given = self._recipients
        kept = given == np.arange(len(given))[:, None]
        return float(kept.sum() / (given >= 0).sum())


class PositionOnly:
    """Random smooth routers of the shape of a model's, on a cohort.

    Attributes:
      specialists: of each contrast, by metric, `[scales, ROUTERS, X]`.
      profiles: by scale, `[ROUTERS, E, classes]`, of their first layers.
    """

    def __init__(
        self,
        antibodies: Sequence[Annotated],
        contrasts: Sequence[Contrast],
        group: np.ndarray,
        shape: tuple[Router, int, float],
        rng: np.random.Generator,
        scales: Sequence[float] = SCALES,
    ):
        """Draws them.

        Args:
          antibodies: the cohort.
          contrasts: all that there are.
          group: of each antibody.
          shape: family, layers, mean experts a residue.
          rng: random numbers.
          scales: of length, in residues.
        """
        router, layers, choices = shape
        places = Places.of(antibodies)
        owner = np.repeat(group, [a.antibody.residues for a in antibodies])
        regional = [c for c in contrasts if c.regional]
        tables = [position_only.counted(c, places, owner) for c in regional]
        traits = {c.trait: c for c in reversed(contrasts) if c.trait in PROFILE}
        classes = [
            summed(position_only.counted(c, places, owner).sum(0)[None], c.label)[0]
            for c in traits.values()
        ]
        self.profiles: dict[float, np.ndarray] = {}
        collected: list[dict[str, list]] = [{} for _ in regional]
        for scale in scales:
            profiles: list[np.ndarray] = []
            parts: list[dict[str, list]] = [{} for _ in regional]
            for _ in range(0, ROUTERS, TOGETHER):
                drawn = position_only.plans(router, places, scale, (TOGETHER, layers), choices, rng)
                profiles.append(position_only.profiles_of(classes, drawn[:, 0]))
                for table, contrast, part in zip(tables, regional, parts, strict=True):
                    drawn_of = position_only.specialists_of(table, drawn, contrast)
                    for metric, values in drawn_of.items():
                        part.setdefault(metric, []).append(values)
            self.profiles[scale] = np.concatenate(profiles)
            for whole, part in zip(collected, parts, strict=True):
                for metric, chunks in part.items():
                    whole.setdefault(metric, []).append(np.concatenate(chunks))
        self.specialists = [{m: np.stack(v) for m, v in each.items()} for each in collected]

    def correlations(self) -> list[Number]:
        """Matched correlations of pairs of unrelated routers (`matching.stability` uses them)."""
        return [
            n for scale, each in self.profiles.items() for n in position_correlations(each, scale)
        ]


def beyond_numbers(
    contrast: Contrast,
    own: Specialists,
    references: Mapping[str, Specialists],
    positional: Mapping[str, np.ndarray],
) -> list[Number]:
    """For each region and null: `null_METRIC`, and `beyond_null_METRIC`, what is above it.

    Args:
      contrast: of regions.
      own: of the model.
      references: of nulls that are one router.
      positional: of position-only routers, `[scales, R, X]` by metric.
    """
    numbers = []
    for metric in (m for m in COMPARED if m in own):
        unit = "log2" if metric == "excess" else "share"
        for x, region in enumerate(contrast.names):
            about = {"region": region, "matched": contrast.matched}
            mine = own[metric][x]
            tails = {null: _one(mine, of[metric][x]) for null, of in references.items()}
            tails[POSITION] = _many(mine, positional[metric][..., x])
            for null, (under, above) in tails.items():
                labels = about | {"null": null}
                numbers.append(Number(f"null_{metric}", *_shown(under, labels), unit=unit))
                numbers.append(Number(f"beyond_null_{metric}", *_shown(above, labels), unit=unit))
    return numbers


Ends = tuple[float, float, float]  # value, low, high


def _shown(ends: Ends, labels: dict[str, str]) -> tuple[float, dict[str, str], float, float]:
    return ends[0], labels, ends[1], ends[2]


def _one(own: Jackknifed, null: Jackknifed) -> tuple[Ends, Ends]:
    """Of a null that is one router; both errors count, though the antibodies are the same."""
    above = Jackknifed(
        own.value - null.value, np.hypot(own.error, null.error), own.bias, own.groups
    )
    return _ends(null), _ends(above)


def _ends(estimate: Jackknifed) -> Ends:
    low, high = estimate.interval()
    return float(estimate.value), float(low), float(high)


def hardest(drawn: np.ndarray) -> np.ndarray:
    """Of routers `[scales, R]` those of the scale with the largest mean, `[R]`."""
    return drawn[drawn.mean(1).argmax()]


def _many(own: Jackknifed, drawn: np.ndarray) -> tuple[Ends, Ends]:
    """Of many routers `[scales, R]`: the scale that is hardest to exceed, ends over its routers."""
    values = hardest(drawn)
    mean, (low, high), value = float(values.mean()), interval(values), float(own.value)
    return (mean, low, high), (value - mean, value - high, value - low)
