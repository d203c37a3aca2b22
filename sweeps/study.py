"""The command line that all studies share: plan, table, checks, launch.

python sweeps/STUDY.py [--data DIR] [--out DIR] [--seeds N] [--launcher NAME] [--dry-run]
    [--max-gpu-hours H] [--device NAME] [--mfu SHARE | --calibrate RUNS] [--config.KEY=VALUE ...]
"""

import argparse
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from launch.cell import Cell
from launch.settings import resolve
from launch.state import COMPLETE, CellState, state_of
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError, counted
from moe_ablm.files import address_of, require_local
from sweeps.cost import DEVICES, START, cost_table, rate_of, wide_console
from sweeps.device import planned_device
from sweeps.grid import Point, Recipe
from sweeps.planned import PLAN, Planned, write_plan

LAUNCHERS = ("local", "slurm", "jobset", "print")
DATA = "data/pairs"  # --data of most studies
SIMULATED = "simulated"  # --data of the embedded dataset


def data_path(text: str) -> str | None:
    """`--data` as a value of `data.path`: absolute, or None for the embedded dataset."""
    return None if text == SIMULATED else address_of(text) or str(Path(text).resolve())


def without_data(options: argparse.Namespace, default: str) -> argparse.Namespace:
    """The options, planning on the embedded dataset where a dry run finds none at the default.

    A clone has no data yet; the table of cells, their parameters and FLOPs need none of it.
    """
    if options.dry_run and options.data is None and not Path(default).exists():
        print(
            f"{default} is not there: a dry run on the embedded dataset; parameters, tokens and "
            "FLOPs are about right, epochs, unique tokens and the design check are of its "
            "antibodies (--data names yours)"
        )
        return argparse.Namespace(**{**vars(options), "data": SIMULATED})
    return options


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Study:
    """A grid of runs and how each becomes a config.

    Attributes:
      name: of the file; also the default folder under runs/.
      about: its docstring.
      points: options -> the grid.
      recipe: (point, options) -> config of a point.
      add_arguments: options of its own.
      repairs: the planned grid -> points by name. `--add=NAME` appends them, and the design check
        says what they would identify. None: the study is not for a scaling law.
      tuned: (planned cell, options) -> what its size and tokens decide, by config key.
      notes: (cells, options) -> lines to print once they are planned.
      report: (cells, states) -> text to print when the launcher has ended.
      data: options -> the dataset where --data is not given.
      device: options -> the device that the grid is made for (`sweeps/device.py`).
      mfu, seeds: defaults of the options.
    """

    name: str
    about: str
    points: Callable[[argparse.Namespace], list[Point]]
    recipe: Callable[[Point, argparse.Namespace], Recipe]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    repairs: Callable[[list[Planned]], Mapping[str, list[Point]]] | None = None
    tuned: Callable[[Planned, argparse.Namespace], Mapping[str, object]] = lambda *_: {}
    notes: Callable[[list[Planned], argparse.Namespace], list[str]] = lambda *_: []
    report: Callable[[list[Planned], list[CellState]], str] | None = None
    device: Callable[[argparse.Namespace], str] = lambda _: "h100"
    mfu: float = 0.3
    seeds: int = 2
    data: Callable[[argparse.Namespace], str] = lambda _: DATA


def main(study: Study, argv: list[str] | None = None) -> int:
    """Runs a study; returns the exit code (0 done, 2 the input is wrong, 1 a cell failed)."""
    return end(lambda: _run(study, argv), "sweeps")


def _run(study: Study, argv: list[str] | None) -> int:
    options, launcher, extra = _options(study, argv)
    options = without_data(options, study.data(options))
    cells, offered = _plan(study, options, extra)
    states = [state_of(p.cell) for p in cells]
    done = frozenset(p.cell.name for p, s in zip(cells, states, strict=True) if s.name == COMPLETE)
    rate = rate_of(
        options.device or _device(study, options, launcher),
        options.mfu,
        study.mfu,
        options.start_seconds,
        options.calibrate,
        options.out,
    )
    wide_console().print(cost_table(cells, rate, done))
    if study.repairs:
        from sweeps.check import design_lines

        print("\n".join(design_lines(cells, offered)))
    left, failed = _to_launch(cells, states)
    hours = sum(rate.hours(cell) for cell in left)
    if options.max_gpu_hours is not None and not hours <= options.max_gpu_hours:
        raise UserError(
            f"{hours:.4g} hours are left to run, --max-gpu-hours allows {options.max_gpu_hours:g}: "
            "raise it or make the grid smaller"
        )
    if options.dry_run:
        return 0
    with _new_or_kept(options.out):
        write_plan(options.out, study.name, cells)
        print(f"{len(left)} of {counted(len(cells), 'cell')} to run", flush=True)
        code = launcher.launch(left, options) if left else 0
    states = [state_of(p.cell) for p in cells]
    if study.report and any(s.name == COMPLETE for s in states):
        print(study.report(cells, states))
    return code or int(failed)


