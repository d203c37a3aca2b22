"""What holds of three claims of the studies, by these models and data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.estimates import Number
from moe_ablm.evaluation.reporting.compare import Comparison
from moe_ablm.evaluation.reporting.report import interval_written
from moe_ablm.evaluation.reporting.results import Evaluated
from moe_ablm.model.families import FAMILIES

HOLDS, NOT, OPEN, NONE = "holds", "does not hold", "these data cannot tell", "not evaluated"
# effects below these are none: 5 % more than expected, and a fifth of a percent of perplexity
SMALLEST_EXCESS, SMALLEST_LOSS = math.log2(1.05), 0.002
# results.json names router families; runs of a family that is not known here stay undecided
TOKEN_CHOICE = tuple(n for n, family in FAMILIES.items() if family.independent)
DENSE = "none"
# nulls of the routing evaluation; the first decides: what takes heavy chains takes CDRH3, too
MATCHED = ("chain and residue", "residue", "distance from N-terminus")
# active parameters and tokens that differ by more are not called equal
EQUAL = 0.05
PARTNERS = {
    "random": "a random heavy chain",
    "reverted": "its own heavy chain reverted to germline",
    "none": "no heavy chain",
}


@dataclass(frozen=True)
class Evidence:
    """What the models of a kind say of a claim; `decides`: it counts for the claim's verdict."""

    kind: str
    verdict: str
    sentence: str
    decides: bool = True


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it.

    Attributes:
      text: what is claimed, and by whom.
      test: what was measured, and when it holds.
      findings: of each kind of model.
      notes: sentences beside.
    """

    text: str
    test: str
    findings: Sequence[Evidence]
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
    """The three claims."""
    return [specialisation(comparison), pairing(comparison), experts_against_dense(comparison)]


def verdict_of(low: float, high: float, smallest: float) -> str:
    """Of an effect that is claimed to be above 0, with its interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return OPEN
    if high < smallest:  # also where it is above 0: too small to count
        return NOT
    return HOLDS if low > 0 else OPEN


def both(one: str, other: str) -> str:
    """Of a claim that needs two things."""
    if NOT in (one, other):
        return NOT
    return HOLDS if one == other == HOLDS else OPEN


def together(verdicts: Sequence[str]) -> str:
    """Of several runs: only where they agree."""
    return verdicts[0] if len(set(verdicts)) == 1 else OPEN


def specialisation(comparison: Comparison) -> Claim:
    """Token choice specialises on CDRH3."""
    findings, notes = [], []
    for kind, runs in comparison.kinds.items():
        router = runs[0].model["router"]
        if router in TOKEN_CHOICE:
            findings += [_more_than_others(kind, runs), *_excesses(kind, runs)]
        elif router != DENSE:
            over, excess = _more_than_others(kind, runs), _excesses(kind, runs)
            notes.append(f"For comparison {kind} ({router}): {over.sentence}.")
            notes += [f"{kind}: {finding.sentence}." for finding in excess[:1]]
    none = Evidence("", NONE, f"no model with token choice ({', '.join(TOKEN_CHOICE)}) among these")
    return Claim(
        "Token choice specialises on CDRH3 (BALM-MoE, ICLR 2026 workshop).",
        "The expert that takes most of CDRH3 beyond expectation is chosen on one half of the "
        "clones. On the other: the excess is log2 of how much more of CDRH3 it takes than if its "
        "routing knew only chain and residue. Routing by position alone gives every region such "
        "an expert; so the excess is told relative to that of an expert of CDRH3 alone, less the "
        "mean of the same for all other regions. It holds where both are above 0 in every run, "
        f"and does not where the excess is below {SMALLEST_EXCESS:.2f} (5 % more) or CDRH3 below "
        "the other regions in every run.",
        findings or [none],
        notes,
    )


def _more_than_others(kind: str, runs: Sequence[Evaluated]) -> Evidence:
    """Whether CDRH3 has an expert, and more of one than other regions."""
    found = [
        [_first(r.numbers("routing", f"cdrh3_{m}", matched=MATCHED[0])) for r in runs]
        for m in ("excess", "over_others")
    ]
    if not all(number for numbers in found for number in numbers):
        return Evidence(kind, NONE, why_not(runs, "routing"))
    verdicts = [
        both(verdict_of(e.low, e.high, SMALLEST_EXCESS), verdict_of(o.low, o.high, 0.0))
        for e, o in zip(*found, strict=True)
    ]
    intervals = "; ".join(interval_written(vars(n)) for n in found[1])
    sentence = f"more than the other regions' experts, relative: {intervals} ({_runs(runs)})"
    return Evidence(kind, together(verdicts), sentence)


