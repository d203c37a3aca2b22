"""Verdicts on three claims of the studies, for these models and data.

A verdict needs two or more seeds of a kind, as training runs differ, and a claim that was declared
before the evaluations ran (`evaluation.declared`). benchmarks/error_rates.py measures how often the
rules say "holds" where there is no effect.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.declared import CLAIMS, EXPERTS, PAIRING, SPECIALISATION
from moe_ablm.evaluation.estimates import Number
from moe_ablm.evaluation.kinds import over_seeds
from moe_ablm.evaluation.nulls import NULLS
from moe_ablm.evaluation.reporting.compare import Comparison
from moe_ablm.evaluation.reporting.report import interval_written
from moe_ablm.evaluation.reporting.results import Evaluated
from moe_ablm.model.families import FAMILIES

HOLDS, NOT, OPEN, NONE = "holds", "does not hold", "these data cannot tell", "not evaluated"
ALONE, EXPLORATORY = "one seed cannot tell", "exploratory"
BESIDE = ""  # of numbers that decide nothing
# effects below these are none: 5 % more than expected, and a fifth of a percent of perplexity
SMALLEST_EXCESS, SMALLEST_LOSS = math.log2(1.05), 0.002
# results.json names router families; runs of a family that is not known here stay undecided
TOKEN_CHOICE = tuple(n for n, family in FAMILIES.items() if family.independent)
DENSE = "none"
# nulls of the routing evaluation; the first decides: what takes heavy chains takes CDRH3, too
MATCHED = ("chain and residue", "residue", "distance from N-terminus")
# active parameters and tokens that differ by more are not called equal
EQUAL = 0.05
LEAST_SEEDS = 2  # of a kind, for a verdict
PARTNERS = {
    "random": "a random heavy chain",
    "reverted": "its own heavy chain reverted to germline",
    "none": "no heavy chain",
}


@dataclass(frozen=True)
class Statement:
    """What the models of a kind say of a claim; without a verdict it stands beside."""

    kind: str
    verdict: str
    sentence: str

    @property
    def decides(self) -> bool:
        """Whether it counts for the claim's verdict."""
        return self.verdict != BESIDE


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it.

    Attributes:
      name: by which a suite declares it.
      text: what is claimed, and by whom.
      test: what was measured, and when it holds.
      findings: of each kind of model.
      notes: sentences beside.
    """

    name: str
    text: str
    test: str
    findings: Sequence[Statement]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def verdict(self) -> str:
        """One where all kinds agree, else that of each: "holds for a, does not hold for b"."""
        kinds_of: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.decides:
                kinds_of.setdefault(finding.verdict, []).append(finding.kind)
        if len(kinds_of) == 1:
            return next(iter(kinds_of))
        return ", ".join(f"{v} for {' and '.join(kinds)}" for v, kinds in kinds_of.items())


def claims_of(comparison: Comparison) -> list[Claim]:
    """The three claims; those that were not declared have no verdict but that they are not."""
    made = [specialisation(comparison), pairing(comparison), experts_against_dense(comparison)]
    return [_as_declared(claim, comparison.runs) for claim in made]


def _as_declared(claim: Claim, runs: Sequence[Evaluated]) -> Claim:
    without = [r for r in runs if claim.name not in r.content.get(CLAIMS, ())]
    if not without:
        return claim
    findings = [
        replace(f, verdict=f.verdict if f.verdict in (BESIDE, NONE) else EXPLORATORY)
        for f in claim.findings
    ]
    note = (
        f"Exploratory: the suite of {without[0].directory} did not name the claim {claim.name!r} "
        "before it ran, so that there is no verdict."
    )
    return replace(claim, findings=findings, notes=[*claim.notes, note])


def verdict_of(low: float, high: float, smallest: float, seeds: int) -> str:
    """Of an effect that is claimed to be above 0, with its interval over seeds."""
    if seeds < LEAST_SEEDS:
        return ALONE
    if not (math.isfinite(low) and math.isfinite(high)):
        return OPEN
    if high < smallest:  # also where it is above 0: too small to count
        return NOT
    return HOLDS if low > 0 else OPEN


def all_of(verdicts: Sequence[str]) -> str:
    """Of a claim that needs several things: each test at its level keeps that of the claim."""
    for verdict in (ALONE, NOT):
        if verdict in verdicts:
            return verdict
    return HOLDS if {*verdicts} == {HOLDS} else OPEN


def specialisation(comparison: Comparison) -> Claim:
    """Token choice specialises on CDRH3."""
    findings, notes = [], []
    for kind, runs in comparison.kinds.items():
        router = runs[0].model["router"]
        if router in TOKEN_CHOICE:
            findings += [_beyond_nulls(kind, runs), *_excesses(kind, runs)]
        elif router != DENSE:
            beside = [_beyond_nulls(kind, runs), *_excesses(kind, runs)[:1]]
            notes += [f"For comparison {kind} ({router}): {f.sentence}." for f in beside]
    none = Statement(
        "", NONE, f"no model with token choice ({', '.join(TOKEN_CHOICE)}) among these"
    )
    return Claim(
        SPECIALISATION,
        "Token choice specialises on CDRH3 (BALM-MoE, ICLR 2026 workshop).",
        "The expert that takes most of CDRH3 beyond expectation is chosen on one half of the "
        "clones. On the other: the excess is log2 of how much more of CDRH3 it takes than if its "
        "routing knew only chain and residue; and the same relative to that of an expert of CDRH3 "
        "alone, less the mean for all other regions. Routing by position alone, and an encoder "
        "that was never trained, have such experts, too. So both numbers are compared with those "
        "of smooth random routers by position, of the same router with the positions of other "
        "antibodies of equal length, and of the same encoder untrained. It holds where the mean "
        f"over seeds (t interval, {LEAST_SEEDS} seeds or more) of both is above all three, and "
        f"does not where one of them is below: the excess with less than {SMALLEST_EXCESS:.2f} (5 "
        "% more) above, or relative to other regions none.",
        findings or [none],
        notes,
    )


# what is compared with each null: the least of it that counts, and its name
BEYOND = {
    "excess": (SMALLEST_EXCESS, "log2 excess"),
    "over_others": (0.0, "relative to other regions' experts"),
}


def beyond_verdict(
    values: Mapping[tuple[str, str], Sequence[float]], widths: Mapping[str, Sequence[float]]
) -> str:
    """Whether CDRH3 has an expert, and more of one than other regions, beyond all nulls.

    Args:
      values: of each seed, beyond each (metric of `BEYOND`, null).
      widths: of each seed's interval over antibodies, by metric.
    """
    verdicts = []
    for (metric, _), each in values.items():
        _, low, high = over_seeds(each, widths[metric])
        verdicts.append(verdict_of(low, high, BEYOND[metric][0], len(each)))
    return all_of(verdicts)


def _beyond_nulls(kind: str, runs: Sequence[Evaluated]) -> Statement:
    """Whether CDRH3 has an expert, and more of one than other regions, beyond all nulls."""
    values: dict[tuple[str, str], list[float]] = {}
    widths: dict[str, list[float]] = {}
    for metric in BEYOND:
        own = [_first(r.numbers("routing", f"cdrh3_{metric}", matched=MATCHED[0])) for r in runs]
        widths[metric] = [n.high - n.low for n in own if n]
        for null in NULLS:
            labels = {"matched": MATCHED[0], "region": "CDRH3", "null": null}
            numbers = [
                _first(r.numbers("routing", f"beyond_null_{metric}", **labels)) for r in runs
            ]
            if not (all(numbers) and all(own)):
                return Statement(kind, NONE, _why_no_nulls(runs, own))
            values[metric, null] = [n.value for n in numbers if n]
    parts = []
    for metric, (_, words) in BEYOND.items():
        told = []
        for null in NULLS:
            value, low, high = over_seeds(values[metric, null], widths[metric])
            told.append(f"{null} {interval_written({'value': value, 'low': low, 'high': high})}")
        parts.append(f"{words} beyond {', '.join(told)}")
    return Statement(kind, beyond_verdict(values, widths), f"{'; '.join(parts)} ({_runs(runs)})")


def _why_no_nulls(runs: Sequence[Evaluated], own: Sequence[Number | None]) -> str:
    if all(own):
        return "routing: evaluated without routers that know no region: evaluate again"
    return why_not(runs, "routing")


def _excesses(kind: str, runs: Sequence[Evaluated]) -> list[Statement]:
    """Excesses of CDRH3's expert by what they are matched on, of each run."""
    findings = []
    for matched in MATCHED:
        numbers = [_first(r.numbers("routing", "cdrh3_excess", matched=matched)) for r in runs]
        if all(numbers):
            intervals = "; ".join(interval_written(vars(n)) for n in numbers if n)
            sentence = f"log2 excess over the same {matched}, each run: {intervals}"
            findings.append(Statement(kind, BESIDE, sentence))
    return findings


