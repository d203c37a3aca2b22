"""The sequences of a dataset as a model sees them: stored pairs, single chains, re-paired pairs."""

from dataclasses import dataclass

import numpy as np

from moe_ablm.data.antibody import row_sizes
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import mix
from moe_ablm.data.regions import CDR3, CHAINS
from moe_ablm.data.tokenizer import Layout
from moe_ablm.errors import UserError

NONE = -1
_ROWS_AT_ONCE = 16_384
_SAMPLED = 4_096
_LIGHT_SALT = np.uint64(0xA0761D6478BD642F)
_HEAVY_SALT = np.uint64(0xE7037ED1A0B428DB)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of one dataset; arrays `[n]`.

    Attributes:
      heavy, light: int64 rows of the dataset that give the chains; `NONE` for no such chain.
      key: uint64, identity of each sequence: masks and crops are drawn from it.
    """

    heavy: np.ndarray
    light: np.ndarray
    key: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def take(self, index: np.ndarray) -> "Sequences":
        """Some of the sequences."""
        return Sequences(self.heavy[index], self.light[index], self.key[index])

    def residues(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Residues of the heavy and of the light chain, int64 `[n]` each."""
        chains = zip(CHAINS, (self.heavy, self.light), strict=True)
        heavy, light = (np.where(r == NONE, 0, dataset.lengths[c][r]) for c, r in chains)
        return heavy, light

    def tokens(self, dataset: Dataset, layout: Layout) -> np.ndarray:
        """Tokens of each sequence in a layout, special ones included, int64 `[n]`."""
        return row_sizes(*self.residues(dataset), layout)


def stored(dataset: Dataset, rows: np.ndarray) -> Sequences:
    """Records as they are: pairs, and single chains where only one is stored."""
    heavy, light = (np.where(dataset.lengths[c][rows] > 0, rows, NONE) for c in CHAINS)
    return Sequences(heavy, light, dataset.key[rows])


def pairs(dataset: Dataset, rows: np.ndarray) -> Sequences:
    """Records that have both chains."""
    return stored(dataset, _with_both(dataset, rows))


def chains(dataset: Dataset, rows: np.ndarray) -> Sequences:
    """Each chain alone: all heavy chains, then all light chains."""
    heavy, light = (rows[dataset.lengths[c][rows] > 0] for c in CHAINS)
    key = np.concatenate(
        [mix(dataset.key[heavy] ^ _HEAVY_SALT), mix(dataset.key[light] ^ _LIGHT_SALT)]
    )
    return Sequences(
        np.concatenate([heavy, np.full(len(light), NONE)]),
        np.concatenate([np.full(len(heavy), NONE), light]),
        key,
    )


def repaired(dataset: Dataset, rows: np.ndarray, seed: int) -> tuple[Sequences, int, int]:
    """Records with the light chains of pairs dealt out again among them; single chains as stored.

    No pair of the result is a native pair of `rows`, as sequences and not only as records: where
    the draw meets one by coincidence (light chains are often shared) it is drawn again. That fails
    only where too few different light chains exist.

    Returns:
      The sequences, the number of coincidences that were drawn again, and of those that remain.
    """
    both = _with_both(dataset, rows)
    if len(both) < 2:
        raise UserError(
            f"dataset {dataset.path}: config.data.regime='shuffled' needs at least two antibodies "
            f"with both chains in a split, found {len(both)}"
        )
    partner, met, left = _deal(
        dataset.chain_hashes["heavy"][both],
        dataset.chain_hashes["light"][both],
        np.random.default_rng(np.random.SeedSequence([seed, 0x5EA1])),
    )
    single = stored(dataset, np.setdiff1d(rows, both, assume_unique=True))
    return (
        Sequences(
            np.concatenate([both, single.heavy]),
            np.concatenate([both[partner], single.light]),
            np.concatenate([dataset.key[both], single.key]),
        ),
        met,
        left,
    )


def _with_both(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    return rows[(dataset.lengths["heavy"][rows] > 0) & (dataset.lengths["light"][rows] > 0)]


def _deal(
    heavy: np.ndarray, light: np.ndarray, rng: np.random.Generator, rounds: int = 64
) -> tuple[np.ndarray, int, int]:
    """Partner `[n]` of each heavy chain among the light ones, from hashes of both `[n]`."""
    n = len(heavy)
    native = np.unique(mix(heavy ^ mix(light)))
    ring = rng.permutation(n)
    partner = np.empty(n, np.int64)
    partner[ring] = np.roll(ring, -1)  # one cycle through all: no record keeps its own

    def is_native(at: np.ndarray, its: np.ndarray) -> np.ndarray:
        pair = mix(heavy[at] ^ mix(light[its]))
        return native[np.minimum(np.searchsorted(native, pair), len(native) - 1)] == pair

    wrong = np.flatnonzero(is_native(np.arange(n), partner))
    met = len(wrong)
    for _ in range(rounds):
        if len(wrong) == 0:
            break
        # swaps with distinct others that are right, kept where both sides come out right
        other = rng.choice(n, min(2 * len(wrong), n), replace=False, shuffle=True)
        other = other[~np.isin(other, wrong)][: len(wrong)]
        mine = wrong[: len(other)]
        good = ~is_native(mine, partner[other]) & ~is_native(other, partner[mine])
        mine, other = mine[good], other[good]
        partner[mine], partner[other] = partner[other], partner[mine]
        wrong = rng.permutation(np.setdiff1d(wrong, mine, assume_unique=True))
    return partner, met, len(wrong)


def fitting(
    dataset: Dataset, sequences: Sequences, layout: Layout, length: int
) -> tuple[Sequences, int]:
    """Sequences that can be shown in `length` tokens, and how many cannot.

    A single chain without annotation, a general protein, fits always: it is cropped.
    """
    long = np.flatnonzero(sequences.tokens(dataset, layout) > length)
    single = long[(sequences.heavy[long] == NONE) | (sequences.light[long] == NONE)]
    cropped = single[_is_protein(dataset, sequences.take(single))]
    drop = np.setdiff1d(long, cropped, assume_unique=True)
    keep = np.ones(len(sequences), bool)
    keep[drop] = False
    return (sequences.take(keep), len(drop)) if len(drop) else (sequences, 0)


def _is_protein(dataset: Dataset, single: Sequences) -> np.ndarray:
    """Whether the one chain of each sequence has no region (see `regions_from_cdr_mask`)."""
    protein = np.zeros(len(single), bool)
    for chain, rows in zip(CHAINS, (single.heavy, single.light), strict=True):
        mine = np.flatnonzero(rows != NONE)
        for begin in range(0, len(mine), _ROWS_AT_ONCE):
            part = mine[begin : begin + _ROWS_AT_ONCE]
            size = dataset.lengths[chain][rows[part]]
            region = dataset.gather(rows[part], chain, ("region",))["region"]
            protein[part] = region[np.cumsum(size) - size] == 0
    return protein


def has_cdr3(dataset: Dataset, sequences: Sequences) -> bool:
    """Whether any of the first sequences has an annotated CDR3."""
    return _any(dataset, sequences, "region", CDR3)


def has_mutations(dataset: Dataset, sequences: Sequences) -> bool:
    """Whether any of the first sequences has a residue marked as not germline."""
    return _any(dataset, sequences, "mutated", 1)


def _any(dataset: Dataset, sequences: Sequences, column: str, code: int) -> bool:
    for chain, rows in zip(CHAINS, (sequences.heavy, sequences.light), strict=True):
        some = rows[rows != NONE][:_SAMPLED]
        if (dataset.gather(some, chain, (column,))[column] == code).any():
            return True
    return False
