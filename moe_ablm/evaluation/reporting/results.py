"""The directory of an evaluation: what it is of, `results.json`, `numbers.csv`, `report.html`."""

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_ablm.data.dataset import Dataset
from moe_ablm.errors import UserError
from moe_ablm.evaluation.reporting.report import write_report
from moe_ablm.evaluation.suite import SCHEMA
from moe_ablm.files import write_atomically
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.output import file_identity
from moe_ablm.model import flops
from moe_ablm.results import versions

IDENTITY = "evaluation.json"
PACKAGES = ("moe_ablm", "jax", "flax", "numpy", "scikit-learn", "umap-learn")  # what computes


def same_command(
    out: Path,
    engine: Engine,
    dataset: Dataset | None,
    files: Mapping[str, tuple[Path, ...]],
    seed: int,
) -> dict[str, Any]:
    """What is evaluated on what; kept in `out`, which may hold results of the same only.

    Raises:
      UserError: `out` holds results of another model or of other data, or cannot be written.
    """
    model = engine.model
    about = {
        "schema": SCHEMA,
        "model": {
            "source": model.source,
            "sha256": model.digest(),
            "regime": model.regime,
            "router": model.spec.moe.name if model.spec.moe else "none",
            "params_total": flops.params_total(model.spec),
            "params_active": flops.params_active(model.spec),
            "tokens_seen": model.facts.get("data", {}).get("tokens_seen"),
        },
        "dataset": dataset and {"path": str(dataset.path), "sha256": dataset.identity},
        "files": {name: [file_identity(p) for p in paths] for name, paths in sorted(files.items())},
        "seed": seed,
        "precision": engine.precision,
    }
    file = out / IDENTITY
    before = _read(file)
    if not before and any(p.is_file() for p in (out / "results.json", *out.glob("*/result.json"))):
        raise UserError(
            f"--out {out} holds results, but no {IDENTITY} that says of what: choose a new name or "
            "remove it"
        )
    if before and _deciding(before) != _deciding(about):
        parts = [k for k in about if before.get(k) != about[k]]
        raise UserError(
            f"--out {out} holds an evaluation of another {' and '.join(parts)}: choose a new name "
            "or remove it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(about, indent=1))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return about


def _deciding(about: Mapping[str, Any]) -> dict[str, Any]:
    """Without names of places: a run and a dataset may move."""
    content = json.loads(json.dumps(about))
    content["model"] = content["model"]["sha256"]
    content["dataset"] = content["dataset"] and content["dataset"]["sha256"]
    return content


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        _deciding(content)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content


def write_results(
    out: Path, about: Mapping[str, Any], found: Mapping[str, dict], command: Sequence[str]
) -> list[Path]:
    """Writes all numbers and the report.

    Args:
      out: directory of the evaluation.
      about: of `same_command`.
      found: of `suite.run_suite`.
      command: the command line without its suite and output, told in the report.

    Returns:
      Files that were written.
    """
    installed = {"python": platform.python_version(), **versions(*PACKAGES)}
    content = {**about, "versions": installed, "evaluations": dict(found)}
    write_atomically(out / "results.json", json.dumps(content, indent=1))
    write_atomically(out / "numbers.csv", numbers_csv(found))
    return [out / "results.json", out / "numbers.csv", write_report(out, content, command)]


def numbers_csv(found: Mapping[str, dict]) -> str:
    """A line a number; a column a label."""
    rows = [
        {"evaluation": name, **{k: v for k, v in number.items() if k != "labels"}}
        | number["labels"]
        for name, kept in found.items()
        for number in kept["numbers"]
    ]
    fixed = ["evaluation", "metric", "value", "low", "high", "n", "unit"]
    labels = sorted({key for row in rows for key in row} - set(fixed))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fixed + labels, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
