"""Where experts stand: interleaved, consecutive, every layer; soft-MoE and expert choice.

    python sweeps/placement.py --data=data/proteins --launcher=slurm
    python sweeps/placement.py --data=data/pairs --config.data.length=256 \
        --config.model.moe.slots=32

Configs of configs/soft_moe_protein.py: 150,000 updates of 512 rows of 512 tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import argparse

from sweeps import grid
from sweeps.study import Recipe, Study, data_path, main


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Routers x placements, seed after seed."""
    return grid.product(
        seed=range(options.seeds),
        router=("soft", "expert_choice"),
        placement=("interleaved", "consecutive", "every"),
    )


def recipe(point: grid.Point, options: argparse.Namespace) -> Recipe:
    """A point's config."""
    argument = f"router={point['router']},placement={point['placement']},size=8m"
    overrides = {"seed": point["seed"], "data.path": data_path(options.data or "data/proteins")}
    return Recipe("configs/soft_moe_protein.py", argument, overrides)


study = Study(name="placement", about=__doc__, points=points, recipe=recipe)

if __name__ == "__main__":
    sys.exit(main(study))