def pairing(comparison: Comparison) -> Claim:
    """Native pairing helps light chains."""
    findings, notes = [], []
    for kind, runs in comparison.kinds.items():
        if runs[0].model["regime"] == "unpaired":
            notes.append(f"{kind} was trained on single chains: left out.")
            continue
        for partner, words in PARTNERS.items():
            light, heavy = (
                comparison.value("mutations", "gain", kind, masked=chain, partner=partner)
                for chain in CHAINS[::-1]
            )
            decides = partner == "random"
            if light is None:
                if decides:
                    findings.append(Statement(kind, NONE, why_not(runs, "mutations")))
                continue
            verdict = verdict_of(light.low, light.high, SMALLEST_LOSS, light.seeds)
            sentence = f"nats gained over {words}: {interval_written(vars(light))} ({_runs(runs)})"
            findings.append(Statement(kind, verdict if decides else BESIDE, sentence))
            if decides and heavy is not None:
                notes.append(
                    f"Heavy chains with a random light chain instead, {kind}: "
                    f"{interval_written(vars(heavy))}."
                )
    none = Statement("", NONE, "no model that was trained on pairs among these")
    return Claim(
        PAIRING,
        "Native pairing helps light chains (Burbach & Briney 2024).",
        "All mutated residues of the light chain masked: cross-entropy with another heavy chain "
        "less that with the native one, so that above 0 is a gain. A random heavy chain decides, "
        "as it differs from the native one in nothing but the pairing; against its germline the "
        "native chain also tells how mutated the antibody is. It holds where the interval of the "
        f"mean over seeds ({LEAST_SEEDS} or more), over antibodies and seeds, is above 0 and "
        f"reaches {SMALLEST_LOSS} nats, and does not where it is below that.",
        findings or [none],
        notes,
    )


