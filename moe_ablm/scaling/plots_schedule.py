"""The figure of laws of whole curves."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from moe_ablm.scaling.selection import Analysis

MOST_CURVES = 12


def loss_against_area(analysis: "Analysis") -> Figure:
    """Losses of each run and the law through them, against the area under the learning rate."""
    fit = analysis.fit
    runs = fit.runs
    names = np.unique(runs["run"]) if "run" in runs else np.array([""])
    figure = Figure(figsize=(5.6, 3.8))
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0, 0.88, min(names.size, MOST_CURVES)))
    for name, colour in zip(names[:MOST_CURVES], colours, strict=True):
        mine = np.flatnonzero(runs["run"] == name) if "run" in runs else np.arange(len(runs))
        mine = mine[np.argsort(runs["lr_area"][mine])]
        predicted = fit.law.predict(fit.coefficients, runs.take(mine).columns)
        axes.plot(runs["lr_area"][mine], runs["loss"][mine], "o", ms=3, color=colour)
        axes.plot(runs["lr_area"][mine], predicted, color=colour, lw=1, label=str(name)[-24:])
    axes.set(xscale="log", xlabel="area under the learning rate", ylabel="loss")
    axes.legend(fontsize=6, title=f"{min(names.size, MOST_CURVES)} of {names.size} runs")
    return figure
