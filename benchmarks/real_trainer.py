"""A minute of the real trainer: loader, step, logging and a checkpoint, as a user runs it."""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
POLL = 0.5  # seconds


class Run(NamedTuple):
    """What is trained, and for how long.

    Attributes:
      flags: of `python -m moe_ablm.train`, without the work directory.
      seconds: from the first update that was logged until the run is stopped.
      most: seconds from its start until it is stopped in any case.
    """

    flags: tuple[str, ...]
    seconds: float
    most: float


def flags(data: Path | None, values: dict[str, object]) -> tuple[str, ...]:
    """Flags of a run that neither evaluates nor ends by itself; `values` by key of the config."""
    never = dict.fromkeys(("train.steps", "eval.every", "checkpoint.every"), 10**6)
    paths = {} if data is None else {"data.path": data}
    changes = (f"--config.{key}={value}" for key, value in (never | paths | values).items())
    return "--config=configs/base.py", *changes


def measure(run: Run) -> dict:
    """Trains, stops the run by SIGTERM and sums it up.

    Raises:
      RuntimeError: it failed, or its loss does not fall.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-m", "moe_ablm.train", *run.flags, f"--workdir={workdir}"]
        start = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT)
            try:
                lines = _watch(process, workdir / "results.jsonl", run)
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
            finally:
                process.kill()
        if code:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            raise RuntimeError(f"the trainer ended with exit code {code}: {' '.join(last)}")
        return _summary(lines, time.monotonic() - start) | {"config": {"flags": run.flags}}


def _watch(process: subprocess.Popen, path: Path, run: Run) -> list:
    """Waits until the time of a run is over or it has ended; its log lines."""
    start, first = time.monotonic(), math.inf
    while process.poll() is None:
        now = time.monotonic()
        if now - first > run.seconds or now - start > run.most:
            break
        if first == math.inf and _read(path):
            first = now
        time.sleep(POLL)
    return _read(path)


def _read(path: Path) -> list[dict]:
    """The whole lines that are there."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _summary(lines: list[dict], seconds: float) -> dict:
    if len(lines) < 2:
        raise RuntimeError(f"{len(lines)} log lines in {seconds:.0f} s")
    first, last = lines[0], lines[-1]
    if not last["loss"] < first["loss"]:
        raise RuntimeError(f"the loss went from {first['loss']:.4f} to {last['loss']:.4f}")
    return {
        "steps": last["step"],
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "tokens_per_second": last["tokens_per_second"],
        "matmul_peak_share": last.get("matmul_peak_share"),
        "seconds": seconds,
        "losses": [[line["step"], line["loss"]] for line in lines[:: max(1, len(lines) // 20)]],
    }
