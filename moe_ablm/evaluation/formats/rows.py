"""Rows of delimited tables, and the values in them, with messages that name row and column."""

import csv
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa

from moe_ablm.data.readers.columns import listed, once
from moe_ablm.data.readers.delimited import delimiter_of
from moe_ablm.data.readers.missing import is_missing
from moe_ablm.data.readers.nucleotides import are_nucleotides
from moe_ablm.data.readers.report import Report, place
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.members import Member
from moe_ablm.inference.antibodies import LETTERS

_LONGEST = 50_000  # residues
_LETTERS = frozenset(LETTERS)


class TableRow(NamedTuple):
    """A record of a file: `where` names it in messages; `values` by column."""

    where: str
    values: Mapping[str, str]

    @property
    def place(self) -> str:
        """Where it stands in its file."""
        return self.where.rpartition(": ")[2]

    def lacks(self, column: str) -> bool:
        """Whether a value is blank or a word for "missing"."""
        return is_missing(self.values[column])

    def fail(self, column: str, problem: str) -> UserError:
        """The error of a malformed value."""
        return UserError(f"{self.where}: column {column}: {problem}")

    def number(self, column: str) -> float:
        """A finite number.

        Raises:
          UserError: it is none.
        """
        text = self.values[column]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.fail(column, f"found {text[:40]!r}, expected a number: mend or remove it")
        return value

    def sequence(self, column: str, empty: bool = False) -> str:
        """Residues in upper case.

        Raises:
          UserError: another letter than the 20 amino acids and X, B, U, Z, O; none; too many.
        """
        text = "" if self.lacks(column) else self.values[column].strip().upper()
        if are_nucleotides(pa.array([text]))[0]:
            raise self.fail(column, "nucleotides, expected amino acids")
        wrong = sorted(set(text) - _LETTERS)
        if wrong:
            at = text.index(wrong[0]) + 1
            raise self.fail(column, f"{wrong[0]!r} at residue {at} is no amino acid")
        if not text and not empty:
            raise self.fail(column, "no sequence")
        if len(text) > _LONGEST:
            raise self.fail(column, f"{len(text)} residues, expected at most {_LONGEST}")
        return text


@contextmanager
def leaving_out(report: Report, row: "TableRow") -> Iterator[None]:
    """Counts a malformed row and leaves it out, where the report says so; else raises."""
    try:
        yield
    except UserError as error:
        if report.on_bad_row == "fail":
            raise UserError(
                f"{error}; mend the file, or leave such rows out with --on-bad-row=skip"
            ) from error
        report.reject("malformed", row.place)


def read_rows(member: Member, report: Report | None = None) -> tuple[list[str], Iterator[TableRow]]:
    """Header and rows of a CSV or TSV file with a header.

    Args:
      member: the file.
      report: counts the rows; malformed ones are left out where it says so.

    Raises:
      UserError: no header; while reading, a row with another number of fields.
    """
    lines = member.lines()
    line = next(lines, "")
    if not line.strip():
        raise UserError(f"{member.where}: no header line: the file is empty, or begins with a gap")
    delimiter = delimiter_of(line.encode())
    header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    return header, _rows(member, header, lines, delimiter, report or Report(member.where))


def _rows(
    member: Member, header: list[str], lines: Iterator[str], delimiter: str, report: Report
) -> Iterator[TableRow]:
    reader, number = csv.reader(lines, delimiter=delimiter, strict=True), 0
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            number += 1
            report.read += 1
            report.bad_row(place(number), "wrong quoting", f"wrong quoting ({error})")
            continue
        if fields is None:
            return
        if not any(field.strip() for field in fields):
            continue
        number += 1
        report.read += 1
        at = place(number, reader.line_num + 1)
        if len(fields) != len(header):
            detail = f"found {len(fields)} columns, expected {len(header)} as in the header"
            report.bad_row(at, "wrong number of columns", detail)
            continue
        yield TableRow(f"{member.where}: {at}", dict(zip(header, fields, strict=True)))


def named(header: list[str], names: tuple[str, ...], where: str) -> str:
    """The one column of a header that has one of some names, in any case.

    Raises:
      UserError: none, or several of that name.
    """
    column = next((h for name in names for h in header if h.lower() == name.lower()), None)
    if column is None:
        raise UserError(f"{where}: no column {' or '.join(names)}; found {listed(header)}")
    once(header, column, where)
    return column
