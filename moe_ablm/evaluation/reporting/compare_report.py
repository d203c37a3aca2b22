"""Tables, figure and sentences of a comparison: results.json, numbers.csv, report.html."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe_ablm.data.regions import region_names
from moe_ablm.evaluation.estimates import Number
from moe_ablm.evaluation.kinds import Estimate
from moe_ablm.evaluation.outcome import Table
from moe_ablm.evaluation.reporting.claims import HOLDS, NOT, Claim
from moe_ablm.evaluation.reporting.compare import Compared, Comparison, as_content, results_csv
from moe_ablm.evaluation.reporting.references import HEADLINES, Headline
from moe_ablm.evaluation.reporting.report import (
    facts_html,
    headline_written,
    name_written,
    numbers_table,
    parameters_written,
    tokens_written,
    written,
)
from moe_ablm.evaluation.reporting.results import Evaluated
from moe_ablm.evaluation.suite import as_json
from moe_ablm.files import write_atomically, write_json
from moe_ablm.page import cells_html, image_html, lines_html, write_page

ACROSS = "kinds"
STABILITY = (
    "Experts of two runs are matched one to one by what they take; the correlation of matched "
    "experts' profiles is told beside that of unrelated routers that know position only, on the "
    "same antibodies (of the length scale where they are most alike); p is the share of such pairs "
    "that are as alike. Evaluations of before have no such routers, and no p."
)
READING = (
    "Brackets hold 95 % intervals. A difference is a kind of model less another, each the mean of "
    "its seeds. Its interval is made of two levels: antibodies (clonal clusters) are drawn again, "
    "the same ones for every model; the error of the means of so few seeds is that of Student's "
    "t with the standard deviation between seeds of each kind (Welch). Where a kind has one seed "
    "that part is missing: an interval is of these models alone, and there is neither p nor "
    "verdict. Intervals are not adjusted for how many there are; p is, by Holm, for all "
    "differences of an evaluation: below 0.05, the chance of any false one among them is 5 %."
)
TAGS = {HOLDS: "yes", NOT: "no"}


def write_comparison(
    out: Path, comparison: Comparison, claims: Sequence[Claim], command: Sequence[str]
) -> list[Path]:
    """Writes results, numbers and report into `out`; returns the files."""
    results, numbers = out / "results.json", out / "numbers.csv"
    write_json(results, as_content(comparison, claims))
    write_atomically(numbers, results_csv(comparison.results))
    names = ", ".join(comparison.kinds)
    first = comparison.runs[0].content
    seeds = ", ".join(f"{kind} {len(runs)}" for kind, runs in comparison.kinds.items())
    parts = [
        f"<h1>Comparison of {escape(names)}</h1>",
        facts_html(
            {
                "Dataset": (first["dataset"] or {}).get("path", "none"),
                "Seed of all draws": str(first["seed"]),
                "Precision": first["precision"],
            }
        ),
        "<h2>What holds</h2>",
        *map(claim_html, claims),
        "<h2>Models</h2>",
        _models(comparison.runs),
        "<h2>Differences</h2>",
        f'<p class="faint">{escape(READING)} Seeds: {escape(seeds)}.</p>',
        lines_html(comparison.notes) if comparison.notes else "",
        _headline_differences(comparison),
        *_forest(comparison, out),
        *_stability(comparison),
        "<h2>All differences</h2>",
        *_everything(comparison),
        f"<pre>{escape(shlex.join(command))}</pre>",
    ]
    return [results, numbers, write_page(out / "report.html", f"Comparison of {names}", parts)]


def claim_html(claim: Claim) -> str:
    """A claim with its verdict and the findings behind it."""
    rows = [
        f"<th>{escape(f.kind)}</th><td>{_tag(f.verdict)}</td><td>{escape(f.sentence)}"
        + ("" if f.decides else ' <span class="faint">(beside)</span>')
        + "</td>"
        for f in claim.findings
    ]
    notes = f'<p class="faint">{escape(" ".join(claim.notes))}</p>' if claim.notes else ""
    return (
        f"<h3>{escape(claim.text)} {_tag(claim.verdict)}</h3><p>{escape(claim.test)}</p>"
        + cells_html([], rows)
        + notes
    )


def _tag(verdict: str) -> str:
    if not verdict:
        return ""
    return f'<span class="tag {TAGS.get(verdict, "open")}">{escape(verdict)}</span>'


def _models(runs: Sequence[Evaluated]) -> str:
    """A column a model: what it is, and the headline of each evaluation."""
    rows = {"": [run.kind for run in runs]}
    rows["directory"] = [run.directory.name for run in runs]
    rows["router"] = [run.model["router"] for run in runs]
    rows["parameters"] = [parameters_written(run.model) for run in runs]
    rows["tokens seen"] = [tokens_written(run.model) or "not known" for run in runs]
    for name, headline in _headlines():
        about = {"evaluation": name, "metric": headline.metric}
        shown = (n for run in runs for n in run.numbers(**about, **dict(headline.labels)))
        if first := next(shown, None):
            each = [run.numbers(**about, **first.labels) for run in runs]
            text = headline_written(headline, first.labels)
            rows[text] = [written(numbers[0].value) if numbers else "-" for numbers in each]
    head = [f"<th>{escape(cell)}</th>" for cell in ["", *rows.pop("")]]
    body = [
        f"<th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        for name, cells in rows.items()
    ]
    return cells_html(head, body)


def _headlines() -> list[tuple[str, Headline]]:
    return [(name, headline) for name, each in HEADLINES.items() for headline in each]


def _headline_differences(comparison: Comparison) -> str:
    """Of the headline numbers that are means over units."""
    lines = []
    for name, headline in _headlines():
        wanted = {("metric", headline.metric), *headline.labels}
        for result in comparison.results:
            labels = {("metric", result.metric), *result.labels.items()}
            if result.evaluation == name and wanted <= labels:
                lines.append((result, {"what": headline_written(headline, result.labels)}))
    return _table("Headline numbers", lines, "what")


def _everything(comparison: Comparison) -> list[str]:
    """A table for each evaluation."""
    titles = {
        name: kept["title"]
        for run in comparison.runs
        for name, kept in run.content["evaluations"].items()
    }
    lines: dict[str, list] = {}
    for result in comparison.results:
        labels = {"metric": name_written(result.metric)} | dict(result.labels)
        lines.setdefault(result.evaluation, []).append((result, labels))
    return [_table(titles[name], each, "metric") for name, each in lines.items()]


def _table(title: str, lines: Sequence[tuple[Compared, dict[str, str]]], first: str) -> str:
    """Differences with labels of their own; a column two kinds, and how much seeds vary."""
    lines = [(result, labels) for result, labels in lines if result.reference]
    kept = [
        as_json(replace(number, n=r.estimate.units, unit=r.unit))
        for r, labels in lines
        for number in _cells(r, labels)
    ]
    return numbers_table(kept, asdict(Table(title, ("",), (first,), ACROSS)))


def _cells(result: Compared, labels: Mapping[str, str]) -> list[Number]:
    """A difference, its adjusted p, and how much seeds of both kinds vary."""
    pair, e = f"{result.kind} less {result.reference}", result.estimate
    beside = {
        f"p (Holm), {pair}": result.adjusted,
        f"sd between seeds, {result.reference}": e.reference_sd,
        f"sd between seeds, {result.kind}": e.seed_sd,
    }
    return [
        Number("", e.value, {**labels, ACROSS: pair}, e.low, e.high),
        *(Number("", value, {**labels, ACROSS: column}) for column, value in beside.items()),
    ]


def _forest(comparison: Comparison, out: Path) -> list[str]:
    """The picture of differences by region, [] where there are none."""
    kinds = list(comparison.kinds)
    by_kind = {
        kind: [
            comparison.difference(
                "perplexity", "loss", kind, kinds[0], **{"test set": "paired", "region": region}
            )
            for region in ("all", *region_names())
        ]
        for kind in kinds[1:]
    }
    if not any(any(each) for each in by_kind.values()):
        return []
    figure = draw_forest(by_kind, ("all", *region_names()), kinds[0])
    file = out / "loss_by_region.png"
    figure.savefig(file, dpi=130)
    caption = (
        f"Loss on masked residues of pairs, by region: each kind less {kinds[0]}; left of 0 is a "
        "lower loss. Bars are 95 % intervals over antibodies and seeds."
    )
    image = image_html(file, caption)
    return [f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"]


def draw_forest(
    by_kind: Mapping[str, Sequence[Estimate | None]], names: Sequence[str], reference: str
) -> Figure:
    """A line an entry of `names`, a colour a kind; bars are intervals."""
    figure = Figure(figsize=(7.5, 1.2 + 0.36 * len(names)), layout="constrained")
    axis = figure.subplots()
    step = 0.7 / len(by_kind)
    for place, (kind, estimates) in enumerate(by_kind.items()):
        kept = [(y, e) for y, e in enumerate(estimates) if e is not None]
        if not kept:
            continue
        y = np.array([y for y, _ in kept]) + step * (place - (len(by_kind) - 1) / 2)
        value, low, high = np.array([(e.value, e.low, e.high) for _, e in kept]).T
        axis.errorbar(value, y, xerr=[value - low, high - value], fmt="o", ms=4, label=kind)
    axis.axvline(0, color="0.4", lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    axis.set(xlabel=f"difference of loss to {reference} (nats)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def _stability(comparison: Comparison) -> list[str]:
    """Agreement of experts between seeds."""
    if not comparison.stability:
        return []
    numbers = [as_json(number) for number in comparison.stability]
    metrics = tuple(dict.fromkeys(n["metric"] for n in numbers))
    table = Table("By layer", metrics, ("kind", "seeds", "layer"))
    return [
        "<h2>Do seeds of a kind specialise alike?</h2>",
        f"<p>{escape(STABILITY)}</p>",
        numbers_table(numbers, asdict(table)),
    ]
