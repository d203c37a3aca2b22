"""Adds to every cell what named hardware needs: mesh, remat, XLA flags, the share of memory.

All launchers take `--hardware=NAME`. A cell gets arguments of the training command that are outside
its identity, and variables of its environment. A key that the cell's command line or config sets
stays as it is; so do a variable and an XLA flag that the user's environment sets.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from shlex import quote

from launch.cell import Cell, config_of
from launch.hardware import NAMES, hardware
from launch.mesh_plan import fitting_plan, given_keys
from launch.settings import Setting
from moe_ablm.errors import UserError
from moe_ablm.program import FLAGS, HARDWARE

SETTING = Setting(
    r"[a-z0-9-]+", f"hardware whose mesh, remat and XLA flags every cell gets: {NAMES}"
)


def assigned(cells: Sequence[Cell], name: str | None) -> list[Cell]:
    """The cells with what hardware of this name asks for; None leaves them as they are.

    Raises:
      UserError: there is no such hardware, or a cell does not fit it.
    """
    if name is None:
        return list(cells)
    where = hardware(name)
    environment = {HARDWARE: name} | where.environment
    made = []
    for cell in cells:
        given = given_keys(cell.argv)
        try:
            plan = fitting_plan(config_of(cell.argv), where, given)
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from error
        flags = [f"--config.{k}={v}" for k, v in plan.overrides.items() if k not in given]
        made.append(replace(cell, argv=(*cell.argv, *flags), environment=environment))
    return made


def merged(environment: Mapping[str, str], own: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a cell's process: that of the hardware, under the user's own."""
    made = dict(environment) | dict(own)
    for name in environment.keys() & own.keys():
        if name in FLAGS:
            made[name] = f"{environment[name]} {own[name]}"
        elif name == HARDWARE:
            made[name] = environment[name]
    return made


def exports(environment: Mapping[str, str]) -> list[str]:
    """The same as lines of a shell script."""
    lines = []
    for name, value in environment.items():
        if name in FLAGS:
            lines.append(f'export {name}={quote(value)}${{{name}:+" ${name}"}}')
        elif name == HARDWARE:
            lines.append(f"export {name}={quote(value)}")
        else:
            lines.append(f"export {name}=${{{name}:-{quote(value)}}}")
    return lines