def _first(numbers: Sequence[Number]) -> Number | None:
    return numbers[0] if numbers else None


def _runs(runs: Sequence[Evaluated]) -> str:
    return "one run" if len(runs) == 1 else f"{len(runs)} seeds"


def why_not(runs: Sequence[Evaluated], evaluation: str) -> str:
    """Why an evaluation has no number of runs."""
    reasons = dict.fromkeys(r.why_not(evaluation) for r in runs if not r.done(evaluation))
    return f"{evaluation}: {'; '.join(reasons) or 'it has no such number'}"


def experts_against_dense(comparison: Comparison) -> Claim:
    """MoE beats dense at equal active parameters."""
    routers = {kind: runs[0].model["router"] for kind, runs in comparison.kinds.items()}
    dense = next((kind for kind, router in routers.items() if router == DENSE), None)
    findings = [
        _against(comparison, kind, dense, region)
        for kind, router in routers.items()
        if dense is not None and router != DENSE
        for region in ("all", "CDRH3")
    ]
    why = "no dense model among these" if dense is None else "no model with experts among these"
    return Claim(
        EXPERTS,
        "MoE beats dense at equal active parameters (BALM-MoE, ICLR 2026 workshop).",
        "Loss on masked residues of held-out pairs, dense less MoE, so that above 0 is a gain; the "
        "interval is over antibodies, the same ones for all models, and over seeds of each kind "
        f"({LEAST_SEEDS} or more). The loss on all residues decides: it holds where the interval "
        f"is above 0 and reaches {SMALLEST_LOSS} nats, and does not where it is below that.",
        findings or [Statement("", NONE, why)],
    )


def _against(comparison: Comparison, kind: str, dense: str, region: str) -> Statement:
    decides = region == "all"
    labels = {"test set": "paired", "region": region}
    difference = comparison.difference("perplexity", "loss", dense, kind, **labels)
    if difference is None:
        runs = [*comparison.kinds[kind], *comparison.kinds[dense]]
        why = f"{region} residues: {why_not(runs, 'perplexity')}"
        return Statement(kind, NONE if decides else BESIDE, why)
    counts, sds = (
        (len(comparison.kinds[k]) for k in (dense, kind)),
        (difference.seed_sd, difference.reference_sd),
    )
    seeds = ", ".join(
        f"{name} {count} seeds, sd {sd:.4f}" if count > 1 else f"{name} one run"
        for name, count, sd in zip((dense, kind), counts, sds, strict=True)
    )
    if difference.seeds < LEAST_SEEDS:
        seeds += ": what another seed would change is not in the interval"
    where = "all residues" if decides else region
    sentence = f"nats gained on {where}: {interval_written(vars(difference))} ({seeds})"
    verdict = verdict_of(difference.low, difference.high, SMALLEST_LOSS, difference.seeds)
    pairs = list(product(*(comparison.kinds[k] for k in (kind, dense))))
    for what, name in (("active parameters", "params_active"), ("tokens seen", "tokens_seen")):
        unequal = [(a.model[name], b.model[name]) for a, b in pairs]
        unequal = [each for each in unequal if not equal(*each)]
        if unequal:
            ours, theirs = map(_size_written, unequal[0])
            sentence += f", but {what} are not equal: {ours}, of {dense} {theirs}"
            verdict = NONE
    return Statement(kind, verdict if decides else BESIDE, sentence)


def equal(a: int | None, b: int | None) -> bool:
    """Whether two sizes are known and the same but for `EQUAL`."""
    if not a or not b:
        return False
    return abs(a / b - 1) <= EQUAL


def _size_written(value: int | None) -> str:
    return f"{value:,}" if value else "not known"
