"""Splits of FLIP (Dallago et al. 2021): CSV, FASTA with fields, FASTA with a label a residue.

CSV: `sequence, target, set, validation`. FASTA: `>id TARGET=1.2 SET=train VALIDATION=False`, or
without TARGET and with labels in the place of residues, whose sequences are in `sequences.fasta`
of the same task, and in `mask.fasta` or `resolved.fasta` 0 where a label is not known.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.members import Member
from moe_ablm.evaluation.formats.protein_tasks import PARTS, UNKNOWN, Protein, kind_of
from moe_ablm.evaluation.formats.rows import TableRow, named, read_rows

SEQUENCES, MASKS = "sequences", ("mask", "resolved")
_FIELDS = ("TARGET", "SET", "VALIDATION", "MASK")


class FlipRecord(NamedTuple):
    """A protein of a split as it is written: texts of `_FIELDS`, "" where there are none."""

    name: str
    row: TableRow


def read_csv(member: Member) -> list[FlipRecord]:
    """Records of a CSV split.

    Raises:
      UserError: a missing column, a malformed row, no row.
    """
    header, rows = read_rows(member)
    columns = {
        "sequence": named(header, ("sequence",), member.where),
        "TARGET": named(header, ("target",), member.where),
        "SET": named(header, ("set",), member.where),
    }
    if "validation" in {h.lower() for h in header}:
        columns["VALIDATION"] = named(header, ("validation",), member.where)
    empty = dict.fromkeys(_FIELDS, "")
    records: list[FlipRecord] = []
    for row in rows:
        values = empty | {name: row.values[column] for name, column in columns.items()}
        records.append(FlipRecord(str(len(records) + 1), TableRow(row.where, values)))
    if not records:
        raise UserError(f"{member.where}: no rows below the header")
    return records


def read_fasta(member: Member) -> list[FlipRecord]:
    """Records of a FASTA; what stands below a header is under "sequence"."""
    return [_record(member, *entry) for entry in _fasta(member)]


def _fasta(member: Member) -> Iterator[tuple[int, str, str]]:
    """(line, header, text) of each record."""
    at, header = 0, ""
    parts: list[str] = []
    for number, line in enumerate(member.lines(), start=1):
        if line.startswith(">"):
            if at:
                yield at, header, "".join(parts)
            at, header, parts = number, line[1:].strip(), []
        else:
            parts.append(line.strip())
    yield at, header, "".join(parts)


def _record(member: Member, line: int, header: str, text: str) -> FlipRecord:
    where = f"{member.where}: line {line}"
    name, *fields = header.split() or [""]
    if not name:
        raise UserError(f"{where}: nothing stands behind '>'")
    values = dict.fromkeys(_FIELDS, "") | {"sequence": text}
    for field in fields:
        key, equals, value = field.partition("=")
        if equals and key.upper() in _FIELDS:
            values[key.upper()] = value
    return FlipRecord(name, TableRow(where, values))


def proteins_of(
    split: Sequence[FlipRecord], others: Mapping[str, Sequence[FlipRecord]]
) -> tuple[str, dict[str, list[Protein]]]:
    """Kind and proteins by part of a split.

    Args:
      split: its records.
      others: all records of the task by the stem of their file, for sequences and masks.

    Raises:
      UserError: a record without set, target or sequence, or labels that do not fit.
    """
    rows = _joined(split, others)
    kind = kind_of([(row.values["sequence"].strip(), row.values["TARGET"]) for row in rows])
    parts: dict[str, list[Protein]] = {part: [] for part in PARTS}
    for row in rows:
        sequence = row.sequence("sequence")
        target = row.number("TARGET") if kind == "regression" else row.values["TARGET"]
        if kind == "residue":
            target = masked(row, "TARGET", len(sequence))
        parts[_part(row)].append(Protein(sequence, target))
    return kind, parts


def masked(row: TableRow, target: str, residues: int) -> str:
    """Labels in the column `target`, `UNKNOWN` where its "MASK", if it has one, is 0.

    Raises:
      UserError: labels or mask are not one a residue.
    """
    labels, mask = row.values[target], row.values["MASK"]
    if len(labels) != residues:
        raise row.fail(target, f"{len(labels)} labels, but {residues} residues")
    if not mask:
        return labels
    if len(mask) != residues or set(mask) - set("01"):
        raise row.fail("MASK", f"expected {residues} letters 0 and 1, one a residue")
    return "".join(a if b == "1" else UNKNOWN for a, b in zip(labels, mask, strict=True))


def _joined(
    split: Sequence[FlipRecord], others: Mapping[str, Sequence[FlipRecord]]
) -> list[TableRow]:
    """Rows with sequence, target and mask, wherever they are written."""
    if all(record.row.values["TARGET"] for record in split):
        return [record.row for record in split]
    if SEQUENCES not in others:
        lacking = next(r.row for r in split if not r.row.values["TARGET"])
        raise lacking.fail("TARGET", f"none, and the task has no file {SEQUENCES}.fasta")
    sequences = {r.name: r.row.values["sequence"] for r in others[SEQUENCES]}
    masks = {r.name: r.row.values["sequence"] for stem in MASKS for r in others.get(stem, ())}
    rows = []
    for name, row in split:
        if name not in sequences:
            raise UserError(f"{row.where}: {name} is not in {SEQUENCES}.fasta")
        columns = {"TARGET": row.values["sequence"], "MASK": masks.get(name, "")}
        rows.append(TableRow(row.where, {**row.values, **columns, "sequence": sequences[name]}))
    return rows


def _part(row: TableRow) -> str:
    part = row.values["SET"].strip().lower()
    part = {"val": "valid", "validation": "valid"}.get(part, part)
    if part not in PARTS:
        raise row.fail("SET", f"found {part[:20]!r}, expected one of {', '.join(PARTS)}")
    return "valid" if row.values["VALIDATION"].strip().lower() == "true" else part
