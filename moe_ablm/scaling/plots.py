"""Figures of a fit: loss against size, isoFLOP, the frontier, profiles, residuals.

Drawn without pyplot: no global state, no backend, no display.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from moe_ablm.files import replacing
from moe_ablm.scaling.compute import Cost
from moe_ablm.scaling.inputs import make_inputs
from moe_ablm.scaling.laws import SmoothLaw
from moe_ablm.scaling.parabola_fit import ParabolaFit, band
from moe_ablm.scaling.parabolas import IsoFlop
from moe_ablm.scaling.plots_schedule import loss_against_area
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Analysis

# Loss, and both ends of its band where there is one, `[m]` each.
Curve = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
MARKERS = "os^Dv<>P"
GROUPS = 6  # most curves in one panel
SIZES_OF_A_BUDGET = 3  # that make it an isoFLOP budget
MOST_VECTORS = 5000  # most points of a vector line in an SVG; longer lines are rasterised
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "moe_ablm",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def draw_all(analysis: Analysis) -> dict[str, Figure]:
    """Every figure that this fit can have, by name."""
    made = analysis.fit
    figures: dict[str, Figure] = {}
    with rc_context(STYLE):
        figures[made.law.figure] = OF_LOSS[made.law.figure](analysis)
        if isinstance(made, SmoothFit):
            figures["residuals"] = residuals(made)
            if "tokens" in made.law.needs:
                figures["isoflop"] = isoflop(analysis)
                figures["frontier"] = frontier(analysis)
        if analysis.profiles:
            figures["profiles"] = profile_panels(analysis)
    return figures


def save_all(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Writes each figure as PNG and SVG; the same fit gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    out = []
    with rc_context(STYLE):
        for name, figure in figures.items():
            for line in (line for axes in figure.axes for line in axes.lines):
                line.set_rasterized(np.size(line.get_xdata()) > MOST_VECTORS)
            for kind, extra in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                path = directory / f"{name}.{kind}"
                with replacing(path) as temporary:
                    figure.savefig(temporary, format=kind, **extra)
                out.append(path)
    return out


def data_groups(runs: Runs, role: str, most: float = 6) -> list[tuple[str, np.ndarray, float]]:
    """Runs by data size: label, members, middle value; quantile bins of more than `most` sizes."""
    values = runs[role]
    sizes = np.unique(values)
    if sizes.size <= most:
        return [(f"{v:.4g}", values == v, float(v)) for v in sizes]
    edges = np.quantile(values, np.linspace(0, 1, GROUPS + 1))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, GROUPS - 1)
    out = []
    for b in np.unique(bins):
        members = bins == b
        middle = float(np.exp(np.mean(np.log(values[members]))))
        out.append((f"about {middle:.2g}", members, middle))
    return out


def _middle(runs: Runs, members: np.ndarray) -> dict[str, np.ndarray]:
    """Typical inputs of some runs, `[]` each: medians of numbers, the commonest label."""
    out: dict[str, np.ndarray] = {}
    for role, values in runs.inputs().items():
        part = values[members]
        if part.dtype.kind in "fiu":
            out[role] = np.asarray(np.median(part))
        else:
            names, counts = np.unique(part, return_counts=True)
            out[role] = np.asarray(names[np.argmax(counts)])
    return out


def _along_params(inputs: Mapping[str, np.ndarray], params: np.ndarray) -> dict[str, np.ndarray]:
    """Columns for model sizes `[m]` at fixed other inputs and a fixed share of active ones."""
    ratio = inputs.get("total_params", inputs["params"]) / inputs["params"]
    columns = {**inputs, "params": params, "total_params": params * ratio}
    return {k: np.broadcast_to(v, params.shape) for k, v in columns.items()}


def _curve(analysis: Analysis, columns: Mapping[str, np.ndarray]) -> Curve:
    """Loss along the columns, with the 95 % band of the bootstrap draws."""
    made = analysis.fit
    middle = made.predict(**columns)
    if analysis.boot is None or not isinstance(made, SmoothFit):
        return middle, None, None
    x = make_inputs(columns, made.centre, made.law.routers)
    draws = np.exp(made.law.log_loss(analysis.boot.usable[:1000], x))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return middle, low, high


def _sizes(runs: Runs) -> np.ndarray:
    return np.geomspace(runs["params"].min() / 1.5, runs["params"].max() * 1.5, 120)


def _paint(axes: Axes, x: np.ndarray, curve: Curve, color: np.ndarray, label: str) -> None:
    middle, low, high = curve
    axes.plot(x, middle, color=color, lw=1.3, label=label)
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def _frame(axes: Axes, loss: np.ndarray) -> None:
    """Limits from the observed losses: the curve of a law may go far beyond them."""
    margin = 0.15 * np.ptp(loss) or 0.01 * loss.max()
    axes.set_ylim(loss.min() - margin, loss.max() + margin)


def loss_against_params(analysis: Analysis) -> Figure:
    """Loss against N, a curve per data size with its bootstrap band."""
    made, runs = analysis.fit, analysis.fit.runs
    role = "unique_tokens" if "unique_tokens" in made.law.needs else "tokens"
    if isinstance(made, ParabolaFit):
        role = made.law.group
        runs = Runs({**runs.columns, role: made.law.groups(runs)}, runs.source)
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.add_subplot()
    # a parabola is that of its own size or budget: nothing to bin
    groups = data_groups(runs, role, np.inf if isinstance(made, ParabolaFit) else GROUPS)
    markers = _markers(runs)
    colors = colormaps["viridis"](np.linspace(0, 0.88, len(groups)))
    for (label, members, value), color in zip(groups, colors, strict=True):
        for kind, marker in markers.items():
            mine = members & (runs["router"] == kind) if "router" in runs else members
            axes.plot(runs["params"][mine], runs["loss"][mine], marker, ms=4, color=color)
        if isinstance(made, ParabolaFit) and f"a[{value:.15g}]" not in made.coefficients:
            continue
        inputs = {**_middle(runs, members), role: np.asarray(value)}
        drawn = _curve(analysis, _along_params(inputs, _sizes(runs)))
        if isinstance(made, ParabolaFit):
            drawn = (drawn[0], *(band(made, value, _sizes(runs)) or (None, None)))
        _paint(axes, _sizes(runs), drawn, color, label)
        best = made.derived.get(f"N_star[{value:.15g}]")
        if best is not None:
            axes.axvline(best, color=color, lw=0.8, ls=":")
    _frame(axes, runs["loss"])
    for kind, marker in markers.items() if len(markers) > 1 else ():
        axes.plot([], [], marker, ms=4, color="0.4", label=kind)
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss")
    title = f"unique {made.data_unit}" if role == "unique_tokens" else role
    axes.legend(title=title, fontsize=7, title_fontsize=7)
    return figure


def _markers(runs: Runs) -> dict[str, str]:
    """A marker for each router."""
    kinds = np.unique(runs["router"]).tolist() if "router" in runs else [""]
    return {kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(kinds)}


def loss_against_experts(analysis: Analysis) -> Figure:
    """Loss against the number of experts: a panel per router, a curve per size (Clark fig. 2)."""
    made, runs = analysis.fit, analysis.fit.runs
    routers = made.law.routers
    figure = Figure(figsize=(3.0 * len(routers), 3.4))
    panels = figure.subplots(1, len(routers), sharey=True, squeeze=False)[0]
    sizes = np.unique(runs["params"])
    colors = colormaps["viridis"](np.linspace(0, 0.88, sizes.size))
    experts = np.geomspace(1, runs["experts"].max() * 2, 100)
    for axes, router in zip(panels, routers, strict=True):
        for size, color in zip(sizes, colors, strict=True):
            dense = runs["experts"] <= 1
            mine = (runs["params"] == size) & ((runs["router"] == router) | dense)
            axes.plot(runs["experts"][mine], runs["loss"][mine], "o", ms=3, color=color)
            columns = {
                "params": np.full(experts.size, size),
                "experts": experts,
                "router": np.full(experts.size, router),
            }
            _paint(axes, experts, _curve(analysis, columns), color, f"{size:.3g}")
        axes.set(xscale="log", xlabel="experts E", title=router)
    panels[0].set_ylabel("loss")
    panels[-1].legend(title="parameters", fontsize=7, title_fontsize=7)
    return figure


def isoflop(analysis: Analysis) -> Figure:
    """Loss against N at constant compute, with the law's minimum of each curve."""
    runs = analysis.fit.runs
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.add_subplot()
    flops = runs.flops()
    cost = _cost(analysis)
    budgets = _budgets(runs)
    colors = colormaps["viridis"](np.linspace(0, 0.88, len(budgets)))
    sizes = _sizes(runs)
    for budget, color in zip(budgets, colors, strict=True):
        loss = _surface(analysis, sizes, np.exp(cost.log_tokens(budget, np.log(sizes))))
        axes.plot(sizes, loss, color=color, lw=1.2, label=f"{budget:.1e}")
        best = int(np.argmin(loss))
        axes.plot(sizes[best], loss[best], "*", color=color, ms=9)
        near = np.abs(np.log(flops / budget)) < 0.2
        axes.plot(runs["params"][near], runs["loss"][near], "o", ms=3, color=color)
    _frame(axes, runs["loss"])
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss")
    axes.legend(title=f"FLOPs, {cost}", fontsize=7, title_fontsize=7)
    return figure


