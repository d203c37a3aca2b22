"""Semi-global alignment of a chain to a germline protein: affine gaps, free ends.

parasail (Daily 2016) where it is installed. It has no wheels for ARM; there NumPy finds the same
alignments, row by row (Gotoh 1982) and slower: of several best ones the one that parasail finds, so
that annotation does not depend on the machine.
"""

from typing import Any, NamedTuple

import numpy as np

try:
    import parasail
except ImportError:  # no wheel for this machine
    parasail = None

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
OTHER = len(AMINO_ACIDS)  # code of every other letter, and of no residue at all
GAP_OPEN, GAP_EXTEND = 11, 1  # of the first residue of a gap, and of each further one
_ORDER = "ARNDCQEGHILKMFPSTWYVX"
# BLOSUM62 in half bits (Henikoff and Henikoff 1992), as NCBI distributes it
_ROWS = """
 4 -1 -2 -2  0 -1 -1  0 -2 -1 -1 -1 -1 -2 -1  1  0 -3 -2  0  0
-1  5  0 -2 -3  1  0 -2  0 -3 -2  2 -1 -3 -2 -1 -1 -3 -2 -3 -1
-2  0  6  1 -3  0  0  0  1 -3 -3  0 -2 -3 -2  1  0 -4 -2 -3 -1
-2 -2  1  6 -3  0  2 -1 -1 -3 -4 -1 -3 -3 -1  0 -1 -4 -3 -3 -1
 0 -3 -3 -3  9 -3 -4 -3 -3 -1 -1 -3 -1 -2 -3 -1 -1 -2 -2 -1 -2
-1  1  0  0 -3  5  2 -2  0 -3 -2  1  0 -3 -1  0 -1 -2 -1 -2 -1
-1  0  0  2 -4  2  5 -2  0 -3 -3  1 -2 -3 -1  0 -1 -3 -2 -2 -1
 0 -2  0 -1 -3 -2 -2  6 -2 -4 -4 -2 -3 -3 -2  0 -2 -2 -3 -3 -1
-2  0  1 -1 -3  0  0 -2  8 -3 -3 -1 -2 -1 -2 -1 -2 -2  2 -3 -1
-1 -3 -3 -3 -1 -3 -3 -4 -3  4  2 -3  1  0 -3 -2 -1 -3 -1  3 -1
-1 -2 -3 -4 -1 -2 -3 -4 -3  2  4 -2  2  0 -3 -2 -1 -2 -1  1 -1
-1  2  0 -1 -3  1  1 -2 -1 -3 -2  5 -1 -3 -1  0 -1 -3 -2 -2 -1
-1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5  0 -2 -1 -1 -1 -1  1 -1
-2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6 -4 -2 -2  1  3 -1 -1
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7 -1 -1 -4 -3 -2 -2
 1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4  1 -3 -2 -2  0
 0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5 -2 -2  0  0
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11  2 -3 -2
-2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7 -1 -1
 0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4 -1
 0 -1 -1 -1 -2 -1 -1 -1 -1 -1 -1 -1 -1 -1 -2  0  0 -2 -1 -1 -1
"""
_PLACES = [_ORDER.index(letter) for letter in AMINO_ACIDS + "X"]
# int32 `[21, 21]` by residue code
BLOSUM62 = np.array(_ROWS.split(), np.int32).reshape(len(_ORDER), -1)[np.ix_(_PLACES, _PLACES)]
_LETTERS = np.frombuffer((AMINO_ACIDS + "X").encode(), np.uint8)
_ONLY_GERMLINE, _ONLY_CHAIN = 1, 2  # operations of a cigar: I and D


class Profile(NamedTuple):
    """A germline protein, ready to be aligned.

    Attributes:
      codes: uint8 `[G]`, residue codes.
      made: parasail's profile of it; None without parasail.
    """

    codes: np.ndarray
    made: Any


def profile(codes: np.ndarray) -> Profile:
    """The profile of residue codes `[G]`, all of them amino acids."""
    if parasail is None:
        return Profile(codes, None)
    return Profile(codes, parasail.profile_create_16(_text(codes), parasail.blosum62))


