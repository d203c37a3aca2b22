"""Positions as people name them, H105 or L27A, and residues chosen by them or by their regions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.germline import HUMAN
from moe_ablm.data.regions import CHAINS, region_names
from moe_ablm.errors import ArgumentError, suggestion

SCHEMES = ("imgt", "kabat", "chothia", "martin", "aho")
# IMGT's numbers before which insertions stand; everywhere else they follow theirs
_BEFORE = {"imgt": (33, 61, 112)}
_POSITION = re.compile(r"([HL])(\d+)([A-Z]*)")


@dataclass(frozen=True)
class Span:
    """Positions of a chain from `first` to `last`, numbers as "105" or "111A", both included."""

    chain: str
    first: str
    last: str


@dataclass(frozen=True)
class Selection:
    """Residues by region or by position: those that either names.

    Attributes:
      regions: out of `region_names`.
      spans: positions.
      scheme: one of `SCHEMES`, of the positions; regions are IMGT's.
      germlines: by which residues are numbered (see `germline.load_germlines`).
    """

    regions: tuple[str, ...]
    spans: tuple[Span, ...]
    scheme: str
    germlines: tuple[str, ...] = (HUMAN,)

    def chosen(self, chain: str, numbers: Sequence[str], regions: Sequence[str]) -> np.ndarray:
        """Which residues of a chain are chosen, bool `[residues]`.

        Args:
          chain: "heavy" or "light".
          numbers: of each residue, "" outside the domain.
          regions: name of the region of each residue, "" where it is not known.
        """
        here = np.array([region in self.regions for region in regions], bool)
        keys = [self._key(number) if number else None for number in numbers]
        for span in self.spans:
            if span.chain == chain:
                first, last = self._key(span.first), self._key(span.last)
                inside = [key is not None and first <= key <= last for key in keys]
                here |= np.array(inside, bool)
        return here

    def _key(self, number: str) -> tuple[int, int]:
        """Orders the numbers of a chain as they stand in it."""
        digits = number.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        letters = number[len(digits) :]
        rank = len(letters) * 26 + ord(letters[0]) if letters else 0
        return int(digits), -rank if int(digits) in _BEFORE.get(self.scheme, ()) else rank


def selection(
    regions: str | Sequence[str] | None,
    positions: str | Sequence[str] | None,
    scheme: str,
    germlines: tuple[str, ...] = (HUMAN,),
) -> Selection | None:
    """The selection of `--regions CDRH3,CDRL3` and `--positions H105-H117,L27A`; None: neither.

    Raises:
      ArgumentError: no such region, or no such position.
    """
    if scheme not in SCHEMES:
        raise ArgumentError("numbering", scheme, f"expected one of {', '.join(SCHEMES)}")
    named, spans = _parts(regions), [_span(part, positions) for part in _parts(positions)]
    for name in named:
        if name not in region_names():
            known = ", ".join(region_names())
            raise ArgumentError(
                "regions", name, f"expected some of {known}{suggestion(name, region_names())}"
            )
    for given, text in ((regions, "regions"), (positions, "positions")):
        if given is not None and not _parts(given):
            raise ArgumentError(text, given, "expected at least one")
    return Selection(tuple(named), tuple(spans), scheme, germlines) if named or spans else None


def _parts(given: str | Sequence[str] | None) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else list(given or ())
    return [part.strip() for part in parts if part.strip()]


def _span(part: str, given: object) -> Span:
    first, dash, last = part.partition("-")
    ends = [_POSITION.fullmatch(end) for end in (first, last if dash else first)]
    if None in ends or len({end[1] for end in ends if end}) > 1:
        raise ArgumentError(
            "positions", given, f"{part!r} is no position: expected H105, L27A or H105-H117"
        )
    (letter, *_), _ = (end.groups() for end in ends if end)
    numbers = ["".join(end.groups()[1:]) for end in ends if end]
    return Span(CHAINS["HL".index(letter)], *numbers)
