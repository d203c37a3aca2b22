"""What experts specialise in: which residues go to which expert, against what would be expected.

An assignment is one expert computing for one residue (soft-MoE: the expert's share of the residue's
output). Enrichment is log2 of P(expert | class) over P(expert). Its excess is log2 of what the
expert takes of a class over what it would take if the routing knew only something simpler: the
residue, chain and residue, or the position. Flagged are excesses with a false discovery rate
below 5 % (Benjamini & Hochberg 1995) over all layers, experts and classes. Intervals leave out
groups of clones in turn (jackknife). cdrh3_excess is the excess of the expert that takes most of
CDRH3 beyond expectation, chosen among all layers on one half of the clones and measured on the
other. Routers that know no region have such experts, too: beyond_null_excess is what is above that
of random smooth routers by position, of this router with the positions of other antibodies, and of
the untrained encoder. Mutual information is in bits and corrected for its bias.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.regions import region_names
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.experts import position_only
from moe_ablm.evaluation.experts.assignments import Assignments, assigned, routed
from moe_ablm.evaluation.experts.beyond import PositionOnly, References, beyond_numbers
from moe_ablm.evaluation.experts.findings import (
    CDRH3,
    FALSE_DISCOVERIES,
    Finding,
    cell_numbers,
    estimate_numbers,
    heat_map,
    information_numbers,
    specialist_numbers,
)
from moe_ablm.evaluation.experts.matching import PROFILE
from moe_ablm.evaluation.experts.shuffled import shuffle
from moe_ablm.evaluation.experts.slots import TABLES as SLOT_TABLES
from moe_ablm.evaluation.experts.slots import Slots
from moe_ablm.evaluation.experts.specialisation import jackknife, quotient
from moe_ablm.evaluation.experts.specialists import specialists
from moe_ablm.evaluation.experts.traits import (
    ALIGNED,
    CHAIN_AND_RESIDUE,
    FROM_START,
    Contrast,
    contrasts,
)
from moe_ablm.evaluation.nulls import POSITION, ROUTED, SHUFFLED, generator, untrained
from moe_ablm.evaluation.outcome import Outcome, Picture, Skipped, Table
from moe_ablm.evaluation.subject import Subject, require_regions
from moe_ablm.inference.route import Choices, Weights
from moe_ablm.model.families import Router

TITLE = "Expert specialisation"
SHOWN = (("region", CHAIN_AND_RESIDUE), ("residue", ALIGNED))  # contrasts that are drawn
SCALE = 10  # residues: of the null kind of model that knows position only
FEW = 2
MOST = 100_000  # numbers of layers, experts and classes, above which some are left out


@dataclass(frozen=True)
class Settings:
    """Antibodies drawn from the test split."""

    antibodies: int = 1000


TABLES = (
    Table(
        "CDRH3's expert, of all layers",
        ("cdrh3_excess", "cdrh3_share", "cdrh3_relative", "cdrh3_over_others"), ("matched",),
    ),
    Table(
        "CDRH3's expert beyond routers that know no region, matched on chain and residue",
        ("null_excess", "beyond_null_excess", "null_over_others", "beyond_null_over_others"),
        ("null",), where=(("region", CDRH3), ("matched", CHAIN_AND_RESIDUE)),
    ),
    Table(
        "Each region's expert: log2 excess beyond routers that know no region, matched on chain "
        "and residue",
        ("beyond_null_excess",), ("null",), "region", (("matched", CHAIN_AND_RESIDUE),),
    ),
    Table(
        "Each region's expert: log2 excess, matched on chain and residue",
        ("specialist_excess",), ("layer",), "region", (("matched", CHAIN_AND_RESIDUE),),
    ),
    Table(
        "Number of each region's expert, matched on chain and residue",
        ("specialist_expert",), ("layer",), "region", (("matched", CHAIN_AND_RESIDUE),),
    ),
    Table("Information of experts on traits, bits", ("information",), ("layer",), "trait"),
    Table(
        "... given what is matched, bits",
        ("conditional_information",), ("layer", "matched"), "trait",
    ),
    Table("Share of the assignments", ("load",), ("layer",), "expert"),
    Table(
        "Share of each expert's assignments by region",
        ("share",), ("layer", "expert"), "class", (("trait", "region"),),
    ),
)  # fmt: skip


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Enrichments, specialists and information by layer; slots of soft-MoE."""
    spec = subject.engine.model.spec
    router = spec.moe
    if router is None or not spec.moe_layers:
        raise Skipped("a dense model has no experts")
    antibodies, notes = subject.antibodies(settings.antibodies)
    require_regions(antibodies)
    compared = contrasts(antibodies)
    layers, experts = spec.moe_layers, router.experts
    sums = Assignments.empty(antibodies, compared, len(layers), experts)
    regional = [c for c in compared if c.regional]
    references = References(antibodies, regional, sums.group, (len(layers), experts))
    slots = None
    if router.slots_of_expert and subject.null not in ROUTED:
        slots = Slots(antibodies, layers, experts)
    for index, routing, plan, gates in routed_as(subject, antibodies, router):
        sums.add(index, plan, gates)
        references.add_shuffled(index, plan)
        if slots and isinstance(routing, Weights):
            slots.add(index, routing)
    for index, routing in routed(untrained(subject.engine), antibodies):
        references.add_untrained(index, assigned(routing, experts)[0])
    all_findings = findings(compared, sums.tables, layers)
    numbers = slots.numbers() if slots else gate_shares(sums, compared[0], layers)
    cells, cell_notes = bounded([n for finding in all_findings for n in cell_numbers(finding)])
    numbers += cells
    for finding in all_findings:
        numbers += information_numbers(finding)
        numbers += specialist_numbers(finding) if finding.contrast.trait == "region" else []
    choices = float(sums.load.sum() / len(layers) / sum(a.antibody.residues for a in antibodies))
    rng = subject.generator(f"{POSITION} {router.name}")
    shape = router, len(layers), choices
    positional = PositionOnly(antibodies, compared, sums.group, shape, rng)
    numbers += positional.correlations()
    if len(sums.gates) == 1:
        notes.append("one clonal cluster: no intervals, nor information, whose bias is not known")
    else:
        regions = (f for f in all_findings if f.contrast.regional)
        for i, finding in enumerate(regions):
            own = specialists(finding.halves, finding.contrast)
            theirs = references.specialists(i), positional.specialists[i]
            numbers += beyond_numbers(finding.contrast, own, *theirs)
    notes.append(
        f"shuffled: {references.unmoved():.0%} of the chains keep their routing, as no other clone "
        "has a chain of their length"
    )
    samples = load_samples(antibodies, sums, layers, router)
    return Outcome(
        samples + (slots.samples() if slots else []),
        numbers,
        TABLES + (SLOT_TABLES if slots else ()),
        [picture(f) for f in all_findings if (f.contrast.trait, f.contrast.matched) in SHOWN]
        + ([slots.picture()] if slots else []),
        notes + cell_notes + remarks(all_findings),
    )


