"""Who is masked: uniform, CDRH3 or mutated residues preferred, spans; at 15 % on average.

    python sweeps/masking.py --data=data/pairs --size=35m --launcher=slurm

Configs of configs/ladder.py. Validation masks are uniform, the same for all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import argparse

from sweeps import grid
from sweeps.study import Recipe, Study, data_path, main

MASKS = ("uniform", "cdr3:0.25", "cdr3:0.5", "nongermline:0.25", "nongermline:0.5", "span")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this study."""
    parser.add_argument("--size", default="8m", help="of the ladder; default %(default)s")


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Policies, seed after seed."""
    return grid.product(seed=range(options.seeds), mask=MASKS)


def recipe(point: grid.Point, options: argparse.Namespace) -> Recipe:
    """A point's config."""
    path = data_path(options.data or "data/pairs")
    overrides = {"seed": point["seed"], "data.path": path, "data.mask": point["mask"]}
    return Recipe("configs/ladder.py", f"size={options.size}", overrides)


study = Study("masking", __doc__, points, recipe, add_arguments)

if __name__ == "__main__":
    sys.exit(main(study))
