"""A laboratory's assay: a table of antibodies with a column of what was measured of them.

Of residues the column holds a letter a residue, its class, and `UNLABELLED` where it has none: the
columns TARGET_heavy and TARGET_light, or TARGET with the letters of both chains, heavy first.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers import Report, Source
from moe_ablm.data.readers.columns import place_of, require_column
from moe_ablm.data.readers.missing import is_missing
from moe_ablm.data.readers.report import why_nothing
from moe_ablm.data.readers.rows import header_of, read_rows
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import Layout
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.protein_tasks import PARTS
from moe_ablm.evaluation.supervised.head_inputs import IGNORED
from moe_ablm.inference.antibodies import read

RESIDUE = "residue"
TASKS = ("regression", "classification", RESIDUE)
UNLABELLED = "."  # of a residue that has no class
FORMATS = ("table", "joined")  # in which a row is an antibody
# the folds in which those who made GDPa1 ask for results (Arsiwala et al. 2025)
GDPA1_FOLDS = "hierarchical_cluster_IgG_isotype_stratified_fold"
_TARGET, _SPLIT, _GROUPS = "label", "split", "groups"  # "label" is read as it is written
_FOLD = "fold"


@dataclass(frozen=True, eq=False)
class Assay:
    """Antibodies in the order of their file, and what was measured of them.

    Attributes:
      task: one of `TASKS`.
      antibodies: each measurement's; one may be there several times.
      targets: values, float64 `[n]`, or indices in `classes`, int64 `[n]`; of residues an object
        array of int64 `[residues]`, `IGNORED` where there is none.
      classes: their names, sorted; none of a regression.
      parts: "train", "valid" or "test" of each; empty where the table has no such column.
      groups: the value of a column of groups of each; empty where there is none.
      folds: that of a column of folds of each; empty where there is none.
    """

    task: str
    antibodies: tuple[Antibody, ...]
    targets: np.ndarray
    classes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    folds: tuple[str, ...] = ()

    @property
    def of_residues(self) -> bool:
        """Whether each residue has a target."""
        return self.task == RESIDUE


def read_assay(
    source: Source,
    target: str,
    layout: Layout,
    longest: int,
    task: str | None = None,
    split: str | None = None,
    groups: str | None = None,
    fold: str | None = None,
) -> Assay:
    """Reads a table; a row without a target that can be used is a bad row (`Source.report`).

    Args:
      source: the table.
      target: column of what was measured.
      layout, longest: of the model that is to read the antibodies.
      task: one of `TASKS`; None: classification of names or of two values, else regression.
      split: column that says "train", "valid" or "test"; None: there is none.
      groups: column of groups that must not be divided; None: there is none.
      fold: column that says in which fold a row is held out; None: there is none.

    Raises:
      UserError: another format, no such column, a bad row that may not be left out, nothing left.
    """
    if source.format not in FORMATS:
        raise UserError(
            f"--input {source.report.source} is {source.format}: expected a table (CSV, TSV or "
            f"parquet) with a row for each antibody and a column {target}"
        )
    flags = {_TARGET: ("--target", target), _SPLIT: ("--split", split)}
    flags |= {_GROUPS: ("--groups", groups), _FOLD: ("--fold", fold)}
    given = {key: (flag, column) for key, (flag, column) in flags.items() if column is not None}
    values = _columns(source, lambda header: _chosen(given, header, task))
    task = task or _task_of([row[_TARGET] for row in values.values()])

    def refuse(antibody: Antibody) -> str | None:
        row = values[antibody.where]
        if task == RESIDUE:
            unusable = _unlabelled(row, antibody, target)
        else:
            unusable = _unusable(row[_TARGET], task, target)
        return (
            unusable
            or _no_part(row.get(_SPLIT), split)
            or _no_group(row.get(_GROUPS), groups)
            or _no_fold(row.get(_FOLD), fold)
        )

    antibodies = tuple(read([source], layout, longest, refuse))
    if not antibodies:
        raise UserError(f"no antibody is left: {why_nothing([source.report])}")
    rows = [values[antibody.where] for antibody in antibodies]
    texts = [_text(row) for row in rows]
    classes: tuple[str, ...] = ()
    if task == RESIDUE:
        classes = tuple(sorted(set("".join(texts)) - {UNLABELLED}))
        number = {letter: i for i, letter in enumerate(classes)} | {UNLABELLED: IGNORED}
        targets = np.empty(len(texts), object)
        targets[:] = [np.array([number[letter] for letter in text], np.int64) for text in texts]
    elif task == "regression":
        targets = np.array([float(text) for text in texts])
    else:
        classes = tuple(sorted(set(texts)))
        targets = np.array([classes.index(text) for text in texts], np.int64)
    parts = tuple(row[_SPLIT].strip().lower() for row in rows) if split else ()
    families = tuple(row[_GROUPS].strip() for row in rows) if groups else ()
    folds = tuple(row[_FOLD].strip() for row in rows) if fold else ()
    return Assay(task, antibodies, targets, classes, parts, families, folds)


def _chosen(
    given: Mapping[str, tuple[str, str]], header: Sequence[str], task: str | None
) -> Mapping[str, tuple[str, str]]:
    """Of residues with a column of targets for each chain, where there are such, instead of one."""
    flag, target = given[_TARGET]
    names = {chain: f"{target}_{chain}" for chain in CHAINS}
    found = {chain: (flag, name) for chain, name in names.items() if name in header}
    if task != RESIDUE or not found:
        return given
    return {k: v for k, v in given.items() if k != _TARGET} | found


def _text(row: Mapping[str, str]) -> str:
    """The target of a row; of residues that of both chains."""
    return "".join(row[key].strip() for key in (_TARGET, *CHAINS) if key in row)


def official_folds(source: Source) -> str | None:
    """The column of folds of a published table that says which are to be used (GDPa1)."""
    if source.format not in FORMATS:
        return None
    return GDPA1_FOLDS if GDPA1_FOLDS in header_of(source.paths[0]) else None


def _columns(
    source: Source, named: Callable[[Sequence[str]], Mapping[str, tuple[str, str]]]
) -> dict[str, Mapping[str, str]]:
    """The values of columns by the place of their row; malformed rows are the reader's affair.

    Args:
      source: the table.
      named: from the header to flag and name of each column.
    """
    name = source.report.source
    wanted: dict[str, tuple[str, str]] = {}

    def choose(header: Sequence[str]) -> dict[str, str]:
        wanted.update(named(header))
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


def _unlabelled(row: Mapping[str, str], antibody: Antibody, target: str) -> str | None:
    """Why a row has no label for each residue, or None."""
    whole = _TARGET in row
    parts = [("", target, antibody.heavy + antibody.light)] if whole else [
        (f" {chain}", f"{target}_{chain}", getattr(antibody, chain)) for chain in CHAINS
    ]  # fmt: skip
    for chain, column, letters in parts:
        text = row.get(_TARGET if whole else chain.strip(), "").strip()
        if len(text) != len(letters):
            return (
                f"no label a residue: column {column} holds {len(text):,} letters, the{chain} "
                f"sequence has {len(letters):,} residues"
            )
    if not set(_text(row)) - {UNLABELLED}:
        return f"no target: column {target} labels no residue"
    return None


def _no_fold(text: str | None, fold: str | None) -> str | None:
    if text is None or not is_missing(text):
        return None
    return f"no fold: column {fold} holds {text.strip()!r}, expected in which it is held out"


def _no_part(text: str | None, split: str | None) -> str | None:
    if text is None or text.strip().lower() in PARTS:
        return None
    return f"no part: column {split} holds {text.strip()[:40]!r}, expected {', '.join(PARTS)}"
