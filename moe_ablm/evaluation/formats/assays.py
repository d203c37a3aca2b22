"""A laboratory's assay: a table of antibodies with a column of what was measured of them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers import Report, Source
from moe_ablm.data.readers.columns import place_of, require_column
from moe_ablm.data.readers.missing import is_missing
from moe_ablm.data.readers.report import why_nothing
from moe_ablm.data.readers.rows import read_rows
from moe_ablm.data.tokenizer import Layout
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.protein_tasks import PARTS
from moe_ablm.inference.antibodies import read

TASKS = ("regression", "classification")
FORMATS = ("table", "joined")  # in which a row is an antibody
_TARGET, _SPLIT, _GROUPS = "label", "split", "groups"  # "label" is read as it is written


@dataclass(frozen=True, eq=False)
class Assay:
    """Antibodies in the order of their file, and what was measured of them.

    Attributes:
      task: one of `TASKS`.
      antibodies: each measurement's; one may be there several times.
      targets: values, float64 `[n]`, or indices in `classes`, int64 `[n]`.
      classes: their names, sorted; none of a regression.
      parts: "train", "valid" or "test" of each; empty where the table has no such column.
      groups: the value of a column of groups of each; empty where there is none.
    """

    task: str
    antibodies: tuple[Antibody, ...]
    targets: np.ndarray
    classes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


def read_assay(
    source: Source,
    target: str,
    layout: Layout,
    longest: int,
    task: str | None = None,
    split: str | None = None,
    groups: str | None = None,
) -> Assay:
    """Reads a table; a row without a target that can be used is a bad row (`Source.report`).

    Args:
      source: the table.
      target: column of what was measured.
      layout, longest: of the model that is to read the antibodies.
      task: one of `TASKS`; None: classification of names or of two values, else regression.
      split: column that says "train", "valid" or "test"; None: there is none.
      groups: column of groups that must not be divided; None: there is none.

    Raises:
      UserError: another format, no such column, a bad row that may not be left out, nothing left.
    """
    if source.format not in FORMATS:
        raise UserError(
            f"--input {source.report.source} is {source.format}: expected a table (CSV, TSV or "
            f"parquet) with a row for each antibody and a column {target}"
        )
    flags = {_TARGET: ("--target", target), _SPLIT: ("--split", split)}
    flags[_GROUPS] = "--groups", groups
    values = _columns(source, {k: (flag, c) for k, (flag, c) in flags.items() if c is not None})
    task = task or _task_of([row[_TARGET] for row in values.values()])

    def refuse(antibody: Antibody) -> str | None:
        row = values[antibody.where]
        return (
            _unusable(row[_TARGET], task, target)
            or _no_part(row.get(_SPLIT), split)
            or _no_group(row.get(_GROUPS), groups)
        )

    antibodies = tuple(read([source], layout, longest, refuse))
    if not antibodies:
        raise UserError(f"no antibody is left: {why_nothing([source.report])}")
    rows = [values[antibody.where] for antibody in antibodies]
    texts = [row[_TARGET].strip() for row in rows]
    classes: tuple[str, ...] = ()
    if task == "regression":
        targets = np.array([float(text) for text in texts])
    else:
        classes = tuple(sorted(set(texts)))
        targets = np.array([classes.index(text) for text in texts], np.int64)
    parts = tuple(row[_SPLIT].strip().lower() for row in rows) if split else ()
    families = tuple(row[_GROUPS].strip() for row in rows) if groups else ()
    return Assay(task, antibodies, targets, classes, parts, families)


def _columns(source: Source, wanted: Mapping[str, tuple[str, str]]) -> dict[str, Mapping[str, str]]:
    """The values of columns by the place of their row; malformed rows are the reader's affair.

    Args:
      source: the table.
      wanted: flag and name of each column.
    """
    name = source.report.source

    def choose(header: Sequence[str]) -> dict[str, str]:
        for flag, column in wanted.values():
            require_column(header, column, name, f"{flag} ")
        return {key: column for key, (_, column) in wanted.items()}

    found: dict[str, Mapping[str, str]] = {}
    for batch in read_rows(source.paths[0], Report(name, "skip"), choose):
        columns = {key: batch[key].to_pylist() for key in wanted}
        for row in range(batch.num_rows):
            found[place_of(batch, row)] = {key: columns[key][row] for key in wanted}
    return found


def _task_of(texts: Sequence[str]) -> str:
    """Most values decide, so that a malformed one is found as such."""
    given = [text.strip() for text in texts if not is_missing(text)]
    numbers = [text for text in given if _number(text) is not None]
    if 2 * len(numbers) <= len(given) or len(Counter(given)) <= 2:
        return "classification"
    return "regression"


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _unusable(text: str, task: str, target: str) -> str | None:
    if is_missing(text):
        return f"no target: column {target} holds {text.strip()!r}, nothing that was measured"
    if task == "regression" and _number(text.strip()) is None:
        return (
            f"no number: column {target} holds {text.strip()[:40]!r}, expected a number (of "
            "classes: --task classification)"
        )
    return None


def _no_group(text: str | None, groups: str | None) -> str | None:
    return f"no group: column {groups} is empty" if text is not None and not text.strip() else None


def _no_part(text: str | None, split: str | None) -> str | None:
    if text is None or text.strip().lower() in PARTS:
        return None
    return f"no part: column {split} holds {text.strip()[:40]!r}, expected {', '.join(PARTS)}"
