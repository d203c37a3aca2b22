"""Routers compared on real pairs at equal compute: minutes a run on two cores, and a table.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python sweeps/compare_routers.py --data=data/pairs --seeds=3 --jobs=1

Configs of configs/compare_routers.py. The table, of what is complete, is printed at the end; the
same command prints it again.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

from launch.state import COMPLETE, State, read_summary
from moe_ablm.results import read_results
from sweeps import grid
from sweeps.planned import Planned
from sweeps.study import Study, data_path, main

ROWS = [
    ("dense", "interleaved"),
    ("top2", "interleaved"),
    ("top2", "consecutive"),
    ("top2-capacity", "interleaved"),
    ("top2-biased", "interleaved"),
    ("top-p", "interleaved"),
    ("expert-choice", "interleaved"),
    ("expert-choice", "consecutive"),
    ("soft", "interleaved"),
    ("soft", "consecutive"),
    ("soft-l2", "interleaved"),
    ("sequence", "interleaved"),
]
REGIONS = ("CDRH3", "CDRL3", "FRH1")


def points(options: argparse.Namespace) -> list[grid.Point]:
    """The rows, seed after seed."""
    routers, placements = zip(*ROWS, strict=True)
    rows = grid.paired(router=routers, placement=placements)
    return grid.product([{"seed": s} for s in range(options.seeds)], rows)


def recipe(point: grid.Point, options: argparse.Namespace) -> grid.Recipe:
    """A point's config."""
    argument = f"router={point['router']},placement={point['placement']}"
    overrides = {"seed": point["seed"], "data.path": data_path(options.data or "data/pairs")}
    return grid.Recipe("configs/compare_routers.py", argument, overrides)


def table(cells: list[Planned], states: list[State]) -> str:
    """A Markdown table, a line a row that has complete runs."""
    head = ["router", "placement", "seeds", "train loss", "validation", *REGIONS]
    head += ["load entropy", "dropped", "tokens/s", "memory MB", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 3) + "---|"]
    complete = [p for p, s in zip(cells, states, strict=True) if s.name == COMPLETE]
    for row in ROWS:
        runs = [p for p in complete if (p.axes["router"], p.axes["placement"]) == row]
        if runs:
            lines.append("| " + " | ".join([*row, *columns(runs)]) + " |")
    return "\n".join(lines)


def columns(runs: list[Planned]) -> list[str]:
    """The numbers of one row, means over its runs with standard errors."""
    found = [summary for p in runs if (summary := read_summary(p.cell))]
    routing = [stats for p in runs for stats in last_router(p.cell.workdir)]
    verdicts = [run["stability"]["verdict"] for run in found]
    # a run that was resumed after its last update has no speed
    speeds = [run["tokens_per_second"] for run in found if run["tokens_per_second"]]
    return [
        str(len(runs)),
        with_error([run["train_loss_final"] for run in found], 3),
        with_error([run["valid_loss_final"] for run in found], 3),
        *(with_error([run["valid_loss_by_region"][r] for run in found], 3) for r in REGIONS),
        f"{mean(s['entropy'] for s in routing):.3f}" if routing else "",
        f"{mean(s['dropped'] for s in routing):.1%}" if routing else "",
        f"{mean(speeds):,.0f}" if speeds else "",
        f"{max(run['peak_memory'] for run in found) / 1e6:,.0f}",
        ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))),
    ]


def last_router(workdir: Path) -> list[dict]:
    """Router statistics of each MoE layer in the last tenth of the updates."""
    train = [r for r in read_results(workdir / "results.jsonl") if r["kind"] == "train"]
    return [
        s for line in train[-max(len(train) // 10, 1) :] for s in line.get("router", {}).values()
    ]


def with_error(values: list[float], digits: int) -> str:
    """Mean and its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


study = Study(
    name="compare_routers",
    about=__doc__,
    points=points,
    recipe=recipe,
    report=table,
    device="core",
    mfu=0.15,
    seeds=3,
)

if __name__ == "__main__":
    sys.exit(main(study))