@contextmanager
def _new_or_kept(out: Path) -> Iterator[None]:
    """Removes a folder made within the block if that is refused before anything was launched."""
    made = not out.exists()
    try:
        yield
    except UserError:
        files = {path.name for path in out.rglob("*") if path.is_file()}
        if made and all(name == PLAN or name.startswith(".") for name in files):
            shutil.rmtree(out, ignore_errors=True)
        raise


def _options(study: Study, argv: list[str] | None):
    """Options, the launcher's module and the overrides for every cell."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--launcher", choices=LAUNCHERS, help=f"default {LAUNCHERS[0]}")
    module = importlib.import_module(f"launch.{_launcher(first.parse_known_args(argv)[0])}")
    parser = Parser(
        prog=f"python sweeps/{study.name}.py",
        description=study.about,
        parents=[first],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", help="prepared dataset, or 'simulated' for the embedded one")
    add("--out", type=Path, default=Path("runs") / study.name, help="folder of the sweep")
    add("--seeds", type=int, default=study.seeds, help="number of seeds; default %(default)s")
    add("--dry-run", action="store_true", help="print the table of cells and stop")
    add("--max-gpu-hours", type=float, metavar="H", help="refuse to launch more device-hours")
    about = (
        "device whose hours are estimated; default: that of --hardware, else 'core' where cells "
        "run on this machine without GPU or TPU, else that of the study"
    )
    add("--device", choices=DEVICES, help=about)
    add(
        "--mfu",
        type=float,
        help="share of the device's peak that training reaches; default: that of recorded runs, "
        f"else {study.mfu}",
    )
    add(
        "--calibrate",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.csv|RUNS",
        help="estimate hours from recorded runs on the device: a table of sweeps.collect or a "
        "folder of runs; repeatable",
    )
    about = "seconds until a cell trains; default %(default)s"
    add("--start-seconds", type=float, default=START, help=about)
    study.add_arguments(parser)
    module.add_arguments(parser)
    options, rest = parser.parse_known_args(argv)
    from sweeps.plan import unplanned_flags  # imports jax

    require_local(options.out, "--out")
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: expected 1 or more")
    if not 0 <= options.start_seconds < float("inf"):
        raise UserError(f"--start-seconds {options.start_seconds:g}: expected 0 or more")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu:g}: expected above 0, at most 1")
    return options, module, unplanned_flags(rest)


def _launcher(options: argparse.Namespace) -> str:
    return options.launcher or LAUNCHERS[0]


def _device(study: Study, options: argparse.Namespace, launcher: ModuleType) -> str:
    """The device whose hours are planned where `--device` does not say.

    A dry run without `--launcher` need not be of this machine.
    """
    name = _launcher(options)
    named = resolve(options, name, launcher.SETTINGS)["hardware"]
    here = name == "local" and (options.launcher is not None or not options.dry_run)
    return planned_device(study.device(options), named, here)


def _plan(
    study: Study, options: argparse.Namespace, extra: list[str]
) -> tuple[list[Planned], dict[str, list[Planned]]]:
    """The cells, those that were asked for with `--add` among them, and the others on offer."""
    from sweeps.plan import plan

    def planned(points: list[Point]) -> list[Planned]:
        cells, notes = plan(
            points,
            lambda p: study.recipe(p, options),
            options.out,
            extra,
            lambda p: study.tuned(p, options),
        )
        print("".join(f"{note}\n" for note in notes), end="")
        return cells

    cells = planned(study.points(options))
    offered = {}
    if study.repairs:
        offered = {name: planned(points) for name, points in study.repairs(cells).items()}
        for name in options.add:
            known = {p.cell.fingerprint for p in cells}
            added = offered.pop(name, [])
            cells += [p for p in added if p.cell.fingerprint not in known]
    print("".join(f"{line}\n" for line in study.notes(cells, options)), end="")
    return cells, offered


def _to_launch(cells: list[Planned], states: list[CellState]) -> tuple[list[Cell], bool]:
    """Cells that are left to run, and whether others have failed for good; prints both."""
    left, failed = [], False
    for p, state in zip(cells, states, strict=True):
        if state.final:
            failed = True
            print(
                f"{p.cell.name}: not run again: {state.note}; remove {p.cell.workdir} to train it "
                "anew",
                file=sys.stderr,
            )
        elif state.name != COMPLETE:
            if state.note:
                print(f"{p.cell.name}: {state.name}: {state.note}")
            left.append(p.cell)
    return left, failed
