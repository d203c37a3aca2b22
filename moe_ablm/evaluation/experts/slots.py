"""What the slots of soft-MoE read and what tokens take from them."""

from collections.abc import Sequence

import numpy as np

from moe_ablm.data.regions import region_names
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.experts.assignments import GROUPS, groups_of
from moe_ablm.evaluation.experts.findings import heat_map
from moe_ablm.evaluation.experts.specialisation import jackknife, quotient
from moe_ablm.evaluation.outcome import Picture, Table
from moe_ablm.inference.route import Weights

FLAT = 0.999  # entropy over its maximum: weights vary by 10 % (as the stability watch of training)
METRICS = ("dispatch_entropy", "flat_slots", "slot_difference", "combine_entropy", "on_residues")
TABLES = (
    Table("Slots of soft-MoE: 1 is uniform", METRICS, ("layer",)),
    Table(
        "Dispatch of each expert over that of a plain mean",
        ("dispatch_ratio",),
        ("layer", "expert"),
        "region",
    ),
)


class Slots:
    """Sums, float64.

    Attributes:
      figures: `[antibodies, 5, M]`, those of `METRICS`.
      mass: `[groups of clones, M, E, 14]`, of the dispatch, by region.
      plain: `[groups, 14]`, share of residues, which is the dispatch of a plain mean.
    """

    def __init__(self, antibodies: Sequence[Annotated], layers: Sequence[int], experts: int):
        n, regions = len(antibodies), len(region_names())
        self._antibodies, self._layers = antibodies, layers
        self._group = groups_of([a.unit for a in antibodies], GROUPS[1])
        groups = self._group.max() + 1
        self.figures = np.zeros((n, len(METRICS), len(layers)))
        self.mass = np.zeros((groups, len(layers), experts, regions))
        self.plain = np.zeros((groups, regions))

    def add(self, index: int, weights: Weights) -> None:
        """Adds an antibody."""
        region = self._antibodies[index].region_index()
        known = np.eye(len(region_names()))[region] * (region >= 0)[:, None]
        dispatch = weights.dispatch.astype(np.float64)
        on_residues = dispatch.sum(0)
        dispatch = dispatch / np.maximum(on_residues, 1e-30)
        self.figures[index] = [*_spread(dispatch, weights.combine), on_residues.mean((1, 2))]
        group = self._group[index]
        self.mass[group] += np.einsum("nmes,nr->mer", dispatch, known) / dispatch.shape[-1]
        self.plain[group] += known.mean(0)

    def samples(self) -> list[Sample]:
        """Means over antibodies, by layer."""
        units, one = [a.unit for a in self._antibodies], np.ones(len(self._antibodies))
        return [
            Sample(metric, units, self.figures[:, i, m], one, {"layer": str(layer)}, unit="share")
            for i, metric in enumerate(METRICS)
            for m, layer in enumerate(self._layers)
        ]

    def numbers(self) -> list[Number]:
        """Mass of the dispatch by layer, expert and region, and over that of a plain mean."""
        antibodies = np.bincount(self._group)[:, None, None]
        numbers = []
        for m, layer in enumerate(self._layers):
            for metric, unit, over in (
                ("dispatch_share", "share", np.broadcast_to(antibodies, self.plain[:, None].shape)),
                ("dispatch_ratio", "ratio", self.plain[:, None]),
            ):
                table = np.concatenate([self.mass[:, m], over], axis=1)
                estimate = jackknife(table, lambda t: quotient(t[:, :-1], t[:, -1:]))
                low, high = estimate.interval()
                numbers += [
                    Number(
                        metric,
                        float(estimate.value[e, r]),
                        {"layer": str(layer), "expert": str(e), "region": region_names()[r]},
                        float(low[e, r]),
                        float(high[e, r]),
                        len(self._antibodies),
                        unit,
                    )
                    for e, r in np.ndindex(estimate.value.shape)
                    if self.plain[:, r].any()
                ]
        return numbers

    def picture(self) -> Picture:
        """Mass of the dispatch over that of a plain mean, as a heat map."""
        mass, plain = self.mass.sum(0), self.plain.sum(0)
        here = np.flatnonzero(plain)
        values = np.log2(np.maximum(mass[..., here] / plain[here], 1e-6)).transpose(0, 2, 1)
        names = [region_names()[r] for r in here]
        return Picture(
            "dispatch_region",
            "What the slots of experts read, by region: log2 of the dispatch over that of a plain "
            "mean of all residues.",
            lambda: heat_map(values, np.zeros(values.shape, bool), self._layers, names, "log2"),
        )


def _spread(dispatch: np.ndarray, combine: np.ndarray) -> list[np.ndarray]:
    """Entropies over their maxima and how unlike the slots are, `[M]` each.

    The last is the Jensen-Shannon divergence of all slots' weights over its maximum: 0 where all
    slots read the same, 1 where no two read the same token.
    """
    n, layers, experts, slots = dispatch.shape
    each = _entropy(dispatch, 0)
    of_mean = _entropy(dispatch.mean((2, 3)), 0)
    spread = each / np.log(max(n, 2))
    unlike = (of_mean - each.mean((1, 2))) / np.log(max(min(n, experts * slots), 2))
    taken = _entropy(combine.reshape(n, layers, -1).astype(np.float64), -1).mean(0)
    return [
        spread.mean((1, 2)),
        (spread > FLAT).mean((1, 2)),
        unlike,
        taken / np.log(max(experts * slots, 2)),
    ]


def _entropy(p: np.ndarray, axis: int) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis)
