"""Dots with intervals: one number a row, a colour for what is compared."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from moe_ablm.evaluation.statistics.estimates import Number


def dots(numbers: Sequence[Number], rows: tuple[str, ...], colour: str, title: str) -> Figure:
    """Values from the first row downwards, and their intervals.

    Args:
      numbers: those that are defined are shown.
      rows: labels that make a row.
      colour: label whose values are told apart by colour, side by side in a row.
      title: of the axis, with the unit.
    """
    names = list(dict.fromkeys(", ".join(n.labels[key] for key in rows) for n in numbers))
    kinds = list(dict.fromkeys(n.labels[colour] for n in numbers))
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    for place, kind in enumerate(kinds):
        some = [n for n in numbers if n.labels[colour] == kind and n.value == n.value]
        at = [names.index(", ".join(n.labels[key] for key in rows)) for n in some]
        at = [y + 0.6 * ((place + 0.5) / len(kinds) - 0.5) for y in at]
        axis.plot([n.value for n in some], at, "o", color=f"C{place}", label=kind)
        axis.hlines(at, [n.low for n in some], [n.high for n in some], color=f"C{place}")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axvline(0, color="0.8", zorder=0)
    axis.set_xlabel(title)
    axis.legend(loc="best", fontsize="small")
    return figure
