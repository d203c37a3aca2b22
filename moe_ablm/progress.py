"""Progress bars on a terminal; of training plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

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
