"""Three encoders of equal active parameters and tokens, to be dissected: dense, top-2, soft-MoE.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python sweeps/specialisation.py --data=data/pairs --seeds=2 --jobs=2
    python -m moe_ablm evaluate --run runs/specialisation/CELL --input data/pairs --out DIR

Configs of configs/compare_routers.py, five times as long.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import argparse

from sweeps import grid
from sweeps.study import Recipe, Study, data_path, main

ROUTERS = ("dense", "top2", "soft")
STEPS = 2000


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Routers, seed after seed."""
    return grid.product([{"seed": s} for s in range(options.seeds)], grid.product(router=ROUTERS))


def recipe(point: grid.Point, options: argparse.Namespace) -> Recipe:
    """A point's config."""
    overrides = {
        "seed": point["seed"],
        "data.path": data_path(options.data or "data/pairs"),
        "train.steps": STEPS,
        "train.warmup": STEPS // 10,
        "eval.every": STEPS // 4,
        "checkpoint.every": STEPS // 4,
        "log.every": 10,
    }
    return Recipe("configs/compare_routers.py", f"router={point['router']}", overrides)


study = Study(
    name="specialisation",
    about=__doc__,
    points=points,
    recipe=recipe,
    device="core",
    mfu=0.15,
    seeds=2,
)

if __name__ == "__main__":
    sys.exit(main(study))