def frontier(analysis: Analysis) -> Figure:
    """Contours of L over N and D, the runs, and the best N at each compute."""
    runs = analysis.fit.runs
    figure = Figure(figsize=(5.6, 4.0))
    axes = figure.add_subplot()
    sizes = _sizes(runs)
    tokens = np.geomspace(runs["tokens"].min() / 1.5, runs["tokens"].max() * 1.5, 110)
    n, d = np.meshgrid(sizes, tokens)
    loss = _surface(analysis, n, d)
    levels = np.quantile(loss, np.linspace(0.01, 0.95, 14))
    contours = axes.contour(n, d, loss, levels=np.unique(levels), cmap="viridis", linewidths=0.9)
    axes.clabel(contours, fontsize=6, fmt="%.3g")
    axes.plot(runs["params"], runs["tokens"], "k.", ms=3, label="runs")
    fine = np.geomspace(sizes[0], sizes[-1], 1500)
    cost = _cost(analysis)
    least, most = cost.flops(sizes[[0, -1]], tokens[[0, -1]])
    budgets = np.geomspace(least, most, 80)
    along, budget = np.meshgrid(fine, budgets)
    paid = np.exp(cost.log_tokens(budget, np.log(along)))
    best = np.argmin(_surface(analysis, along, paid), axis=1)
    path = fine[best]
    shown = paid[np.arange(budgets.size), best]
    inner = (best > 0) & (best < fine.size - 1) & (shown > tokens[0]) & (shown < tokens[-1])
    if inner.any():
        axes.plot(path[inner], shown[inner], "r-", lw=1.3, label="best N at its compute")
    title = ""
    if "unique_tokens" in analysis.fit.law.needs:
        title = f"at {runs['unique_tokens'].max():.3g} unique {analysis.fit.data_unit}"
    axes.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="tokens D", title=title)
    axes.legend(fontsize=7)
    return figure


