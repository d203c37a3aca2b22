"""Batches out of a dataset, through grain; the batch of a step is a pure function of (seed, step).

The element of the grain dataset is a whole batch: a random-access source whose item t is the batch
of step t, gathered from the memory map and masked in a handful of numpy calls. The iterator's
state is then the step alone, so resuming is exact and does not depend on the number of hosts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import grain
import numpy as np

from moe_ablm.data import masking
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import LAYOUTS, PAD, Layout, is_amino_acid
from moe_ablm.errors import UserError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class BatchSpec:
    """What a batch looks like: `batch` rows of `length` tokens in a named layout."""

    batch: int
    length: int
    layout: str
    mask_rate: float
    seed: int


def row_tokens(dataset: Dataset, rows: np.ndarray, layout: str) -> np.ndarray:
    """Tokens that each of `rows` takes in a layout, special tokens included, int64 `[n]`."""
    ids = LAYOUTS[layout]
    lengths = [dataset.lengths[chain][rows] for chain in CHAINS]
    pair = (lengths[0] > 0) & (lengths[1] > 0)
    return sum(lengths) + len(ids.before) + len(ids.after) + pair * len(ids.between)


def fitting_rows(dataset: Dataset, split: str, fraction: str, spec: BatchSpec) -> np.ndarray:
    """Row numbers of a split and fraction that fit in `spec.length`; never empty."""
    rows = dataset.rows(split, fraction)
    kept = rows[row_tokens(dataset, rows, spec.layout) <= spec.length]
    if len(kept) == 0:
        raise UserError(
            f"dataset {dataset.path}: split {split!r}, fraction {fraction!r} has {len(rows)} "
            f"antibodies, none of which fits in data.length={spec.length}: raise it or prepare "
            "more data"
        )
    return kept


def assemble(dataset: Dataset, rows: np.ndarray, length: int, layout: Layout) -> Batch:
    """Rows as padded arrays, before masking.

    Args:
      dataset: where the rows live.
      rows: int64 `[B]` row numbers; each fits in `length` (see `fitting_rows`).
      length: L.
      layout: special tokens around the chains.

    Returns:
      `tokens`, `segment` (0 pad, 1 heavy, 2 light; a special token belongs to the chain before it,
      `<cls>` to the first) and `region` (codes of `data.regions`, 0 for special tokens), uint8
      `[B, L]`.
    """
    b = len(rows)
    tokens = np.full((b, length), PAD, np.uint8)
    segment = np.zeros((b, length), np.uint8)
    region = np.zeros((b, length), np.uint8)
    row = np.arange(b)
    has = {chain: dataset.lengths[chain][rows] > 0 for chain in CHAINS}
    at = np.zeros(b, np.int64)

    def special(ids: tuple[int, ...], where: np.ndarray, chain: np.ndarray) -> None:
        nonlocal at
        for token in ids:
            tokens[row[where], at[where]] = token
            segment[row[where], at[where]] = chain[where]
            at = at + where

    first = np.where(has["heavy"], 1, 2)
    last = np.where(has["light"], 2, 1)
    special(layout.before, np.ones(b, bool), first)
    for code, chain in enumerate(CHAINS, start=1):
        size = dataset.lengths[chain][rows]
        values = dataset.gather(rows, chain, ("tokens", "region"))
        ends = np.cumsum(size)
        target = np.arange(ends[-1]) + np.repeat(row * length + at - (ends - size), size)
        tokens.reshape(-1)[target] = values["tokens"]
        segment.reshape(-1)[target] = code
        region.reshape(-1)[target] = values["region"]
        at = at + size
        if chain == "heavy":
            special(layout.between, has["heavy"] & has["light"], np.ones(b, np.uint8))
    special(layout.after, np.ones(b, bool), last)
    return {"tokens": tokens, "segment": segment, "region": region}


def masked_batch(dataset: Dataset, rows: np.ndarray, epoch: np.ndarray, spec: BatchSpec) -> Batch:
    """The batch of some rows as the model takes it.

    Args:
      dataset: where the rows live.
      rows: int64 `[B]`.
      epoch: int64 `[B]`, how often each record was drawn before.
      spec: its `seed` selects the masks.

    Returns:
      `tokens` (corrupted), `targets`, `segment`, `region` uint8 and `loss_mask` bool, all `[B, L]`.
    """
    layout = LAYOUTS[spec.layout]
    batch = assemble(dataset, rows, spec.length, layout)
    targets = batch["tokens"]
    residue = is_amino_acid(targets)
    rate = np.where(residue, np.float32(spec.mask_rate), np.float32(0))
    bits = masking.draw(spec.seed, dataset.key[rows], epoch, spec.length)
    tokens, loss_mask = masking.mask_tokens(targets, rate, bits)
    return batch | {"tokens": tokens, "targets": targets, "loss_mask": loss_mask}


@lru_cache(maxsize=3)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(n)


class TrainBatches(grain.sources.RandomAccessDataSource):
    """Random-access source whose item t is this process's part of the batch of step t.

    Epochs follow each other without a gap: a batch may hold the end of one and the start of the
    next, so no record is left out, whatever the batch size.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        spec: BatchSpec,
        steps: int,
        process: tuple[int, int] = (0, 1),
    ):
        """Args: rows to draw from; steps of the run; process (index, count), which divides B."""
        self._dataset, self._rows, self._spec, self._steps = dataset, rows, spec, steps
        index, count = process
        part = spec.batch // count
        self._slice = np.arange(index * part, (index + 1) * part)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        position = step * self._spec.batch + self._slice
        epoch, within = np.divmod(position, len(self._rows))
        rows = np.empty_like(position)
        for e in np.unique(epoch):
            here = epoch == e
            order = _permutation(self._spec.seed, int(e), len(self._rows))
            rows[here] = self._rows[order[within[here]]]
        return masked_batch(self._dataset, rows, epoch, self._spec)

    def __repr__(self) -> str:
        return f"TrainBatches({self._dataset.path}, {self._spec})"


def train_iterator(source: TrainBatches, first_step: int, threads: int = 2) -> Iterator[Batch]:
    """Batches of steps `first_step`, `first_step + 1`, ... prefetched by grain's threads."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    if first_step:
        grain.experimental.set_next_index(iterator, first_step)
    return iterator


def evaluation_rows(dataset: Dataset, rows: np.ndarray, count: int) -> np.ndarray:
    """A fixed sample of `count` of `rows`: those with the smallest hashed keys.

    Adding records to the dataset changes the sample only where a new key is among the smallest.
    """
    order = np.argsort(masking.mix(dataset.key[rows]), kind="stable")
    return rows[order[:count]]


def evaluation_batches(dataset: Dataset, rows: np.ndarray, spec: BatchSpec) -> Iterator[Batch]:
    """The rows in order, in batches of one shape; the last is filled up with empty rows.

    Masks are those of epoch 0 under `spec.seed`: the same at every call.
    """
    for start in range(0, len(rows), spec.batch):
        part = rows[start : start + spec.batch]
        batch = masked_batch(dataset, part, np.zeros(len(part), np.int64), spec)
        missing = spec.batch - len(part)
        fill = {"tokens": PAD, "targets": PAD}
        yield {
            name: np.pad(array, ((0, missing), (0, 0)), constant_values=fill.get(name, 0))
            for name, array in batch.items()
        }
