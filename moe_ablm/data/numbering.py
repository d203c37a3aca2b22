"""Numbers of residues of V domains: IMGT's, and Kabat's, Chothia's, Martin's and AHo's by table.

Framework residues have the IMGT positions of the germline residues that they are aligned to; CDRs
are numbered by their length alone, as IMGT defines it (Lefranc et al. 2003): gaps in the middle,
insertions at 32 and 33, 60 and 61, 111 and 112 (112A, 111A, 112B, ...). The other schemes divide a
domain at IMGT positions into segments of one-to-one numbers and loops, in which numbers lack, or
have insertions, at a place of the scheme (Kabat et al. 1991; Al-Lazikani et al. 1997; Abhinandan
and Martin 2008; Honegger and Plueckthun 2001), where ANARCI has them (Dunbar and Deane 2016).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np

from moe_ablm.data.align import ACCEPTED, REASONS
from moe_ablm.data.domains import Domains, find_domains
from moe_ablm.data.germline import HUMAN, LOCI
from moe_ablm.data.regions import regions_from_cdr_mask

_ROWS_AT_ONCE = 1024
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FR4_START = 118
_IMGT_LOOPS = ((27, 38), (56, 65), (105, 117))

Place = tuple[int, int]  # an IMGT position, and which residue behind it (0: the position's own)


@dataclass(frozen=True)
class Numbering:
    """The numbers of a V domain.

    Attributes:
      start: index in the chain of the first residue of the domain.
      numbers: of each residue of the domain, "105" or "111A".
      regions: uint8 codes of `REGIONS` of each residue, by IMGT.
      v_identity: share of residues up to C104 that are the germline's.
    """

    start: int
    numbers: tuple[str, ...]
    regions: np.ndarray
    v_identity: float


@dataclass(frozen=True)
class Segment:
    """IMGT positions `first` to `last` and the numbers that they have in a scheme.

    Attributes:
      number: of the first position.
      without: IMGT positions without a number of their own: insertions behind the one before.
      insert_at: the number behind which residues stand that are more than there are numbers; None:
        where the alignment has them.
      gone: the order in which numbers lack where there are fewer residues; beyond it, where the
        alignment has gaps.
      last_number: of the segment.
    """

    first: int
    last: int
    number: int
    without: tuple[int, ...] = ()
    insert_at: int | None = None
    gone: tuple[int, ...] = ()
    last_number: int = 0

    @property
    def numbers(self) -> range:
        """All numbers of the segment."""
        end = self.last - self.first - len(self.without) + self.number
        return range(self.number, (self.last_number or end) + 1)


def _from(middle: int, first: int, last: int, behind_first: bool = False) -> tuple[int, ...]:
    """`middle`, the number before it, the one behind it, and so on outwards to `first`, `last`."""
    side = -0.1 if behind_first else 0.1
    return tuple(sorted(range(first, last + 1), key=lambda n: abs(n - middle + side)))


def _loop(first: int, last: int, numbers: range, insert_at: int, gone: Sequence[int]) -> Segment:
    return Segment(first, last, numbers[0], (), insert_at, tuple(gone), numbers[-1])


_H2 = _loop(55, 65, range(50, 58), 52, (52, 51, 50, 53, 54, 55, 56, 57))
_H3 = _loop(105, 117, range(93, 103), 100, (100, 99, 98, 97, 96, 95, 101, 102, 94, 93))
_L2 = Segment(57, 67, 51, without=tuple(range(58, 65)), insert_at=52)
_L3 = _loop(105, 117, range(89, 98), 95, (95, 94, 93, 92, 91, 96, 97, 90, 89))


def _heavy(fw1_insert_at: int, h1: Segment, fw2: Segment, fw3: Segment) -> tuple[Segment, ...]:
    fw1 = Segment(1, 10, 1, without=(10,), insert_at=fw1_insert_at)
    return (fw1, Segment(11, 23, 10), h1, fw2, _H2, fw3, _H3, Segment(118, 129, 103))


def _light(l1: Segment, fw3: Segment) -> tuple[Segment, ...]:
    fw1, fw2, fw4 = Segment(1, 23, 1), Segment(41, 56, 35), Segment(118, 129, 98)
    return (fw1, l1, fw2, _L2, fw3, _L3, fw4)


def _aho(*cdr1: int) -> tuple[Segment, ...]:
    """`cdr1`: numbers of CDR1 in the order in which they lack, which differs between chains."""
    return (
        Segment(1, 10, 1, insert_at=8, gone=(8,)),
        Segment(11, 24, 11),
        _loop(25, 40, range(25, 43), 36, (*cdr1, 30, 25, 31, 41, 42)),
        Segment(41, 55, 43),
        _loop(56, 75, range(58, 78), 63, (*_from(63, 58, 68), *range(69, 78))),
        _loop(76, 91, range(78, 94), 85, _from(86, 78, 93)),
        Segment(92, 104, 94),
        _loop(105, 117, range(107, 139), 123, (*_from(123, 108, 138, behind_first=True), 107)),
        Segment(118, 129, 139),
    )


_FW3_H = Segment(66, 104, 58, without=(73, 92, 93, 94))
_FW3_L = Segment(68, 104, 55, without=(73, 81, 82))
_KABAT_H = _heavy(
    6, _loop(24, 40, range(23, 36), 35, range(35, 22, -1)), Segment(41, 54, 36), _FW3_H
)
_KABAT_L = _light(_loop(24, 40, range(24, 35), 27, (*range(28, 35), *range(27, 23, -1))), _FW3_L)
_CHOTHIA_H1 = _loop(24, 38, range(23, 34), 31, (*range(31, 22, -1), 32, 33))
_CHOTHIA_H = _heavy(6, _CHOTHIA_H1, Segment(39, 54, 34), _FW3_H)
_CHOTHIA_L = _light(
    _loop(24, 40, range(24, 35), 30, (31, 32, 33, 34, *range(30, 23, -1))),
    replace(_FW3_L, insert_at=68, gone=(68,)),
)
_MARTIN_H = _heavy(
    *(8, _CHOTHIA_H1, Segment(39, 54, 34)),
    Segment(66, 104, 58, without=(73, 82, 83, 84), insert_at=72),
)
# scheme -> the segments of heavy, kappa and lambda chains, in the order of LOCI
TABLES = {
    "kabat": (_KABAT_H, _KABAT_L, _KABAT_L),
    "chothia": (_CHOTHIA_H, _CHOTHIA_L, _CHOTHIA_L),
    "martin": (_MARTIN_H, _CHOTHIA_L, _CHOTHIA_L),
    "aho": (
        _aho(28, 36, 35, 37, 34, 38, 27, 33, 39, 32, 40, 29, 26),
        _aho(28, 27, 36, 35, 37, 34, 38, 33, 39, 32, 40, 29, 26),
        _aho(28, 36, 35, 37, 34, 38, 27, 29, 33, 39, 32, 40, 26),
    ),
}


def number_chains(
    sequences: Sequence[str],
    chain: str,
    scheme: str = "imgt",
    *,
    unknown: bool = False,
    germlines: str = HUMAN,
) -> list[Numbering | str]:
    """Numbers amino-acid sequences that each hold one V domain of a chain.

    Args:
      sequences: letters; case is ignored.
      chain: "heavy" or "light".
      scheme: one of `positions.SCHEMES`.
      unknown: allow residues that are none of the 20 amino acids, such as masked ones.
      germlines: "human" or a folder (see `germline.load_germlines`).

    Returns:
      For each sequence, in order, its numbering, or the one of `align.REASONS` why it has none.
    """
    found: list[Numbering | str] = []
    for first in range(0, len(sequences), _ROWS_AT_ONCE):
        encoded = [sequence.encode() for sequence in sequences[first : first + _ROWS_AT_ONCE]]
        letters = np.frombuffer(b"".join(encoded), np.uint8)
        offsets = np.cumsum([0, *map(len, encoded)])
        domains = find_domains(letters, offsets, chain, unknown=unknown, germlines=germlines)
        regions = _regions(domains)
        for row, reason in enumerate(domains.reason.tolist()):
            if reason != ACCEPTED:
                found.append(REASONS[reason])
                continue
            here = regions[row, : domains.length[row]]
            numbers = numbers_of(domains, row, scheme)
            identity = float(domains.v_identity[row])
            found.append(Numbering(int(domains.start[row]), numbers, here, identity))
    return found


def _regions(domains: Domains) -> np.ndarray:
    """Region codes `[n, D]`; those of rows that are not accepted mean nothing."""
    n, width = domains.cdr.shape
    flat = regions_from_cdr_mask(domains.cdr.reshape(-1), np.arange(n + 1) * width)
    return flat.reshape(n, width)


def numbers_of(domains: Domains, row: int, scheme: str) -> tuple[str, ...]:
    """The numbers of an accepted row of `domains`, a string for each residue."""
    to_cdr3 = int(domains.cdr3_start[row])
    fr4 = int(domains.length[row]) - to_cdr3 - int(domains.cdr3_length[row])
    return _numbers(
        domains.imgt[row, :to_cdr3].tobytes(),
        domains.cdr[row, :to_cdr3].tobytes(),
        int(domains.cdr3_length[row]),
        fr4,
        LOCI.index(domains.v_call[row][:3]),
        scheme,
    )


@lru_cache(maxsize=65_536)  # chains of one layout have the same numbers
def _numbers(
    imgt: bytes, cdr: bytes, cdr3: int, fr4: int, locus: int, scheme: str
) -> tuple[str, ...]:
    """Numbers from IMGT positions (0: inserted) and CDR digits up to C104, and two lengths."""
    names, places = _imgt(imgt, cdr, cdr3, fr4)
    if scheme == "imgt":
        return tuple(names)
    numbers: list[str] = []
    for segment in TABLES[scheme][locus]:
        inside = [p for p in places if segment.first <= p[0] <= segment.last]
        numbers += _in_segment(segment, inside, numbers)
    return tuple(numbers)


def _imgt(imgt: bytes, cdr: bytes, cdr3: int, fr4: int) -> tuple[list[str], list[Place]]:
    """IMGT's number of each residue as text, and its place."""
    names: list[str] = []
    places: list[Place] = []
    for digit, group in groupby(range(len(cdr)), key=lambda i: cdr[i]):
        residues = list(group)
        if digit != ord("0"):
            loop = _IMGT_LOOPS[digit - ord("1")]
            names += imgt_loop(*loop, len(residues))
            places += [(_position(name), 0) for name in names[len(places) :]]
            continue
        here = _framework([imgt[i] for i in residues], places[-1][0] if places else 0)
        places += here
        names += [f"{position}{_letter(inserted)}" for position, inserted in here]
    names += imgt_loop(*_IMGT_LOOPS[2], cdr3) + [str(_FR4_START + i) for i in range(fr4)]
    places += [(_position(name), 0) for name in names[len(places) :]]
    return names, places


