"""BALM-MoE's pilot: routers x capacity x shared experts, and the dense encoder.

    python sweeps/routers.py --data=data/pairs --launcher=slurm

Configs of configs/balm_moe.py: 250,000 updates of 512 single chains; experts are the wider the less
they may take. `sweeps/compare_routers.py` compares all routers in minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import argparse

from sweeps import grid
from sweeps.study import Recipe, Study, data_path, main


def points(options: argparse.Namespace) -> list[grid.Point]:
    """18 pilots and the dense one, seed after seed."""
    pilots = grid.product(
        router=("topk", "topp", "expert_choice"), capacity=("1", "0.5", "0.25"), shared=("0", "1")
    )
    return grid.product([{"seed": s} for s in range(options.seeds)], [{"router": "dense"}, *pilots])


def recipe(point: grid.Point, options: argparse.Namespace) -> Recipe:
    """A point's config."""
    argument = "model=dense_45m"
    if point["router"] != "dense":
        chosen = (f"{name}={point[name]}" for name in ("router", "capacity", "shared"))
        argument = ",".join(("model=pilot", *chosen))
    overrides = {"seed": point["seed"], "data.path": data_path(options.data or "data/pairs")}
    return Recipe("configs/balm_moe.py", argument, overrides)


study = Study(name="routers", about=__doc__, points=points, recipe=recipe, seeds=1)

if __name__ == "__main__":
    sys.exit(main(study))
