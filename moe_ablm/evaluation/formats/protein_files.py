"""From files to tasks: the formats of FLIP and TAPE, recognised by content, in archives or not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from moe_ablm.data.readers.report import Report
from moe_ablm.errors import UserError, counted
from moe_ablm.evaluation.formats import flip, tape
from moe_ablm.evaluation.formats.members import Member, members
from moe_ablm.evaluation.formats.protein_tasks import Protein, Split, Task

_FOLDERS = ("splits", "data", "")  # names that do not identify a task


def read_tasks(paths: Sequence[Path], on_bad_row: Literal["fail", "skip"] = "fail") -> list[Task]:
    """The tasks of all files together: parts of one task may be in several.

    Args:
      paths: the files.
      on_bad_row: whether a malformed row raises UserError or is left out, with a note.

    Raises:
      UserError: a malformed file, a task without training or test set.
    """
    splits: dict[str, dict[str, _Flip]] = {}
    parts: dict[str, dict[str, _Part]] = {}
    for path in paths:
        for member in members(path):
            report = Report(member.where, on_bad_row)
            first = member.head.lstrip()[:1]
            if first in ("{", "["):
                name, part = tape.part_of(member)
                read = _Part(*tape.read_json(member, report), report)
                parts.setdefault(name or _folder(path), {})[part] = read
            else:
                _read_flip(member, splits.setdefault(_folder(path), {}), report)
    found = [task for name, files in splits.items() for task in _flip_tasks(name, files)]
    return found + [_tape_task(name, found) for name, found in parts.items()]


class _Flip(NamedTuple):
    """A file of FLIP."""

    records: list[flip.FlipRecord]
    report: Report


class _Part(NamedTuple):
    """A file of TAPE."""

    kind: str
    proteins: list[Protein]
    report: Report


def _left_out(name: str, report: Report) -> tuple[str, ...]:
    rejected = report.rejected.items()
    return tuple(f"{name}: {counted(n, 'row')} left out: {why}" for why, n in rejected)


def _folder(path: Path) -> str:
    """What a file of FLIP is of: `gb1/splits.zip`, `gb1/splits/sampled.csv`, `gb1.zip`."""
    path = path.resolve()
    names = [path.name.partition(".")[0]] if path.name.endswith((".zip", "gz", ".tar")) else []
    names += [folder.name for folder in path.parents]
    return next((name for name in names if name not in _FOLDERS), path.stem)


def _read_flip(member: Member, files: dict[str, _Flip], report: Report) -> None:
    """Adds a file's records; where a split is there as FASTA and as CSV, the FASTA is read."""
    if member.head.lstrip().startswith(">"):
        files[member.stem] = _Flip(flip.read_fasta(member, report), report)
    elif member.stem not in files:
        files[member.stem] = _Flip(flip.read_csv(member, report), report)


def _flip_tasks(name: str, files: dict[str, _Flip]) -> list[Task]:
    """A task a kind: all splits of a file are of one, as a rule."""
    kinds: dict[str, list[Split]] = {}
    notes: dict[str, tuple[str, ...]] = {}
    others = {stem: records for stem, (records, _) in files.items()}
    for stem, (records, report) in files.items():
        if stem == flip.SEQUENCES or stem in flip.MASKS:
            continue
        kind, parts = flip.proteins_of(records, others, report)
        report.settle(sum(map(len, parts.values())))
        _require(report.source, parts)
        split = Split(parts["train"], parts["valid"], {stem: parts["test"]})
        kinds.setdefault(kind, []).append(split)
        notes[kind] = notes.get(kind, ()) + _left_out(stem, report)
    return [Task(name, kind, splits, notes[kind]) for kind, splits in kinds.items()]


def _tape_task(name: str, parts: dict[str, _Part]) -> Task:
    kinds = {part.kind for part in parts.values()}
    if len(kinds) > 1:
        raise UserError(f"task {name}: its files have targets of different kinds")
    for part in parts.values():
        part.report.settle(len(part.proteins))
    sets = {name: part.proteins for name, part in parts.items()}
    train, valid = sets.pop("train", []), sets.pop("valid", [])
    _require(f"task {name}", {"train": train, "test": [p for t in sets.values() for p in t]})
    notes = [note for part, read in parts.items() for note in _left_out(part, read.report)]
    return Task(name, kinds.pop(), [Split(train, valid, sets)], tuple(notes))


def _require(where: str, parts: dict[str, list[Protein]]) -> None:
    for part in ("train", "test"):
        if not parts[part]:
            raise UserError(
                f"{where}: no {part} set; give all files of a task: --data proteins=FILE once each"
            )