def _framework(positions: list[int], before: int) -> list[Place]:
    """Places of the residues of a framework; inserted ones (0) take positions that are free."""
    places: list[Place] = []
    for inserted, group in groupby(range(len(positions)), key=lambda i: not positions[i]):
        residues = list(group)
        if not inserted:
            places += [(positions[i], 0) for i in residues]
            continue
        last = places[-1][0] if places else before
        behind = positions[residues[-1] + 1] if residues[-1] + 1 < len(positions) else last + 1
        free = list(range(last + 1, behind))[: len(residues)] or [last]
        more = len(residues) - len(free) + (free == [last])
        extra = [(free[0], i) for i in range(1, more + 1)]
        places += [(p, 0) for p in free[:1] if p != last] + extra + [(p, 0) for p in free[1:]]
    return places


def imgt_loop(first: int, last: int, residues: int) -> list[str]:
    """Numbers of a CDR between two IMGT positions: gaps and insertions in the middle.

    Of an odd number the residue more stands before the gap, an insertion more behind it.
    """
    size = last - first + 1
    before, behind = (min(residues, size) + 1) // 2, min(residues, size) // 2
    more = max(residues - size, 0)
    left, right = first + before - 1, last - behind + 1
    return [
        *map(str, range(first, left + 1)),
        *(f"{left}{_letter(i)}" for i in range(1, more // 2 + 1)),
        *(f"{right}{_letter(i)}" for i in range((more + 1) // 2, 0, -1)),
        *map(str, range(right, last + 1)),
    ]


def _in_segment(segment: Segment, places: list[Place], before: list[str]) -> list[str]:
    """Numbers of the residues of a segment; `before`: those of the residues before it."""
    numbers = list(segment.numbers)
    if segment.first == 1 and places:  # residues that lack at the start are no gap of the scheme
        numbers = numbers[min(places[0][0] - 1, len(numbers)) :]
    lacking = len(numbers) - len(places)
    if lacking < 0 and segment.insert_at in numbers:
        at = numbers.index(segment.insert_at) + 1
        more = [f"{segment.insert_at}{_letter(i)}" for i in range(1, 1 - lacking)]
        return [*map(str, numbers[:at]), *more, *map(str, numbers[at:])]
    if segment.gone and 0 <= lacking <= len(segment.gone):
        return [str(n) for n in numbers if n not in segment.gone[:lacking]]
    own = [p for p in range(segment.first, segment.last + 1) if p not in segment.without]
    number_at = dict(zip(own, segment.numbers, strict=True))
    last, inserted = _position(before[-1]) if before else 0, 0
    found = []
    for position, behind in places:
        if not behind and position in number_at:
            last, inserted = number_at[position], 0
        else:
            inserted += 1
        found.append(f"{last}{_letter(inserted)}")
    return found


def _position(number: str) -> int:
    return int(number.rstrip(_LETTERS))


def _letter(count: int) -> str:
    """The letter of an insertion: "", "A", ..., "Z", "AA", "BB", ..."""
    rounds, letter = divmod(count - 1, len(_LETTERS))
    return "" if count == 0 else _LETTERS[letter] * (rounds + 1)
