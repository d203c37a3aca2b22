"""Prints the command of each cell, for a scheduler of your own."""

import argparse
import shlex

from launch import assign
from launch.cell import REPOSITORY, Cell
from launch.settings import add_options, resolve

SETTINGS = {"hardware": assign.SETTING}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this launcher."""
    add_options(parser, SETTINGS)


def launch(cells: list[Cell], options: argparse.Namespace) -> int:
    """Prints a line for a shell; arguments with line ends go over several. Returns 0.

    Raises:
      UserError: a setting is wrong, or a cell does not fit the hardware.
    """
    cells = assign.assigned(cells, resolve(options, "print", SETTINGS)["hardware"])
    print(f"cd {shlex.quote(str(REPOSITORY))}")
    for cell in cells:
        variables = [f"{name}={value}" for name, value in cell.environment.items()]
        print(shlex.join([*(["env", *variables] if variables else []), "python", *cell.argv]))
    return 0
