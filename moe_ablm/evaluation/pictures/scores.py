"""Scores of several predictors side by side, with their intervals."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from moe_ablm.evaluation.outcome import Picture
from moe_ablm.evaluation.statistics.estimates import Number


def picture(name: str, caption: str, numbers: Sequence[Number], metric: str, group: str) -> Picture:
    """Points with intervals, a row for each value of the label `group`, a colour a predictor."""
    shown = [n for n in numbers if n.metric == metric]
    return Picture(name, caption, lambda: _drawn(shown, metric, group))


def _drawn(numbers: Sequence[Number], metric: str, group: str) -> Figure:
    rows = list(dict.fromkeys(n.labels[group] for n in numbers))
    predictors = list(dict.fromkeys(n.labels["predictor"] for n in numbers))
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.7 * len(rows)), layout="constrained")
    for i, predictor in enumerate(predictors):
        mine = [n for n in numbers if n.labels["predictor"] == predictor]
        y = [rows.index(n.labels[group]) + 0.16 * (i - (len(predictors) - 1) / 2) for n in mine]
        values = [n.value for n in mine]
        ends = [[n.value - n.low for n in mine], [n.high - n.value for n in mine]]
        axis.errorbar(values, y, xerr=ends, fmt="o", markersize=5, capsize=3, label=predictor)
    axis.axvline(0.5, color="0.7", linewidth=0.8)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(metric)
    figure.legend(loc="outside upper center", ncols=len(predictors), fontsize=8, frameon=False)
    return figure
