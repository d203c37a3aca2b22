"""Reports how a cell's process ended: `python -m launch.ended OUTCOME LOG CODE [--requeue]`.

A trainer that was killed or never started leaves no outcome file; its exit code and the last line
of the log are then written as one. Exit code 42: the run was stopped and saved (with `--requeue`,
SLURM is asked to requeue the job). 3: it diverged or collapsed, and would do so again. Otherwise
the trainer's own code. Needs the standard library only.
"""

import signal
import sys
from pathlib import Path

from moe_ablm import outcome
from moe_ablm.outcome import Ending, one_line
from moe_ablm.preemption import requeue_job

AGAIN = 42  # one of the codes that xpk restarts by itself
FINAL = 3
ATTEMPT = "$ "  # begins the line of a log with the command of a new attempt
TAIL = 1 << 18  # bytes at the end of a file that are enough to know how things stand


def outcome_of(file: Path, log: Path, code: int) -> Ending:
    """How a process ended that failed, by its own word, else by its exit code and last line."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    message = f"{how}; last line: {_last_line(log)}"
    return outcome.leave(file, Ending(outcome.FAILED, code, message))


def _last_line(log: Path) -> str:
    """Of the newest attempt, and not of SLURM."""
    try:
        output = f"\n{tail(log)}".rpartition(f"\n{ATTEMPT}")[2].splitlines()[1:]
    except OSError as error:
        return f"{log} cannot be read ({error.strerror})"
    lines = [line for line in output if line.strip()]
    said = [line for line in lines if not line.startswith(("srun: ", "slurmstepd: "))]
    return one_line((said or lines or ["no output"])[-1])


def tail(file: Path) -> str:
    """The end of a text file."""
    with file.open("rb") as f:
        f.seek(max(0, f.seek(0, 2) - TAIL))
        return f.read().decode(errors="replace")


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    file, log, code = Path(argv[1]), Path(argv[2]), int(argv[3])
    # a process that is not the first may end well without a word
    found = outcome_of(file, log, code) if code else outcome.read(file)
    status = found.status if found else outcome.COMPLETE
    if status == outcome.STOPPED:
        if "--requeue" in argv[4:]:
            print(requeue_job())
        return AGAIN
    return FINAL if status in outcome.FINAL else code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
