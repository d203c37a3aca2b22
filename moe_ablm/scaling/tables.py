"""What a fit says: rich tables and sentences for the terminal, and one HTML page of both."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_ablm.page import image_html, lines_html, table_html, write_page
from moe_ablm.scaling.advice import Advice, DataValue
from moe_ablm.scaling.approaches import Approach
from moe_ablm.scaling.design import Design
from moe_ablm.scaling.forecast import Forecast
from moe_ablm.scaling.published import Study, published_objective, rounded_objective
from moe_ablm.scaling.ranking import Candidate
from moe_ablm.scaling.result import Fit, Interval
from moe_ablm.scaling.selection import Analysis, Score
from moe_ablm.scaling.tuning import TuningFit

SHOWN_DROPS = 8
# Reasons that differ from row to row, and their common part.
KINDS = {
    "not the last step": "not the last step of its run",
    "not the best": "not the best setting of its cell",
    "duplicate of": "duplicate of a row before it",
}


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text: `u[soft]` is a name and not markup."""
    table.add_row(*(Text(cell) for cell in cells))


def number(value: float | None) -> str:
    """Five significant digits; thousands grouped for large numbers."""
    if value is None:
        return "open"
    if not math.isfinite(value):
        return str(value)
    if 1e4 <= abs(value) < 1e13:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def interval_text(item: Interval) -> str:
    """Both ends; open sides and open intervals say so."""
    return f"{number(item.low)} .. {number(item.high)}" + (", open" if item.open else "")


def rows_of(fit: Fit) -> list[tuple[str, float, str]]:
    """Coefficients, then derived quantities: name, value, verdict."""
    rows = [(n, v, fit.verdicts.get(n, "")) for n, v in fit.coefficients.items()]
    return rows + [(n, v, fit.derived_verdicts.get(n, "derived")) for n, v in fit.derived.items()]


def methods_of(fit: Fit) -> list[str]:
    """Names of the methods that made this fit's intervals."""
    return list(dict.fromkeys(i.method for items in fit.intervals.values() for i in items))


def coefficient_table(fit: Fit, study: Study | None = None) -> Table:
    """Value, interval of each method, published value, verdict."""
    table = Table(title=f"{fit.law.name}: {fit.law.equation}", title_justify="left")
    table.add_column("quantity")
    table.add_column("ours", justify="right")
    if study:
        table.add_column(f"published ({study.source})", justify="right")
    methods = methods_of(fit)
    for method in methods:
        table.add_column(f"95 % {method}" if method != "bootstrap" else "95 % bootstrap (SE)")
    table.add_column("verdict")
    for name, value, verdict in rows_of(fit):
        cells = [name, number(value)]
        if study:
            cells.append(_published(study, name))
        by_method = {i.method: i for i in fit.intervals.get(name, ())}
        for method in methods:
            item = by_method.get(method)
            text = "" if item is None else interval_text(item)
            if item is not None and item.se is not None:
                text += f" ({number(item.se)})"
            if item is not None and item.se_log is not None:
                text += f" (ln: {number(item.se_log)})"
            cells.append(text)
        add_row(table, *cells, verdict)
    return table


def _published(study: Study, name: str) -> str:
    if name not in study.values:
        return ""
    text = number(study.values[name])
    return f"{text} ({number(study.errors[name])})" if name in study.errors else text


def summary_lines(analysis: Analysis) -> list[str]:
    """Status, objective, noise and notes, one sentence per line."""
    fit = analysis.fit
    delta = "least squares" if math.isinf(fit.huber_delta) else f"Huber delta {fit.huber_delta:.3g}"
    lines = [
        f"status: {fit.status}; {fit.n} runs; objective {fit.objective:.7g} (sum); {delta} "
        f"({fit.delta_source})"
    ]
    if math.isfinite(fit.condition):
        lines.append(f"condition number of the scaled Jacobian: {fit.condition:.3g}")
    if fit.at_bounds:
        lines.append(f"at a bound: {', '.join(fit.at_bounds)}")
    for name, verdict in fit.verdicts.items():
        if verdict not in ("identified", "fixed"):
            lines.append(f"{name}: {verdict}")
    boot = analysis.boot
    if boot is not None and fit.draws_lost:
        lines.append(
            f"{fit.draws_lost} of {fit.draws} bootstrap draws did not converge and are left out"
        )
    noise = {
        i.note for items in fit.intervals.values() for i in items if i.method.startswith("para")
    }
    lines += sorted(noise)[:3]
    lof = analysis.lack_of_fit
    if lof is not None:
        word = "the law misses more than noise" if lof.p_value < 0.05 else "no lack of fit seen"
        lines.append(
            f"seed sd of ln L {lof.seed_sd:.3g} from replicates; lack of fit F{lof.freedom} = "
            f"{lof.statistic:.3g}, p = {lof.p_value:.2g}: {word}"
        )
    return lines + list(fit.notes)


