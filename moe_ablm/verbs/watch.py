"""`report --watch`: where runs stand, drawn anew until all have ended."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from moe_ablm.errors import UserError
from moe_ablm.files import locked
from moe_ablm.results import read_results
from moe_ablm.verbs.run_curves import names_of, places_of

EVERY = 2.0  # seconds between looks
WAITING, RUNNING, INTERRUPTED = "waiting", "running", "interrupted"  # of runs without a run.json
OPEN = (WAITING, RUNNING, INTERRUPTED)
_HEADS = ("run", "status", "updates", "training", "validation", "best", "CDRH3", "tokens/s", "left")


@dataclass(frozen=True)
class Standing:
    """Where a run stands; NaN and None where nothing is known yet.

    Attributes:
      name, status: of the run; the status of its `run.json`, or one of `OPEN`.
      step, steps: updates that its results tell of, and those it is to make.
      train, valid, best, cdrh3: losses (nats): last logged, last validation, the best of those, and
        the last of CDRH3.
      rate: tokens a second when it last logged.
      left: seconds at that rate.
    """

    name: str
    status: str
    step: int = 0
    steps: int | None = None
    train: float = math.nan
    valid: float = math.nan
    best: float = math.nan
    cdrh3: float = math.nan
    rate: float = math.nan
    left: float = math.nan

    def cells(self) -> list[str]:
        """The line of the table."""
        updates = f"{self.step:,}" + (f" of {self.steps:,}" if self.steps else "")
        losses = [_shown(x, ".4f") for x in (self.train, self.valid, self.best, self.cdrh3)]
        left = "" if math.isnan(self.left) else _clock(self.left)
        return [self.name, self.status, updates, *losses, _shown(self.rate, ",.0f"), left]

    def line(self) -> str:
        """The same where there is no terminal."""
        parts = zip(_HEADS[2:], self.cells()[2:], strict=True)
        return f"{self.name}: {self.status}; " + ", ".join(f"{n} {v}" for n, v in parts if v)


def _shown(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def watch(runs: Sequence[Path]) -> None:
    """Draws a table of runs until all have ended; without a terminal a line where one has changed.

    A run need not have begun. One that was killed counts as interrupted and is waited for.

    Raises:
      UserError: a run is given twice, or a file of it is damaged.
    """
    names = names_of(places_of(runs))
    console = Console()
    told: dict[str, Standing] = {}

    def look() -> list[Standing]:
        found = [standing_of(run, name) for run, name in zip(runs, names, strict=True)]
        for each in found:
            if not console.is_terminal and told.get(each.name) != each:
                print(each.line(), flush=True)
            told[each.name] = each
        return found

    found = look()
    if not console.is_terminal:
        while _some_open(found):
            time.sleep(EVERY)
            found = look()
        return
    with Live(table(found), console=console, auto_refresh=False) as live:
        while _some_open(found):
            time.sleep(EVERY)
            found = look()
            live.update(table(found), refresh=True)


def _some_open(found: Sequence[Standing]) -> bool:
    return any(each.status in OPEN for each in found)


def table(found: Sequence[Standing]) -> Table:
    """A line a run."""
    shown = Table(title="loss of masked tokens (nats)")
    for head in _HEADS:
        shown.add_column(head, justify="left" if head in _HEADS[:2] else "right")
    for each in found:
        shown.add_row(*each.cells())
    return shown


def standing_of(run: Path, name: str) -> Standing:
    """Where a run stands by its files; nothing is changed.

    Raises:
      UserError: one of them is damaged.
    """
    records = read_results(run / "results.jsonl")
    try:
        status, steps = _status(run), _steps(run)
        train = [r for r in records if r["kind"] == "train"]
        valid = [r for r in records if r["kind"] == "eval"]
        if not records:
            return Standing(name, status, steps=steps)
        rates = [r["tokens_per_second"] for r in train if r["tokens_per_second"] > 0]
        rate, step = rates[-1] if rates else math.nan, records[-1]["step"]
        each = records[-1]["tokens_seen"] / max(step, 1)
        return Standing(
            *(name, status, step, steps),
            train=train[-1]["loss"] if train else math.nan,
            valid=valid[-1]["loss"] if valid else math.nan,
            best=min((r["loss"] for r in valid), default=math.nan),
            cdrh3=valid[-1]["loss_by_region"].get("CDRH3", math.nan) if valid else math.nan,
            rate=rate,
            left=(steps - step) * each / rate if steps and status == RUNNING else math.nan,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--run {run}: its results are damaged ({error!r})") from error


def _steps(run: Path) -> int | None:
    file = run / "config.json"
    return json.loads(file.read_text())["config"]["train"]["steps"] if file.exists() else None


def _status(run: Path) -> str:
    """As in `run.json`; without one, whether a process holds the run."""
    try:
        return json.loads((run / "run.json").read_text())["status"]
    except FileNotFoundError:
        pass
    if not (run / "config.json").exists():
        return WAITING
    try:
        with locked(run / ".lock", shared=True):
            return INTERRUPTED
    except FileNotFoundError:
        return INTERRUPTED
    except BlockingIOError:
        return RUNNING
