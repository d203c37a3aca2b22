"""Ctrl-C, stop signals, and the return of a stopped run to SLURM's queue."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from moe_ablm.endings import INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS = 60  # for the controller to answer
GRACE = 3.0  # seconds that a command has after Ctrl-C to tidy up


def again(flags: Sequence[str]) -> str:
    """The training command with these flags, to be typed again."""
    found = shutil.which("python")
    # `make quickstart` uses an environment that need not be active
    here = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "python" if here else sys.executable
    return shlex.join([python, "-m", "moe_ablm.train", *flags])


class Interrupts:
    """What Ctrl-C does while a command runs, from before its imports on.

    A thread answers at once: Python's own handlers wait for the main thread, which may be inside a
    compiler for minutes, and an exception that they raise may end in a callback of a library that
    swallows it. Where nothing has to be saved, KeyboardInterrupt is raised, and a command that is
    not over after `GRACE` is ended from outside; under `stop_flag` the command saves, and a second
    Ctrl-C ends it without. Files are written whole or not at all, whichever way it ends. A process
    that goes on after the command, since Python called it, is left alone (`leave` ends others).

    Use as a context manager around the command, in the main thread.

    Attributes:
      after: what the user can do next, printed with the answer.
      heard: how many times Ctrl-C was pressed.
    """

    current: "Interrupts | None" = None  # of this process
    alone = False  # whether the process is there for the command alone, and ends with it

    def __init__(self, name: str = "moe_ablm", after: str = "give the same command again"):
        self.after, self.heard, self.saves = after, 0, False
        self._over, self._telling = threading.Event(), threading.Lock()
        self._name = name

    def __enter__(self) -> "Interrupts":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.signal(signal.SIGINT, self._raise), signal.set_wakeup_fd(self._write)
        Interrupts.current = self
        sys.unraisablehook = _without_interrupts
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        Interrupts.current = None
        sys.unraisablehook = sys.__unraisablehook__
        signal.set_wakeup_fd(self._before[1])
        signal.signal(signal.SIGINT, self._before[0])
        os.close(self._write)
        self._thread.join(GRACE)  # the command may be over before the answer to Ctrl-C is told

    def _raise(self, _: int, frame: FrameType | None) -> NoReturn:
        """KeyboardInterrupt; among imports, where C++ may abort at one, the end of the process.

        Nothing is to be saved or tidied up there.
        """
        if self.alone and _imports(frame):
            if self._telling.acquire(blocking=False):
                self._tell(f"interrupted: {self.after}")
            else:
                self._over.wait(0.1)  # the thread is telling it
            _exit()
        raise KeyboardInterrupt

    def _answer(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] != signal.SIGINT:
                continue
            self.heard += 1
            if self.heard > 1:
                saved = "; what was saved before is kept" if self.saves else ""
                self._tell(f"ended at once{saved}: {self.after}")
                _exit()
            if self.saves:
                self._tell("heard Ctrl-C, saving after this step; again: end without saving")
            elif self._telling.acquire(blocking=False):
                self._tell(f"interrupted: {self.after}")
                threading.Thread(target=_end_late, args=(self._over,), daemon=True).start()
        os.close(self._read)

    def _tell(self, text: str) -> None:
        start = "\n" if os.isatty(2) else ""  # behind the terminal's own ^C
        with contextlib.suppress(OSError):
            os.write(2, f"{start}{self._name}: {text}\n".encode())


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _without_interrupts(told: Any) -> None:
    """Callbacks that cannot raise print what they would have: of Ctrl-C the answer is enough."""
    if not isinstance(told.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(told)


def _end_late(over: threading.Event) -> None:
    if not over.wait(GRACE):
        _exit()


def _exit() -> NoReturn:
    """Ends this process at once, after Ctrl-C."""
    _end_workers()
    os._exit(INTERRUPTED)


def _end_workers() -> None:
    """Ends the processes of a pool, which would tell what they miss once this process is over."""
    if module := sys.modules.get("multiprocessing"):
        for worker in module.active_children():
            worker.kill()


def leave(code: int) -> NoReturn:
    """Ends the process of a command line with its code; after Ctrl-C within `GRACE`.

    Threads and workers of libraries may want more time than that.
    """
    if code == INTERRUPTED:
        _end_workers()
        threading.Thread(target=_end_late, args=(threading.Event(),), daemon=True).start()
    sys.exit(code)


_flags: list[list[str]] = []  # of the runs of this process that would save and stop


@contextmanager
def stop_flag() -> Iterator[list]:
    """A list that is empty until the run is to stop; it then holds a signal's name, or why."""
    received: list[str] = []

    def receive(number, _):
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT and not Interrupts.current:  # Ctrl-C again does not wait
            signal.signal(number, signal.default_int_handler)

    handlers = {s: signal.signal(s, receive) for s in STOP_SIGNALS}
    if Interrupts.current:
        Interrupts.current.saves = True
    _flags.append(received)
    try:
        yield received
    finally:
        _flags.remove(received)
        if Interrupts.current:
            Interrupts.current.saves = False
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop(reason: str) -> None:
    """What a stop signal does, from any thread; nothing where no run is there to stop."""
    for flag in _flags:
        flag.append(reason)


def requeue_job() -> str:
    """Asks SLURM to queue the batch job of this process again, where there is one to queue.

    A job that somebody cancelled, or that ran out of time, is no longer running when it is asked
    about, and stays so.

    Returns:
      A line that says what was done, empty outside of SLURM.
    """
    job = _batch_job(os.environ)
    if not job:
        return ""
    try:
        line = _scontrol("show", "job", "--oneliner", job)
        state = _field(line, "JobState")
        if state != "RUNNING" or _field(line, "BatchFlag") != "1":
            return f"SLURM job {job} is {state.lower()} and not queued again"
        _scontrol("requeue", job)
    except FileNotFoundError:
        return ""  # in a container: the batch script does it
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        return f"SLURM job {job} could not be queued again: {reason}"
    return f"SLURM job {job} is queued again"


def _batch_job(environment: Mapping[str, str]) -> str:
    """This process's job as SLURM's commands call it, alone; empty outside of SLURM.

    One task of an array has the number of the array, which stands for all of its tasks.
    """
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    job, array, task = (environment.get(name, "") for name in names)
    if not job.isdecimal():
        return ""
    return f"{array}_{task}" if array.isdecimal() and task.isdecimal() else job


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    return done.stdout


def _field(line: str, name: str) -> str:
    found = re.search(rf"(?:^|\s){name}=(\S*)", line)
    return found[1] if found else "unknown"