def dropped_lines(fit: Fit) -> list[str]:
    """Rows that were left out, one line per reason."""
    reasons: dict[str, list[str]] = {}
    for source, reason in fit.runs.dropped:
        kind = next((text for start, text in KINDS.items() if reason.startswith(start)), reason)
        reasons.setdefault(kind, []).append(source)
    lines = []
    for reason, sources in list(reasons.items())[:SHOWN_DROPS]:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        lines.append(f"dropped {sources[0]}{more}: {reason}")
    if len(reasons) > SHOWN_DROPS:
        lines.append(f"... and {len(reasons) - SHOWN_DROPS} more reasons; all are in fit.json")
    return lines


def published_lines(fit: Fit, study: Study) -> list[str]:
    """The remark on the published point, and our objective there."""
    lines = [f"published: {study.remark}"] if study.remark else []
    there = published_objective(fit, study)
    if there is not None:
        better = "it is not the minimum" if there > fit.objective * (1 + 1e-6) else "no worse"
        rounded = rounded_objective(fit, study)
        if rounded is not None and there <= max(rounded, fit.objective * (1 + 1e-6)):
            better = (
                f"the rounding to {study.decimals} decimals explains it, ours rounded so gives "
                f"{rounded:.7g}"
            )
        lines.append(
            f"our objective at the published point is {there:.7g}, at ours {fit.objective:.7g}: "
            f"{better}"
        )
    absent = [name for name in study.values if name not in {*fit.coefficients, *fit.derived}]
    if absent:
        lines.append(f"published and not in this fit (other data?): {', '.join(absent)}")
    return lines


def delta_table(analysis: Analysis) -> Table:
    """How the coefficients move with the Huber delta."""
    names = list(analysis.deltas[0][1])[:8]
    table = Table(title="sensitivity to the Huber delta", title_justify="left")
    for name in ("delta", *names, "sum |residual|"):
        table.add_column(Text(name), justify="right")
    for delta, values, total in analysis.deltas:
        add_row(table, f"{delta:.2g}", *(number(values[n]) for n in names), f"{total:.5g}")
    return table


def comparison_table(scores: Sequence[Score]) -> Table:
    """Laws by AICc, with held-out errors."""
    table = Table(title="which law", title_justify="left")
    for name in (
        "law",
        "status",
        "coefficients",
        "AICc - best",
        "held-out |error| of ln L",
        "largest runs: rms error",
        "bias",
    ):
        table.add_column(name, justify="left" if name in ("law", "status") else "right")
    best = scores[0].aicc if scores else 0.0
    for s in scores:
        add_row(
            table,
            s.law,
            s.fit.status,
            str(s.parameters),
            f"{s.aicc - best:.1f}",
            f"{s.cv:.3g}",
            f"{s.largest_error:.3g}",
            f"{s.largest_bias:+.2g}",
        )
    return table


def approaches_table(made: Sequence[Approach]) -> Table:
    """Exponent of N_opt in C and N_opt of each approach, with 95 % intervals."""
    table = Table(title="approaches of Hoffmann et al. 2022", title_justify="left")
    names = list(dict.fromkeys(name for a in made for name in a.values))
    table.add_column("approach")
    for name in names:
        table.add_column(name, justify="right")
    for a in made:
        cells = []
        for name in names:
            text = number(a.values[name]) if name in a.values else ""
            if name in a.intervals:
                text += f" ({interval_text(a.intervals[name])})"
            cells.append(text)
        add_row(table, a.name, *cells)
    return table


def forecast_table(made: Sequence[Forecast]) -> Table:
    """The error at each budget of the law of the smaller ones."""
    table = Table(title="leaving the future out", title_justify="left")
    for name in ("budget (FLOPs)", "from budgets", "times beyond", "rms error of ln L", "bias"):
        table.add_column(name, justify="right")
    for f in made:
        numbers = (f"{f.flops:.3g}", str(f.used), f"{f.beyond:.3g}", f"{f.error:.2g}")
        add_row(table, *numbers, f"{f.bias:+.2g}")
    return table


