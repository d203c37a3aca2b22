"""Supervised tasks on proteins: sequences with a value, a class, or a class of every residue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_ablm.data.antibody import Antibody

UNKNOWN = " "  # label of a residue that has none
PARTS = ("train", "valid", "test")


class Protein(NamedTuple):
    """A sequence, which is shown to the encoder as one chain, and what is to be predicted.

    `target`: a number, the name of a class, or a letter for each residue (`UNKNOWN`: none).
    """

    sequence: str
    target: float | str

    @property
    def antibody(self) -> Antibody:
        """As the encoder reads it."""
        return Antibody(self.sequence, self.sequence, "")


@dataclass(frozen=True, eq=False)
class Split:
    """A training set with the test sets, by name, that go with it."""

    train: Sequence[Protein]
    valid: Sequence[Protein]
    tests: Mapping[str, Sequence[Protein]]

    def everyone(self) -> list[Protein]:
        """All proteins of it."""
        return [*self.train, *self.valid, *(p for test in self.tests.values() for p in test)]


@dataclass(frozen=True, eq=False)
class Task:
    """A prediction task, in one split or several.

    Attributes:
      name: "flip_gb1", "fluorescence".
      kind: one of `head_inputs.KINDS`.
      splits: at least one.
      left_out: notes on rows that were left out.
    """

    name: str
    kind: str
    splits: Sequence[Split]
    left_out: tuple[str, ...] = ()


def kind_of(pairs: Sequence[tuple[str, str]]) -> str:
    """The kind of task of (sequence, target) texts.

    A letter for each residue makes "residue", else a number "regression", else it is
    "classification"; most rows decide, so that a malformed one is found as such.
    """
    if sum(len(sequence) == len(target) > 1 for sequence, target in pairs) * 2 > len(pairs):
        return "residue"
    numbers = sum(_is_number(target) for _, target in pairs)
    return "regression" if numbers * 2 > len(pairs) else "classification"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
