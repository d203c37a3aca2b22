"""An endless seeded order of rows: epoch after epoch, every sequence once in each."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moe_ablm.data.dataset import Dataset
from moe_ablm.data.packing import first_fit_decreasing, seat
from moe_ablm.data.sequences import Sequences
from moe_ablm.data.tokenizer import Layout

_EPOCHS_KEPT = 2  # a batch may hold the end of one epoch and the start of the next


class Drawn(NamedTuple):
    """Sequences of some rows, row after row; arrays `[n]`.

    Attributes:
      row: index of the position that asked for it.
      sequence: index in the stream's sequences.
      epoch: how often the stream gave each of its sequences before.
      start: token of the row at which it begins.
    """

    row: np.ndarray
    sequence: np.ndarray
    epoch: np.ndarray
    start: np.ndarray


class Stream:
    """Rows out of sequences of one dataset, one sequence or, packed, several in a row.

    Attributes:
      dataset, sequences: what is drawn.
      size: int64 `[n]`, tokens of each sequence, at most `length` (longer ones are cropped).
      length: tokens of a row.
      rows: rows of an epoch, the same in every epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequences: Sequences,
        layout: Layout,
        length: int,
        seed: int,
        number: int = 0,
        packed: bool = False,
    ):
        """Args: the run's seed; `number` sets streams of one run apart."""
        self.dataset, self.sequences, self.length = dataset, sequences, length
        self.size = np.minimum(sequences.tokens(dataset, layout), length)
        self._seed, self._spawn = seed, (number,) if number else ()
        self._packing = first_fit_decreasing(self.size, length) if packed else None
        self.rows = len(self._packing) if packed else len(sequences)
        self._order = lru_cache(_EPOCHS_KEPT)(self._make_order)

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of an epoch in order; packed also the sequence of each place."""
        entropy = np.random.SeedSequence([self._seed, epoch], spawn_key=self._spawn)
        rng = np.random.default_rng(entropy)
        rows = rng.permutation(self.rows)
        if self._packing is None:
            return rows, None
        return rows, seat(self._packing, self.size, rng.permutation(len(self.sequences)))

    def draw(self, position: np.ndarray) -> Drawn:
        """The rows at some positions (int64 `[B]`) of the endless order."""
        epoch, within = np.divmod(position, self.rows)
        parts = []
        for e in np.unique(epoch):
            here = np.flatnonzero(epoch == e)
            rows, seated = self._order(int(e))
            parts.append(self._draw_epoch(here, rows[within[here]], seated, int(e)))
        if len(parts) == 1:
            return parts[0]
        both = Drawn(*map(np.concatenate, zip(*parts, strict=True)))
        order = np.argsort(both.row, kind="stable")
        return Drawn(*(x[order] for x in both))

    def _draw_epoch(
        self, here: np.ndarray, rows: np.ndarray, seated: np.ndarray | None, epoch: int
    ) -> Drawn:
        if seated is None:
            return Drawn(here, rows, np.full(len(rows), epoch), np.zeros(len(rows), np.int64))
        first = self._packing.first[rows]
        count = self._packing.first[rows + 1] - first
        begin = np.cumsum(count) - count
        place = np.repeat(first - begin, count) + np.arange(count.sum())
        return Drawn(
            np.repeat(here, count),
            seated[place],
            np.full(len(place), epoch),
            self._packing.start[place],
        )
