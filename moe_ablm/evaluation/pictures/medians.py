"""Median cross-entropy of a region in each antibody, and its distribution over antibodies.

Figure 1 of Burbach & Briney 2024: of each sequence the median over the positions of a region, shown
as letter-value plots (Hofmann et al. 2017).
"""

import importlib.util
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ablm.evaluation.statistics.estimates import DRAWS, Number, draw_counts, interval


def group_medians(groups: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups that have values (ascending), and the median of each.

    Args:
      groups: int `[n]`.
      values: float `[n]`.
    """
    order = np.lexsort((values, groups))
    names, first, count = np.unique(groups[order], return_index=True, return_counts=True)
    ordered = values[order]
    return names, (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) / 2


def median_number(
    metric: str,
    units: Sequence[str],
    values: np.ndarray,
    labels: Mapping[str, str],
    unit: str,
    draws: int = DRAWS,
) -> Number:
    """Median over antibodies, with an interval by drawing their clonal clusters again.

    Args:
      metric, labels, unit: as of `Number`.
      units: clonal cluster of each antibody.
      values: float `[n]`, one an antibody.
      draws: of the bootstrap.
    """
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    order = np.argsort(values, kind="stable")
    ordered, index = values[order], index[order]
    low = high = np.nan
    if len(names) >= 2:
        # every draw repeats values: the median is the middle one, or the mean of the two middle
        ends = draw_counts(tuple(names.tolist()), draws).astype(np.int32)[:, index].cumsum(1)
        middle = [
            _first_beyond(ends, (ends[:, -1] - 1) // 2),
            _first_beyond(ends, ends[:, -1] // 2),
        ]
        low, high = interval(ordered[middle].mean(0))
    return Number(metric, float(np.median(values)), labels, low, high, len(values), unit)


def _first_beyond(ends: np.ndarray, rank: np.ndarray) -> np.ndarray:
    return (ends > rank[:, None]).argmax(1)


def letter_values(panels: Mapping[str, Mapping[str, np.ndarray]], axis_label: str) -> Figure:
    """Letter-value plots, or box plots where seaborn is missing.

    Args:
      panels: `{title: {name: values}}`, a panel each; names are the same in all.
      axis_label: with unit.
    """
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 3.2 * len(panels)), layout="constrained", squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    for axis, (title, groups) in zip(axes[:, 0], panels.items(), strict=True):
        _draw(axis, groups)
        axis.set(title=title, ylabel=axis_label, ylim=(0, None))
    return figure


def has_seaborn() -> bool:
    """Whether letter-value plots can be drawn."""
    return importlib.util.find_spec("seaborn") is not None


def _draw(axis: Axes, groups: Mapping[str, np.ndarray]) -> None:
    names = list(groups)
    if not has_seaborn():
        axis.boxplot([groups[name] for name in names], sym=".", manage_ticks=False)
        axis.set_xticks(range(1, len(names) + 1), names)
        return
    import seaborn

    group = np.repeat(names, [len(groups[name]) for name in names])
    values = np.concatenate([groups[name] for name in names])
    colours = ["#4477aa" if "H" in name else "#cc6677" for name in names]
    seaborn.boxenplot(
        x=group, y=values, order=names, hue=group, hue_order=names, palette=colours, ax=axis,
        legend=False, flier_kws={"s": 4},
    )  # fmt: skip
    axis.set_xlabel("")
