"""Chains by their sequence: equal ones, different ones counted once, and those seen in training.

A held-out antibody may have a chain that a training antibody has, too: light chains often are
germline genes joined without mutation. A loss on them mixes memory with learning. Such a chain is
*seen* by a run whose own part of the training split has it; it is *elsewhere* if only the rest of
that split has it, and *novel* if no training antibody has it, whatever part a run takes: novel
chains are the same ones for runs on a quarter, half and all of a dataset.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from moe_ablm.data.masking import mix

if TYPE_CHECKING:
    from moe_ablm.data.dataset import Dataset

NOVEL, ELSEWHERE, SEEN = range(3)
_ROWS_AT_ONCE = 16_384


def hash_sequences(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Hashes of amino-acid sequences: equal for equal ones.

    The sum over the residues of a random number for each (residue, place), modulo 2^64 (Zobrist
    1970): among n different sequences two agree by chance with probability n^2 / 2^65, 3e-9 for the
    320,000 antibodies of one donor.

    Args:
      tokens: uint8 `[residues]`, sequences end to end.
      offsets: int64 `[n + 1]`, where each begins and the last one ends.

    Returns:
      uint64 `[n]`; 0 for an empty sequence.
    """
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for begin in range(0, len(hashes), _ROWS_AT_ONCE):
        ends = offsets[begin : begin + _ROWS_AT_ONCE + 1]
        place = np.arange(ends[-1] - ends[0]) - np.repeat(ends[:-1] - ends[0], np.diff(ends))
        mixed = mix(tokens[ends[0] : ends[-1]] | place.astype(np.uint64) << np.uint64(8))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        hashes[begin : begin + _ROWS_AT_ONCE] = np.diff(sums[ends - ends[0]])
    return hashes


def hash_chains(batch: pa.RecordBatch, chain: str) -> np.ndarray:
    """`hash_sequences` of a chain of stored rows (`dataset.SCHEMA`), uint64 `[rows]`."""
    tokens = batch[f"{chain}_tokens"]
    return hash_sequences(tokens.values.to_numpy(), tokens.offsets.to_numpy())


def levels(hashes: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Whether training has chains: `NOVEL`, `ELSEWHERE` or `SEEN`, uint8 `[n]`.

    Args:
      hashes: uint64 `[n]` of the chains; 0, no chain, is `NOVEL`.
      part: of the chains of the training antibodies that a run draws from, any number.
      whole: of those of all training antibodies.
    """
    there = hashes != 0
    return np.where(np.isin(hashes, part) & there, SEEN, np.isin(hashes, whole) & there).astype(
        np.uint8
    )


def whole_split(datasets: Sequence["Dataset"], chain: str) -> np.ndarray:
    """Hashes (uint64) of that chain of all training rows of some datasets."""
    return np.concatenate([d.chain_hashes[chain][d.rows("train")] for d in datasets])


def different(hashes: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """Number of different chains, and the sum of their sizes, each counted once.

    Args:
      hashes: uint64 `[n]`; 0, no chain, is left out.
      sizes: int64 `[n]`; of a chain that comes with several the largest counts.
    """
    there = hashes != 0
    values, which = np.unique(hashes[there], return_inverse=True)
    largest = np.zeros(len(values), np.int64)
    np.maximum.at(largest, which, sizes[there])
    return len(values), int(largest.sum())


def seen_places(segment: np.ndarray, of_chains: np.ndarray) -> np.ndarray:
    """Levels at every place of a batch, uint8 `[B, L]`.

    Args:
      segment: uint8 `[B, L]`, 0 padding, 1 heavy, 2 light.
      of_chains: uint8 `[B, 2]`, levels of the heavy and of the light chain of each row.
    """
    table = np.concatenate([np.zeros((len(of_chains), 1), np.uint8), of_chains], axis=1)
    return np.take_along_axis(table, segment.astype(np.int64), axis=1)
