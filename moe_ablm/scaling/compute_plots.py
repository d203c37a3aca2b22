"""The figure of laws of compute: the best loss of each budget, and what is left above the floor."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from moe_ablm.scaling.result import SmoothFit

if TYPE_CHECKING:
    from moe_ablm.scaling.selection import Analysis

AHEAD = 10.0  # times the largest budget that the law is drawn to
MARKERS = "os^Dv<>P"


def loss_against_compute(analysis: "Analysis") -> Figure:
    """L against C with the floor L_inf, and L - L_inf on log axes, where the law is straight.

    A marker, colour and line a kind; bands of 95 % of the bootstrap draws; beyond the budgets the
    line is thin.
    """
    fit = analysis.fit
    runs = fit.runs
    flops = np.geomspace(runs["flops"].min(), runs["flops"].max() * AHEAD, 120)
    kinds = np.unique(runs["router"].astype(str))
    floor = fit.coefficients["L_inf"]
    figure = Figure(figsize=(8.2, 3.6))
    left, right = figure.subplots(1, 2)
    for i, kind in enumerate(kinds):
        color, marker = f"C{i}", MARKERS[i % len(MARKERS)]
        mine = runs["router"] == kind
        c, loss = runs["flops"][mine], runs["loss"][mine]
        columns = {"flops": flops, "router": np.full(flops.size, kind)}
        middle = fit.law.predict(fit.coefficients, columns)
        left.plot(c, loss, marker, ms=4, color=color, label=_label(analysis, str(kind), kinds.size))
        right.plot(c[loss > floor], loss[loss > floor] - floor, marker, ms=4, color=color)
        seen = flops <= runs["flops"].max()
        for axes, shown in ((left, middle), (right, middle - floor)):
            axes.plot(flops[seen], shown[seen], "-", lw=1.4, color=color)
            axes.plot(flops[~seen], shown[~seen], "-", lw=0.7, color=color)
        _bands(left, right, analysis, columns, color)
    left.axhline(floor, color="0.4", lw=0.8, ls="--", label=f"L_inf = {floor:.3g}")
    left.set(xscale="log", xlabel="training compute C (FLOPs)", ylabel="loss L (nats)")
    right.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)")
    right.set_ylabel("L - L_inf (nats)")
    for each in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        each(StrMethodFormatter("{x:.2g}"))
    left.legend(fontsize=7)
    return figure


def _label(analysis: "Analysis", kind: str, kinds: int) -> str:
    """The kind, and what it is worth in compute of the reference."""
    if kinds == 1:
        return "best loss of a budget"
    fit, name = analysis.fit, f"gain[{kind}]"
    gain = fit.coefficients.get(name, fit.derived.get(name))
    return kind if gain is None else f"{kind}: {gain:.3g} x the compute"


def _bands(
    left: Axes, right: Axes, analysis: "Analysis", columns: dict[str, np.ndarray], color: Any
) -> None:
    """95 % of the draws of the loss, and of the loss above each draw's own floor."""
    fit, boot = analysis.fit, analysis.boot
    if boot is None or not isinstance(fit, SmoothFit):
        return
    theta = boot.usable[:1000]
    x = fit.law.inputs(columns, fit.centre)
    drawn = np.exp(fit.law.log_loss(theta, x))
    floors = np.exp(theta[:, fit.law.index("L_inf"), None])
    for axes, values in ((left, drawn), (right, drawn - floors)):
        low, high = np.percentile(values, [2.5, 97.5], axis=0)
        axes.fill_between(columns["flops"], low, high, color=color, alpha=0.18, lw=0)
