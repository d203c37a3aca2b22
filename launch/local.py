"""Runs cells on this machine, several at a time, each pinned to cores of its own.

The launcher may die at any time: cells go on, since each has a session of its own, and the same
command finds those that still run by their lock, waits for them and starts the others.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from launch import assign
from launch.cell import REPOSITORY, Cell
from launch.ended import ATTEMPT, outcome_of
from launch.hardware import hardware
from launch.settings import add_options, resolve
from launch.state import COMPLETE, FAILED, INTERRUPTED, is_running, state_of
from moe_ablm.errors import UserError
from moe_ablm.outcome import VARIABLE, one_line

MEMORY_OF_A_JOB = 2 << 30  # bytes that a small training process may need, for the default of --jobs
POLL = 0.2  # seconds
SETTINGS = {"hardware": assign.SETTING}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this launcher."""
    parser.add_argument(
        "--jobs",
        type=int,
        help="cells at a time, each pinned to its share of the cores (default: one per core, fewer "
        "with less than 2 GiB of memory per job; on GPUs and TPUs: 1)",
    )
    add_options(parser, SETTINGS)


def launch(cells: list[Cell], options: argparse.Namespace) -> int:
    """Runs the cells to their ends; 0 if none failed, else 1.

    SIGINT and SIGTERM let the running cells save and end, and start no more.

    Raises:
      UserError: an option is wrong, or a cell does not fit the hardware.
    """
    name = resolve(options, "local", SETTINGS)["hardware"]
    cells = assign.assigned(cells, name)
    slots = core_groups(options.jobs if name is None else _jobs_on(name, options.jobs))
    with stopping() as stop:
        failed = _Launch(cells, slots, stop).run()
    if stop:
        print("stopped; the same command goes on")
    for cell, reason in failed:
        print(f"failed: {cell.name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _jobs_on(name: str, jobs: int | None) -> int | None:
    """How many cells share hardware: a run has all GPUs and TPUs of its machine to itself."""
    where = hardware(name)
    if where.hosts > 1:
        raise UserError(
            f"--hardware {name}: {where.hosts} machines, --launcher=local has this one: use slurm "
            "or jobset"
        )
    if where.kind == "cpu":
        return jobs
    if jobs not in (None, 1):
        raise UserError(f"--jobs {jobs}: a cell has all devices of {name} to itself: expected 1")
    return 1


def core_groups(jobs: int | None) -> list[tuple[int, ...]]:
    """The cores of each of `jobs` slots: this process's, shared out evenly.

    Raises:
      UserError: more jobs than cores, or none.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = len(cores) or os.cpu_count() or 1
    if jobs is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = max(1, min(count, memory // MEMORY_OF_A_JOB))
    if not 0 < jobs <= count:
        raise UserError(f"--jobs {jobs}: expected 1 to {count}, the cores of this machine")
    if not cores:  # macOS: nothing to pin with
        return [()] * jobs
    return [tuple(cores[i * count // jobs : (i + 1) * count // jobs]) for i in range(jobs)]


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen | None  # None: started by a launcher that is gone
    began: float


class _Launch:
    """The loop over slots: fill the free ones, look at the others."""

    def __init__(self, cells: list[Cell], slots: list[tuple[int, ...]], stop: list[str]):
        self.slots, self.stop = slots, stop
        adopted = [cell for cell in cells if is_running(cell)]
        self.waiting = deque(cell for cell in cells if cell not in adopted)
        # more than there are slots, if --jobs was larger before: they wait for a slot, running
        self.adopted = deque(adopted)
        self.jobs: dict[int, _Job] = {}
        self.total, self.done = len(cells), 0
        self.failed: list[tuple[Cell, str]] = []
        self.seconds: list[float] = []

    def run(self) -> list[tuple[Cell, str]]:
        """Returns the cells that failed, with reasons."""
        passed_on = False
        while self.jobs or ((self.waiting or self.adopted) and not self.stop):
            for slot in range(len(self.slots)):
                if slot not in self.jobs and not self.stop:
                    self._fill(slot)
                elif slot in self.jobs:
                    self._look_at(slot)
            if self.stop and not passed_on:
                passed_on = True
                self._pass_on_signal()
            time.sleep(POLL)
        return self.failed

    def _fill(self, slot: int) -> None:
        if self.adopted:
            cell = self.adopted.popleft()
            self.jobs[slot] = _Job(cell, None, time.monotonic())
            print(f"{cell.name}: is running already; waiting for it", flush=True)
        elif self.waiting:
            cell = self.waiting.popleft()
            try:
                process = start(cell, self.slots[slot])
            except OSError as error:
                self._end(cell, FAILED, f"cannot be started: {error.strerror}")
                return
            self.jobs[slot] = _Job(cell, process, time.monotonic())

    def _look_at(self, slot: int) -> None:
        job = self.jobs[slot]
        code = job.process.poll() if job.process else None
        if (job.process and code is None) or (not job.process and is_running(job.cell)):
            return
        if code and is_running(job.cell):  # another process was quicker to take the directory
            job.process = None
            job.cell.outcome.unlink(missing_ok=True)  # the other one's is to come
            return
        del self.jobs[slot]
        stopped = bool(self.stop) and code == -signal.SIGTERM  # before it could save anything
        end = outcome_of(job.cell.outcome, job.cell.log, code) if code and not stopped else None
        state = state_of(job.cell)
        name, reason = state.name, state.note
        if name == COMPLETE:  # even if this process failed: another one was quicker
            self.seconds.append(time.monotonic() - job.began)
            reason = f"loss {state.loss:.4f}, {self.seconds[-1]:,.0f} s"
        elif stopped:
            name, reason = INTERRUPTED, "ended before its first update"
        elif end and end.failed and name != FAILED:  # as where no space was left for its outcome
            name, reason = FAILED, end.message
        self._end(job.cell, name, reason)

    def _end(self, cell: Cell, state: str, reason: str) -> None:
        self.done += 1
        resumable = state == INTERRUPTED and self.stop
        if state != COMPLETE and not resumable:
            self.failed.append((cell, reason or state))
        print(f"[{self.done}/{self.total}] {cell.name}: {state}{self._left(reason)}", flush=True)

    def _left(self, reason: str) -> str:
        text = f", {reason}" if reason else ""
        if self.seconds and self.waiting:
            mean = sum(self.seconds) / len(self.seconds)
            minutes = mean * (len(self.waiting) + len(self.jobs) / 2) / len(self.slots) / 60
            text += f"; about {minutes:,.0f} min left"
        return text

    def _pass_on_signal(self) -> None:
        running = [job.process for job in self.jobs.values() if job.process]
        print(f"stopping: {len(running)} cells save and end", flush=True)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for slot in [slot for slot, job in self.jobs.items() if not job.process]:
            del self.jobs[slot]  # not ours; it goes on


def start(cell: Cell, cores: tuple[int, ...]) -> subprocess.Popen:
    """Starts a cell in a session of its own, its output appended to its log."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    cell.outcome.unlink(missing_ok=True)
    # cells of one shape compile the same program: the first one does it for all
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(cell.log.parent.with_name(".compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    with cell.log.open("ab") as log:
        log.write(f"{ATTEMPT}{one_line(shlex.join(cell.argv))}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *cell.argv],
            cwd=REPOSITORY,
            env=cache | assign.merged(cell.environment) | {VARIABLE: str(cell.outcome)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if cores:
        # threads come later and inherit it; a process that has ended already needs none
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, cores)
    return process


@contextmanager
def stopping() -> Iterator[list[str]]:
    """A list that is empty until SIGINT or SIGTERM arrives."""
    received: list[str] = []

    def receive(number, _):
        received.append(signal.Signals(number).name)

    before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
