"""Submits cells to SLURM as job arrays: one array task per cell, one job step for its processes.

A job receives USR1 120 s before preemption or its time limit. The trainer then saves, requeues the
job, and resumes in it. In a container there is no `scontrol`: `launch.ended` requeues the job.

Logs of cells are where `sweeps.status` looks. SLURM's own output, the scripts and the lists of
submitted cells are beside them, in `logs/slurm-*`.
"""

import argparse
import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote

from launch import assign
from launch.cell import LOGS, REPOSITORY, Cell
from launch.ended import ATTEMPT
from launch.hardware import hardware
from launch.settings import Setting, add_options, given, resolve
from moe_ablm.errors import UserError
from moe_ablm.files import locked
from moe_ablm.outcome import VARIABLE

GRACE = 120  # seconds between USR1 and the end
LARGEST_ARRAY = 1000  # tasks; SLURM's default MaxArraySize is 1001
_WORD = r"[A-Za-z0-9_.,+:@=-]+"
SETTINGS = {
    "hardware": assign.SETTING,
    "partition": Setting(_WORD, "a partition, or several separated by commas"),
    "account": Setting(_WORD, "an account"),
    "qos": Setting(_WORD, "a quality of service"),
    "time": Setting(r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}", "time limit such as 24:00:00"),
    "nodes": Setting("[1-9][0-9]*", "nodes per cell (default: those of --hardware, else 1)"),
    "gpus": Setting(
        "[0-9]+",
        "GPUs per node, with one process each; 0: CPUs only (default: those of --hardware, else 0)",
    ),
    "processes": Setting("[1-9][0-9]*", "processes per node without GPUs", "1"),
    "cpus": Setting("[1-9][0-9]*", "CPUs per process"),
    "memory": Setting("[1-9][0-9]*[KMGT]?", "memory per node such as 64G"),
    "at-once": Setting("[1-9][0-9]*", "largest number of cells that run at a time"),
    "container": Setting(
        r"[A-Za-z0-9_.,+:@#/ -]+", "an image: FILE.sif (apptainer), else of pyxis (enroot)"
    ),
    "mounts": Setting(
        "/[A-Za-z0-9_./-]*(,/[A-Za-z0-9_./-]*)*",
        "folders to mount in the container beside the repository and --out, separated by commas, "
        "such as that of --data",
    ),
}
# variables that a job inherits; others may hold secrets, and SLURM stores what it is given
_EXPORTED = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TMPDIR|LD_LIBRARY_PATH|XDG_\w+|GLIBC_TUNABLES|MODULEPATH"
    r"|(JAX|XLA|NCCL|CUDA|NVIDIA|OMP|MOE_ABLM)_\w+"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this launcher."""
    add_options(parser, SETTINGS)


def launch(cells: list[Cell], options: argparse.Namespace) -> int:
    """Submits what is not in the queue already; returns 0 when SLURM has taken all of it.

    Raises:
      UserError: a setting is wrong, or SLURM is not here or refuses.
    """
    settings = settings_of(options)
    if not cells:
        return 0
    cells = assign.assigned(cells, settings["hardware"])
    with _one_at_a_time(_logs(cells)):
        queued = queued_fingerprints(cells)
        left = [cell for cell in cells if cell.fingerprint not in queued]
        if len(left) < len(cells):
            print(f"{len(cells) - len(left)} cells are queued or running in SLURM already")
        for first in range(0, len(left), LARGEST_ARRAY):
            part = left[first : first + LARGEST_ARRAY]
            job = submit(part, settings)
            print(f"SLURM job {job}: {len(part)} cells; squeue --job={job} --array shows them")
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, str | None]:
    """Value of every setting; nodes and GPUs are those of the hardware, if that is named.

    Raises:
      UserError: a setting has a wrong form, or is not that of the hardware.
    """
    settings = resolve(options, "slurm", SETTINGS)
    needed = {"nodes": "1", "gpus": "0"}
    if settings["hardware"] is None:
        return settings | {k: settings[k] or v for k, v in needed.items()}
    where = hardware(settings["hardware"])
    if where.kind == "tpu":
        raise UserError(f"--hardware {where.name}: SLURM has no TPUs: use --launcher=jobset")
    gpus = where.devices // where.hosts if where.kind == "gpu" else 0
    needed = {"nodes": str(where.hosts), "gpus": str(gpus)}
    for name, number in needed.items():
        if settings[name] not in (None, number):
            raise UserError(
                f"--{name}={settings[name]}: --hardware {where.name} has {number}: leave --{name} "
                "out, or name other hardware"
            )
    return settings | needed


@contextmanager
def _one_at_a_time(logs: Path) -> Iterator[None]:
    """Waits for another launcher of the sweep: both would find the queue without these cells."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        stack = ExitStack()
        stack.enter_context(locked(logs / ".slurm-lock", wait=True))
    except OSError as error:
        raise UserError(f"{logs} cannot be written or locked: {error.strerror}") from error
    with stack:
        yield


def submit(cells: list[Cell], settings: dict[str, str | None]) -> str:
    """Submits one array; returns its job id."""
    logs = _logs(cells)
    file, listed = logs / "slurm-submitted.sh", logs / "slurm-submitted.json"
    try:
        file.write_text(script(cells, settings))
        # before sbatch: what is submitted and not listed would be submitted again
        listed.write_text(json.dumps([cell.fingerprint for cell in cells]) + "\n")
    except OSError as error:
        raise UserError(f"{logs} cannot be written: {error.strerror}") from error
    names = sorted(n for n in os.environ if _EXPORTED.fullmatch(n) and not _SECRET.search(n))
    # paths are arguments, not directives: sbatch would read patterns and quotes in them
    job = _run(
        "sbatch",
        "--parsable",
        f"--chdir={logs}",
        f"--export={','.join(names)}",
        str(file),
    ).partition(";")[0]
    if not job.isdecimal():
        raise UserError(f"sbatch answered {job!r}, expected a job id; the script is {file}")
    listed.rename(logs / f"slurm-{job}.json")
    file.rename(logs / f"slurm-{job}.sh")
    return job


