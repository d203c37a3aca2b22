"""A suite: evaluations by name with their settings, run one after the other.

Each result is written as soon as it is there; the same command goes on after the last one.
"""

import dataclasses
import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ablm.errors import UserError
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.outcome import Outcome, Skipped
from moe_ablm.evaluation.subject import Subject
from moe_ablm.files import json_text, replacing, write_json
from moe_ablm.inference.buckets import NotOffered

SCHEMA = "moe_ablm.evaluation/1"
# modules of this package, in the order in which they are done
EVALUATIONS = (
    "perplexity",
    "positions",
    "mutations",
    "attention",
    "embeddings",
    "routing",
    "pairing",
    "classification",
    "fitness",
    "proteins",
)
DONE, SKIPPED = "done", "skipped"


class Evaluation(Protocol):
    """What the module of every evaluation defines; `Settings` is a dataclass with defaults."""

    TITLE: str
    Settings: type

    def evaluate(self, subject: Subject, settings: Any) -> Outcome:
        """Carries it out; raises `Skipped` where data or model do not allow it."""


def module_of(name: str) -> Evaluation:
    """The module of an evaluation."""
    return cast(Evaluation, importlib.import_module(f"moe_ablm.evaluation.{name}"))


def run_suite(
    subject: Subject, suite: Mapping[str, Any], out: Path, tell: Callable[[str], None]
) -> dict[str, dict]:
    """Does each evaluation of a suite that is not done yet.

    Args:
      subject: model and data.
      suite: settings by the name of the evaluation.
      out: directory of the results.
      tell: called with each line of progress.

    Returns:
      For each evaluation what `out/NAME/result.json` holds: status "done" or "skipped", reason,
      seconds, settings, numbers, tables, pictures, notes.
    """
    evaluations = {}
    for name, settings in suite.items():
        directory = out / name
        kept = read_kept(directory, dataclasses.asdict(settings))
        if kept is None:
            tell(f"{name} ...")
            kept = _carry_out(name, subject, settings, directory)
        tell(f"{name}: {status_line(kept)}")
        evaluations[name] = kept
    return evaluations


def with_earlier(evaluations: Mapping[str, dict], out: Path) -> dict[str, dict]:
    """What a suite found and what others finished in `out` before, in the order of EVALUATIONS."""
    both = {name: evaluations.get(name) or read_kept(out / name) for name in EVALUATIONS}
    return {name: kept for name, kept in both.items() if kept is not None}


def status_line(kept: Mapping) -> str:
    """Status of an evaluation in one line."""
    if kept["status"] == SKIPPED:
        return f"skipped: {kept['reason']}"
    return f"{len(kept['numbers']):,} numbers, {kept['seconds']:.1f} s"


def read_kept(directory: Path, settings: Mapping[str, Any] | None = None) -> dict | None:
    """What an earlier command found, with the same settings if any are given.

    None where there is nothing whole; what was skipped is tried again.
    """
    try:
        content = json.loads((directory / "result.json").read_text())
        done = content["status"] == DONE and content["schema"] == SCHEMA
        if settings is not None:
            done = done and content["settings"] == json.loads(json_text(settings))
        files = ["samples.parquet", *(picture["file"] for picture in content["pictures"])]
        done = done and all((directory / file).is_file() for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if done else None


def _carry_out(name: str, subject: Subject, settings: Any, directory: Path) -> dict:
    evaluation = module_of(name)
    start = time.monotonic()
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "title": evaluation.TITLE,
        "about": " ".join((evaluation.__doc__ or "").split()),
        "settings": dataclasses.asdict(settings),
    }
    directory.mkdir(parents=True, exist_ok=True)
    try:
        outcome = evaluation.evaluate(subject, settings)
    except (Skipped, NotOffered) as skipped:
        content |= {"status": SKIPPED, "reason": str(skipped), "numbers": [], "tables": []}
        content |= {"pictures": [], "notes": []}
    else:
        # broken off while samples and pictures are written, it must not pass for what it replaces
        (directory / "result.json").unlink(missing_ok=True)
        content |= {"status": DONE, "reason": "", **_kept(outcome, directory)}
    content["seconds"] = time.monotonic() - start
    write_json(directory / "result.json", content)
    return content


def _kept(outcome: Outcome, directory: Path) -> dict:
    """Writes samples and pictures; returns the rest as plain JSON."""
    numbers = [sample.number() for sample in outcome.samples] + list(outcome.numbers)
    write_samples(outcome.samples, directory / "samples.parquet")
    pictures = []
    for picture in outcome.pictures:
        file = f"{picture.name}.png"
        picture.draw().savefig(directory / file, dpi=130)
        pictures.append({"file": file, "caption": picture.caption})
    return {
        "numbers": [as_json(number) for number in numbers],
        "tables": [dataclasses.asdict(table) for table in outcome.tables],
        "pictures": pictures,
        "notes": list(outcome.notes),
    }


def as_json(number: Number) -> dict:
    """A number as plain JSON: null where it is not defined."""
    values = dataclasses.asdict(number)
    for key in ("value", "low", "high"):
        value = float(values[key])
        values[key] = value if math.isfinite(value) else None
    return values | {"labels": dict(number.labels)}


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Every antibody's part of every mean, a line each."""
    columns: dict[str, list] = {name: [] for name in ("sample", "unit", "total", "weight")}
    heads = []
    for number, sample in enumerate(samples):
        heads.append(
            {
                "metric": sample.metric,
                "labels": dict(sample.labels),
                "scale": sample.scale,
                "unit": sample.unit,
                "repeats": list(sample.repeats),
            }
        )
        columns["sample"].append(np.full(len(sample.units), number, np.int32))
        columns["unit"].append(np.asarray(sample.units, dtype=np.str_))
        columns["total"].append(np.asarray(sample.total, np.float64))
        columns["weight"].append(np.asarray(sample.weight, np.float64))
    empty = (np.int32, np.str_, np.float64, np.float64)
    arrays = [
        pa.array(np.concatenate(parts) if parts else np.zeros(0, kind))
        for parts, kind in zip(columns.values(), empty, strict=True)
    ]
    table = pa.table(dict(zip(columns, arrays, strict=True)))
    table = table.replace_schema_metadata({"samples": json_text(heads)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_samples(path: Path) -> list[Sample]:
    """What `write_samples` wrote.

    Raises:
      UserError: the file is damaged.
    """
    try:
        table = pq.read_table(path)
        heads = json.loads(table.schema.metadata[b"samples"])
        which = table["sample"].to_numpy()
        units = np.array(table["unit"].to_pylist(), dtype=np.str_)
        total, weight = table["total"].to_numpy(), table["weight"].to_numpy()
        return [
            Sample(
                *(h["metric"], units[at], total[at], weight[at]),
                *(h["labels"], h["scale"], h["unit"]),
                tuple(h.get("repeats", ())),  # older files have none
            )
            for number, h in enumerate(heads)
            for at in [np.flatnonzero(which == number)]
        ]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again") from error
