"""Prints the command of each cell, for a scheduler of your own."""

import argparse
import shlex

from launch.cell import REPOSITORY, Cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def launch(cells: list[Cell], options: argparse.Namespace) -> int:
    """Prints a line for a shell; arguments with line ends go over several. Returns 0."""
    print(f"cd {shlex.quote(str(REPOSITORY))}")
    for cell in cells:
        print(shlex.join(["python", *cell.argv]))
    return 0