def queued_fingerprints(cells: list[Cell]) -> set[str]:
    """Fingerprints of the cells of this sweep that wait or run in SLURM."""
    logs = _logs(cells)
    listed = _run(
        "squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%F %K"
    )
    queued = set()
    for line in listed.splitlines():
        job, _, index = line.strip().partition(" ")
        try:
            queued.add(json.loads((logs / f"slurm-{job}.json").read_text())[int(index)])
        except (OSError, ValueError, IndexError, TypeError):
            continue  # a job of something else
    return queued


def script(cells: list[Cell], settings: dict[str, str | None]) -> str:
    """The batch script of an array. Values of `settings` have their forms (`settings.resolve`)."""
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by launch/slurm.py: task I of the array is the cell of case I below.",
            "# shellcheck disable=SC2016,SC1003  # what stands in quotes is to stay as it is",
            *(f"#SBATCH --{directive}" for directive in _directives(len(cells), settings)),
            "set -uo pipefail",
            "trap '' USR1  # the notice is for the processes of the step",
            f"cd {quote(str(REPOSITORY))} || exit 1",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *(_case(index, cell) for index, cell in enumerate(cells)),
            '*) echo "no cell has number $SLURM_ARRAY_TASK_ID" >&2; exit 1 ;;',
            "esac",
            # cells of one shape compile the same program: the first one does it for all
            f"export JAX_COMPILATION_CACHE_DIR={quote(str(_logs(cells).with_name('.compiled')))}",
            'exec >>"$log" 2>&1',
            f'rm -f "${VARIABLE}"',
            f"printf '{ATTEMPT}%s\\n' \"SLURM job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $workdir\"",
            *_step(cells, settings),
            "code=$?",
            # outside of a container: there is no scontrol inside
            f'{quote(sys.executable)} -m launch.ended "${VARIABLE}" "$log" "$code"'
            + (" --requeue" if settings["container"] else ""),
            'exit "$code"',
            "",
        ]
    )


def _directives(count: int, s: dict[str, str | None]) -> list[str]:
    gpus = int(given(s, "gpus"))
    limit = f"%{s['at-once']}" if s["at-once"] else ""
    directives = {
        "job-name": "moe_ablm",
        "array": f"0-{count - 1}{limit}",
        "output": "slurm-%A_%a.out",  # in --chdir
        "open-mode": "append",
        "signal": f"USR1@{GRACE}",
        "nodes": s["nodes"],
        "ntasks-per-node": gpus or s["processes"],
        # of the node, not of the task: JAX picks the one with the number of its process
        "gpus-per-node": gpus or None,
        "cpus-per-task": s["cpus"],
        "mem": s["memory"],
        "partition": s["partition"],
        "account": s["account"],
        "qos": s["qos"],
        "time": s["time"],
    }
    return [
        "requeue",
        *(f"{name}={value}" for name, value in directives.items() if value is not None),
    ]


def _case(index: int, cell: Cell) -> str:
    arguments = " ".join(map(quote, cell.argv))
    return (
        f"{index})\n  log={quote(str(cell.log))}\n  workdir={quote(str(cell.workdir))}\n"
        f"  export {VARIABLE}={quote(str(cell.outcome))}\n"
        f"  set -- {arguments}\n"
        + "".join(f"  {line}\n" for line in assign.exports(cell.environment))
        + "  ;;"
    )


def _step(cells: list[Cell], s: dict[str, str | None]) -> list[str]:
    """`srun` of the training command; a process that fails takes the others along."""
    options = ["srun", "--export=ALL", "--kill-on-bad-exit=1"]
    if s["cpus"]:  # srun does not take it over from sbatch
        options.append(f"--cpus-per-task={s['cpus']}")
    image, python = s["container"], quote(sys.executable)
    inside: list[str] = []
    if image:
        python = "python3"
        folders = [str(REPOSITORY), str(_logs(cells).parent), *(s["mounts"] or "").split(",")]
        folders = list(filter(None, folders))
        if any(set(folder) & set(":,") for folder in folders):
            raise UserError(f"{' or '.join(folders)} has a ':' or ',': no container can mount it")
        if image.endswith(".sif"):
            nv = ["--nv"] if int(given(s, "gpus")) else []
            inside = ["apptainer", "exec", *nv, *(f"--bind={folder}" for folder in folders), image]
        else:
            mounts = ",".join(f"{folder}:{folder}" for folder in folders)
            options += [f"--container-image={image}", f"--container-mounts={mounts}",
                        f"--container-workdir={REPOSITORY}"]  # fmt: skip
    return [
        "# USR1 before the trainer listens would end it; it begins to listen when it can save",
        f"{' '.join(map(quote, options))} \\",
        *([f"  {' '.join(map(quote, inside))} \\"] if inside else []),
        f'  bash -c \'trap "" USR1; exec "$@"\' bash {python} "$@"',
    ]


def _logs(cells: list[Cell]) -> Path:
    return cells[0].workdir.parent / LOGS


def _run(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, timeout=120
        )
    except FileNotFoundError:
        raise UserError(
            f"{program} is not here: use --launcher=slurm where SLURM is, or another launcher"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{program} did not answer within 120 s: try again later") from None
    if done.returncode:
        raise UserError(f"{program} refused: {' '.join(done.stderr.split())[:500]}")
    return done.stdout.strip()
