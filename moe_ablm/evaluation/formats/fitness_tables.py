"""Variants with a measured fitness: tables of FLAb and of ProteinGym, recognised by their columns.

FLAb (Graylab/FLAb) keeps antibodies as `heavy, light, fitness`, nanobodies as `VHH_sequence`;
ProteinGym (Notin et al. 2023) substitutions as `mutant, mutated_sequence, DMS_score`, where
`A24C:G30K` counts residues of the wild type from 1.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers.columns import chain_columns, listed, once
from moe_ablm.data.readers.report import Report, why_nothing
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError, counted
from moe_ablm.evaluation.formats.members import Member, members
from moe_ablm.evaluation.formats.rows import TableRow, leaving_out, named, read_rows

WILD_TYPE = ("", "wt", "_wt", "wild-type", "wildtype")
_SUBSTITUTION = re.compile(f"([{AMINO_ACIDS}])([0-9]{{1,6}})([{AMINO_ACIDS}])")

# (index from 0, letter of the wild type, letter of the mutant)
Substitution = tuple[int, str, str]


@dataclass(frozen=True, eq=False)
class Antibodies:
    """Antibodies without a common wild type, and their fitness, float64 `[n]`.

    `left_out`: notes on rows of the table that are not among them.
    """

    name: str
    antibodies: tuple[Antibody, ...]
    fitness: np.ndarray
    left_out: tuple[str, ...] = ()

    def take(self, index: np.ndarray) -> "Antibodies":
        """Some of them."""
        some = tuple(self.antibodies[i] for i in index)
        return Antibodies(self.name, some, self.fitness[index])


@dataclass(frozen=True, eq=False)
class Substitutions:
    """Variants of one wild type, and their fitness, float64 `[n]`.

    `left_out`: notes on rows of the table that are not among them.
    """

    name: str
    wild_type: Antibody
    variants: tuple[tuple[Substitution, ...], ...]
    fitness: np.ndarray
    left_out: tuple[str, ...] = ()

    def take(self, index: np.ndarray) -> "Substitutions":
        """Some of them."""
        some = tuple(self.variants[i] for i in index)
        return Substitutions(self.name, self.wild_type, some, self.fitness[index])


Assay = Antibodies | Substitutions


def read_assays(
    paths: tuple[Path, ...], on_bad_row: Literal["fail", "skip"] = "fail"
) -> Iterator[Assay]:
    """The assays of files, one a table; archives may hold several.

    Each is named by its file, with the folder before it where two files are named the same. Rows
    without a measured value or without any sequence are left out.

    Args:
      paths: the files.
      on_bad_row: whether a malformed row raises UserError or is left out.

    Raises:
      UserError: no table of the two kinds, or a malformed row.
    """
    seen = set()
    for path in paths:
        for member in members(path):
            name = member.stem if member.stem not in seen else f"{path.parent.name}/{member.stem}"
            seen.add(name)
            report = Report(member.where, on_bad_row)
            assay = _read(member, name, report)
            report.settle(len(assay.fitness))
            notes = [
                f"{name}: {counted(n, 'row')} left out: {why}" for why, n in report.rejected.items()
            ]
            yield replace(assay, left_out=tuple(notes))


def _read(member: Member, name: str, report: Report) -> Assay:
    header, rows = read_rows(member, report)
    lower = {column.lower() for column in header}
    if {"mutant", "mutated_sequence"} & lower:
        return _substitutions(member, name, header, rows, report)
    if any(chain_columns(header)):
        return _antibodies(member, name, header, rows, report)
    raise UserError(
        f"{member.where}: neither heavy, light, fitness (FLAb) nor mutant, mutated_sequence, "
        f"DMS_score (ProteinGym); found {listed(header)}"
    )


def _antibodies(
    member: Member, name: str, header: list[str], rows: Iterator[TableRow], report: Report
) -> Antibodies:
    columns = chain_columns(header)
    for column in filter(None, columns):
        once(header, column, member.where)
    value = named(header, ("fitness",), member.where)
    antibodies: list[Antibody] = []
    fitness: list[float] = []
    for row in rows:
        with leaving_out(report, row):
            heavy, light = (row.sequence(c, empty=True) if c else "" for c in columns)
            if not heavy + light:
                report.reject("no sequence", row.place)
            elif row.lacks(value):
                report.reject(f"no {value}", row.place)
            else:
                fitness.append(row.number(value))
                antibodies.append(Antibody(str(len(antibodies) + 1), heavy, light))
    if not antibodies:
        raise _nothing_left(report)
    return Antibodies(name, tuple(antibodies), np.array(fitness))


def _substitutions(
    member: Member, name: str, header: list[str], rows: Iterator[TableRow], report: Report
) -> Substitutions:
    mutant = named(header, ("mutant",), member.where)
    mutated = named(header, ("mutated_sequence",), member.where)
    score = named(header, ("DMS_score",), member.where)
    wild_type, first = "", ""
    variants: list[tuple[Substitution, ...]] = []
    fitness: list[float] = []
    for row in rows:
        with leaving_out(report, row):
            if row.lacks(mutated):
                report.reject("no sequence", row.place)
                continue
            variant, reverted = _reverted(row, mutant, mutated)
            if not wild_type:
                wild_type, first = reverted, row.place
            elif reverted != wild_type:
                raise row.fail(mutated, f"{_difference(reverted, wild_type)} {first} reverted")
            if row.lacks(score):
                report.reject(f"no {score}", row.place)
            else:
                fitness.append(row.number(score))
                variants.append(variant)
    if not variants:
        raise _nothing_left(report)
    return Substitutions(name, Antibody(name, wild_type, ""), tuple(variants), np.array(fitness))


def _nothing_left(report: Report) -> UserError:
    if not report.read:
        return UserError(f"{report.source}: no rows below the header")
    return UserError(f"no row is left: {why_nothing([report])}")


def _reverted(row: TableRow, mutant: str, mutated: str) -> tuple[tuple[Substitution, ...], str]:
    """Substitutions of a row, and its sequence without them."""
    letters, text = list(row.sequence(mutated)), row.values[mutant].strip()
    if text.lower() in WILD_TYPE:
        return (), "".join(letters)
    substitutions: list[Substitution] = []
    for part in text.split(":"):
        match = _SUBSTITUTION.fullmatch(part)
        if not match:
            raise row.fail(mutant, f"found {part[:40]!r}, expected substitutions such as A24C:G30K")
        wild, at, new = match[1], int(match[2]) - 1, match[3]
        if not 0 <= at < len(letters):
            raise row.fail(mutant, f"{part}: the sequence has {len(letters)} residues")
        if at in {place for place, *_ in substitutions}:
            raise row.fail(mutant, f"{text[:60]}: residue {at + 1} is substituted twice")
        if letters[at] != new:
            raise row.fail(mutant, f"{part}: residue {at + 1} of {mutated} is {letters[at]}")
        letters[at] = wild
        substitutions.append((at, wild, new))
    return tuple(substitutions), "".join(letters)


def _difference(reverted: str, wild_type: str) -> str:
    if len(reverted) != len(wild_type):
        return f"{len(reverted)} residues, but {len(wild_type)} in"
    at = next(i for i, (a, b) in enumerate(zip(reverted, wild_type, strict=True)) if a != b)
    return (
        f"with its mutations reverted residue {at + 1} of the wild type is {reverted[at]}, but "
        f"{wild_type[at]} in"
    )
