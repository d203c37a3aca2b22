"""Training speeds of recorded runs, by FLOPs per token, for estimates of device-hours."""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.state import finite
from moe_ablm.errors import UserError, counted
from sweeps.device import device_of

COLUMNS = ("flops", "tokens", "tokens_per_second")


@dataclass(frozen=True)
class Recorded:
    """Model FLOP/s of one device by FLOPs per token, which grow with the model.

    Small models are slower than a share of the peak: their matmuls are small, and what is no matmul
    takes most of the time.
    """

    per_token: np.ndarray  # [m] FLOPs a token, ascending
    speed: np.ndarray  # [m] FLOP/s, the median of the runs
    source: str

    def at(self, per_token: float) -> float:
        """FLOP/s on log axes between the runs; beyond them that of the nearest."""
        log_speed = np.interp(math.log(per_token), np.log(self.per_token), np.log(self.speed))
        return float(np.exp(log_speed))

    def beyond(self, known: "Recorded") -> "Recorded":
        """These speeds, and at other sizes those of `known`, as many times faster as these are."""
        per_token = np.union1d(self.per_token, known.per_token)
        times = np.array([math.log(self.at(x) / known.at(x)) for x in self.per_token])
        factor = np.exp(np.interp(np.log(per_token), np.log(self.per_token), times))
        speed = factor * np.array([known.at(x) for x in per_token])
        return Recorded(per_token, speed, f"{self.source} (other sizes: as in {known.source})")


def read_recorded(inputs: Iterable[Path], device: str) -> Recorded:
    """Recorded speeds of tables (CSV of `sweeps.collect`) and folders of runs (`run.json`).

    Raises:
      UserError: a file cannot be read, has no speeds, or a run is of another device.
    """
    names = [str(path) for path in inputs]
    rows = [row for name in names for row in _rows(Path(name), device)]
    return _by_size(rows, f"{len(rows)} recorded runs of {', '.join(names)}")


def recorded_in(folder: Path, device: str) -> Recorded | None:
    """Speeds of a sweep's own runs, as far as they were on the device; None without any.

    Files that cannot be read count as none: the state of their cells says so.
    """
    rows = []
    for file in folder.glob("*/run.json"):
        try:
            content = json.loads(file.read_text())
            if device_of(_execution(content).get("device_kind")) == device:
                rows += _speed_of(content)
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return _by_size(rows, f"{counted(len(rows), 'run')} of {folder}") if rows else None


def _by_size(rows: Iterable[tuple[float, float, float]], source: str) -> Recorded:
    """Medians over runs of the same FLOPs a token."""
    speeds: dict[float, list[float]] = {}
    for flops, tokens, rate in rows:
        speeds.setdefault(flops / tokens, []).append(flops / tokens * rate)
    per_token = np.array(sorted(speeds))
    return Recorded(per_token, np.array([np.median(speeds[key]) for key in per_token]), source)


def _rows(path: Path, device: str) -> list[tuple[float, float, float]]:
    """FLOPs, tokens, and tokens per second and device of each run that has them."""
    try:
        found = _of_runs(path, device) if path.is_dir() else _of_table(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--calibrate {path} cannot be read: {error!r}") from error
    if not found:
        raise UserError(
            f"--calibrate {path}: no run with flops, tokens and tokens_per_second; expected a CSV "
            "table of sweeps.collect, or a folder of runs"
        )
    return found


def _of_table(path: Path) -> list[tuple[float, float, float]]:
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    if missing := [name for name in COLUMNS if table and name not in table[0]]:
        raise UserError(f"--calibrate {path} has no column {missing[0]}")
    return [
        (float(row["flops"]), float(row["tokens"]), float(row["tokens_per_second"]))
        for row in table
        if all(row[name] for name in COLUMNS)
    ]


def _of_runs(path: Path, device: str) -> list[tuple[float, float, float]]:
    out = []
    for file in sorted(path.glob("**/run.json")):
        content = json.loads(file.read_text())
        kind = _execution(content).get("device_kind")
        if (device_of(kind) or device) != device:
            raise UserError(f"--calibrate {file}: a run on {kind}, --device is {device}")
        out += _speed_of(content)
    return out


def _execution(content: dict) -> dict:
    return content.get("execution") or {}


def _speed_of(content: dict) -> list[tuple[float, float, float]]:
    """FLOPs, tokens, and tokens per second and device of a `run.json`; empty where one is not."""
    values = [finite(content.get(k)) for k in ("flops", "tokens_seen", "tokens_per_second")]
    if not all(values):
        return []
    flops, tokens, rate = (float(v) for v in values if v)
    return [(flops, tokens, rate / _execution(content).get("devices", 1))]
