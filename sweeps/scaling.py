"""Runs the grid of a scaling law: sizes x data x routers x seeds.

    python sweeps/scaling.py --ladder=paper --dry-run
    python sweeps/scaling.py --ladder=paper --seeds=1 --routers=dense,top2 --launcher=slurm
    python -m moe_ablm prepare --input pairs.parquet --out data/joint --split joint
    python -m sweeps.nested_data --input data/joint --out data/nested --pairs 64 512 8192
    python sweeps/scaling.py --ladder=micro --launcher=local
    python -m sweeps.collect runs/scaling --out runs/scaling.parquet
    python -m moe_ablm fit --input runs/scaling.parquet --law joint --out fit/micro

paper: the ESM-2 ladder 8m to 650m, 500,000 updates of 128 antibodies (the AbLM study's), data
quarter, half, full. mini: 1 to 40 M parameters, 20,000 updates of 64. micro: 0.06 to 1.3 M, 1,280
updates of 4, for two cores; its data are nested subsets that sweeps/nested_data.py makes, or
quarter, half and full of the embedded dataset (--data=simulated).

Losses are compared on novel chains, which no training antibody has (docs/sweeps.md). Nested
datasets made from a dataset of --split joint share their novel chains.

Runs of equal length cannot identify the effect of training tokens. --add=one-epoch appends dense
runs of at most one epoch at the three smallest sizes. --add=branches appends dense runs with 1/8 to
1/2 of the updates at every size on the full data, each trained from scratch.

--rate-law trains each cell at the peak rate that a fitted law has for its size (docs/sweeps.md).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_ablm.errors import UserError
from moe_ablm.files import address_of
from moe_ablm.stores import Store
from sweeps import grid
from sweeps.device import CORE
from sweeps.planned import Planned
from sweeps.rates import rate_of_law, rates_lines
from sweeps.study import SIMULATED, Study, data_path, main


@dataclass(frozen=True)
class Ladder:
    """A config file, default data, sizes, share of the updates spent on warm-up, and device."""

    config: str
    data: str
    sizes: tuple[str, ...]
    warmup: float
    device: str = "h100"


LADDERS = {
    "paper": Ladder("configs/ladder.py", "data/pairs", ("8m", "35m", "150m", "350m", "650m"), 0.06),
    "mini": Ladder(
        "configs/small_ladder.py", "data/pairs", ("m160", "m224", "m320", "m448", "m640"), 0.1
    ),
    "micro": Ladder(
        "configs/small_ladder.py", "data/nested", ("s48", "s64", "s96", "s128", "s160"), 0.1, CORE
    ),
}
FRACTIONS = ("quarter", "half", "full")
ROUTERS = ("dense", "top2", "soft")
# configs/ladder.py knows dense and top-k only; 8 x 32 slots are the places of a row
SOFT = {
    "model.moe.router": "soft",
    "model.moe.slots": 32,
    "model.moe.load_balance": 0.0,
    "model.moe.z_loss": 0.0,
}
BRANCHES = (8, 4, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this study."""
    parser.add_argument(
        "--ladder", choices=LADDERS, default="micro", help="sizes and data; default %(default)s"
    )
    parser.add_argument("--routers", default=",".join(ROUTERS), help="default %(default)s")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        choices=("one-epoch", "branches"),
        help="append cells that identify more coefficients; repeatable",
    )
    parser.add_argument(
        "--rate-law",
        type=Path,
        metavar="FIT",
        help="learning rates by a fit of law learning_rate; default: those of the config file",
    )


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Sizes x data x routers x seeds, seed after seed."""
    routers = options.routers.split(",")
    if unknown := set(routers) - set(ROUTERS):
        raise UserError(f"--routers {options.routers}: {min(unknown)!r} is none of {ROUTERS}")
    return grid.product(
        seed=range(options.seeds),
        size=LADDERS[options.ladder].sizes,
        data=data_names(options),
        router=routers,
    )


def data_names(options: argparse.Namespace) -> list[str]:
    """Values of the data axis, smallest first.

    Raises:
      UserError: the folder of nested datasets is not there or has none.
    """
    if not is_nested(options):
        return list(FRACTIONS)
    folder = options.data or LADDERS[options.ladder].data
    if address := address_of(folder):
        found = {name.partition("/")[0] for name in Store(address, "--data").listing()}
    else:
        found = {p.name for p in Path(folder).glob("*/")}
    names = [name for name in found if name.isdecimal()]
    if not names:
        raise UserError(
            f"--data {folder}: holds no nested datasets; make them with `python -m "
            f"sweeps.nested_data --input data/pairs --out {folder}`, or use --data=simulated"
        )
    return sorted(names, key=int)


def is_nested(options: argparse.Namespace) -> bool:
    """Whether the data axis is a folder of datasets instead of fractions of one."""
    return options.ladder == "micro" and options.data != SIMULATED


def recipe(point: grid.Point, options: argparse.Namespace) -> grid.Recipe:
    """A point's config."""
    ladder = LADDERS[options.ladder]
    size, data, router = point["size"], point["data"], point["router"]
    path = data_path(options.data or ladder.data)
    overrides = {
        "seed": point["seed"],
        "data.path": f"{path}/{data}" if is_nested(options) else path,
    }
    fraction = "full" if is_nested(options) else data
    named = router
    if options.ladder == "paper":
        named = "none" if router in ("dense", "soft") else router
        overrides |= SOFT if router == "soft" else {}
    if isinstance(steps := point.get("steps"), int):
        overrides |= {"train.steps": steps, "train.warmup": round(steps * ladder.warmup)}
    return grid.Recipe(ladder.config, f"size={size},data={fraction},router={named}", overrides)


def tuned(planned: Planned, options: argparse.Namespace) -> dict[str, object]:
    """The learning rate of a cell, where a law says it."""
    return {"train.lr": rate_of_law(options.rate_law, planned)} if options.rate_law else {}


def notes(cells: list[Planned], options: argparse.Namespace) -> list[str]:
    """The learning rates of a law, in lines."""
    return rates_lines(options.rate_law, cells) if options.rate_law else []


def repairs(cells: list[Planned]) -> dict[str, list[grid.Point]]:
    """Cells that identify more, by the name for `--add`: dense ones of the first seed."""
    dense = [p for p in cells if p.axes["router"] == "dense" and p.axes["seed"] == "0"]
    sizes = dict.fromkeys(p.axes["size"] for p in dense)
    data = dict.fromkeys(p.axes["data"] for p in dense)
    one_epoch = [
        shortened(p, int(p.steps * p.corpus_tokens / p.cell.tokens))
        for p in dense
        if p.axes["size"] in list(sizes)[:3] and p.corpus_tokens < p.cell.tokens
    ]
    branches = [
        shortened(p, p.steps // part)
        for p in dense
        if p.axes["data"] == list(data)[-1]
        for part in BRANCHES
    ]
    offered = {"one-epoch": one_epoch, "branches": branches}
    return {name: [p for p in points if p["steps"]] for name, points in offered.items()}


def shortened(p: Planned, steps: int) -> grid.Point:
    """A dense cell's point with fewer updates."""
    return {"seed": 0, "size": p.axes["size"], "data": p.axes["data"], "router": "dense",
            "steps": steps}  # fmt: skip


study = Study(
    name="scaling",
    about=__doc__,
    points=points,
    recipe=recipe,
    add_arguments=add_arguments,
    repairs=repairs,
    tuned=tuned,
    notes=notes,
    data=lambda options: LADDERS[options.ladder].data,
    device=lambda options: LADDERS[options.ladder].device,
)

if __name__ == "__main__":
    sys.exit(main(study))