def routed_as(
    subject: Subject, antibodies: Sequence[Annotated], router: Router
) -> Iterator[tuple[int, Choices | Weights | None, np.ndarray, np.ndarray]]:
    """(number, routing, assignments, gates) of each antibody: of the model or of its null kind."""
    experts = router.experts
    if subject.null not in ROUTED:
        for index, routing in routed(subject.engine, antibodies):
            yield index, routing, *assigned(routing, experts)
        return
    own = (assigned(routing, experts)[0] for _, routing in routed(subject.engine, antibodies))
    if subject.null == SHUFFLED:
        given = shuffle(antibodies, list(own))
    else:
        places = position_only.Places.of(antibodies)
        choices = float(np.mean([plan.sum(-1).mean() for plan in own]))
        rng, layers = (
            generator(subject.engine, POSITION),
            (len(subject.engine.model.spec.moe_layers),),
        )
        drawn = position_only.plans(router, places, SCALE, layers, choices, rng)
        residues = np.cumsum([a.antibody.residues for a in antibodies])[:-1]
        given = [np.moveaxis(drawn[:, p], 0, 1) for p in np.split(places.codes, residues)]
    for index, plan in enumerate(given):
        yield index, None, plan, plan


def findings(
    compared: Sequence[Contrast], tables: Sequence[np.ndarray], layers: Sequence[int]
) -> list[Finding]:
    """What each contrast says."""
    by_contrast, seen = [], set()
    for contrast, table in zip(compared, tables, strict=True):
        by_contrast.append(Finding.of(contrast, table, layers, contrast.trait not in seen))
        seen.add(contrast.trait)
    return by_contrast


