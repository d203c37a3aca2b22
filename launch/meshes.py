"""Plans a run for named hardware: mesh, XLA flags, split of the batch and remat.

    python -m launch.meshes --hardware=h100x8
    python -m launch.meshes --hardware=v6e-8 --size=650m --router=top2-capacity --experts=32

prints the settings to use and the device memory that they take, computed from the shapes of the
state and of what the backward pass keeps. A single combination that does not fit is refused (exit
code 2). The rules of the choice are those of `launch/mesh_plan.py`.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from launch.cell import config_of
from launch.hardware import NAMES, hardware
from launch.mesh_plan import GIB, MeshPlan, fitting_plan
from moe_ablm.config_schema import Config
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError
from moe_ablm.model.spec import SIZES

ROUTERS: dict[str, dict[str, object]] = {  # overrides of the model's section by name of a router
    "none": {},
    "top2": {"router": "topk"},
    "top2-capacity": {"router": "topk", "capacity": 1.25},
    "expert_choice": {"router": "expert_choice"},
    "soft": {"router": "soft"},
}
DEFAULT = ("a100x8", "h100x8", "h200x8", "h100x8x4", "v4-8", "v5e-8", "v5p-8", "v6e-8", "cpu")


def rung(size: str, router: str, **overrides: object) -> Config:
    """The config of an encoder of the ladder.

    Args:
      size: a key of `SIZES`.
      router: a key of `ROUTERS`.
      **overrides: values of config keys, with "__" for ".".

    Raises:
      UserError: a name is unknown, or a value is wrong.
    """
    if router not in ROUTERS:
        raise UserError(f"router {router!r}: expected one of {', '.join(ROUTERS)}")
    values = {"model.size": size} | {f"model.moe.{k}": v for k, v in ROUTERS[router].items()}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return config_of(
        ["--config=configs/base.py", *(f"--config.{k}={v}" for k, v in values.items())]
    )


def table(rows: list[tuple[str, str, str, MeshPlan | str]]) -> Table:
    """Hardware, size, router and their plan, or why there is none."""
    made = Table("hardware", "size", "router", "data x expert x fsdp", "rows", "remat", box=None)
    for name in ("state", "gradients", "activations", "total", "of GiB"):
        made.add_column(name, justify="right")
    for name, size, router, found in rows:
        if isinstance(found, str):
            made.add_row(name, size, router, "-", "-", "-", "-", "-", "-", "-", "refused")
            continue
        need = found.needed
        parts = need.state, need.gradients, need.activations, need.total
        numbers = [f"{part / GIB:.2f}" for part in parts]
        mesh = f"{found.data} x {found.expert} x {found.fsdp}"
        limit = f"{found.hardware.usable / GIB:.0f}"
        made.add_row(name, size, router, mesh, str(found.rows), found.remat, *numbers, limit)
    return made


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if what was asked for does not exist or does not fit."""
    return end(lambda: _run(argv), "launch.meshes")


def _run(argv: list[str] | None) -> int:
    parser = Parser(
        prog="python -m launch.meshes",
        description=__doc__,
    )
    add = parser.add_argument
    add("--hardware", action="append", help=f"{NAMES}; repeatable; default {', '.join(DEFAULT)}")
    add("--size", action="append", help=f"{', '.join(SIZES)}; repeatable; default all")
    add("--router", action="append", help=f"{', '.join(ROUTERS)}; repeatable; default all")
    add("--experts", type=int, default=8, help="default %(default)s")
    add("--batch", type=int, default=128, help="train.batch; default %(default)s")
    add("--accumulate", type=int, default=1, help="train.accumulate; default %(default)s")
    add("--length", type=int, default=256, help="data.length; default %(default)s")
    options = parser.parse_args(argv)
    rows = _rows(options)
    Console(width=None if sys.stdout.isatty() else 130).print(table(rows))
    for name in sorted({row[0] for row in rows if not isinstance(row[3], str)}):
        for variable, value in hardware(name).environment.items():
            print(f"{name}: {variable}={value}")
    if len(rows) == 1 and isinstance(rows[0][3], MeshPlan):
        print("of the training command:", *rows[0][3].flags)
    refused = [row for row in rows if isinstance(row[3], str)]
    for name, size, router, reason in refused:
        print(f"refused: {size} {router} on {name}: {reason}", file=sys.stderr)
    return 2 if refused and len(rows) == 1 else 0


def _rows(options: argparse.Namespace) -> list[tuple[str, str, str, MeshPlan | str]]:
    shape = {"train__batch": options.batch, "train__accumulate": options.accumulate,
             "data__length": options.length, "model__moe__experts": options.experts}  # fmt: skip
    rows = []
    for name in options.hardware or DEFAULT:
        where = hardware(name)
        for size in options.size or SIZES:
            for router in options.router or ROUTERS:
                config = rung(size, router, **shape)
                try:
                    found: MeshPlan | str = fitting_plan(config, where)
                except UserError as error:
                    found = str(error)
                rows.append((name, size, router, found))
    return rows


if __name__ == "__main__":
    sys.exit(main())
