"""Batches through grain; the batch of a step is a pure function of (seed, step).

The element of the grain dataset is a whole batch: a random-access source whose item t is the batch
of step t, gathered from the memory map and masked in a handful of numpy calls. The iterator's
state is then the step alone, so resuming is exact and does not depend on the number of hosts.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from moe_ablm.data.assemble import Batch, Masking, Placed, assemble
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import extents, mix
from moe_ablm.data.mixture import Mixture
from moe_ablm.data.sequences import Sequences
from moe_ablm.data.tokenizer import LAYOUTS, PAD


class TrainBatches(grain.sources.RandomAccessDataSource):
    """Random-access source whose item t is this process's part of the batch of step t.

    Epochs follow each other without a gap: a batch may hold the end of one and the start of the
    next, so no record is left out, whatever the batch size.
    """

    def __init__(self, mixture: Mixture, masking: Masking, process: tuple[int, int] = (0, 1)):
        """Args: the rows of each step; masks; process (index, count), where count divides B."""
        self._mixture, self._masking = mixture, masking
        self._layout = LAYOUTS[mixture.batching.layout]
        self._datasets = list({id(s.dataset): s.dataset for s in mixture.streams}.values())
        self._number = [
            next(i for i, d in enumerate(self._datasets) if d is s.dataset) for s in mixture.streams
        ]
        index, count = process
        part = mixture.batching.rows // count
        self._mine = slice(index * part, (index + 1) * part)

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, step: int) -> Batch:
        stream, position = (x[self._mine] for x in self._mixture.rows(step))
        numbers = np.unique(stream)
        length = self._mixture.streams[numbers[0]].length  # the same for all streams of a step
        parts = [
            self._place(number, np.flatnonzero(stream == number), position, length)
            for number in numbers
        ]
        placed = parts[0]
        if len(parts) > 1:
            placed = Placed(*map(np.concatenate, zip(*parts, strict=True)))
            placed = Placed(*(x[np.argsort(placed.start)] for x in placed))
        shape = len(stream), length
        return assemble(self._datasets, placed, shape, self._layout, self._masking)

    def _place(self, number: int, rows: np.ndarray, position: np.ndarray, length: int) -> Placed:
        """The sequences of one stream that go to some rows of the batch."""
        stream = self._mixture.streams[number]
        drawn = stream.draw(position[rows])
        sequences = stream.sequences
        return Placed(
            dataset=np.full(len(drawn.row), self._number[number]),
            heavy=sequences.heavy[drawn.sequence],
            light=sequences.light[drawn.sequence],
            key=sequences.key[drawn.sequence],
            epoch=drawn.epoch,
            start=rows[drawn.row] * length + drawn.start,
            size=stream.size[drawn.sequence],
            number=_count_up(drawn.row),
        )

    def __repr__(self) -> str:
        paths = ", ".join(str(d.path) for d in self._datasets)
        return f"TrainBatches({paths}, {self._mixture.batching}, {self._masking})"


def _count_up(row: np.ndarray) -> np.ndarray:
    """1, 2, ... within each run of equal numbers `[n]`."""
    first = np.flatnonzero(np.diff(row, prepend=-1))
    return np.arange(1, len(row) + 1) - np.repeat(first, extents(first, len(row)))


def train_iterator(source: TrainBatches, first_step: int, threads: int = 2) -> Iterator[Batch]:
    """Batches of steps `first_step`, `first_step + 1`, ... prefetched by grain's threads."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    if first_step:
        grain.experimental.set_next_index(iterator, first_step)
    return iterator


def evaluation_sample(sequences: Sequences, count: int) -> Sequences:
    """A fixed sample of at most `count` sequences: those with the smallest hashed keys.

    Adding records to the dataset changes the sample only where a new key is among the smallest.
    """
    order = np.argsort(mix(sequences.key), kind="stable")
    return sequences.take(order[:count])


def evaluation_batches(
    samples: Sequence[tuple[Dataset, Sequences]],
    shape: tuple[int, int],
    layout: str,
    masking: Masking,
) -> Iterator[Batch]:
    """The sequences in order, one a row, in batches of one shape; the last is filled up.

    Masks are those of epoch 0 under `masking.seed`: the same at every call.

    Args:
      samples: sequences of each dataset; longer single chains are cropped.
      shape: rows B and tokens L of a batch.
      layout: name of the layout.
      masking: how residues are masked.
    """
    datasets = [dataset for dataset, _ in samples]
    tokens = [s.tokens(dataset, LAYOUTS[layout]) for dataset, s in samples]
    number = np.repeat(np.arange(len(samples)), [len(s) for _, s in samples])
    heavy, light, key = (
        np.concatenate([getattr(s, name) for _, s in samples]) for name in ("heavy", "light", "key")
    )
    size = np.minimum(np.concatenate(tokens), shape[1])
    for begin in range(0, len(key), shape[0]):
        part = slice(begin, begin + shape[0])
        rows = len(key[part])
        placed = Placed(
            dataset=number[part],
            heavy=heavy[part],
            light=light[part],
            key=key[part],
            epoch=np.zeros(rows, np.int64),
            start=np.arange(rows) * shape[1],
            size=size[part],
            number=np.ones(rows, np.int64),
        )
        batch = assemble(datasets, placed, (rows, shape[1]), LAYOUTS[layout], masking)
        missing = (0, shape[0] - rows), (0, 0)
        empty = {"tokens": PAD, "targets": PAD}
        yield {n: np.pad(a, missing, constant_values=empty.get(n, 0)) for n, a in batch.items()}
