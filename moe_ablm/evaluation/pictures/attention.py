"""Cross-chain attention in bars: CDRs over frameworks, and region by region."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moe_ablm.evaluation.statistics.estimates import Number

COLOURS = {"native": "#33658a", "random": "#b7b7b7"}


def draw_ratios(numbers: Sequence[Number]) -> Figure:
    """CDR over FR by direction, and each region over the mean of its chain; by partner."""
    figure, axes = plt.subplots(
        1, 2, figsize=(12, 4), layout="constrained", width_ratios=(1, 3), sharey=False
    )
    _bars(axes[0], [n for n in numbers if n.metric == "cdr_over_fr"], "direction")
    axes[0].set(ylabel="attention a CDR residue / an FR residue")
    _bars(axes[1], [n for n in numbers if n.metric == "region_over_chain"], "region")
    axes[1].set(ylabel="attention a residue / mean of the chain")
    axes[1].legend(title="partner")
    return figure


def _bars(axis: Axes, numbers: Sequence[Number], label: str) -> None:
    names = list(dict.fromkeys(n.labels[label] for n in numbers))
    partners = list(dict.fromkeys(n.labels["partner"] for n in numbers))
    width = 0.8 / len(partners)
    for i, partner in enumerate(partners):
        mine = [n for n in numbers if n.labels["partner"] == partner]
        x = np.array([names.index(n.labels[label]) for n in mine]) + (i + 0.5) * width - 0.4
        value, low, high = (
            np.array([getattr(n, k) for n in mine]) for k in ("value", "low", "high")
        )
        ends = np.nan_to_num(np.abs([value - low, high - value]))
        axis.bar(x, value, width, yerr=ends, color=COLOURS[partner], capsize=2, label=partner)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
