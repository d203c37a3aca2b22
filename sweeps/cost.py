"""What a sweep costs: the table of its cells, and device-hours at a stated share of the peak."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from moe_ablm.training.peaks import PEAKS
from sweeps.planned import Planned

# peak FLOP/s; "core": measured, one core of a Xeon with AMX (1024 x 1024 matmul of bfloat16
# operands through XLA)
DEVICES = PEAKS | {"core": 0.8e12}


@dataclass(frozen=True)
class Rate:
    """Model FLOP/s that training is expected to reach on one device: `mfu` of its peak."""

    device: str
    mfu: float

    def hours(self, flops: float) -> float:
        """Device-hours of so many model FLOPs."""
        return flops / (DEVICES[self.device] * self.mfu) / 3600

    def __str__(self) -> str:
        return f"{self.device} at {self.mfu:.0%} of {DEVICES[self.device] / 1e12:g} TFLOP/s"


def wide_console() -> Console:
    """The terminal, or something that is wide enough for a table in a file or pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def cost_table(cells: Sequence[Planned], rate: Rate, done: frozenset[str] = frozenset()) -> Table:
    """A line a cell and the total; `done` are the names of cells that are complete.

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
            f"{rate.hours(cell.flops):.3g}",
            *(["complete" if cell.name in done else ""] if done else []),
        )
    tokens, flops = (sum(getattr(p.cell, k) for p in cells) for k in ("tokens", "flops"))
    table.add_section()
    total = f"{len(cells)} cells, {len(done)} complete"
    table.add_row(total, "", "", f"{tokens:.3g}", "", f"{flops:.3g}", f"{rate.hours(flops):.3g}")
    return table
