"""Tasks of TAPE (Rao et al. 2019) as JSON, an array or a record a line, and FLIP's JSON lines.

A file is a part of a task, named by the file: `fluorescence_train.json`,
`secondary_structure_cb513.json`. Of secondary structure the three states are asked for, as in the
paper, and eight where these are not there.
"""

import json
import re
from collections.abc import Iterator

from moe_ablm.data.readers.columns import listed
from moe_ablm.data.readers.report import Report
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.flip import masked
from moe_ablm.evaluation.formats.members import Member
from moe_ablm.evaluation.formats.protein_tasks import Protein
from moe_ablm.evaluation.formats.rows import TableRow, leaving_out

# in the order in which they are looked for: target, kind
TARGETS = {
    "log_fluorescence": "regression",
    "stability_score": "regression",
    "fold_label": "classification",
    "ss3": "residue",
    "ss8": "residue",
    "label": "residue",
}
_SEQUENCES, _MASKS = ("primary", "sequence"), ("valid_mask", "resolved")
_PART = re.compile(
    r"(?P<task>.*?)_?(?P<part>train|valid|val|test\w*|cb513|casp\d+|ts115|new_pisces)", re.ASCII
)
_GAP = re.compile(r"[\s\[\],]*")
_PIECE, _LONGEST_RECORD = 1 << 20, 64 << 20  # characters


def part_of(member: Member) -> tuple[str, str]:
    """(task, part) of a file by its name: "train", "valid", or the name of a test set.

    Raises:
      UserError: the name has no part.
    """
    match = _PART.fullmatch(member.stem)
    if not match:
        raise UserError(
            f"{member.where}: the name tells no part of a task; expected one that ends in train, "
            "valid, or test, as fluorescence_train.json"
        )
    return match["task"], {"val": "valid"}.get(match["part"], match["part"])


def read_json(member: Member, report: Report) -> tuple[str, list[Protein]]:
    """Kind and proteins of a file; `report` counts its records.

    Raises:
      UserError: no JSON, a missing field, a malformed value.
    """
    proteins: list[Protein] = []
    target = ""
    for number, record in enumerate(_records(member), start=1):
        report.read += 1
        row = TableRow(f"{member.where}: record {number}", {})
        if not target:
            target = next((key for key in TARGETS if key in record), "")
        with leaving_out(report, row):
            proteins.append(_protein_of(record, target, row))
    if not proteins:
        raise UserError(f"{member.where}: no record")
    return TARGETS[target], proteins


def _protein_of(record: dict, target: str, row: TableRow) -> Protein:
    keys = [next((k for k in names if k in record), "") for names in (_SEQUENCES, (target,))]
    if not all(keys):
        raise UserError(
            f"{row.where}: expected primary and one of {', '.join(TARGETS)}; found "
            f"{listed([str(key) for key in record])}"
        )
    mask = next((record[k] for k in _MASKS if k in record), "")
    values = {keys[0]: _text(record[keys[0]]), target: _text(record[target])}
    return _protein(TableRow(row.where, values | {"MASK": _text(mask)}), keys[0], target)


def _protein(row: TableRow, sequence: str, target: str) -> Protein:
    letters, value = row.sequence(sequence), row.values[target]
    if TARGETS[target] == "regression":
        return Protein(letters, row.number(target))
    if TARGETS[target] == "classification":
        if not value:
            raise row.fail(target, "none")
        return Protein(letters, value)
    return Protein(letters, masked(row, target, len(letters)))


def _text(value) -> str:
    """A value as text; of an array its elements, which are digits, true or false, or one number."""
    if isinstance(value, list):
        return "".join(_text(each) for each in value)
    return str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)


def _records(member: Member) -> Iterator[dict]:
    """Objects of an array, or one after the other, held one at a time."""
    decoder, text, at, number = json.JSONDecoder(), "", 0, 1
    while True:
        gap = _GAP.match(text, at)
        at = gap.end() if gap else at
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = member.text.read(_PIECE)
            text, at = text[at:] + more, 0
            if not more and not text.strip():
                return
            if not more or len(text) > _LONGEST_RECORD or isinstance(error, RecursionError):
                raise UserError(f"{member.where}: record {number}: no JSON ({error})") from error
            continue
        if not isinstance(record, dict):
            raise UserError(f"{member.where}: record {number}: expected an object of fields")
        yield record
        number += 1
