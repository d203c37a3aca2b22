"""Shows the state of a sweep, read from its files alone.

    python -m sweeps.status DIR            the table once
    python -m sweeps.status DIR --watch    again and again, until nothing is left to run

Works from any machine that sees the files, whoever launched the cells.
"""

import contextlib
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.state import COMPLETE, FAILED, STATES, CellState, state_of
from moe_ablm.endings import Parser, end
from sweeps.cost import wide_console
from sweeps.planned import Planned, read_plan

EVERY = 5.0  # seconds
STYLES = {COMPLETE: "green", "running": "cyan", FAILED: "red", "damaged": "red"}


def standing(study: str, cells: list[Planned], states: list[CellState]) -> Group:
    """State, step, loss and time left of each cell, how many there are of each state, and notes.

    Whatever the width, names are folded before a number is, and notes stand below the table.
    """
    count = Counter(state.name for state in states)
    counts = ", ".join(f"{count[name]} {name}" for name in STATES if count[name])
    table = Table()
    table.add_column("cell", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for p, state in zip(cells, states, strict=True):
        table.add_row(
            p.cell.name,
            Text(state.name, STYLES.get(state.name, "")),
            "" if state.step is None else f"{state.step}/{p.steps}",
            "" if state.loss is None else f"{state.loss:.4f}",
            "" if state.seconds_left is None else _duration(state.seconds_left),
        )
    notes = [
        Text(f"{p.cell.name}: {state.note}", overflow="fold")  # no markup: processes print it
        for p, state in zip(cells, states, strict=True)
        if state.note
    ]
    return Group(Text(f"{study}: {counts}"), table, *notes)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 1 where a cell failed or is damaged, or 2 for wrong input."""
    return end(lambda: _run(argv), "sweeps")


def _run(argv: list[str] | None) -> int:
    parser = Parser(
        prog="python -m sweeps.status",
        description=__doc__,
    )
    parser.add_argument("dir", type=Path, help="the --out of a sweep")
    parser.add_argument("--watch", action="store_true", help="until nothing is left to run")
    options = parser.parse_args(argv)
    console = wide_console()
    study, cells = read_plan(options.dir)
    states = _states(cells)
    if not options.watch:
        console.print(standing(study, cells, states))
    else:
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(standing(study, cells, states), console=console, auto_refresh=False) as live,
        ):
            while any(s.name in ("running", "waiting", "interrupted") for s in states):
                time.sleep(EVERY)
                study, cells = read_plan(options.dir)
                states = _states(cells)
                live.update(standing(study, cells, states), refresh=True)
    return int(any(s.name in (FAILED, "damaged") for s in states))


def _states(cells: list[Planned]) -> list[CellState]:
    return [state_of(p.cell, p.steps) for p in cells]


if __name__ == "__main__":
    sys.exit(main())
