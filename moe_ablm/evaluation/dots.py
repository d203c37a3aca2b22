"""Dot plots of numbers with their intervals, one colour for each thing compared."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from moe_ablm.evaluation.estimates import Number
from moe_ablm.evaluation.outcome import Picture


def dots(numbers: Sequence[Number], rows: tuple[str, ...], colour: str, title: str) -> Figure:
    """Values from the first row downwards, and their intervals.

    Args:
      numbers: those that are defined are shown.
      rows: labels that make a row.
      colour: label whose values have a colour each, side by side in a row.
      title: of the axis, with the unit.
    """
    names = list(dict.fromkeys(", ".join(n.labels[key] for key in rows) for n in numbers))
    kinds = list(dict.fromkeys(n.labels[colour] for n in numbers))
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, kind in enumerate(kinds):
        some = [n for n in numbers if n.labels[colour] == kind and n.value == n.value]
        shift = 0.6 * ((place + 0.5) / len(kinds) - 0.5)
        at = [names.index(", ".join(n.labels[key] for key in rows)) + shift for n in some]
        axis.plot([n.value for n in some], at, "o", color=f"C{place}", label=kind)
        axis.hlines(at, [n.low for n in some], [n.high for n in some], color=f"C{place}")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axvline(0, color="0.8", zorder=0)
    axis.set_xlabel(title)
    axis.legend(loc="best", fontsize="small")
    return figure


def picture(name: str, caption: str, numbers: Sequence[Number], metric: str, group: str) -> Picture:
    """Points with intervals, a row for each value of the label `group`, a colour a predictor."""
    shown = [n for n in numbers if n.metric == metric]
    return Picture(name, caption, lambda: _drawn(shown, metric, group))


def _drawn(numbers: Sequence[Number], metric: str, group: str) -> Figure:
    rows = list(dict.fromkeys(n.labels[group] for n in numbers))
    predictors = list(dict.fromkeys(n.labels["predictor"] for n in numbers))
    figure = Figure(figsize=(7, 0.9 + 0.7 * len(rows)), layout="constrained")
    axis = figure.subplots()
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