def bounded(cells: list[Number]) -> tuple[list[Number], list[str]]:
    """Numbers of layers, experts and classes, and a note where there are more than `MOST`.

    Then regions are kept, with one match, and what seeds are compared by (`matching.PROFILE`).
    """
    if len(cells) <= MOST:
        return cells, []
    kept = [n for n in cells if _essential(n)]
    return kept, [
        f"{len(cells):,} numbers of layers, experts and classes are too many: told are "
        f"{len(kept):,}, share and enrichment by region, enrichment by residue, and excess by "
        f"region matched on {CHAIN_AND_RESIDUE}"
    ]


def _essential(number: Number) -> bool:
    trait, metric = number.labels["trait"], number.metric
    if metric in ("excess", "excess_q"):
        return trait == "region" and number.labels["matched"] == CHAIN_AND_RESIDUE
    return (metric == "share" and trait == "region") or (
        metric == "enrichment" and trait in PROFILE
    )


def load_samples(
    antibodies: Sequence[Annotated], sums: Assignments, layers: Sequence[int], router: Router
) -> list[Sample]:
    """Share of the assignments that experts take, also by gates, and of residues without any."""
    units, samples = [a.unit for a in antibodies], []
    residues = np.array([a.antibody.residues for a in antibodies], float)
    kinds = {"load": sums.load} | ({} if router.slots_of_expert else {"gate_load": sums.weight})
    for m, layer in enumerate(map(str, layers)):
        labels = {"layer": layer}
        for metric, values in kinds.items():
            total = values[:, m].sum(-1)
            samples += [
                Sample(metric, units, each, total, labels | {"expert": str(e)}, unit="share")
                for e, each in enumerate(values[:, m].T)
            ]
        if router.varying:
            alone = sums.alone[:, m]
            samples.append(Sample("without_expert", units, alone, residues, labels, unit="share"))
            samples += _experts_a_residue(antibodies, units, sums.by_region[:, m], labels)
    return samples


def _experts_a_residue(
    antibodies: Sequence[Annotated], units: list[str], assigned: np.ndarray, labels: dict
) -> list[Sample]:
    regions = [a.region_index() for a in antibodies]
    samples = []
    for r, name in enumerate(region_names()):
        count = np.array([(region == r).sum() for region in regions], float)
        if count.any():
            about = labels | {"region": name}
            samples.append(Sample("experts_a_residue", units, assigned[:, r], count, about))
    return samples


def gate_shares(sums: Assignments, contrast: Contrast, layers: Sequence[int]) -> list[Number]:
    """Share of each expert's gates by class of the first contrast."""
    numbers = []
    for m, layer in enumerate(layers):
        shares = jackknife(sums.gates[:, :, m], lambda t: quotient(t, t.sum(1, keepdims=True)))
        numbers += estimate_numbers("gate_share", shares, contrast, layer, {}, "share")
    return numbers


def picture(finding: Finding) -> Picture:
    """Excesses of a contrast as a heat map."""
    c = finding.contrast
    values = np.stack([e.value for e in finding.estimates["excess"]])
    flagged = finding.adjusted < FALSE_DISCOVERIES
    return Picture(
        f"excess_{c.trait}",
        f"Experts by {c.trait}: log2 of what an expert takes over what it would take if only the "
        f"{c.matched} decided. Dots: false discovery rate below {FALSE_DISCOVERIES:.0%}.",
        lambda: heat_map(values, flagged, finding.layers, c.names, "log2 excess"),
    )


def remarks(all_findings: Sequence[Finding]) -> list[str]:
    """How many excesses are flagged, and where matching leaves little to compare."""
    notes = []
    for finding in all_findings:
        c, flagged = finding.contrast, int((finding.adjusted < FALSE_DISCOVERIES).sum())
        notes.append(
            f"{c.trait} matched on {c.matched}: {flagged:,} of {finding.adjusted.size:,} excesses "
            "are flagged"
        )
        if c.residues.sum() < FEW * len(c.residues) * finding.adjusted.shape[-1]:
            notes.append(
                f"{c.trait} matched on {c.matched}: under {FEW} residues for each class, stratum "
                "and expert; the conditional information is too large by what its correction "
                "leaves: take more antibodies"
            )
        if c.matched == FROM_START:
            overlaps = ", ".join(f"{n} {o:.2f}" for n, o in zip(c.names, c.overlap(), strict=True))
            notes.append(
                f"at the same {FROM_START}, share of residues that are of another region: "
                f"{overlaps}; near 0 nothing can exceed what the position predicts"
            )
    return notes
