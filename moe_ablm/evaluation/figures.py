"""Figures of a run, drawn from `results.jsonl` alone."""

import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moe_ablm.data.regions import CHAINS, REGIONS

SHOWN = ("CDRH3", "FRH3", "CDRL3", "FRL3")


def draw_loss(records: list[dict], path: Path) -> None:
    """Training loss, validation loss, and validation loss of some regions, over tokens seen.

    Args:
      records: lines of `results.jsonl`, at least one of kind "eval".
      path: PNG to write.
    """
    train = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.plot(_of(train, "tokens_seen"), _of(train, "loss"), color="0.75", label="training")
    x = _of(evaluations, "tokens_seen")
    axis.plot(x, _of(evaluations, "loss"), "k.-", label="validation")
    for name in SHOWN:
        y = [r["loss_by_region"].get(name, np.nan) for r in evaluations]
        axis.plot(x, y, ".--", label=f"validation, {name}")
    axis.set(xlabel="tokens seen", ylabel="masked-token loss (nats)", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _of(records: list[dict], key: str) -> list[float]:
    return [r[key] for r in records]


def draw_routing(routed: dict[str, list], path: Path) -> None:
    """Heat map, one panel a MoE layer: how much more than its share each expert takes of a region.

    Args:
      routed: `{layer: [E][cells]}` counts of an "eval" line, cells as in `training.step`; of
        soft-MoE sums of shares, no whole numbers.
      path: PNG to write.

    Colour is log2 of (share of the region's assignments that go to the expert) over (share of all
    assignments that go to it): 0 is no preference.
    """
    counts = {layer: np.asarray(table, float) for layer, table in routed.items()}
    cells = [c * len(REGIONS) + r for c in range(len(CHAINS)) for r in range(1, len(REGIONS))]
    names = [f"{CHAINS[c // 8][0].upper()} {REGIONS[c % 8]}" for c in cells]
    experts = len(next(iter(counts.values())))
    # a file has at most 2^16 pixels a side: rows of many experts are lower, and not all numbered
    height = 0.6 + min(0.28 * experts, 6.0)
    figure, axes = plt.subplots(
        len(counts), 1, figsize=(8, 1.2 + len(counts) * height),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, (layer, table) in zip(axes[:, 0], counts.items(), strict=True):
        image = axis.imshow(_enrichment(table[:, cells]), cmap="RdBu_r", vmin=-3, vmax=3)
        axis.set_aspect("auto")
        axis.set_xticks(range(len(cells)), names, rotation=60, ha="right")
        axis.set_yticks(range(0, experts, math.ceil(experts / 32)))
        axis.set(title=f"layer {layer}", ylabel="expert")
    figure.colorbar(image, ax=axes, location="top", shrink=0.5, label="log2 enrichment")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _enrichment(table: np.ndarray) -> np.ndarray:
    """Counts `[E, regions]` -> log2 ratio of observed to independent routing, `[E, regions]`."""
    total = max(table.sum(), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / total
    return np.log2((table + 0.5) / (expected + 0.5))