def _budgets(runs: Runs) -> np.ndarray:
    """The compute budgets of the runs, where they have a few of several sizes; else a range."""
    flops = runs.flops()
    groups = IsoFlop().groups(runs)
    sizes = {g: np.unique(runs["params"][groups == g]).size for g in np.unique(groups)}
    given = np.array([g for g, count in sizes.items() if count >= SIZES_OF_A_BUDGET])
    if given.size >= 2 and np.isin(groups, given).mean() > 0.8:
        return given[np.linspace(0, given.size - 1, min(GROUPS, given.size)).round().astype(int)]
    return np.geomspace(np.quantile(flops, 0.05), np.quantile(flops, 0.95), GROUPS)


def _cost(analysis: Analysis) -> Cost:
    law = analysis.fit.law
    return law.cost if isinstance(law, SmoothLaw) else Cost()


def _surface(analysis: Analysis, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The loss at sizes and tokens (arrays of one shape), at the most unique tokens of the runs."""
    made, runs = analysis.fit, analysis.fit.runs
    columns = _along_params(_middle(runs, np.ones(len(runs), bool)), n.ravel())
    columns["tokens"] = d.ravel()
    if "unique_tokens" in made.law.needs:
        columns["unique_tokens"] = np.minimum(runs["unique_tokens"].max(), d.ravel())
    return made.predict(**columns).reshape(n.shape)


def profile_panels(analysis: Analysis) -> Figure:
    """Signed root of the scaled likelihood ratio; a straight line is a well-behaved quantity."""
    walked = list(analysis.profiles)[:12]
    columns = min(4, len(walked))
    rows = -(-len(walked) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.0 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, p in zip(panels, walked, strict=False):
        order = np.argsort(p.values)
        values = p.quantity.report(p.values[order])
        axes.plot(values, p.roots[order], "-o", ms=2, lw=1)
        for z in (-1.96, 1.96):
            axes.axhline(z, color="0.6", lw=0.7, ls=":")
        axes.set_ylim(-3.2, 3.2)
        axes.set_title(p.quantity.name, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if p.quantity.log and values.max() > 30 * values.min():
            axes.set_xscale("log")
    for axes in panels[len(walked) :]:
        axes.set_axis_off()
    return figure


def residuals(made: SmoothFit) -> Figure:
    """Residuals of ln L against the prediction, and against N and D."""
    runs = made.runs
    misfit = -made.residuals()
    predicted = np.exp(made.problem.log_loss - misfit)
    index = made.index
    inputs = [("predicted loss", predicted, False), ("parameters N", runs["params"][index], True)]
    if "tokens" in runs:
        inputs.append(("tokens D", runs["tokens"][index], True))
    figure = Figure(figsize=(2.9 * len(inputs), 2.8))
    panels = figure.subplots(1, len(inputs), sharey=True, squeeze=False)[0]
    for axes, (label, x, log) in zip(panels, inputs, strict=True):
        axes.plot(x, misfit, "o", ms=2.5, alpha=0.6)
        axes.axhline(0.0, color="0.4", lw=0.8)
        axes.set(xlabel=label, xscale="log" if log else "linear")
    panels[0].set_ylabel("ln L observed - ln L model")
    return figure


def envelope(analysis: Analysis) -> Figure:
    """All training curves and the fitted envelope."""
    made, runs = analysis.fit, analysis.fit.runs
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.add_subplot()
    label = runs["run"] if "run" in runs else runs["params"].astype(str)
    flops = runs.flops()
    for name in np.unique(label):
        members = np.flatnonzero(label == name)
        order = members[np.argsort(flops[members])]
        axes.plot(flops[order], runs["loss"][order], lw=0.8, color="0.6")
    grid = np.geomspace(flops.min(), flops.max(), 100)
    axes.plot(grid, made.predict(params=grid, flops=grid), "r--", lw=1.3, label="envelope")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="loss")
    axes.legend(fontsize=7)
    return figure


# by `figure` of a law
OF_LOSS: dict[str, Callable[[Analysis], Figure]] = {
    "loss_against_area": loss_against_area,
    "loss_against_params": loss_against_params,
    "loss_against_experts": loss_against_experts,
    "envelope": envelope,
}
