"""From files to tasks: the formats of FLIP and TAPE, recognised by content, in archives or not."""

from collections.abc import Sequence
from pathlib import Path

from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats import flip, tape
from moe_ablm.evaluation.formats.members import Member, members
from moe_ablm.evaluation.formats.protein_tasks import Protein, Split, Task

_FOLDERS = ("splits", "data", "")  # names that do not identify a task


def read_tasks(paths: Sequence[Path]) -> list[Task]:
    """The tasks of all files together: parts of one task may be in several.

    Raises:
      UserError: a malformed file, a task without training or test set.
    """
    splits: dict[str, dict[str, list[flip.FlipRecord]]] = {}
    parts: dict[str, dict[str, tuple[str, list[Protein]]]] = {}
    for path in paths:
        for member in members(path):
            first = member.head.lstrip()[:1]
            if first in ("{", "["):
                name, part = tape.part_of(member)
                parts.setdefault(name or _folder(path), {})[part] = tape.read_json(member)
            else:
                _read_flip(member, splits.setdefault(_folder(path), {}))
    tasks = [task for name, files in splits.items() for task in _flip_tasks(name, files)]
    return tasks + [_tape_task(name, of_task) for name, of_task in parts.items()]


def _folder(path: Path) -> str:
    """What a file of FLIP is of: `gb1/splits.zip`, `gb1/splits/sampled.csv`, `gb1.zip`."""
    path = path.resolve()
    names = [path.name.partition(".")[0]] if path.name.endswith((".zip", "gz", ".tar")) else []
    names += [folder.name for folder in path.parents]
    return next((name for name in names if name not in _FOLDERS), path.stem)


def _read_flip(member: Member, files: dict[str, list[flip.FlipRecord]]) -> None:
    """Adds a file's records; where a split is there as FASTA and as CSV, the FASTA is read."""
    if member.head.lstrip().startswith(">"):
        files[member.stem] = flip.read_fasta(member)
    elif member.stem not in files:
        files[member.stem] = flip.read_csv(member)


def _flip_tasks(name: str, files: dict[str, list[flip.FlipRecord]]) -> list[Task]:
    """A task a kind: all splits of a file are of one, as a rule."""
    kinds: dict[str, list[Split]] = {}
    for stem, records in files.items():
        if stem == flip.SEQUENCES or stem in flip.MASKS:
            continue
        kind, parts = flip.proteins_of(records, files)
        _require(records[0].row.where, parts)
        split = Split(parts["train"], parts["valid"], {stem: parts["test"]})
        kinds.setdefault(kind, []).append(split)
    return [Task(name, kind, splits) for kind, splits in kinds.items()]


def _tape_task(name: str, parts: dict[str, tuple[str, list[Protein]]]) -> Task:
    kinds = {kind for kind, _ in parts.values()}
    if len(kinds) > 1:
        raise UserError(f"task {name}: its files have targets of different kinds")
    tests = {
        part: proteins for part, (_, proteins) in parts.items() if part not in ("train", "valid")
    }
    _, train = parts.get("train", ("", []))
    _, valid = parts.get("valid", ("", []))
    _require(f"task {name}", {"train": train, "test": [p for t in tests.values() for p in t]})
    return Task(name, kinds.pop(), [Split(train, valid, tests)])


def _require(where: str, parts: dict[str, list[Protein]]) -> None:
    for part in ("train", "test"):
        if not parts[part]:
            raise UserError(
                f"{where}: no {part} set; give all files of a task: --data proteins=FILE once each"
            )
