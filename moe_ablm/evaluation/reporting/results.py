"""Writes and reads the directory of an evaluation: results.json, numbers.csv, report.html."""

import csv
import functools
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ablm.data.dataset import Dataset
from moe_ablm.errors import UserError
from moe_ablm.evaluation.declared import CLAIMS, declared
from moe_ablm.evaluation.estimates import Number, Sample, ratio, scaled
from moe_ablm.evaluation.reporting.report import write_report
from moe_ablm.evaluation.suite import DONE, SCHEMA, read_samples
from moe_ablm.files import json_text, shortened, write_atomically, write_json
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.output import file_identity
from moe_ablm.results import versions

IDENTITY = "evaluation.json"
PACKAGES = ("moe_ablm", "jax", "flax", "numpy", "scikit-learn", "umap-learn")  # what computes


def same_command(
    out: Path,
    engine: Engine,
    dataset: Dataset | None,
    files: Mapping[str, tuple[Path, ...]],
    seed: int,
    claims: Sequence[str] = (),
    null: str = "",
) -> dict[str, Any]:
    """What is evaluated on what; kept in `out`, which may hold results of the same only.

    `claims` are those that the suite names (`evaluation.declared`), `null` the kind of null model
    that stands for the model.

    Raises:
      UserError: `out` holds results of another model or of other data, or cannot be written.
    """
    model = engine.model
    total, active = model.params_counts()
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "source": model.source,
            "sha256": model.digest(),
            "regime": model.regime,
            "router": model.spec.moe.name if model.spec.moe else "none",
            "params_total": total,
            "params_active": active,
            "tokens_seen": model.facts.get("data", {}).get("tokens_seen"),
            **({"null": null} if null else {}),
        },
        "dataset": dataset and {"path": str(dataset.path), "sha256": dataset.identity},
        "files": {name: [file_identity(p) for p in paths] for name, paths in sorted(files.items())},
        "seed": seed,
        "precision": engine.precision,
    }
    file = out / IDENTITY
    before = _read(file)
    about[CLAIMS] = declared(claims, before, out)
    if not before and any(p.is_file() for p in (out / "results.json", *out.glob("*/result.json"))):
        raise UserError(
            f"--out {out} holds results, but no {IDENTITY} that says of what: choose a new name or "
            "remove it"
        )
    if before and _deciding(before) != _deciding(about):
        parts = [k for k in about if k != CLAIMS and before.get(k) != about[k]]
        raise UserError(
            f"--out {out} holds an evaluation of another {' and '.join(parts)}: choose a new name "
            "or remove it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, about)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return about


def _deciding(about: Mapping[str, Any]) -> dict[str, Any]:
    """Without names of places: a run and a dataset may move."""
    content = json.loads(json_text(about))
    content.pop(CLAIMS, None)
    content["model"] = [content["model"]["sha256"], content["model"].get("null", "")]
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
    out: Path, about: Mapping[str, Any], evaluations: Mapping[str, dict], command: Sequence[str]
) -> list[Path]:
    """Writes all numbers and the report.

    Args:
      out: directory of the evaluation.
      about: of `same_command`.
      evaluations: of `suite.run_suite`.
      command: the command line without its suite and output, shown in the report.

    Returns:
      Files that were written.
    """
    installed = {"python": platform.python_version(), **versions(*PACKAGES)}
    content = {**about, "versions": installed, "evaluations": dict(evaluations)}
    write_json(out / "results.json", content)
    write_atomically(out / "numbers.csv", numbers_csv(evaluations))
    return [out / "results.json", out / "numbers.csv", write_report(out, content, command)]


def numbers_csv(evaluations: Mapping[str, dict]) -> str:
    """A line a number, with the digits of float32; a column a label."""
    rows = [
        {"evaluation": name, **{k: shortened(v) for k, v in number.items() if k != "labels"}}
        | number["labels"]
        for name, kept in evaluations.items()
        for number in kept["numbers"]
    ]
    fixed = ["evaluation", "metric", "value", "low", "high", "n", "unit"]
    labels = sorted({key for row in rows for key in row} - set(fixed))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fixed + labels, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


