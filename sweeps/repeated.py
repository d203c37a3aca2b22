"""What holds over-fitting back where few pairs are read often: dropout, weight decay, or both.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs --split joint
    python -m sweeps.nested_data --input data/pairs --out data/nested --pairs 64
    python sweeps/repeated.py --data=data/nested/64 --jobs=1

Configs of configs/small_ladder.py, dense, 1,280 updates of 4 antibodies: 80 passes over 64. The
table of complete runs is printed at the end: losses with standard errors over seeds, and the
validation loss less that of the first row, seed by seed, with Student's 95 % interval. Training
losses are those of the updates, with what dropout left.
"""

import argparse
import sys
from statistics import mean, stdev

from scipy import special

from launch.state import COMPLETE, CellState, read_summary
from sweeps import grid
from sweeps.compare_routers import with_error
from sweeps.device import CORE
from sweeps.planned import Planned
from sweeps.study import Study, data_path, main

DROPOUT = (0.0, 0.1)
WEIGHT_DECAY = (0.01, 0.3)
DATA = "data/nested/64"
PLACES = ("attention_dropout", "hidden_dropout", "embedding_dropout")
STEPS = 1280
HEAD = ("dropout", "weight decay", "seeds", "passes", "train loss", "validation, last",
        "validation, least", "last less first row's [95 %]")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this study."""
    parser.add_argument("--size", default="s64", help="of the ladder; default %(default)s")


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Every dropout with every weight decay, seed after seed."""
    return grid.product(
        seed=range(options.seeds),
        dropout=[str(rate) for rate in DROPOUT],
        weight_decay=[str(rate) for rate in WEIGHT_DECAY],
    )


def recipe(point: grid.Point, options: argparse.Namespace) -> grid.Recipe:
    """A point's config."""
    overrides = {f"model.{place}": point["dropout"] for place in PLACES}
    overrides |= {
        "seed": point["seed"],
        "data.path": data_path(options.data or DATA),
        "train.weight_decay": point["weight_decay"],
        "train.steps": STEPS,
        "train.warmup": STEPS // 10,
        "eval.every": STEPS // 8,
    }
    return grid.Recipe("configs/small_ladder.py", f"size={options.size}", overrides)


def table(cells: list[Planned], states: list[CellState]) -> str:
    """A Markdown table with one line per dropout and weight decay that has complete runs."""
    rows: dict[tuple[str, str], dict[int, dict]] = {}
    for p, state in zip(cells, states, strict=True):
        if state.name == COMPLETE and (summary := read_summary(p.cell)):
            row = p.axes["dropout"], p.axes["weight_decay"]
            rows.setdefault(row, {})[p.seed] = summary
    first = next(iter(rows.values()))
    lines = [f"| {' | '.join(HEAD)} |", "|" + "--:|" * len(HEAD)]
    for row, by_seed in rows.items():
        runs = list(by_seed.values())
        names = ("train_loss_final", "valid_loss_final", "valid_loss_best")
        passes = mean(run["tokens_seen"] / run["corpus_tokens"] for run in runs)
        losses = [with_error([run[name] for run in runs], 3) for name in names]
        less = "" if by_seed is first else difference(by_seed, first)
        lines.append(f"| {' | '.join([*row, str(len(runs)), f'{passes:.0f}', *losses, less])} |")
    return "\n".join(lines)


def difference(some: dict[int, dict], others: dict[int, dict]) -> str:
    """Validation loss at the end less that of other runs of the same seeds."""
    name = "valid_loss_final"
    less = [run[name] - others[seed][name] for seed, run in some.items() if seed in others]
    if len(less) < 2:
        return ""
    error = stdev(less) / len(less) ** 0.5
    half = float(special.stdtrit(len(less) - 1, 0.975)) * error
    return f"{mean(less):.3f} [{mean(less) - half:.3f}, {mean(less) + half:.3f}]"


study = Study(
    name="repeated",
    about=__doc__,
    points=points,
    recipe=recipe,
    add_arguments=add_arguments,
    report=table,
    device=lambda _: CORE,
    mfu=0.1,
    seeds=3,
    data=lambda _: DATA,
)

if __name__ == "__main__":
    sys.exit(main(study))
