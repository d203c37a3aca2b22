"""The figure of laws of settings: the valley of each cell, and the optima with the law."""

from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from moe_ablm.scaling.tuning import Cell, TuningFit

if TYPE_CHECKING:
    from moe_ablm.scaling.selection import Analysis

SHOWN = 0.1  # nats above the lowest loss of a cell that are drawn
NAMED = 10  # cells that a legend has room for
LABELS = {"lr": "peak learning rate", "batch": "batch"}


def best_setting(analysis: "Analysis") -> Figure:
    """Loss over the lowest one of its cell against the setting; optima against the law's value."""
    fit = cast(TuningFit, analysis.fit)
    label = LABELS[fit.law.setting]
    figure = Figure(figsize=(8.2, 3.6))
    left, right = figure.subplots(1, 2)
    colors = colormaps["viridis"](np.linspace(0, 0.88, len(fit.cells)))
    cells = sorted(fit.cells, key=lambda c: (c.params, c.tokens))
    for cell, color in zip(cells, colors, strict=True):
        above = cell.loss - cell.loss.min()
        left.plot(cell.tried, above, "o-", ms=2.5, lw=0.8, color=color, label=cell.name)
        left.axvline(cell.best, ymax=0.04, color=color, lw=1.2)
        told = _told(fit, cell)
        right.plot([told, told], cell.ends, "-", lw=1, color=color)
        right.plot(told, cell.best, "o", ms=4, color=color)
    left.set(xscale="log", xlabel=label, ylabel="loss above the cell's lowest (nats)")
    left.set_ylim(-0.02 * SHOWN, SHOWN)
    values = [_told(fit, cell) for cell in cells]
    ends = [min(values) / 1.3, max(values) * 1.3]
    right.plot(ends, ends, "-", lw=1.2, color="0.4", label="the law")
    right.set(xscale="log", yscale="log", ylabel=f"best {label} of a cell")
    right.set_xlabel(f"{label} of the law")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
        axis.set_minor_formatter(NullFormatter())
    right.legend(fontsize=7)
    if len(cells) <= NAMED:
        left.legend(fontsize=6)
    return figure


def _told(fit: TuningFit, cell: Cell) -> float:
    """What the law says of a cell."""
    columns = {"params": np.array(cell.params), "tokens": np.array(cell.tokens)}
    return float(fit.law.predict(fit.coefficients, columns))
