"""Comparison of evaluated models: kinds of model, seeds of a kind, differences and claims."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.experts.matching import stability as seed_agreement
from moe_ablm.evaluation.kinds import Estimate, holm, kinds_of
from moe_ablm.evaluation.reporting.results import Evaluated, key
from moe_ablm.evaluation.suite import EVALUATIONS, as_json
from moe_ablm.files import shortened

SCHEMA = "moe_ablm.comparison/1"


@dataclass(frozen=True)
class Compared:
    """A metric of a kind, or how much more it is than that of another kind.

    Attributes:
      evaluation, metric, labels, unit: as in the evaluations.
      kind: of model.
      reference: the kind that is subtracted; "": the value of `kind` itself.
      estimate: mean over seeds with its interval.
      adjusted: p of a difference, for how many differences its evaluation has (Holm).
    """

    evaluation: str
    metric: str
    labels: Mapping[str, str]
    unit: str
    kind: str
    reference: str
    estimate: Estimate
    adjusted: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Results of several models side by side.

    Attributes:
      runs: models, those of the reference kind first.
      results: values and differences of what is a mean over units.
      stability: agreement of experts of seeds of a kind.
      notes: what could not be compared.
    """

    runs: Sequence[Evaluated]
    results: Sequence[Compared]
    stability: Sequence[Number] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def kinds(self) -> dict[str, list[Evaluated]]:
        """Seeds of each kind, the reference first."""
        return by_kind(self.runs)

    def value(self, evaluation: str, metric: str, kind: str, **labels: str) -> Estimate | None:
        """A metric of `kind`; None where it is not known of all its seeds."""
        return self.difference(evaluation, metric, kind, "", **labels)

    def difference(
        self, evaluation: str, metric: str, kind: str, reference: str, **labels: str
    ) -> Estimate | None:
        """How much more a metric of `kind` is than that of `reference`; None where not known."""
        for r in self.results:
            if (r.evaluation, r.metric) == (evaluation, metric) and {*labels.items()} <= {
                *r.labels.items()
            }:
                if (r.kind, r.reference) == (kind, reference):
                    return r.estimate
                if (r.kind, r.reference) == (reference, kind):
                    return r.estimate.turned()
        return None


def by_kind(runs: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """Models by kind, in the order of first appearance."""
    kinds: dict[str, list[Evaluated]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    return kinds


def compare(runs: Sequence[Evaluated]) -> Comparison:
    """Compares models on all that their evaluations have in common.

    Args:
      runs: checked by `results.require_same_basis`; differences are a kind less an earlier one.
    """
    results, notes = [], []
    for evaluation in EVALUATIONS:
        kinds = {}
        for kind, members in by_kind(runs).items():
            without = [r for r in members if not r.done(evaluation)]
            if without and len(without) < len(members):
                notes.append(
                    f"{evaluation}: {kind} is left out, as {without[0].directory} has none "
                    f"({without[0].why_not(evaluation)})"
                )
            if not without:
                kinds[kind] = members
        results += _compared(evaluation, kinds)
    return Comparison(runs, results, stability(runs), notes)


def _compared(evaluation: str, kinds: Mapping[str, Sequence[Evaluated]]) -> list[Compared]:
    """Every metric of an evaluation that all seeds of a kind have."""
    tables = {
        kind: [{key(s.metric, s.labels): s for s in r.samples(evaluation)} for r in members]
        for kind, members in kinds.items()
    }
    keys = dict.fromkeys(k for members in tables.values() for t in members for k in t)
    results = []
    for each in keys:
        if "expert" in dict(each[1]):  # number 3 of one seed is not number 3 of another
            continue
        have = {
            kind: [t[each] for t in members]
            for kind, members in tables.items()
            if all(each in t for t in members)
        }
        results += _estimates(evaluation, have)
    adjusted = holm([r.estimate.p if r.reference else math.nan for r in results])
    return [replace(r, adjusted=float(p)) for r, p in zip(results, adjusted, strict=True)]


def _estimates(evaluation: str, samples: Mapping[str, Sequence[Sample]]) -> list[Compared]:
    by_kind = kinds_of(samples) if samples else None
    if by_kind is None:
        return []
    head = next(iter(samples.values()))[0]
    about = (evaluation, head.metric, dict(head.labels), head.unit)
    means = [Compared(*about, kind, "", by_kind.mean(kind)) for kind in samples]
    return means + [
        Compared(*about, kind, reference, by_kind.difference(kind, reference))
        for reference, kind in combinations(samples, 2)
    ]


def stability(runs: Sequence[Evaluated]) -> list[Number]:
    """Agreement of specialisation of every two seeds of a kind."""
    numbers = []
    for kind, members in by_kind(runs).items():
        routed = [r for r in members if r.done("routing")]
        for a, b in combinations(routed, 2):
            both = (r.content["evaluations"]["routing"] for r in (a, b))
            names = f"{a.directory.name}, {b.directory.name}"
            for number in seed_agreement(*both):
                labels = {"kind": kind, "seeds": names} | dict(number.labels)
                numbers.append(Number(**vars(number) | {"labels": labels}))
    return numbers


def as_content(comparison: Comparison, claims: Sequence[Any]) -> dict[str, Any]:
    """What `results.json` holds."""
    first = comparison.runs[0].content
    return {
        "schema": SCHEMA,
        **{part: first[part] for part in ("dataset", "files", "seed", "precision")},
        "runs": [
            {"kind": r.kind, "directory": str(r.directory), "model": dict(r.model)}
            for r in comparison.runs
        ],
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in claims],
        "results": [flat(r) | {"labels": dict(r.labels)} for r in comparison.results],
        "stability": [as_json(number) for number in comparison.stability],
        "notes": list(comparison.notes),
    }


def flat(result: Compared) -> dict[str, Any]:
    """A result without its labels; None where a value is not defined."""
    kept = as_json(
        Number(result.metric, result.estimate.value, {}, result.estimate.low, result.estimate.high)
    )
    estimate = result.estimate
    rest = {"seed_sd": estimate.seed_sd, "reference_seed_sd": estimate.reference_sd}
    rest |= {"p": estimate.p, "p_holm": result.adjusted}
    return {
        "evaluation": result.evaluation,
        "metric": result.metric,
        "kind": result.kind,
        "reference": result.reference,
        **{name: kept[name] for name in ("value", "low", "high")},
        "unit": result.unit,
        "n": result.estimate.units,
        "seeds": result.estimate.seeds,
        **{name: as_json(Number("", value))["value"] for name, value in rest.items()},
    }


def results_csv(results: Sequence[Compared]) -> str:
    """A line a value or difference, with the digits of float32; a column a label."""
    rows = [
        {k: shortened(v) for k, v in flat(result).items()} | dict(result.labels)
        for result in results
    ]
    fixed = list(flat(results[0])) if results else []
    columns = fixed + sorted({name for row in rows for name in row} - {*fixed})
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
