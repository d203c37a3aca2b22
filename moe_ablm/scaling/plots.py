"""Figures of a fit: loss against size, isoFLOP, the frontier, profiles, residuals.

Drawn without pyplot: no global state, no backend, no display.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from moe_ablm.scaling.compute_plots import MARKERS, loss_against_compute
from moe_ablm.scaling.envelope import on_grid, training_curves
from moe_ablm.scaling.gap_plots import gap_against_repeats
from moe_ablm.scaling.laws import SmoothLaw
from moe_ablm.scaling.optimum_plots import optimum_of_budgets, optimum_of_surface
from moe_ablm.scaling.parabola_fit import ParabolaFit, band
from moe_ablm.scaling.parabolas import IsoFlop
from moe_ablm.scaling.plots_schedule import loss_against_area
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Analysis
from moe_ablm.scaling.tuning_plots import best_setting

# Loss, and both ends of its band where there is one, `[m]` each.
Curve = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
LOSS = "loss L (nats)"
RESIDUALS_AGAINST = {
    "parameters N": "params",
    "tokens D": "tokens",
    "training compute C (FLOPs)": "flops",
}
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
        if isinstance(made, ParabolaFit) and made.law.group == "flops":
            figures["optimum"] = optimum_of_budgets(made)
        if isinstance(made, SmoothFit):
            figures["residuals"] = residuals(made)
            if "tokens" in made.law.needs and not made.law.of_gap:
                if _budgets(made.runs).size:
                    figures["isoflop"] = isoflop(analysis)
                figures["frontier"] = frontier(analysis)
                optimum = optimum_of_surface(made, analysis.boot)
                figures |= {} if optimum is None else {"optimum": optimum}
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
    x = made.law.inputs(columns, made.centre)
    draws = np.exp(made.law.log_loss(analysis.boot.usable[:1000], x))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return middle, low, high


def _sizes(runs: Runs) -> np.ndarray:
    return np.geomspace(runs["params"].min() / 1.5, runs["params"].max() * 1.5, 120)


def _paint(
    axes: Axes, x: np.ndarray, curve: Curve, color: Any, label: str, line: Any = "-"
) -> None:
    middle, low, high = curve
    axes.plot(x, middle, color=color, lw=1.3, ls=line, label=label)
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
    kinds = _kinds(runs)
    for (label, members, value), color in zip(groups, _colors(len(groups)), strict=True):
        for kind in kinds:
            here = members & kind.members
            axes.plot(runs["params"][here], runs["loss"][here], kind.marker, ms=4, color=color)
        if isinstance(made, ParabolaFit):
            _paint_parabola(axes, made, runs["params"][members], value, color, label)
            continue
        # a law that knows kinds has a curve for each
        drawn = kinds if made.law.routers else kinds[:1]
        for kind in drawn:
            here = members & kind.members if made.law.routers else members
            if here.any():
                inputs = {**_middle(runs, here), role: np.asarray(value)}
                sizes = _sizes(runs.take(here))
                curve = _curve(analysis, _along_params(inputs, sizes))
                _paint(axes, sizes, curve, color, label if kind is drawn[0] else "_", kind.line)
    _frame(axes, runs["loss"])
    _name_kinds(axes, kinds, lines=bool(made.law.routers))
    axes.set(xscale="log", xlabel="parameters N", ylabel=LOSS)
    unit = {"unique_tokens": f"unique {made.data_unit}", "flops": "FLOPs", "tokens": "tokens D"}
    axes.legend(title=unit[role], fontsize=7, title_fontsize=7, ncols=1 + (len(groups) > 8))
    return figure


def _paint_parabola(
    axes: Axes, made: ParabolaFit, params: np.ndarray, size: float, color: Any, label: str
) -> None:
    """A parabola over the sizes of its runs, its band and its minimum, where it has been fitted."""
    if f"a[{size:.15g}]" not in made.coefficients:
        return
    sizes = np.geomspace(params.min() / 1.5, params.max() * 1.5, 120)
    middle = made.predict(params=sizes, **{made.law.group: size})
    _paint(axes, sizes, (middle, *(band(made, size, sizes) or (None, None))), color, label)
    best = made.derived.get(f"N_star[{size:.15g}]")
    if best is not None and sizes[0] < best < sizes[-1]:
        axes.axvline(best, color=color, lw=0.8, ls=":")


@dataclass(frozen=True)
class Kind:
    """A router and number of experts: its runs (a mask), marker and line style."""

    name: str
    members: np.ndarray
    marker: str
    line: Any


def _kinds(runs: Runs) -> list[Kind]:
    """What tells the models of the runs apart besides their size, at most as many as markers."""
    router = runs["router"].astype(str) if "router" in runs else np.full(len(runs), "")
    experts = runs["experts"] if "experts" in runs else np.ones(len(runs))
    names = np.array(
        [f"{r} {e:g}".strip() if e > 1 else r for r, e in zip(router, experts, strict=True)]
    )
    found = np.unique(names).tolist()
    if len(found) > len(MARKERS):
        names, found = router, np.unique(router).tolist()
    return [
        Kind(name, names == name, MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(found)
    ]


def _name_kinds(axes: Axes, kinds: list[Kind], lines: bool = False) -> None:
    """Entries of the legend for the markers (and line styles) of several kinds."""
    for kind in kinds if len(kinds) > 1 else ():
        style = {"ls": kind.line, "lw": 1.2} if lines else {"ls": "none"}
        axes.plot([], [], marker=kind.marker, ms=4, color="0.4", label=kind.name, **style)


def _colors(count: int) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0, 0.88, count))


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
    panels[0].set_ylabel(LOSS)
    panels[-1].legend(title="parameters", fontsize=7, title_fontsize=7)
    return figure


def isoflop(analysis: Analysis) -> Figure:
    """Loss against N at each compute budget of the runs, with the law's minimum of each curve."""
    runs = analysis.fit.runs
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.add_subplot()
    cost = _cost(analysis)
    groups, budgets = IsoFlop().groups(runs), _budgets(runs)
    kinds, sizes = _kinds(runs), _sizes(runs)
    for budget, color in zip(budgets, _colors(budgets.size), strict=True):
        loss = _surface(analysis, sizes, np.exp(cost.log_tokens(budget, np.log(sizes))))
        axes.plot(sizes, loss, color=color, lw=1.2, label=f"{budget:.1e}")
        best = int(np.argmin(loss))
        if 0 < best < sizes.size - 1:
            axes.plot(sizes[best], loss[best], "*", color=color, ms=9)
        for kind in kinds:
            here = kind.members & (groups == budget)
            axes.plot(runs["params"][here], runs["loss"][here], kind.marker, ms=3, color=color)
    _frame(axes, runs["loss"])
    axes.set(xscale="log", xlabel="parameters N", ylabel=LOSS)
    _name_kinds(axes, kinds)
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
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(tokens[0], tokens[-1]))
    axes.legend(fontsize=7)
    return figure


