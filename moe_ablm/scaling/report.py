"""One self-contained HTML page of a fit: tables, sentences and figures, no script and no link."""

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from moe_ablm.scaling.analysis import Analysis
from moe_ablm.scaling.published import Study
from moe_ablm.scaling.tables import (
    coefficient_table,
    delta_table,
    dropped_lines,
    published_lines,
    summary_lines,
)

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;"
    "color:#222}table{border-collapse:collapse;font-size:13px;margin:1em 0}"
    "th,td{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left;vertical-align:top}"
    "img{max-width:100%}caption{text-align:left;font-weight:600;padding:.3em 0}"
    "code{background:#f4f4f4;padding:.1em .3em}"
)


def table_html(table: Table) -> str:
    """A rich table as an HTML table."""
    head = "".join(f"<th>{escape(str(c.header))}</th>" for c in table.columns)
    columns = [list(c.cells) for c in table.columns]
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in zip(*columns, strict=True)
    )
    caption = f"<caption>{escape(str(table.title or ''))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def lines_html(lines: Sequence[str]) -> str:
    """Sentences as an HTML list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def write_report(
    directory: Path,
    analysis: Analysis,
    figures: Mapping[str, Path],
    tables: Sequence[Table] = (),
    sentences: Sequence[str] = (),
    study: Study | None = None,
) -> Path:
    """Writes `report.html` into `directory`; `figures` are SVG files to embed, by name."""
    fit = analysis.fit
    parts = [
        f"<h1>Scaling law: {escape(fit.law.name)}</h1>",
        f"<p><code>{escape(fit.law.equation)}</code><br>{escape(fit.law.source)}</p>",
        "".join(f"<p><b>{escape(s)}</b></p>" for s in sentences),
        table_html(coefficient_table(fit, study)),
        lines_html(published_lines(fit, study)) if study else "",
        lines_html(summary_lines(analysis)),
        *(table_html(t) for t in tables),
    ]
    for name, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        alt = escape(name.replace("_", " "))
        parts.append(f'<h2>{alt}</h2><img alt="{alt}" src="data:image/svg+xml;base64,{data}">')
    if analysis.deltas:
        parts.append(table_html(delta_table(analysis)))
    dropped = dropped_lines(fit)
    if dropped:
        parts.append("<h2>rows left out</h2>" + lines_html(dropped))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(fit.law.name)}</title><style>{STYLE}</style></head><body>"
        + "".join(parts)
        + "</body></html>\n"
    )
    path = directory / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path
