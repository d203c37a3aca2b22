"""Trajectories of a metric: folders of runs, or tables of run, step and value."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from moe_ablm.errors import UserError, suggestion
from moe_ablm.results import is_extended
from moe_ablm.scaling.readers import read_sheet

FEWEST_POINTS = 3
RUN, STEP, VALUE, VERDICT = "run", "step", "value", "verdict"
KINDS = ("eval", "train")  # of lines of results.jsonl; the first that has the metric counts
ALIASES = {"load_entropy": "entropy"}  # as the signals of the stability watch are called
UNFINISHED = "unfinished"


@dataclass
class Trajectories:
    """Curves of a metric, N of them.

    Attributes:
      names: of the runs.
      steps, values: `[P]` arrays of each run, steps increasing.
      verdicts: of the stability watch; empty where there is none.
      source: what was read, in words.
      left_out: runs without a usable curve, and why.
    """

    names: list[str] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    source: str = ""
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, curve: Mapping[float, float], verdict: str, absent: int = 0) -> None:
        """A run with its values by step, or the reason why it does not count."""
        finite = {s: v for s, v in curve.items() if math.isfinite(v)}
        if len(finite) < FEWEST_POINTS:
            lost = len(curve) - len(finite) + absent
            reason = f"{len(finite)} values, fewer than {FEWEST_POINTS}"
            self.left_out.append(
                (name, reason + (f"; {lost} without a finite value" if lost else ""))
            )
            return
        steps = np.array(sorted(finite))
        self.names.append(name)
        self.steps.append(steps)
        self.values.append(np.array([finite[s] for s in steps]))
        self.verdicts.append(verdict)


def read_trajectories(path: Path, metric: str) -> Trajectories:
    """The curve of a metric of every run in or below a directory, or of a table.

    Args:
      path: a directory with `results.jsonl` in it or below, or a table with the columns `run`,
        `step`, the metric (or `value`), and `verdict` if there is one.
      metric: a key of lines of `results.jsonl`, with dots for keys within keys
        (`loss_by_region.CDRH3`), or a statistic of routers (`load_entropy`, `dropped`), which is
        averaged over layers. Lines of evaluations count, or those of training if no evaluation has
        the metric.

    Raises:
      UserError: names file and row of what is wrong.
    """
    found = _of_runs(path, metric) if path.is_dir() else _of_table(path, metric)
    if len(found.names) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.left_out[:3])
        raise UserError(
            f"--input {path}: {len(found.names)} curves of {metric}, and clusters need at least 2"
            + (f" ({reasons})" if reasons else "")
        )
    return found


def _of_runs(path: Path, metric: str) -> Trajectories:
    files = sorted(f for f in path.rglob("results.jsonl") if not is_extended(f))
    if not files:
        raise UserError(
            f"--input {path}: no results.jsonl in it or below; expected a folder of runs"
        )
    lines = {file: list(_lines(file)) for file in files}
    every = [line for of_file in lines.values() for line in of_file]
    having = Counter(str(x.get("kind")) for x in every if metric_of(x, metric) is not None)
    kind = next((k for k in KINDS if having[k]), None)
    if kind is None:
        known = sorted({name for line in every for name in _metrics(line)})
        raise UserError(
            f"--metric {metric}: no line of the {len(files)} runs below {path} has it"
            f"{suggestion(metric, known)}; they have {', '.join(known) or 'no metric at all'}"
        )
    found = Trajectories(source=f"{kind} lines of {len(files)} runs")
    for file, of_file in lines.items():
        values = [(x["step"], metric_of(x, metric)) for x in of_file if x.get("kind") == kind]
        curve = {float(step): v for step, v in values if v is not None}
        name = str(file.parent.relative_to(path))
        found.add(name if name != "." else path.name, curve, _verdict(file))
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Records of a file; the end of a line that is still being written is none."""
    try:
        whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    for row, line in enumerate(whole.split("\n") if whole else (), 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(f"{file}, row {row}: not JSON; mend it or move the run away") from None
        step = record.get(STEP) if isinstance(record, dict) else None
        if not isinstance(step, int | float) or not 0 <= step < math.inf:
            raise UserError(f"{file}, row {row}: found step {step!r}, expected a count of updates")
        yield record


def metric_of(record: Mapping[str, Any], metric: str) -> float | None:
    """The value of a metric in a line, infinite ones too; None where it has none."""
    value: Any = record
    for key in metric.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if _is_number(value):
        return float(value)
    layers = record.get("router")
    if not isinstance(layers, Mapping):
        return None
    name = ALIASES.get(metric, metric)
    of_layers = [x.get(name) for x in layers.values() if isinstance(x, Mapping)]
    numbers = [float(v) for v in of_layers if _is_number(v)]
    return float(np.mean(numbers)) if numbers else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metrics(record: Mapping[str, Any]) -> set[str]:
    """Names that `metric_of` finds in a line, those of keys within keys left out."""
    names = {k for k, v in record.items() if _is_number(v)} - {STEP}
    layers = record.get("router")
    if isinstance(layers, Mapping):
        inner = {k for x in layers.values() if isinstance(x, Mapping) for k in x}
        own = {name: short for name, short in ALIASES.items() if short in inner}
        names |= (inner - {"load"} - set(own.values())) | set(own)
    return names


def _verdict(file: Path) -> str:
    """What the run's record says of its stability; how it ended where it says nothing."""
    record = file.with_name("run.json")
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        stability = content.get("stability") or {}
        return str(stability.get("verdict") or content.get("status") or "")
    except FileNotFoundError:
        return UNFINISHED
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{record}: not readable as JSON: {error}") from None


def _of_table(path: Path, metric: str) -> Trajectories:
    sheet = read_sheet(path)
    name = metric if metric in sheet.header else VALUE
    for wanted in (RUN, STEP, name):
        if wanted not in sheet.header:
            other = f" or '{metric}'" if wanted == VALUE else ""
            raise UserError(
                f"--input {path}: no column '{wanted}'{other}; it has {', '.join(sheet.header)}"
            )
    curves: dict[str, dict[float, float]] = {}
    verdicts: dict[str, str] = {}
    absent: Counter[str] = Counter()
    for row in sheet.rows:
        run = str(row.values[RUN] or "").strip()
        if not run:
            raise UserError(f"{row.source}, column '{RUN}': empty")
        curve = curves.setdefault(run, {})
        step = _number(row.source, STEP, row.values[STEP])
        if not 0 <= step < math.inf:
            raise UserError(f"{row.source}, column '{STEP}': found {step:g}, expected 0 or more")
        if step in curve:
            raise UserError(f"{row.source}: run {run} has step {step:g} twice; keep one")
        raw = row.values[name]
        verdicts[run] = str(row.values.get(VERDICT) or "").strip()
        if raw is None or str(raw).strip() == "":
            absent[run] += 1
            continue
        curve[step] = _number(row.source, name, raw)
    found = Trajectories(source=f"column '{name}' of {path.name}")
    for run, curve in curves.items():
        found.add(run, curve, verdicts[run], absent[run])
    return found


def _number(source: str, column: str, raw: Any) -> float:
    try:
        return float(raw)
    except (TypeError, ValueError):
        raise UserError(
            f"{source}, column '{column}': found {str(raw)[:40]!r}, expected a number"
        ) from None
