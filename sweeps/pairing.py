"""What native pairs are worth: paired, shuffled, unpaired (also doubled), mixed, curriculum.

    python sweeps/pairing.py --data=data/pairs --size=35m --launcher=slurm

Configs of configs/ladder.py. A regime without pairs is validated on single chains, all others on
native pairs, so that their losses are of different sequences; "unpaired:doubled" shows as many
residues an update as "paired".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import argparse

from sweeps import grid
from sweeps.study import Recipe, Study, data_path, main

REGIMES = ("paired", "shuffled", "unpaired", "unpaired:doubled", "mixed:0.625",
           "curriculum:sigmoid")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this study."""
    parser.add_argument("--size", default="8m", help="of the ladder; default %(default)s")


def points(options: argparse.Namespace) -> list[grid.Point]:
    """Regimes, seed after seed."""
    return grid.product(seed=range(options.seeds), regime=REGIMES)


def recipe(point: grid.Point, options: argparse.Namespace) -> Recipe:
    """A point's config."""
    path = data_path(options.data or "data/pairs")
    overrides = {"seed": point["seed"], "data.path": path, "data.regime": point["regime"]}
    return Recipe("configs/ladder.py", f"size={options.size}", overrides)


study = Study("pairing", __doc__, points, recipe, add_arguments)

if __name__ == "__main__":
    sys.exit(main(study))