def best_score(germline: Profile, chain: np.ndarray) -> tuple[int, int]:
    """Score of the best alignment, and the index in the chain of its last residue.

    Args:
      germline: G residues.
      chain: uint8 `[N]`, residue codes.
    """
    if germline.made is None:
        cells = _Cells(germline.codes, chain)
        return cells.best, cells.end[1] - 1
    hit = parasail.sg_scan_profile_16(germline.made, _text(chain), GAP_OPEN, GAP_EXTEND)
    return hit.score, hit.end_ref


def aligned_pairs(germline: Profile, chain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best alignment, as indices `[m]` of aligned residues in the germline and in the chain.

    Arguments as of `best_score`.
    """
    if germline.made is None:
        return _Cells(germline.codes, chain).pairs()
    text = _text(chain)
    result = parasail.sg_trace_striped_profile_16(germline.made, text, GAP_OPEN, GAP_EXTEND)
    cigar = np.asarray(result.cigar.seq)
    operation, counts = cigar & 15, cigar >> 4
    moves_germline = np.repeat(operation != _ONLY_CHAIN, counts)
    moves_chain = np.repeat(operation != _ONLY_GERMLINE, counts)
    both = moves_germline & moves_chain
    return np.cumsum(moves_germline)[both] - 1, np.cumsum(moves_chain)[both] - 1


def _text(codes: np.ndarray) -> str:
    return _LETTERS[codes].tobytes().decode()


class _Cells:
    """The tables of an alignment, `[G + 1, N + 1]`: row and column 0 are before the sequences.

    `total` is the best score of an alignment that ends at the cell, `down` and `right` that of one
    that ends in a gap of the chain or of the germline there.
    """

    def __init__(self, germline: np.ndarray, chain: np.ndarray):
        self.scores = BLOSUM62[np.ix_(germline, chain)]
        g, n = self.scores.shape
        self.total = np.zeros((g + 1, n + 1), np.int64)
        self.down = np.full((g + 1, n + 1), -(1 << 30), np.int64)
        self.right = np.full((g + 1, n + 1), -(1 << 30), np.int64)
        slope = GAP_EXTEND * np.arange(n + 1)
        for i in range(1, g + 1):
            above, down, right = self.total[i - 1], self.down[i], self.right[i]
            down[1:] = np.maximum(above[1:] - GAP_OPEN, self.down[i - 1, 1:] - GAP_EXTEND)
            here = self.total[i]
            here[1:] = np.maximum(above[:-1] + self.scores[i - 1], down[1:])
            # a gap of the germline that opens behind column k costs the same at every later column,
            # up to its extension: the best k is a running maximum
            opened = np.maximum.accumulate(here + slope)[:-1]
            right[1:] = opened - GAP_OPEN - slope[:-1]
            here[1:] = np.maximum(here[1:], right[1:])
        self.end = self._end()
        self.best = int(self.total[self.end])

    def _end(self) -> tuple[int, int]:
        """The cell of the best score in the last row or column."""
        last_row, last_column = self.total[-1], self.total[:, -1]
        j, i = int(last_row[1:].argmax()) + 1, int(last_column[1:].argmax()) + 1
        if last_row[j] >= last_column[i]:
            return len(last_column) - 1, j
        return i, len(last_row) - 1

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Aligned residues, as of `aligned_pairs`."""
        i, j = self.end
        aligned = []
        gap: np.ndarray | None = None  # the table of the gap that the walk is in
        while i and j:
            gap = self._gap_at(i, j) if gap is None else gap
            if gap is None:
                i, j = i - 1, j - 1
                aligned.append((i, j))
                continue
            before = (i - 1, j) if gap is self.down else (i, j - 1)
            longer = gap[before] - GAP_EXTEND == gap[i, j]  # of equal ones the longer comes first
            gap, (i, j) = gap if longer else None, before
        pairs = np.array(aligned[::-1], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _gap_at(self, i: int, j: int) -> np.ndarray | None:
        """`down` or `right` where the best alignment ends in such a gap; None: in a match.

        Of equal ones in the order match, down, right.
        """
        score = self.total[i, j]
        if self.total[i - 1, j - 1] + self.scores[i - 1, j - 1] == score:
            return None
        return self.down if self.down[i, j] == score else self.right
