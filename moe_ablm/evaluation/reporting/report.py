"""`report.html` of an evaluation: settings, results with intervals, and how to reproduce them.

One file without scripts and links to elsewhere, made of `results.json` and the figures alone.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe_ablm.evaluation.declared import CLAIMS
from moe_ablm.evaluation.reporting.references import HEADLINES, Headline
from moe_ablm.evaluation.suite import SKIPPED, module_of
from moe_ablm.files import json_text
from moe_ablm.page import cells_html, image_html, lines_html, text_html, write_page

# longer tables are folded away
LONG = 40
# a number as `suite.as_json` keeps it
Kept = Mapping[str, Any]
READING = (
    "Published values are of other models on other data: they say what size of number to expect. "
    "Brackets hold 95 % intervals. Where a metric is a mean over residues or antibodies they are "
    "percentile intervals of a bootstrap over clonal clusters; the notes of a section say where "
    "they are of another kind. They tell how much other antibodies of the same kind would change "
    "a number, not how much another training run would: for that, evaluate several seeds and use "
    "the verb compare."
)


def write_report(out: Path, content: Mapping[str, Any], command: Sequence[str]) -> Path:
    """Writes `out/report.html`.

    Args:
      out: directory of an evaluation, with its figures.
      content: what `out/results.json` holds.
      command: the command line without its suite.
    """
    evaluations = content["evaluations"]
    name = content["model"]["source"].split(",")[0]
    parts = [
        f"<h1>Evaluation of {escape(name)}</h1>",
        facts_html(_facts(content)),
        _contents(evaluations),
        '<h2 id="summary">Summary</h2>',
        _summary(evaluations),
        f'<p class="faint">{escape(READING)}</p>',
    ]
    for each, kept in evaluations.items():
        parts += section(each, kept, out / each, command)
    return write_page(out / "report.html", f"Evaluation of {name}", parts)


def facts_html(facts: Mapping[str, str]) -> str:
    """Names and values, a line each."""
    rows = [f"<th>{escape(k)}</th><td>{escape(v)}</td>" for k, v in facts.items() if v]
    return cells_html([], rows)


def _facts(content: Mapping[str, Any]) -> dict[str, str]:
    model, dataset = content["model"], content["dataset"]
    tokens = f"{tokens_written(model)} tokens" if model["tokens_seen"] else ""
    files = [
        f"{name}: {Path(file['name']).name}"
        for name, identities in content["files"].items()
        for file in identities
    ]
    return {
        "Model": model["source"],
        "Router": model["router"],
        "Null": model.get("null", ""),
        "Parameters": parameters_written(model),
        "Trained on": ", ".join(filter(None, (tokens, model["regime"]))),
        "Weights": f"sha256 {model['sha256'][:16]}, of encoder, row and parameters "
        "(params_sha256 of run.json is of the parameters alone)",
        "Dataset": f"{dataset['path']}, sha256 {dataset['sha256'][:16]}" if dataset else "none",
        "Files": ", ".join(files),
        "Seed of all draws": str(content["seed"]),
        "Claims declared before": ", ".join(content.get(CLAIMS, [])),
        "Precision": content["precision"],
        "Versions": ", ".join(f"{k} {v}" for k, v in content["versions"].items()),
    }


def parameters_written(model: Mapping[str, Any]) -> str:
    """Parameters of a model in words."""
    total, active = model["params_total"], model["params_active"]
    return f"{total:,}" if total == active else f"{total:,}, of which {active:,} active"


def tokens_written(model: Mapping[str, Any]) -> str:
    """Tokens that a model has seen; "" where that is not known."""
    return f"{model['tokens_seen']:,}" if model["tokens_seen"] else ""


def headline_written(headline: Headline, labels: Mapping[str, str]) -> str:
    """A headline in words, with the labels that distinguish its number from others that match."""
    others = [v for k, v in labels.items() if k not in dict(headline.labels)]
    return headline.text + (f" ({', '.join(others)})" if others else "")


def _contents(evaluations: Mapping[str, Kept]) -> str:
    links = [("summary", "Summary"), *((name, kept["title"]) for name, kept in evaluations.items())]
    items = "".join(f'<li><a href="#{escape(a)}">{escape(b)}</a></li>' for a, b in links)
    return f"<nav><ol>{items}</ol></nav>"


def _summary(evaluations: Mapping[str, Kept]) -> str:
    """A line for each headline of each evaluation."""
    rows = []
    for name, kept in evaluations.items():
        title = f'<th><a href="#{escape(name)}">{escape(kept["title"])}</a></th>'
        if kept["status"] == SKIPPED:
            rows.append(
                f'{title}<td colspan="3"><span class="tag open">skipped</span> '
                f"{text_html(kept['reason'])}</td>"
            )
            continue
        lines = [_line(headline, number) for headline, number in headlines(name, kept["numbers"])]
        for place, line in enumerate(lines or ['<td colspan="3">see its section</td>']):
            rows.append((title if place == 0 else "<th></th>") + line)
    head = ("Evaluation", "What", "Value [95 % interval]", "Published, of other models")
    return cells_html([f"<th>{escape(h)}</th>" for h in head], rows)


def _line(headline: Headline, number: Kept) -> str:
    value, _, rest = interval_written(number).partition(" ")
    text = headline_written(headline, number["labels"])
    return (
        f'<td>{escape(text)}</td><td style="white-space:nowrap"><b>{escape(value)}</b> '
        f'<span class="faint">{escape(rest)} {escape(number["unit"])}</span></td>'
        f'<td class="faint">{escape(headline.published)}</td>'
    )


def headlines(name: str, numbers: Sequence[Kept]) -> list[tuple[Headline, Kept]]:
    """The headline numbers that an evaluation has, for the summary."""
    lines = []
    for headline in HEADLINES.get(name, ()):
        number = next((n for n in numbers if _matches(headline, n)), None)
        if number is not None and number["value"] is not None:
            lines.append((headline, number))
    return lines


def _matches(headline: Headline, number: Kept) -> bool:
    labels = number["labels"]
    return number["metric"] == headline.metric and all(
        labels.get(k) == v for k, v in headline.labels
    )


def section(name: str, kept: Kept, directory: Path, command: Sequence[str]) -> list[str]:
    """All of one evaluation."""
    parts = [
        f'<h2 id="{escape(name)}">{escape(kept["title"])}</h2>',
        f"<p>{escape(kept['about'])}</p>",
    ]
    if kept["status"] == SKIPPED:
        reason = f'<span class="tag open">skipped</span> {escape(kept["reason"])}'
        return [*parts, f"<p>{reason}</p>", _alone(name, kept, command)]
    if kept["notes"]:
        parts.append(lines_html(kept["notes"]))
    parts += [numbers_table(kept["numbers"], table) for table in kept["tables"]]
    for picture in kept["pictures"]:
        image = image_html(directory / picture["file"], picture["caption"])
        parts.append(
            f"<figure>{image}<figcaption>{escape(picture['caption'])}</figcaption></figure>"
        )
    return [*parts, _alone(name, kept, command)]


def _alone(name: str, kept: Kept, command: Sequence[str]) -> str:
    """How to do one evaluation again."""
    took = f"This evaluation alone ({kept['seconds']:.0f} s here)"
    settings, defaults = kept["settings"], dataclasses.asdict(module_of(name).Settings())
    if settings == json.loads(json_text(defaults)):
        line = shlex.join([*command, "--suite", name, "--out", f"evaluation-{name}"])
        return f'<p class="faint">{took}:</p><pre>{escape(line)}</pre>'
    line = shlex.join([*command, "--suite", f"{name}.py", "--out", f"evaluation-{name}"])
    file = (
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({ {name: settings}!r})\n"
    )
    return (
        f'<p class="faint">{took}, with {escape(name)}.py as below:</p>'
        f"<pre>{escape(line)}\n\n# {escape(name)}.py\n{escape(file)}</pre>"
    )


def decimals(value: float, low: float | None, high: float | None) -> int:
    """How many a value deserves: the interval's width to two digits, else four of the value."""
    size = high - low if low is not None and high is not None else 0
    if size > 0 and math.isfinite(size):
        return max(0, min(6, 1 - math.floor(math.log10(size))))
    return max(0, min(6, 3 - math.floor(math.log10(abs(value))))) if value else 0


