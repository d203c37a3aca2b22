"""The cost of a sweep: a table of its cells with FLOPs and estimated device-hours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.cell import REPOSITORY, Cell
from moe_ablm.errors import UserError, counted
from moe_ablm.training.peaks import PEAKS
from sweeps.device import CORE
from sweeps.planned import Planned
from sweeps.recorded import Recorded, read_recorded, recorded_in

# peak FLOP/s; "core": measured, one core of a Xeon with AMX (1024 x 1024 matmul of bfloat16
# operands through XLA)
DEVICES = PEAKS | {CORE: 0.8e12}


# seconds until a run trains: process, data, compiled program from the cache. The 105 runs of
# benchmarks/results/xeon-2-cores/micro_scaling.csv took 2.06 core-hours, 1.69 of them training
START = 12.0
RECORDED = {CORE: REPOSITORY / "benchmarks/results/xeon-2-cores/micro_scaling.csv"}


@dataclass(frozen=True)
class Rate:
    """Model FLOP/s that training is expected to reach on one device, and what a start takes.

    As `recorded` runs had, else `mfu` of the device's peak. `start` is in seconds.
    """

    device: str
    mfu: float
    start: float = START
    recorded: Recorded | None = None

    def hours(self, cell: Cell) -> float:
        """Device-hours of a cell."""
        speed = DEVICES[self.device] * self.mfu
        if self.recorded is not None:
            speed = self.recorded.at(cell.flops / cell.tokens)
        return (cell.flops / speed + self.start) / 3600

    def __str__(self) -> str:
        speed = f"{self.device} at {self.mfu:.0%} of {DEVICES[self.device] / 1e12:g} TFLOP/s"
        if self.recorded is not None:
            speed = f"{self.device} as fast as {self.recorded.source}"
        return f"{speed}, {self.start:g} s a start"


def rate_of(
    device: str,
    mfu: float | None,
    usual: float,
    start: float,
    calibrate: Sequence[Path],
    out: Path | None = None,
) -> Rate:
    """The rate that the options ask for: recorded runs, else a share of the peak.

    Without either, that of the runs in the sweep's own folder `out`, else of runs that were
    recorded on the device, else the `usual` share. Where there are both kinds of runs, those of the
    folder, which are of the machine that goes on, say how fast it is, and the others how speed goes
    with size.
    """
    if calibrate and mfu is not None:
        raise UserError("--calibrate and --mfu: give one of them")
    recorded = None
    if mfu is None:
        file = RECORDED.get(device)
        files = calibrate or ([file] if file and file.exists() else [])
        recorded = read_recorded(files, device) if files else None
        own = recorded_in(out, device) if out and not calibrate else None
        if own is not None:
            recorded = own.beyond(recorded) if recorded else own
    return Rate(device, usual if mfu is None else mfu, start, recorded)


def wide_console() -> Console:
    """The terminal, or something that is wide enough for a table in a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def cost_table(cells: Sequence[Planned], rate: Rate, done: frozenset[str] = frozenset()) -> Table:
    """One line per cell and the total; `done` are the names of complete cells.

    Whatever the width, names are folded before a number is.
    """
    title = f"hours: {rate}"
    table = Table(title=title, title_justify="left", caption_justify="left", box=None)
    table.add_column("cell", overflow="fold", min_width=8)
    for name in ("parameters", "active", "tokens", "epochs", "FLOPs", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    if done:
        table.add_column("", no_wrap=True)
    for p in cells:
        cell = p.cell
        table.add_row(
            cell.name,
            f"{p.params_total:,}",
            f"{p.params_active:,}",
            f"{cell.tokens:.3g}",
            f"{cell.tokens / p.corpus_tokens:.3g}",
            f"{cell.flops:.3g}",
            f"{rate.hours(cell):.3g}",
            *(["complete" if cell.name in done else ""] if done else []),
        )
    tokens, flops = (sum(getattr(p.cell, k) for p in cells) for k in ("tokens", "flops"))
    table.add_section()
    total = f"{counted(len(cells), 'cell')}, {len(done)} complete"
    hours = sum(rate.hours(p.cell) for p in cells)
    table.add_row(total, "", "", f"{tokens:.3g}", "", f"{flops:.3g}", f"{hours:.3g}")
    return table
