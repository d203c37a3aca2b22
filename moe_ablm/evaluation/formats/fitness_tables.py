"""Variants with a measured fitness: tables of FLAb and of ProteinGym, recognised by their columns.

FLAb (Graylab/FLAb) keeps antibodies as `heavy, light, fitness`, nanobodies as `VHH_sequence`;
ProteinGym (Notin et al. 2023) substitutions as `mutant, mutated_sequence, DMS_score`, where
`A24C:G30K` counts residues of the wild type from 1.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers.columns import listed
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.members import Member, members
from moe_ablm.evaluation.formats.rows import TableRow, named, read_rows

HEAVY = ("heavy", "VHH_sequence", "sequence_aa_heavy", "h_sequence")
LIGHT = ("light", "sequence_aa_light", "l_sequence")
WILD_TYPE = ("", "wt", "_wt", "wild-type", "wildtype")
_SUBSTITUTION = re.compile(f"([{AMINO_ACIDS}])([0-9]{{1,6}})([{AMINO_ACIDS}])")

# (index from 0, letter of the wild type, letter of the mutant)
Substitution = tuple[int, str, str]


@dataclass(frozen=True, eq=False)
class Antibodies:
    """Antibodies without a common wild type, and their fitness, float64 `[n]`."""

    name: str
    antibodies: tuple[Antibody, ...]
    fitness: np.ndarray

    def take(self, index: np.ndarray) -> "Antibodies":
        """Some of them."""
        some = tuple(self.antibodies[i] for i in index)
        return Antibodies(self.name, some, self.fitness[index])


@dataclass(frozen=True, eq=False)
class Substitutions:
    """Variants of one wild type, and their fitness, float64 `[n]`."""

    name: str
    wild_type: Antibody
    variants: tuple[tuple[Substitution, ...], ...]
    fitness: np.ndarray

    def take(self, index: np.ndarray) -> "Substitutions":
        """Some of them."""
        some = tuple(self.variants[i] for i in index)
        return Substitutions(self.name, self.wild_type, some, self.fitness[index])


Assay = Antibodies | Substitutions


def read_assays(paths: tuple[Path, ...]) -> Iterator[Assay]:
    """The assays of files, one a table; archives may hold several.

    Each is named by its file, with the folder before it where two files are named the same.

    Raises:
      UserError: no table of the two kinds, or a malformed row.
    """
    seen = set()
    for path in paths:
        for member in members(path):
            name = member.stem if member.stem not in seen else f"{path.parent.name}/{member.stem}"
            seen.add(name)
            yield _read(member, name)


def _read(member: Member, name: str) -> Assay:
    header, rows = read_rows(member)
    lower = {column.lower() for column in header}
    if {"mutant", "mutated_sequence"} & lower:
        return _substitutions(member, name, header, rows)
    if lower & {column.lower() for column in (*HEAVY, *LIGHT)}:
        return _antibodies(member, name, header, rows)
    raise UserError(
        f"{member.where}: neither heavy, light, fitness (FLAb) nor mutant, mutated_sequence, "
        f"DMS_score (ProteinGym); found {listed(header)}"
    )


def _antibodies(
    member: Member, name: str, header: list[str], rows: Iterator[TableRow]
) -> Antibodies:
    columns = [
        next((h for n in names for h in header if h.lower() == n.lower()), None)
        for names in (HEAVY, LIGHT)
    ]
    for column in filter(None, columns):
        named(header, (column,), member.where)
    value = named(header, ("fitness",), member.where)
    antibodies: list[Antibody] = []
    fitness = []
    for row in rows:
        heavy, light = (row.sequence(c, empty=True) if c else "" for c in columns)
        if not heavy + light:
            raise row.fail(next(filter(None, columns)), "both chains are empty")
        antibodies.append(Antibody(str(len(antibodies) + 1), heavy, light))
        fitness.append(row.number(value))
    if not antibodies:
        raise UserError(f"{member.where}: no rows below the header")
    return Antibodies(name, tuple(antibodies), np.array(fitness))


def _substitutions(
    member: Member, name: str, header: list[str], rows: Iterator[TableRow]
) -> Substitutions:
    mutant = named(header, ("mutant",), member.where)
    mutated = named(header, ("mutated_sequence",), member.where)
    score = named(header, ("DMS_score",), member.where)
    wild_type, first, variants, fitness = "", "", [], []
    for row in rows:
        variant, found = _reverted(row, mutant, mutated)
        if not wild_type:
            wild_type, first = found, row.where.rpartition(": ")[2]
        elif found != wild_type:
            raise row.fail(mutated, f"{_difference(found, wild_type)} {first} reverted")
        variants.append(variant)
        fitness.append(row.number(score))
    if not variants:
        raise UserError(f"{member.where}: no rows below the header")
    return Substitutions(name, Antibody(name, wild_type, ""), tuple(variants), np.array(fitness))


def _reverted(row: TableRow, mutant: str, mutated: str) -> tuple[tuple[Substitution, ...], str]:
    """Substitutions of a row, and its sequence without them."""
    letters, text = list(row.sequence(mutated)), row.values[mutant].strip()
    if text.lower() in WILD_TYPE:
        return (), "".join(letters)
    found: list[Substitution] = []
    for part in text.split(":"):
        match = _SUBSTITUTION.fullmatch(part)
        if not match:
            raise row.fail(mutant, f"found {part[:40]!r}, expected substitutions such as A24C:G30K")
        wild, at, new = match[1], int(match[2]) - 1, match[3]
        if not 0 <= at < len(letters):
            raise row.fail(mutant, f"{part}: the sequence has {len(letters)} residues")
        if at in {place for place, *_ in found}:
            raise row.fail(mutant, f"{text[:60]}: residue {at + 1} is substituted twice")
        if letters[at] != new:
            raise row.fail(mutant, f"{part}: residue {at + 1} of {mutated} is {letters[at]}")
        letters[at] = wild
        found.append((at, wild, new))
    return tuple(found), "".join(letters)


def _difference(found: str, wild_type: str) -> str:
    if len(found) != len(wild_type):
        return f"{len(found)} residues, but {len(wild_type)} in"
    at = next(i for i, (a, b) in enumerate(zip(found, wild_type, strict=True)) if a != b)
    return (
        f"with its mutations reverted residue {at + 1} of the wild type is {found[at]}, but "
        f"{wild_type[at]} in"
    )