def _excesses(kind: str, runs: Sequence[Evaluated]) -> list[Evidence]:
    """Excesses of CDRH3's expert by what they are matched on."""
    findings = []
    for matched in MATCHED:
        numbers = [_first(r.numbers("routing", "cdrh3_excess", matched=matched)) for r in runs]
        if any(numbers):
            what = f"log2 excess over the same {matched}"
            findings.append(_of_runs(kind, runs, numbers, "routing", SMALLEST_EXCESS, what, False))
    return findings


def pairing(comparison: Comparison) -> Claim:
    """Native pairing helps light chains."""
    findings, notes = [], []
    for kind, runs in comparison.kinds.items():
        if runs[0].model["regime"] == "unpaired":
            notes.append(f"{kind} was trained on single chains: left out.")
            continue
        for partner, words in PARTNERS.items():
            numbers, heavy = ([_gain(r, chain, partner) for r in runs] for chain in CHAINS[::-1])
            decides = partner == "random"
            what = f"nats gained over {words}"
            if decides or any(numbers):
                findings.append(
                    _of_runs(kind, runs, numbers, "mutations", SMALLEST_LOSS, what, decides)
                )
            if decides and all(heavy):
                of = _of_runs(kind, runs, heavy, "mutations", SMALLEST_LOSS, "", False)
                notes.append(
                    f"Heavy chains with a random light chain instead, {kind}{of.sentence}."
                )
    none = Evidence("", NONE, "no model that was trained on pairs among these")
    return Claim(
        "Native pairing helps light chains (Burbach & Briney 2024).",
        "All mutated residues of the light chain masked: cross-entropy with another heavy chain "
        "less that with the native one, so that above 0 is a gain. A random heavy chain decides, "
        "as it differs from the native one in nothing but the pairing; against its germline the "
        "native chain also tells how mutated the antibody is. It holds where in every run the "
        f"interval is above 0 and reaches {SMALLEST_LOSS} nats, and does not where it is below "
        "that in every run.",
        findings or [none],
        notes,
    )


def _gain(run: Evaluated, masked: str, partner: str) -> Number | None:
    return _first(run.numbers("mutations", "gain", masked=masked, partner=partner))


def _first(numbers: Sequence[Number]) -> Number | None:
    return numbers[0] if numbers else None


def _of_runs(
    kind: str,
    runs: Sequence[Evaluated],
    numbers: Sequence[Number | None],
    evaluation: str,
    smallest: float,
    what: str,
    decides: bool,
) -> Evidence:
    """Of an effect within models: the same in every run."""
    known = [n for n in numbers if n is not None]
    if len(known) < len(numbers):
        return Evidence(kind, NONE, why_not(runs, evaluation), decides)
    verdict = together([verdict_of(n.low, n.high, smallest) for n in known])
    intervals = "; ".join(interval_written(vars(n)) for n in known)
    return Evidence(kind, verdict, f"{what}: {intervals} ({_runs(runs)})", decides)


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
        "MoE beats dense at equal active parameters (BALM-MoE, ICLR 2026 workshop).",
        "Loss on masked residues of held-out pairs, dense less MoE, so that above 0 is a gain; the "
        "interval is over antibodies, the same ones for all models, and over seeds. The loss on "
        f"all residues decides: it holds where the interval is above 0 and reaches {SMALLEST_LOSS} "
        "nats, and does not where it is below that.",
        findings or [Evidence("", NONE, why)],
    )


def _against(comparison: Comparison, kind: str, dense: str, region: str) -> Evidence:
    decides = region == "all"
    labels = {"test set": "paired", "region": region}
    found = comparison.difference("perplexity", "loss", dense, kind, **labels)
    if found is None:
        runs = [*comparison.kinds[kind], *comparison.kinds[dense]]
        return Evidence(kind, NONE, f"{region} residues: {why_not(runs, 'perplexity')}", decides)
    seeds = f"{found.seeds} seeds each, sd between seeds {found.seed_sd:.4f}"
    if math.isnan(found.seed_sd):
        seeds = "one run each: what another seed would change is not in the interval"
    where = "all residues" if decides else region
    sentence = f"nats gained on {where}: {interval_written(vars(found))} ({seeds})"
    verdict = verdict_of(found.low, found.high, SMALLEST_LOSS)
    pairs = list(product(*(comparison.kinds[k] for k in (kind, dense))))
    for what, name in (("active parameters", "params_active"), ("tokens seen", "tokens_seen")):
        unequal = [(a.model[name], b.model[name]) for a, b in pairs]
        unequal = [each for each in unequal if not equal(*each)]
        if unequal:
            ours, theirs = map(_size_written, unequal[0])
            sentence += f", but {what} are not equal: {ours}, of {dense} {theirs}"
            verdict = NONE
    return Evidence(kind, verdict, sentence, decides)


def equal(a: int | None, b: int | None) -> bool:
    """Whether two sizes are known and the same but for `EQUAL`."""
    if not a or not b:
        return False
    return abs(a / b - 1) <= EQUAL


def _size_written(value: int | None) -> str:
    return f"{value:,}" if value else "not known"
