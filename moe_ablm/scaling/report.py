"""One self-contained HTML page of a fit: tables, sentences and figures, no script and no link."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from moe_ablm.page import image_html, lines_html, table_html, write_page
from moe_ablm.scaling.analysis import Analysis
from moe_ablm.scaling.published import Study
from moe_ablm.scaling.tables import (
    coefficient_table,
    delta_table,
    dropped_lines,
    published_lines,
    summary_lines,
)


def rich_html(table: Table) -> str:
    """A rich table as an HTML table."""
    rows = zip(*(list(c.cells) for c in table.columns), strict=True)
    cells = [[str(cell) for cell in row] for row in rows]
    return table_html([str(c.header) for c in table.columns], cells, str(table.title or ""))


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
        rich_html(coefficient_table(fit, study)),
        lines_html(published_lines(fit, study)) if study else "",
        lines_html(summary_lines(analysis)),
        *(rich_html(t) for t in tables),
    ]
    for name, path in figures.items():
        alt = name.replace("_", " ")
        parts.append(f"<h2>{escape(alt)}</h2>{image_html(path, alt)}")
    if analysis.deltas:
        parts.append(rich_html(delta_table(analysis)))
    dropped = dropped_lines(fit)
    if dropped:
        parts.append("<h2>rows left out</h2>" + lines_html(dropped))
    return write_page(directory / "report.html", fit.law.name, parts)
