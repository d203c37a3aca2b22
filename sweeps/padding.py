"""BALM-MoE's ablation of padding, 2 x 2: last in the queues or not, in the router losses or not.

    python sweeps/padding.py --data=data/pairs --launcher=slurm

Configs of configs/balm_moe.py:model=pads, 250,000 updates of 512 single chains.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import argparse

from sweeps import grid
from sweeps.study import Recipe, Study, data_path, main

# BALM-MoE's name by (padding is last in the queues, padding is left out of the losses)
PADS = {
    (False, False): "none",
    (True, False): "probabilities",
    (False, True): "aux",
    (True, True): "probabilities+aux",
}


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Both choices, seed after seed."""
    return grid.product(seed=range(options.seeds), last=(False, True), left_out=(False, True))


def recipe(point: grid.Point, options: argparse.Namespace) -> Recipe:
    """A point's config."""
    pads = PADS[point["last"], point["left_out"]]
    overrides = {"seed": point["seed"], "data.path": data_path(options.data or "data/pairs")}
    return Recipe("configs/balm_moe.py", f"model=pads,pads={pads}", overrides)


study = Study(name="padding", about=__doc__, points=points, recipe=recipe)

if __name__ == "__main__":
    sys.exit(main(study))
