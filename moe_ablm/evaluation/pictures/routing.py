"""Heat maps of experts against what they take."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

NUMBERED = 32  # experts of a panel
MOST = 3.0  # what is more or less has the last colour: experts that never take a class


def heat_map(
    values: np.ndarray,
    flagged: np.ndarray,
    layers: Sequence[int],
    names: Sequence[str],
    label: str,
) -> Figure:
    """A panel a layer, experts by classes; a dot where a value is flagged.

    Args:
      values: `[M, X, E]`; 0 is white, red is more.
      flagged: bool, the same shape.
      layers: numbers of the M layers.
      names: of the X classes.
      label: of the colours.
    """
    experts = values.shape[2]
    # a file has at most 2^16 pixels a side: rows of many experts are lower
    height = 0.7 + min(0.25 * experts, 6.0)
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(2 + 0.42 * len(names), 1.4 + len(layers) * height),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    limit = float(np.clip(values.max(), 0.1, MOST))
    for axis, layer, table, mark in zip(axes[:, 0], layers, values, flagged, strict=True):
        image = axis.imshow(table.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.plot(*np.nonzero(mark), "k.", markersize=2)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(0, experts, math.ceil(experts / NUMBERED)))
        axis.tick_params(axis="y", labelsize=7)
        axis.set(title=f"layer {layer}", ylabel="expert")
    figure.colorbar(image, ax=axes, location="right", label=label, shrink=0.8, extend="both")
    return figure