# what two evaluations must have in common for a comparison
BASIS = ("dataset", "files", "seed", "precision")
# what is read here, checked so that a damaged file is found at once
MODEL = ("source", "sha256", "router", "regime", "params_total", "params_active", "tokens_seen")
KEPT = ("status", "reason", "settings", "numbers", "title")


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One model's results.

    Attributes:
      kind: what it is one of, as "dense": models of a kind differ in their seed.
      directory: of `evaluate`.
      content: its `results.json`.
    """

    kind: str
    directory: Path
    content: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """Source, router, parameters ..."""
        return self.content["model"]

    def done(self, evaluation: str) -> bool:
        """Whether an evaluation was carried out."""
        kept = self.content["evaluations"].get(evaluation)
        return kept is not None and kept["status"] == DONE

    def why_not(self, evaluation: str) -> str:
        """Why it was not."""
        kept = self.content["evaluations"].get(evaluation)
        return "not part of its suite" if kept is None else kept["reason"]

    def numbers(self, evaluation: str, metric: str = "", **labels: str) -> list[Number]:
        """Results of an evaluation, [] where it was not carried out; of a metric and labels."""
        kept = self.content["evaluations"][evaluation] if self.done(evaluation) else None
        return [
            Number(**n | {k: math.nan if n[k] is None else n[k] for k in ("value", "low", "high")})
            for n in (kept["numbers"] if kept else ())
            if metric in ("", n["metric"])
            and all(n["labels"].get(k) == v for k, v in labels.items())
        ]

    @functools.cached_property
    def _samples(self) -> dict[str, list[Sample]]:
        return {}

    def samples(self, evaluation: str) -> list[Sample]:
        """Every antibody's part of the means of an evaluation.

        Raises:
          UserError: the file is damaged, or not that of the results.
        """
        if evaluation not in self._samples:
            file = self.directory / evaluation / "samples.parquet"
            read = read_samples(file)
            _check(read, self.numbers(evaluation), file)
            self._samples[evaluation] = read
        return self._samples[evaluation]


def _check(samples: Sequence[Sample], numbers: Sequence[Number], file: Path) -> None:
    """Raises `UserError` where samples are not those of the numbers."""
    values = {key(n.metric, n.labels): n.value for n in numbers}
    for sample in samples:
        value = float(scaled(ratio(sample.total.sum(), sample.weight.sum()), sample.scale))
        other = values.get(key(sample.metric, sample.labels), math.inf)
        same = math.isnan(value) and math.isnan(other)
        if not same and not math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9):
            raise UserError(
                f"{file} is not of the results beside it ({sample.metric} is {value:.6g} there, "
                f"{other:.6g} in results.json): evaluate again"
            )


def key(metric: str, labels: Mapping[str, str]) -> tuple:
    """Identity of a number within an evaluation."""
    return metric, tuple(sorted(labels.items()))


def read_evaluated(kind: str, directory: Path) -> Evaluated:
    """Reads what `evaluate` wrote.

    Raises:
      UserError: it is no such directory, unfinished, or damaged.
    """
    where = f"--input {kind}={directory}"
    file = directory / "results.json"
    if not file.is_file():
        unfinished = (directory / IDENTITY).is_file()
        raise UserError(
            f"{where}: the evaluation is unfinished (no results.json): give its command again"
            if unfinished
            else f"{where} is not a directory of `python -m moe_ablm evaluate` (no results.json)"
        )
    try:
        content = json.loads(file.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r} instead of {SCHEMA!r}")
        needed = [content[part] for part in BASIS]
        needed += [content["model"][name] for name in MODEL]
        needed += [kept[name] for kept in content["evaluations"].values() for name in KEPT]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): evaluate again") from error
    for name, kept in content["evaluations"].items():
        _finished(where, directory / name / "result.json", kept)
    return Evaluated(kind, directory, content)


def _finished(where: str, file: Path, kept: Mapping[str, Any]) -> None:
    """Raises `UserError` where an evaluation was begun again and broken off."""
    try:
        newest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} is damaged or missing: evaluate again") from error
    if newest != kept:
        raise UserError(
            f"{where}: {file} is newer than results.json, the evaluation is unfinished: give its "
            "command again"
        )


def require_same_basis(runs: Sequence[Evaluated]) -> None:
    """Raises `UserError` where runs were not evaluated on the same data in the same way."""
    first = runs[0]
    for run in runs[1:]:
        where = f"--input {run.kind}={run.directory}"
        for part in BASIS:
            found, expected = (_basis(part, r.content[part]) for r in (run, first))
            if found != expected:
                raise UserError(
                    f"{where}: evaluated with another {part} than {first.directory} "
                    f"({_short(found)} instead of {_short(expected)}): evaluate both the same way"
                )
        for name, kept in run.content["evaluations"].items():
            if not (run.done(name) and first.done(name)):
                continue
            found, expected = kept["settings"], first.content["evaluations"][name]["settings"]
            if found != expected:
                raise UserError(
                    f"{where}: {name} was done with other settings than in {first.directory} "
                    f"({_short(found)} instead of {_short(expected)}): evaluate both the same way"
                )
    _require_kinds(runs)
    seen: dict[tuple, Path] = {}
    for run in runs:
        identity = (run.kind, run.model["sha256"])
        if identity in seen:
            raise UserError(
                f"--input {run.kind}={run.directory}: the same weights as {seen[identity]}, so no "
                f"other seed of {run.kind}: give each model once"
            )
        seen[identity] = run.directory


def _require_kinds(runs: Sequence[Evaluated]) -> None:
    """Raises `UserError` where runs of a kind differ in more than their seed."""
    first: dict[str, Evaluated] = {}
    for run in runs:
        other = first.setdefault(run.kind, run)
        for name in ("router", "regime", "params_total", "params_active"):
            if run.model[name] != other.model[name]:
                raise UserError(
                    f"--input {run.kind}={run.directory}: {name} {run.model[name]}, but "
                    f"{other.model[name]} of {other.directory}, so no other seed of {run.kind}: "
                    "give it a name of its own"
                )


def _basis(part: str, value: Any) -> Any:
    """A dataset by what it holds: it may have moved."""
    return value["sha256"] if part == "dataset" and value else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
