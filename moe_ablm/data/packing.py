"""Several sequences in a row: which lengths share a row, and which sequence takes which place.

Which *lengths* share a row is decided once: the rows of an epoch are then equally many in every
epoch, so that the row of a step is known without packing all that came before. Which sequence of a
length takes which place of that length is drawn anew in every epoch. Attention is confined to each
sequence, so its neighbours in the row do not matter to it.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

MOST_IN_A_ROW = 255  # their number must fit in the uint8 array `antibody` of a batch


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of places; row r has the places `first[r]` to `first[r + 1]`.

    Attributes:
      first: int64 `[R + 1]`.
      size: int64 `[n]`, tokens of each place.
      start: int64 `[n]`, where in its row a place begins.
    """

    first: np.ndarray
    size: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


def first_fit_decreasing(sizes: np.ndarray, length: int) -> PackedRows:
    """Packs sequences into rows, the longest first, each into the first row with room.

    Filling one row after the other, each with the longest that still fits, gives the same rows
    (Johnson 1973; at most 11/9 of the fewest possible), and depends on counts of lengths only: the
    cost does not grow with the number of sequences.

    Args:
      sizes: int64 `[n]`, tokens of each sequence, from 1 to `length`.
      length: tokens of a row.
    """
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= length:
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()} in rows of {length}")
    kinds, counts = (x.tolist() for x in np.unique(sizes, return_counts=True))
    left = dict(zip(kinds, counts, strict=True))
    rows, repeats = [], []
    while kinds:
        row = _fill_row(kinds, left, length)
        times = min(left[size] // used for size, used in row)
        rows.append([size for size, used in row for _ in range(used)])
        repeats.append(times)
        for size, used in row:
            left[size] -= times * used
            if not left[size]:
                kinds.remove(size)
    return _lay_out(rows, repeats)


def _fill_row(kinds: list[int], left: dict[int, int], length: int) -> list[tuple[int, int]]:
    """Sizes and how many of each for the next row; `kinds` rises and holds those left."""
    row, places, room = [], MOST_IN_A_ROW, length
    below = len(kinds)
    while places and (below := bisect_right(kinds, room, 0, below)):
        size = kinds[below - 1]
        used = min(room // size, left[size], places)
        row.append((size, used))
        places -= used
        room -= used * size
        below -= 1
    return row


def _lay_out(rows: list[list[int]], repeats: list[int]) -> PackedRows:
    count = np.repeat([len(row) for row in rows], repeats).astype(np.int64)
    size = np.concatenate(
        [np.zeros(0, np.int64)]
        + [np.tile(np.array(row, np.int64), n) for row, n in zip(rows, repeats, strict=True)]
    )
    first = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    ends = np.cumsum(size)
    before_row = np.repeat((ends - size)[first[:-1]], count)
    return PackedRows(first, size, ends - size - before_row)


def seat(packing: PackedRows, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The sequence of each place: those of one length take the places of that length in `order`.

    Args:
      packing: made from the same sizes.
      sizes: int64 `[n]`, tokens of each sequence.
      order: int64 `[n]`, a permutation of the sequences.

    Returns:
      int64 `[n]`.
    """
    seated = np.empty(len(sizes), np.int64)
    by_size = order[np.argsort(sizes[order], kind="stable")]
    seated[np.argsort(packing.size, kind="stable")] = by_size
    return seated
