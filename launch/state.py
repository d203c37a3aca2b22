"""The state of a cell, from the files of its run alone."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from launch.cell import Cell
from launch.ended import tail
from moe_ablm import outcome
from moe_ablm.files import locked
from moe_ablm.outcome import one_line

COMPLETE, RUNNING, INTERRUPTED = "complete", "running", "interrupted"
FAILED, DAMAGED, WAITING = "failed", "damaged", "waiting"
STATES = (COMPLETE, RUNNING, INTERRUPTED, FAILED, DAMAGED, WAITING)
STARTING = 60.0  # seconds for which a log without a lock counts as a process that starts


@dataclass(frozen=True)
class CellState:
    """How a cell stands.

    Attributes:
      name: one of `STATES`. Complete, running and waiting (never begun, or its directory is gone)
        mean what they say. Interrupted: begun, not ended, and the same command resumes it.
        Failed: it ended with an error. Damaged: a file of it cannot be read, or is another run's.
      step: updates done, if known.
      loss: newest validation loss, else training loss, in nats, if known.
      seconds_left: of a running cell, from its newest speed.
      note: what happened, one line.
      final: the same command would end the same way; only a new work directory changes that.
    """

    name: str
    step: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    note: str = ""
    final: bool = False


class Damaged(Exception):
    """A file of a run that cannot be read or is not this cell's."""


def read_summary(cell: Cell) -> dict | None:
    """The content of `run.json`; None if there is none.

    Raises:
      Damaged: it is no JSON object with status and fingerprint, or that of another run.
    """
    file = cell.workdir / "run.json"
    try:
        content = json.loads(file.read_text())
        status, found = content["status"], content["fingerprint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"run.json is damaged ({one_line(repr(error))})") from error
    if not isinstance(status, str) or found != cell.fingerprint:
        raise Damaged(f"run.json is of run {found!r}, planned is {cell.fingerprint}")
    return content


def state_of(cell: Cell, steps: int | None = None) -> CellState:
    """How a cell stands; `steps` are those of the whole run, for the time that is left."""
    held = is_running(cell)
    try:
        summary = None if held else read_summary(cell)
    except Damaged as damage:
        return CellState(
            DAMAGED, note=f"{damage}; the sweep's command mends it from the checkpoints"
        )
    if summary:
        return _ended(summary, cell)
    records = _tail_records(cell.workdir / "results.jsonl")
    progress = _progress(records, steps)
    if held:
        return CellState(RUNNING, **progress)
    return _not_ended(cell, progress)


def _ended(summary: dict, cell: Cell) -> CellState:
    """The state of a run with a `run.json`."""
    status, step = summary["status"], finite(summary.get("step"))
    step = None if step is None else int(step)
    loss = finite(summary.get("valid_loss_final"))
    if status == outcome.STOPPED:
        # a later attempt may have failed before it took the directory over
        if (end := outcome.read(cell.outcome)) and end.failed:
            return CellState(FAILED, step, loss, note=end.message)
        return CellState(INTERRUPTED, step, loss, note="stopped by a signal, saved")
    if status != outcome.COMPLETE:
        note = one_line(f"{status}: {summary.get('error', 'see stability in run.json')}")
        return CellState(FAILED, step, loss, note=note, final=True)
    if loss is None:
        found = summary.get("valid_loss_final")
        return CellState(
            FAILED, step, note=f"complete, but valid_loss_final is {found}", final=True
        )
    return CellState(COMPLETE, step, loss)


def _not_ended(cell: Cell, progress: dict) -> CellState:
    progress = progress | {"seconds_left": None}
    if (end := outcome.read(cell.outcome)) and end.failed:
        return CellState(FAILED, **progress, note=end.message)
    try:
        age = time.time() - cell.log.stat().st_mtime
    except OSError:
        age = math.inf
    if end is None and age < STARTING and not progress["step"]:
        return CellState(RUNNING, note="starting")
    if (cell.workdir / "config.json").exists():
        return CellState(
            INTERRUPTED, **progress, note="ended without a word (killed?); see its log"
        )
    gone = "was begun, but its work directory is gone or was never made"
    return CellState(WAITING, note=gone if age < math.inf else "")


def is_running(cell: Cell) -> bool:
    """Whether a process holds the lock of the work directory, on this machine or a shared disk."""
    try:
        with locked(cell.workdir / ".lock", shared=True):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _tail_records(file: Path) -> list[dict]:
    """The whole lines at the end of a `results.jsonl`; damaged ones are left out."""
    try:
        lines = tail(file).split("\n")[:-1]
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _progress(records: list[dict], steps: int | None) -> dict:
    """Step, loss and seconds left of the newest lines."""
    if not records:
        return {"step": None, "loss": None, "seconds_left": None}
    step = records[-1]["step"]
    losses = [r for r in records if r.get("kind") == "eval"] or records
    left = None
    for record in reversed(records):
        speed, tokens = finite(record.get("tokens_per_second")), finite(record.get("tokens_seen"))
        if steps and speed and tokens and record["step"]:
            left = (steps - step) * tokens / record["step"] / speed
            break
    return {"step": step, "loss": finite(losses[-1].get("loss")), "seconds_left": left}


def finite(value: object) -> float | None:
    """A finite number as it is, anything else as None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
