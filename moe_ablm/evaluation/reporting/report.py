"""`report.html` of an evaluation: what was asked, the answers with intervals, and how to redo them.

One file without scripts and links to elsewhere, made of `results.json` and the figures alone.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe_ablm.evaluation.reporting.layout import Kept, interval_written, numbers_table
from moe_ablm.evaluation.reporting.references import HEADLINES, Headline
from moe_ablm.evaluation.suite import SKIPPED, module_of
from moe_ablm.page import cells_html, image_html, lines_html, write_page

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
    found = content["evaluations"]
    name = content["model"]["source"].split(",")[0]
    parts = [
        f"<h1>Evaluation of {escape(name)}</h1>",
        facts_html(_facts(content)),
        _contents(found),
        '<h2 id="summary">Summary</h2>',
        _summary(found),
        f'<p class="faint">{escape(READING)}</p>',
    ]
    for each, kept in found.items():
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
        for name, found in content["files"].items()
        for file in found
    ]
    return {
        "Model": model["source"],
        "Router": model["router"],
        "Parameters": parameters_written(model),
        "Trained on": ", ".join(filter(None, (tokens, model["regime"]))),
        "Weights": f"sha256 {model['sha256'][:16]}",
        "Dataset": f"{dataset['path']}, sha256 {dataset['sha256'][:16]}" if dataset else "none",
        "Files": ", ".join(files),
        "Seed of all draws": str(content["seed"]),
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
    """A headline in words, with the labels that tell its number from others that would fit."""
    others = [v for k, v in labels.items() if k not in dict(headline.labels)]
    return headline.text + (f" ({', '.join(others)})" if others else "")


def _contents(found: Mapping[str, Kept]) -> str:
    links = [("summary", "Summary"), *((name, kept["title"]) for name, kept in found.items())]
    items = "".join(f'<li><a href="#{escape(a)}">{escape(b)}</a></li>' for a, b in links)
    return f"<nav><ol>{items}</ol></nav>"


def _summary(found: Mapping[str, Kept]) -> str:
    """A line for each headline of each evaluation."""
    rows = []
    for name, kept in found.items():
        title = f'<th><a href="#{escape(name)}">{escape(kept["title"])}</a></th>'
        if kept["status"] == SKIPPED:
            rows.append(
                f'{title}<td colspan="3"><span class="tag open">skipped</span> '
                f"{escape(kept['reason'])}</td>"
            )
            continue
        lines = headlines(name, kept["numbers"]) or [(None, None)]
        for place, (headline, number) in enumerate(lines):
            rows.append((title if place == 0 else "<th></th>") + _line(headline, number))
    head = ("Evaluation", "What", "Value [95 % interval]", "Published, of other models")
    return cells_html([f"<th>{escape(h)}</th>" for h in head], rows)


def _line(headline: Headline | None, number: Kept | None) -> str:
    if headline is None:
        return '<td colspan="3">see its section</td>'
    value, _, rest = interval_written(number).partition(" ")
    text = headline_written(headline, number["labels"])
    return (
        f'<td>{escape(text)}</td><td style="white-space:nowrap"><b>{escape(value)}</b> '
        f'<span class="faint">{escape(rest)} {escape(number["unit"])}</span></td>'
        f'<td class="faint">{escape(headline.published)}</td>'
    )


def headlines(name: str, numbers: Sequence[Kept]) -> list[tuple[Headline, Kept]]:
    """Numbers of an evaluation that the summary tells, those that are there."""
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
        told = f'<span class="tag open">skipped</span> {escape(kept["reason"])}'
        return [*parts, f"<p>{told}</p>", _alone(name, kept, command)]
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
    if settings == json.loads(json.dumps(defaults)):
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
