"""Compares routers on real pairs: minutes per run on two cores, and a table.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python sweeps/compare_routers.py --data=data/pairs --seeds=3 --jobs=1

Trains every config of configs/compare_routers.py at the learning rate that it was tuned to (`RATES`
there), or at each of --rates. The table of complete runs is printed at the end; the same command
prints it again. A row shows the rate with the lowest mean validation loss: one rate for all would
favour the routers that it suits. FLOPs per token are relative to the dense encoder; top-p and
soft-MoE spend more.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

from configs.compare_routers import rate_of
from launch.state import COMPLETE, CellState, read_summary
from moe_ablm.results import read_results
from sweeps import grid
from sweeps.device import CORE
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
CHAINS = ("heavy", "light_unseen")  # of `valid_loss_by_chain`: those that no run was trained on
REGIONS = ("CDRH3", "CDRL3", "FRH1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this study."""
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        help="learning rates tried for every row; default: the tuned one of each",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=["-".join(row) for row in ROWS],
        default=["-".join(row) for row in ROWS],
        metavar="ROUTER-PLACEMENT",
        help="rows of the table; default all: %(default)s",
    )


def points(options: argparse.Namespace) -> list[grid.Point]:
    """The rows with every rate, seed after seed."""
    rows = [
        {"router": router, "placement": placement, "lr": rate}
        for router, placement in ROWS
        if f"{router}-{placement}" in options.rows
        for rate in options.rates or [rate_of(router)]
    ]
    return grid.product([{"seed": s} for s in range(options.seeds)], rows)


def recipe(point: grid.Point, options: argparse.Namespace) -> grid.Recipe:
    """A point's config."""
    argument = f"router={point['router']},placement={point['placement']}"
    path = data_path(options.data or "data/pairs")
    overrides = {"seed": point["seed"], "train.lr": point["lr"], "data.path": path}
    return grid.Recipe("configs/compare_routers.py", argument, overrides)


def table(cells: list[Planned], states: list[CellState]) -> str:
    """A title and a Markdown table with one line per row of `ROWS` that has complete runs."""
    head = ["router", "placement", "rate", "seeds", "FLOPs", "train loss", "validation"]
    head += [*(chain.replace("_", ", ") for chain in CHAINS), *REGIONS]
    head += ["load entropy", "dropped", "tokens/s", "memory MB", "verdict"]
    complete = [p for p, s in zip(cells, states, strict=True) if s.name == COMPLETE]
    rows = {row: runs for row in ROWS if (runs := best_rate(row, complete))}
    dense = next((flops_per_token(runs[0]) for (name, _), runs in rows.items() if name == "dense"),
                 None)  # fmt: skip
    updates = ", ".join(f"{n:,}" for n in sorted({p.steps for p in complete}))
    title = f"After {updates} updates, each row at its best of the rates that ran:\n"
    lines = [title, f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (len(head) - 3) + "---|"]
    for row, runs in rows.items():
        lines.append("| " + " | ".join([*row, runs[0].axes["lr"], *columns(runs, dense)]) + " |")
    return "\n".join(lines)


def best_rate(row: tuple[str, str], complete: list[Planned]) -> list[Planned]:
    """The runs of the rate with the lowest mean validation loss, among those of most seeds."""
    rates: dict[str, list[Planned]] = {}
    for p in complete:
        if (p.axes["router"], p.axes["placement"]) == row:
            rates.setdefault(p.axes["lr"], []).append(p)
    most = max(map(len, rates.values()), default=0)
    whole = [runs for runs in rates.values() if len(runs) == most]
    return min(whole, key=lambda runs: mean(map(valid_loss, runs)), default=[])


def valid_loss(planned: Planned) -> float:
    """Validation loss of a complete run, in nats."""
    return (read_summary(planned.cell) or {})["valid_loss_final"]


def flops_per_token(planned: Planned) -> float:
    """FLOPs of a training token of a complete run."""
    summary = read_summary(planned.cell) or {}
    return summary["flops"] / summary["tokens_seen"]


def columns(runs: list[Planned], dense: float | None) -> list[str]:
    """The numbers of one row, means over its runs with standard errors.

    Args:
      runs: of one row, complete.
      dense: FLOPs of a token of the dense encoder; None: not known.
    """
    found = [summary for p in runs if (summary := read_summary(p.cell))]
    routing = [stats for p in runs for stats in last_router(p.cell.workdir)]
    verdicts = [run["stability"]["verdict"] for run in found]
    # a run that was resumed after its last update has no speed
    speeds = [run["tokens_per_second"] for run in found if run["tokens_per_second"]]
    return [
        str(len(runs)),
        f"{mean(map(flops_per_token, runs)) / dense:.2f}" if dense else "",
        with_error([run["train_loss_final"] for run in found], 3),
        with_error([run["valid_loss_final"] for run in found], 3),
        *(
            with_error([run.get(f"valid_loss_by_{part}", {}).get(name) for run in found], 3)
            for part, names in (("chain", CHAINS), ("region", REGIONS))
            for name in names
        ),
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


def with_error(values: list[float | None], digits: int) -> str:
    """Mean and its standard error; "" where a run has no value, as older ones by chain."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    error = f" ± {stdev(known) / len(known) ** 0.5:.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{error}"


study = Study(
    name="compare_routers",
    about=__doc__,
    points=points,
    recipe=recipe,
    add_arguments=add_arguments,
    report=table,
    device=lambda _: CORE,
    mfu=0.15,
    seeds=3,
)

if __name__ == "__main__":
    sys.exit(main(study))