def design_table(design: Design) -> Table:
    """Expected error and verdict of each coefficient."""
    table = Table(title=f"{design.law} on {design.runs} planned runs", title_justify="left")
    table.add_column("coefficient")
    table.add_column("expected error", justify="right")
    table.add_column("verdict")
    for name, verdict in design.verdicts.items():
        error = design.expected_errors.get(name)
        add_row(table, name, "" if error is None else f"{error:.3g}", verdict)
    return table


def advice_table(advice: Advice) -> Table:
    """Best models over bootstrap draws, a row per kind."""
    import numpy as np

    table = Table(title="best model under the limits, over bootstrap draws", title_justify="left")
    for name in ("kind", "draws", "parameters", "tokens", "epochs", "loss", "extrapolated"):
        table.add_column(name, justify="left" if name == "kind" else "right")

    def spread(values: np.ndarray) -> str:
        low, middle, high = np.percentile(values, [2.5, 50, 97.5])
        return f"{middle:.3g} ({low:.3g} .. {high:.3g})"

    for i, kind in enumerate(advice.kinds):
        mine = advice.kind == i
        if mine.any():
            add_row(
                table,
                kind,
                f"{mine.mean():.0%}",
                spread(advice.params[mine]),
                spread(advice.tokens[mine]),
                spread(advice.repeats[mine]),
                spread(advice.loss[mine]),
                f"{advice.at_bound[mine].mean():.0%}",
            )
    return table


def data_table(values: Sequence[DataValue], tokens_per_pair: float | None = None) -> Table:
    """The best loss at each doubling of the unique data (in pairs where their length is known)."""
    table = Table(title="worth of more unique data", title_justify="left")
    pairs = ["unique pairs"] if tokens_per_pair else []
    for name in ("times", "unique tokens", *pairs, "best loss", "gain of this doubling (ln L)"):
        table.add_column(name, justify="right")
    for v in values:
        cells = [f"{v.factor:g}", f"{v.unique_tokens:.4g}"]
        if tokens_per_pair:
            cells.append(number(v.unique_tokens / tokens_per_pair))
        cells.append("{:.4g} ({:.4g} .. {:.4g})".format(*v.loss))
        cells.append("" if v.factor == 1 else "{:.2g} ({:.2g} .. {:.2g})".format(*v.gain))
        add_row(table, *cells)
    return table


def next_table(candidates: Sequence[Candidate], quantity: str) -> Table:
    """The ten best cells to run next."""
    table = Table(title=f"next run: reduction of var(ln {quantity}) per FLOP", title_justify="left")
    for name in ("cell", "FLOPs", "variance left", "per 1e18 FLOPs"):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for c in candidates[:10]:
        cell = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in c.inputs.items()
        )
        add_row(
            table, cell, f"{c.flops:.3g}", f"{c.variance_left:.1%}", f"{c.per_flops * 1e18:.3g}"
        )
    return table


def show(console: Console, analysis: Analysis, study: Study | None = None) -> None:
    """Everything about one fit."""
    console.print(coefficient_table(analysis.fit, study))
    lines = published_lines(analysis.fit, study) if study else []
    for line in [*lines, *summary_lines(analysis), *dropped_lines(analysis.fit)]:
        console.print(line, markup=False, highlight=False)
    for table in extra_tables(analysis):
        console.print(table)


def cell_table(fit: TuningFit) -> Table:
    """The optimum of each cell, and what rules cost there."""
    table = Table(title="best value of each cell, and regret in nats", title_justify="left")
    table.add_column("cell")
    rules = list(fit.cells[0].regret)
    for name in ("tried", "best", *rules):
        table.add_column(name, justify="right")
    for c in fit.cells:
        ends = "" if math.isnan(c.ends[0]) else f" ({c.ends[0]:.3g} .. {c.ends[1]:.3g})"
        tried = f"{c.tried[0]:.3g} .. {c.tried[-1]:.3g}"
        add_row(table, c.name, tried, f"{c.best:.3g}{ends}", *(f"{c.regret[r]:.2g}" for r in rules))
    return table


def extra_tables(analysis: Analysis) -> list[Table]:
    """Cells, forecasts and the sensitivity to delta, where there are any."""
    out = [forecast_table(analysis.forecasts)] if analysis.forecasts else []
    if isinstance(analysis.fit, TuningFit):
        out.append(cell_table(analysis.fit))
    return [*out, delta_table(analysis)] if analysis.deltas else out


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
    parts += map(rich_html, extra_tables(analysis))
    dropped = dropped_lines(fit)
    if dropped:
        parts.append("<h2>rows left out</h2>" + lines_html(dropped))
    return write_page(directory / "report.html", fit.law.name, parts)
