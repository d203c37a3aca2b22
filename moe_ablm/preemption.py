"""Stop signals, and the return of a stopped run to SLURM's queue."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS = 60  # for the controller to answer


@contextmanager
def stop_flag() -> Iterator[list]:
    """A list that is empty until a stop signal arrives; it then holds the signal's name."""
    received: list[str] = []

    def receive(number, _):
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:  # Ctrl-C again does not wait
            signal.signal(number, signal.default_int_handler)

    handlers = {s: signal.signal(s, receive) for s in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