def written(value: float | None, places: int | None = None) -> str:
    """A value; "-" where it is not defined."""
    if value is None or not math.isfinite(value):
        return "-"
    if 0 < abs(value) < 1e-4 and (places is None or places >= 6):
        return f"{value:.2e}".replace("-", "\N{MINUS SIGN}")
    # a real minus is as wide as a plus, and is not torn from its number at a line's end
    text = f"{value:,.{decimals(value, None, None) if places is None else places}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def deserved(number: Kept) -> int:
    """`decimals` of a number."""
    return decimals(number["value"] or 0, number["low"], number["high"])


def interval_written(number: Kept, places: int | None = None) -> str:
    """As "0.293 [0.281, 0.305]"; without brackets where there is no interval."""
    value, low, high = (number[key] for key in ("value", "low", "high"))
    if value is None or not math.isfinite(value):
        return "-"
    if places is None or 0 < abs(value) < 10**-places:
        places = deserved(number)
    if low is None or high is None or not math.isfinite(high - low):
        return written(value, places)
    return f"{written(value, places)} [{written(low, places)}, {written(high, places)}]"


def name_written(name: str) -> str:
    """Metrics and labels in words."""
    return name.replace("_", " ")


def numbers_table(numbers: Iterable[Kept], table: Mapping[str, Any]) -> str:
    """A table of an evaluation in HTML, "" where no number belongs to it.

    Args:
      numbers: all of the evaluation.
      table: an `outcome.Table` as JSON; numbers without one of its labels are left to others.
        Labels that differ but are named nowhere in it become labels of rows, so that no number
        hides another.
    """
    where, metrics, across = dict(table["where"]), list(table["metrics"]), table["columns"]
    needed = {*table["rows"], *where} | ({across} if across else set())
    chosen = [
        n
        for n in numbers
        if n["metric"] in metrics
        and needed <= n["labels"].keys()
        and all(n["labels"][k] == v for k, v in where.items())
    ]
    if not chosen:
        return ""
    keys = _row_labels(chosen, [*table["rows"]], {across, *where})
    grid: dict[tuple, dict[tuple, Kept]] = {}
    for number in chosen:
        labels = number["labels"]
        row = grid.setdefault(tuple(labels.get(k, "") for k in keys), {})
        row.setdefault((labels.get(across, ""), number["metric"]), number)
    values = dict.fromkeys(n["labels"].get(across, "") for n in chosen)
    have = {(n["labels"].get(across, ""), n["metric"]) for n in chosen}
    columns = [(v, m) for v in values for m in metrics if (v, m) in have]
    html = cells_html(_head(keys, columns, chosen), _rows(grid, columns), table["title"])
    if len(grid) <= LONG:
        return html
    title = f"{table['title']} ({len(grid):,} rows)"
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def _row_labels(chosen: Sequence[Kept], keys: list[str], known: set[str]) -> list[str]:
    others = dict.fromkeys(k for n in chosen for k in n["labels"] if k not in known | {*keys})
    return keys + [k for k in others if len({n["labels"].get(k) for n in chosen}) > 1]