def _budgets(runs: Runs) -> np.ndarray:
    """The compute budgets that at least three sizes of one kind share; none is made up."""
    groups = IsoFlop().groups(runs)
    found = []
    for budget in np.unique(groups):
        masks = [kind.members & (groups == budget) for kind in _kinds(runs)]
        if max(np.unique(runs["params"][m]).size for m in masks) >= SIZES_OF_A_BUDGET:
            found.append(budget)
    return np.array(found if len(found) > 1 else [])


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
    what = "1 + gap" if made.law.of_gap else "L"
    inputs = [("predicted 1 + gap" if made.law.of_gap else "predicted loss", predicted, False)]
    inputs += [
        (name, runs[role][index], True)
        for name, role in RESIDUALS_AGAINST.items()
        if role in runs and (role != "flops" or role in made.law.needs)
    ]
    figure = Figure(figsize=(2.9 * len(inputs), 2.8))
    panels = figure.subplots(1, len(inputs), sharey=True, squeeze=False)[0]
    for axes, (label, x, log) in zip(panels, inputs, strict=True):
        axes.plot(x, misfit, "o", ms=2.5, alpha=0.6)
        axes.axhline(0.0, color="0.4", lw=0.8)
        axes.set(xlabel=label, xscale="log" if log else "linear")
    panels[0].set_ylabel(f"ln {what} observed - ln {what} model")
    return figure


def envelope(analysis: Analysis) -> Figure:
    """All training curves, the lowest at each compute, and the law through their envelope."""
    made, runs = analysis.fit, analysis.fit.runs
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.add_subplot()
    curves, params = training_curves(runs)
    sizes = np.unique(params)
    for (log_c, loss), size in zip(curves, params, strict=True):
        color = _colors(sizes.size)[np.searchsorted(sizes, size)]
        axes.plot(np.exp(log_c), loss, lw=0.8, color=color)
    grid, losses = on_grid(curves)
    lowest = losses.min(axis=0)
    seen = np.isfinite(lowest)
    axes.plot(np.exp(grid[seen]), lowest[seen], "k-", lw=1.6, label="lowest curve")
    flops = np.exp(grid[seen])
    law = made.predict(params=flops, flops=flops)
    floor = made.coefficients.get("L_inf")
    label = "power law of C" if floor is None else f"L_inf + A C^-alpha, L_inf = {floor:.3g}"
    axes.plot(flops, law, "r--", lw=1.3, label=label)
    for size in sizes[[0, -1]]:
        axes.plot([], [], color=_colors(2)[int(size == sizes[-1])], label=f"N = {size:.3g}")
    _frame(axes, np.concatenate([loss for _, loss in curves]))
    axes.set(xscale="log", xlabel="training compute C (FLOPs)", ylabel=LOSS)
    axes.legend(fontsize=7)
    return figure


# by `figure` of a law
OF_LOSS: dict[str, Callable[[Analysis], Figure]] = {
    "loss_against_area": loss_against_area,
    "loss_against_params": loss_against_params,
    "loss_against_experts": loss_against_experts,
    "loss_against_compute": loss_against_compute,
    "gap_against_repeats": gap_against_repeats,
    "best_setting": best_setting,
    "envelope": envelope,
}
