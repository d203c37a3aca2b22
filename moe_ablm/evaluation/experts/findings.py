"""What a contrast says of the experts of all layers: numbers and heat maps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from moe_ablm.evaluation.estimates import Number
from moe_ablm.evaluation.experts import specialisation
from moe_ablm.evaluation.experts.specialisation import (
    Jackknifed,
    discoveries,
    held_out_information,
    jackknife,
)
from moe_ablm.evaluation.experts.specialists import Half, chosen, halves, specialists
from moe_ablm.evaluation.experts.traits import FROM_START, Contrast

FALSE_DISCOVERIES = 0.05
CDRH3 = "CDRH3"
GIVEN = 3  # of `specialisation.information`: the conditional one
ANY = "any"  # layer of a specialist sought in all of them
UNMATCHED = {"share": specialisation.composition, "enrichment": specialisation.enrichment}
MATCHED = {"expected": specialisation.predicted, "excess": specialisation.excess}


@dataclass(frozen=True, eq=False)
class Finding:
    """Estimates of a contrast.

    Attributes:
      contrast: what is compared.
      layers: numbers of the M layers.
      first: whether it is the first of its trait: what needs no match is reported once.
      estimates: of each layer, `[X, E]`, by metric.
      adjusted: `[M, X, E]`, p-values of `excess`, adjusted for how many they are.
      information: of each layer, as `specialisation.information`, less its bias.
      held_out: of each layer, as `specialisation.held_out_information`.
      halves: of each layer; none of a single group of clones.
    """

    contrast: Contrast
    layers: Sequence[int]
    first: bool
    estimates: Mapping[str, list[Jackknifed]]
    adjusted: np.ndarray
    information: list[Jackknifed]
    held_out: list[Jackknifed]
    halves: list[tuple[Half, Half]]

    @classmethod
    def of(
        cls, contrast: Contrast, table: np.ndarray, layers: Sequence[int], first: bool
    ) -> "Finding":
        """From sums `[groups, cells, M, E]`."""
        parts = [table[:, :, m] for m in range(len(layers))]

        def each(statistic) -> list[Jackknifed]:
            return [jackknife(part, partial(statistic, contrast=contrast)) for part in parts]

        wanted = (UNMATCHED if first else {}) | MATCHED
        estimates = {metric: each(statistic) for metric, statistic in wanted.items()}
        adjusted = discoveries(np.stack([e.p_value() for e in estimates["excess"]]))
        information = [e.corrected() for e in each(specialisation.information)]
        held_out = [held_out_information(part, contrast) for part in parts]
        sought = contrast.trait == "region" and len(table) > 1
        two = [halves(part, contrast) for part in parts] if sought else []
        return cls(contrast, layers, first, estimates, adjusted, information, held_out, two)


def cell_numbers(finding: Finding) -> list[Number]:
    """Of each layer, expert and class: share, enrichment, expected, excess and `excess_q`."""
    numbers, matched = [], {"matched": finding.contrast.matched}
    for m, layer in enumerate(finding.layers):
        for metric, estimates in finding.estimates.items():
            labels = {} if metric in UNMATCHED else matched
            unit = "share" if metric == "share" else "log2"
            of = estimates[m]
            numbers += estimate_numbers(metric, of, finding.contrast, layer, labels, unit)
        q = finding.adjusted[m]
        no_error = Jackknifed(q, np.full(q.shape, np.nan), np.zeros(q.shape), 0)
        numbers += estimate_numbers("excess_q", no_error, finding.contrast, layer, matched, "")
    return numbers


def estimate_numbers(
    metric: str, estimate: Jackknifed, contrast: Contrast, layer: int, labels: dict, unit: str
) -> list[Number]:
    """Of an estimate `[X, E]`, a number a class and expert."""
    low, high = estimate.interval()
    counts = np.bincount(contrast.label, contrast.residues)
    about = {"layer": str(layer), "trait": contrast.trait} | labels
    return [
        Number(
            metric,
            float(estimate.value[x, e]),
            about | {"expert": str(e), "class": contrast.names[x]},
            float(low[x, e]),
            float(high[x, e]),
            int(counts[x]),
            unit,
        )
        for x, e in np.ndindex(estimate.value.shape)
    ]


def information_numbers(finding: Finding) -> list[Number]:
    """Information by layer, in bits, and as a share of the entropy of experts.

    The interval of the conditional one begins where information that was held out begins, as a
    correction leaves too much where cells are few: near 0 it is a bound from above.
    """
    c, n = finding.contrast, int(finding.contrast.residues.sum())
    wanted = [("conditional_information", GIVEN, {"trait": c.trait, "matched": c.matched})]
    if finding.first:
        wanted.append(("information", 1, {"trait": c.trait}))
    if c.matched == FROM_START:
        wanted.append(("information", 2, {"trait": FROM_START}))
    if finding.first and c.trait == "region":
        wanted.append(("expert_entropy", 0, {}))
    numbers = []
    each = zip(finding.layers, finding.information, finding.held_out, strict=True)
    for layer, estimate, held_out in each:
        low, high = estimate.interval()
        low[GIVEN] = np.minimum(low[GIVEN], np.fmin(held_out.interval()[0], held_out.value))
        for metric, i, labels in wanted:
            about = {"layer": str(layer)} | labels
            for j, (name, unit) in enumerate(((metric, "bits"), (f"{metric}_share", "share"))):
                ends = float(low[i, j]), float(high[i, j])
                if (i, j) != (0, 1):  # the entropy over itself
                    value = float(estimate.value[i, j])
                    numbers.append(Number(name, value, about, *ends, n, unit))
    return numbers


def specialist_numbers(finding: Finding) -> list[Number]:
    """Each region's expert by layer and among all layers; CDRH3's by itself, too."""
    if not finding.halves:
        return []
    c, numbers = finding.contrast, []
    counts = np.bincount(c.label, c.residues)
    among = {str(layer): [two] for layer, two in zip(finding.layers, finding.halves, strict=True)}
    for layer, two in among.items():
        about = {"layer": layer, "matched": c.matched}
        numbers += [
            Number("specialist_expert", chosen(two[0], x), about | {"region": name}, unit="number")
            for x, name in enumerate(c.names)
        ]
    for layer, candidates in (among | {ANY: finding.halves}).items():
        for metric, estimates in specialists(candidates, c).items():
            unit = "log2" if metric == "excess" else "share"
            for x, name in enumerate(c.names):
                low, high = (float(end) for end in estimates[x].interval())
                value, rest = float(estimates[x].value), (low, high, int(counts[x]), unit)
                about = {"layer": layer, "region": name, "matched": c.matched}
                numbers.append(Number(f"specialist_{metric}", value, about, *rest))
                if (layer, name) == (ANY, CDRH3):
                    about = {"matched": c.matched}
                    numbers.append(Number(f"cdrh3_{metric}", value, about, *rest))
    return numbers


NUMBERED = 32  # experts of a panel
MOST = 3.0  # what is more or less has the last colour: experts that never take a class


def heat_map(
    values: np.ndarray,
    flagged: np.ndarray,
    layers: Sequence[int],
    names: Sequence[str],
    label: str,
) -> Figure:
    """A panel a layer, experts by classes; a dot where a value is flagged.

    Args:
      values: `[M, X, E]`; 0 is white, red is more.
      flagged: bool, the same shape.
      layers: numbers of the M layers.
      names: of the X classes.
      label: of the colours.
    """
    experts = values.shape[2]
    # a file has at most 2^16 pixels a side: rows of many experts are lower
    height = 0.7 + min(0.25 * experts, 6.0)
    size = (2 + 0.42 * len(names), 1.4 + len(layers) * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(layers), 1, squeeze=False)
    limit = float(np.clip(values.max(), 0.1, MOST))
    for axis, layer, table, mark in zip(axes[:, 0], layers, values, flagged, strict=True):
        image = axis.imshow(table.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.plot(*np.nonzero(mark), "k.", markersize=2)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(0, experts, math.ceil(experts / NUMBERED)))
        axis.tick_params(axis="y", labelsize=7)
        axis.set(title=f"layer {layer}", ylabel="expert")
    figure.colorbar(image, ax=axes, location="right", label=label, shrink=0.8, extend="both")
    return figure