def _head(keys: Sequence[str], columns: Sequence[tuple], chosen: Sequence[Kept]) -> list[str]:
    units = {n["metric"]: n["unit"] for n in chosen}
    several = len({metric for _, metric in columns}) > 1
    head = [f"<th>{escape(name_written(key))}</th>" for key in keys]
    for place, (value, metric) in enumerate(columns):
        name = name_written(metric) + (f" ({units[metric]})" if units[metric] else "")
        text = value if value and not several else f"{value} {name}".strip()
        head.append(f'<th class="number">{escape(text)}</th>')
        if place == 0 and _drawn(columns):
            head.append("<th></th>")
    return [*head, '<th class="number">n</th>']


def _drawn(columns: Sequence[tuple]) -> bool:
    """Whether intervals are drawn, too: those of the first metric, not of a table of two ways."""
    return all(not value for value, _ in columns)


def _rows(grid: Mapping[tuple, Mapping[tuple, Kept]], columns: Sequence[tuple]) -> list[str]:
    of = {c: [row[c] for row in grid.values() if c in row] for c in columns}
    # one column, one number of decimals, so that its values can be compared at a glance
    places = {c: sorted(map(deserved, numbers))[len(numbers) // 2] for c, numbers in of.items()}
    axis = _axis(of[columns[0]])
    rows = []
    for labels, row in grid.items():
        cells = "".join(f"<th>{escape(str(label))}</th>" for label in labels)
        sizes = {row[c]["n"] for c in columns if c in row}
        for place, column in enumerate(columns):
            cells += _cell(row.get(column), places[column], alone=len(sizes) > 1)
            if place == 0 and _drawn(columns):
                cells += f"<td>{whisker(row.get(column), axis)}</td>"
        n = f"{sizes.pop():,}" if len(sizes) == 1 else ""
        rows.append(cells + f'<td class="number faint">{"" if n == "0" else n}</td>')
    return rows


def _cell(number: Kept | None, places: int, alone: bool) -> str:
    """A value, its interval fainter; with its own n where the row's numbers have different ones."""
    if number is None:
        return '<td class="number">-</td>'
    value, _, rest = interval_written(number, places).partition(" ")
    if alone and number["n"]:
        rest += f" n={number['n']:,}"
    faint = f' <span class="faint">{escape(rest)}</span>' if rest else ""
    return f'<td class="number">{escape(value)}{faint}</td>'


def _axis(numbers: Sequence[Kept]) -> tuple[float, float] | None:
    """Ends of a common axis for intervals, None where drawing them shows nothing."""
    ends = [n[k] for n in numbers for k in ("low", "high") if n[k] is not None]
    if len(ends) < 4 or min(ends) >= max(ends):
        return None
    return min(ends), max(ends)


def whisker(number: Kept | None, axis: tuple[float, float] | None, width: int = 150) -> str:
    """An interval as a line with a dot, drawn to the axis; a hair at zero where it crosses."""
    if not axis or not number or None in (number["value"], number["low"], number["high"]):
        return ""
    low, high = axis
    x = [4 + (width - 8) * (number[k] - low) / (high - low) for k in ("low", "value", "high")]
    at_zero = 4 + (width - 8) * (0 - low) / (high - low)
    hair = f'<path d="M{at_zero:.1f} 0V16" stroke="#b9c1cb"/>' if low < 0 < high else ""
    return (
        f'<svg width="{width}" height="16" viewBox="0 0 {width} 16" aria-hidden="true">{hair}'
        f'<path d="M{x[0]:.1f} 8H{x[2]:.1f}" stroke="#1f5a96" stroke-width="1.6"/>'
        f'<circle cx="{x[1]:.1f}" cy="8" r="3" fill="#1f5a96"/></svg>'
    )
