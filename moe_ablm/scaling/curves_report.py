"""What is said of clusters of curves: tables, a figure, files."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from rich.table import Table

from moe_ablm.files import write_atomically, write_json
from moe_ablm.page import image_html, lines_html, write_page
from moe_ablm.scaling.gp_mixture import Clusters
from moe_ablm.scaling.plots import STYLE, save_all
from moe_ablm.scaling.tables import add_row, number, rich_html
from moe_ablm.scaling.trajectories import Trajectories

BAND = 1.96
DOUBTFUL = 0.95  # a run whose best cluster is less probable is named
SHOWN = 12  # most names in a cell or sentence
NO_VERDICT = "none"


def verdict_table(curves: Trajectories, clusters: Clusters) -> Table:
    """Runs of each cluster by the verdict of the stability watch."""
    verdicts = [v or NO_VERDICT for v in curves.verdicts]
    table = Table(title="clusters against stability verdicts", title_justify="left")
    kinds = sorted(set(verdicts))
    for name in ("cluster", "runs", *kinds, "mean at the end", "95 % of its runs"):
        table.add_column(name, justify="right")
    for k in range(clusters.count):
        mine = [v for v, label in zip(verdicts, clusters.labels, strict=True) if label == k]
        at = _last(curves, clusters, k)
        mean, half = clusters.mean[k, at], BAND * clusters.run_sd[k, at]
        counts = [str(mine.count(kind)) for kind in kinds]
        ends = f"{number(mean - half)} .. {number(mean + half)}"
        add_row(table, str(k + 1), str(len(mine)), *counts, number(mean), ends)
    return table


def runs_table(curves: Trajectories, clusters: Clusters) -> Table:
    """Every run with its cluster, the probability of that, and its verdict."""
    table = Table(title="runs", title_justify="left")
    for name in ("run", "cluster", "probability", "verdict"):
        table.add_column(name, justify="right" if name == "probability" else "left")
    for row in _assignments(curves, clusters):
        add_row(table, row[0], str(row[1]), f"{row[2]:.3f}", row[3])
    return table


def sentences(curves: Trajectories, clusters: Clusters, metric: str) -> list[str]:
    """What was found, what is doubtful, what was left out."""
    said = [
        f"{clusters.count} cluster{'s' * (clusters.count > 1)} of {len(curves.names)} curves of "
        f"{metric} ({curves.source}); ln evidence {clusters.bound - clusters.single:+.1f} against "
        f"one cluster; axis of steps: {clusters.axis}",
        f"a run deviates from its cluster by {number(clusters.deviation_sd)} (sd), single values "
        f"from the run by {number(clusters.noise_sd)}",
    ]
    sure = clusters.probability.max(1)
    doubtful = [n for n, p in zip(curves.names, sure, strict=True) if p < DOUBTFUL]
    if doubtful:
        said.append(f"less than {DOUBTFUL:.0%} sure of {_some(doubtful)}")
    said += [f"left out {name}: {why}" for name, why in curves.left_out]
    return said


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _last(curves: Trajectories, clusters: Clusters, k: int) -> int:
    """Where the longest run of a cluster ends, as an index of its mean."""
    ends = [s[-1] for s, label in zip(curves.steps, clusters.labels, strict=True) if label == k]
    return int(np.abs(clusters.steps - max(ends)).argmin())


def _assignments(curves: Trajectories, clusters: Clusters) -> list[tuple[Any, ...]]:
    return [
        (name, int(label) + 1, float(p[label]), verdict, *map(float, p))
        for name, label, p, verdict in zip(
            curves.names, clusters.labels, clusters.probability, curves.verdicts, strict=True
        )
    ]


def draw(curves: Trajectories, clusters: Clusters, metric: str) -> Figure:
    """Runs in the colour of their cluster, its mean, and the band of 95 % of its runs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.2))
        axes = figure.add_subplot()
        colours = [colormaps["tab10" if clusters.count <= 10 else "tab20"](k % 20)
                   for k in range(clusters.count)]  # fmt: skip
        for steps, values, label in zip(curves.steps, curves.values, clusters.labels, strict=True):
            axes.plot(steps, values, color=colours[label], alpha=0.35, linewidth=0.7)
        for k, colour in enumerate(colours):
            till = _last(curves, clusters, k) + 1
            x, mean = clusters.steps[:till], clusters.mean[k, :till]
            half = BAND * clusters.run_sd[k, :till]
            size = int((clusters.labels == k).sum())
            axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, color=colour, linewidth=2, label=f"cluster {k + 1}: {size} runs")
        if clusters.axis == "log":
            axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlabel("step")
        axes.set_ylabel(metric)
        axes.legend()
    return figure


def write_curves(
    directory: Path,
    curves: Trajectories,
    clusters: Clusters,
    metric: str,
    provenance: dict[str, object],
) -> list[Path]:
    """Writes `curves.json`, `runs.csv`, `clusters.csv`, the figure and `report.html`."""
    said = sentences(curves, clusters, metric)
    names = ["run", "cluster", "probability", "verdict"]
    names += [f"cluster_{k + 1}" for k in range(clusters.count)]
    _write_csv(directory / "runs.csv", names, _assignments(curves, clusters))
    _write_csv(
        directory / "clusters.csv",
        ["cluster", "step", "mean", "mean_low", "mean_high", "run_low", "run_high"],
        (
            (k + 1, step, m, m - BAND * s, m + BAND * s, m - BAND * r, m + BAND * r)
            for k in range(clusters.count)
            for step, m, s, r in zip(
                clusters.steps.tolist(),
                clusters.mean[k].tolist(),
                clusters.mean_sd[k].tolist(),
                clusters.run_sd[k].tolist(),
                strict=True,
            )
        ),
    )
    write_json(
        directory / "curves.json",
        {
            "schema": "moe_ablm.curves/1",
            "metric": metric,
            "source": curves.source,
            "clusters": clusters.count,
            "axis": clusters.axis,
            "log_evidence": clusters.bound,
            "log_evidence_one_cluster": clusters.single,
            "noise_sd": clusters.noise_sd,
            "deviation_sd": clusters.deviation_sd,
            "left_out": [list(pair) for pair in curves.left_out],
            "provenance": provenance,
        },
    )
    figures = save_all({"curves": draw(curves, clusters, metric)}, directory / "figures")
    picture = next(p for p in figures if p.suffix == ".svg")
    parts = [
        f"<h1>Clusters of {len(curves.names)} curves</h1>",
        lines_html(said),
        image_html(picture, f"curves of {metric} by cluster"),
        rich_html(verdict_table(curves, clusters)),
        rich_html(runs_table(curves, clusters)),
    ]
    write_page(directory / "report.html", f"curves of {metric}", parts)
    return [directory / name for name in ("report.html", "curves.json", "runs.csv", "clusters.csv")]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
