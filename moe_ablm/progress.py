"""Progress bars on a terminal (of training plain lines elsewhere), tables, the verdict."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

LINE_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Context manager around training; `update` after each step, `note` for what should stay."""

    def __init__(self, steps: int, start: int):
        self._steps, self._start = steps, start
        self._console = Console(file=sys.stdout)
        self._bar: Bar | None = None
        self._last_line = time.monotonic()
        self._began: tuple[float, int] | None = None  # after the first update, which compiles

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, completed=self._start, state="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` updates are done."""
        state = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, state=state)
            return
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        if now - self._last_line >= LINE_EVERY or step == self._steps:
            self._last_line = now
            began, first = self._began
            left = (now - began) / max(step - first, 1) * (self._steps - step)
            eta = f"  {left:,.0f} s left" if step > first else ""
            print(f"step {step}/{self._steps}  {state}{eta}", flush=True)

    def busy(self, what: str) -> None:
        """Says what takes so long until the next `update`."""
        if self._bar:
            self._bar.update(self._task, state=what)
        else:
            print(f"{what} ...", flush=True)

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)


def bar(*columns: ProgressColumn, transient: bool = True) -> Bar:
    """A bar on stderr where that is a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return Bar(*columns, console=console, disable=not console.is_terminal, transient=transient)


class WatchedBar(Bar):
    """A bar on stderr of one task that looks how far the work is each time it is drawn.

    Args:
      look: returns arguments of `rich.progress.Progress.update`, such as completed and total.
      columns: of the bar.
      console: instead of stderr.
    """

    def __init__(
        self,
        look: Callable[[], dict[str, Any]],
        *columns: ProgressColumn,
        console: Console | None = None,
    ):
        self._look = look
        console = console or Console(stderr=True)
        super().__init__(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.add_task(**({"description": "", "total": None} | look()))

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws, of the state of now."""
        for task in self.tasks:
            self.update(task.id, **self._look())
        return super().get_renderables()


def region_table(evaluation: dict) -> Table:
    """Loss and accuracy by region and chain, of light chains also without those seen in training.

    The last rows are whole chains: all, those that the run's training antibodies have ("seen") and
    those that they have not. Evaluations older than this distinction have none.

    Args:
      evaluation: an "eval" line of `results.jsonl`.
    """
    table = Table(title=f"Validation loss {evaluation['loss']:.4f} (nats), by region", box=None)
    table.add_column("region")
    apart = "loss_by_chain" in evaluation
    for chain in ("heavy", "light"):
        for column in ("loss", "accuracy", "masked"):
            table.add_column(f"{chain} {column}", justify="right")
    if apart:
        table.add_column("light unseen loss", justify="right")
    for region in ("FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4"):
        cells = []
        for chain in "HL":
            cells += _cells(evaluation, "region", f"{region[:-1]}{chain}{region[-1]}")
        if apart:
            unseen = evaluation["loss_by_region_unseen"].get(f"{region[:-1]}L{region[-1]}")
            cells.append("-" if unseen is None else f"{unseen:.4f}")
        table.add_row(region, *cells)
    if apart:
        table.add_section()
        for part, label in (("", "all"), ("_seen", "seen"), ("_unseen", "unseen")):
            cells = [
                cell
                for chain in ("heavy", "light")
                for cell in _cells(evaluation, "chain", f"{chain}{part}")
            ]
            table.add_row(label, *cells, "")
    return table


def _cells(evaluation: dict, by: str, name: str) -> list[str]:
    """Loss, accuracy and masked tokens of a region or chain."""
    if name not in evaluation[f"loss_by_{by}"]:
        return ["-", "-", "0"]
    return [
        f"{evaluation[f'loss_by_{by}'][name]:.4f}",
        f"{evaluation[f'accuracy_by_{by}'][name]:.3f}",
        f"{evaluation[f'masked_by_{by}'][name]:,}",
    ]


def stability_lines(stability: Mapping) -> list[str]:
    """The verdict of the stability watch and its events, one a line, those not over last.

    Args:
      stability: of `run.json`: verdict, events, worst.
    """
    events = sorted(stability["events"], key=lambda e: (e["until"] is None, e["step"]))
    return [f"stability: {stability['verdict']}", *(f"  {_told(event)}" for event in events)]


def _told(event: Mapping) -> str:
    where = "loss" if event["layer"] is None else f"layer {event['layer']}"
    over = "not over" if event["until"] is None else f"over at step {event['until']}"
    value = "not finite" if event["value"] is None else f"{event['value']:.4g}"  # null in JSON
    return f"{where}: {event['what']} {value} from step {event['step']}, {over}"
