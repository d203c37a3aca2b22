"""Figure of masked mutations by partner, as Figure 3 of Burbach & Briney 2024."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.partners import PARTNERS
from moe_ablm.evaluation.statistics.estimates import Number

NAMES = {"native": "native", "reverted": "germline-\nreverted", "random": "random", "none": "none"}
SHOWN = {"mutated": "#4477aa", "other non-germline": "0.7"}


def draw_across(numbers: Sequence[Number]) -> Figure:
    """Cross-entropy above, likelihoods below; a column for each masked chain.

    Args:
      numbers: "cross_entropy" and "likelihood", labelled by "masked", "partner", "residue".
    """
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row")
    for column, masked in enumerate(CHAINS):
        own = [n for n in numbers if n.labels["masked"] == masked]
        losses = [n for n in own if n.metric == "cross_entropy"]
        _bars(axes[0, column], losses, 0, 0.7, color="#4477aa")
        for i, (residue, colour) in enumerate(SHOWN.items()):
            chosen = [n for n in own if n.labels.get("residue") == residue]
            _bars(axes[1, column], chosen, (i - 0.5) * 0.4, 0.36, color=colour, label=residue)
        axes[0, column].set_title(f"{masked} chain masked")
        for axis in axes[:, column]:
            axis.set_xticks(range(len(PARTNERS)), [NAMES[p] for p in PARTNERS])
    axes[0, 0].set_ylabel("cross-entropy (nats)")
    axes[1, 0].set_ylabel("likelihood (share)")
    axes[1, 0].legend()
    return figure


def _bars(axis: Axes, numbers: Sequence[Number], shift: float, width: float, **style) -> None:
    x = np.array([PARTNERS.index(n.labels["partner"]) for n in numbers]) + shift
    value, low, high = (
        np.array([getattr(n, k) for n in numbers]) for k in ("value", "low", "high")
    )
    axis.bar(x, value, width, **style)
    reach = np.nan_to_num(np.maximum([value - low, high - value], 0))
    axis.errorbar(x, value, reach, fmt="none", ecolor="0.2", capsize=2, linewidth=1)
