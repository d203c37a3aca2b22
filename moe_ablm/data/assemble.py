"""From sequences with places in a batch to its arrays: tokens, chains, regions and masks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_ablm.data import masking
from moe_ablm.data.antibody import row_sizes, write_special_tokens
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import MaskPolicy
from moe_ablm.data.regions import CDR3, CHAINS
from moe_ablm.data.sequences import NONE
from moe_ablm.data.tokenizer import PAD, Layout, is_amino_acid

Batch = dict[str, np.ndarray]
_CROP_SALT = np.uint64(0x8BB84B93962EACC9)
_CHAIN_SALT = np.uint64(0x589965CC75374CC3)


class Placed(NamedTuple):
    """Sequences with their places in a batch of B rows of L tokens; arrays `[n]`.

    Attributes:
      dataset: index of the dataset.
      heavy, light: its rows that give the chains, `sequences.NONE` for none.
      key: uint64, identity of the sequence.
      epoch: how often it was drawn before.
      start: its first place of the B * L ones, rising from 0.
      size: its tokens; a single chain that is longer is cropped.
      number: 1, 2, ... within its row.
    """

    dataset: np.ndarray
    heavy: np.ndarray
    light: np.ndarray
    key: np.ndarray
    epoch: np.ndarray
    start: np.ndarray
    size: np.ndarray
    number: np.ndarray


class Masking(NamedTuple):
    """How residues are masked: the policy, the mean rate, and the seed of the draws."""

    policy: MaskPolicy
    mean: float
    seed: int


def assemble(
    datasets: Sequence[Dataset],
    placed: Placed,
    shape: tuple[int, int],
    layout: Layout,
    masking_of: Masking,
) -> Batch:
    """The batch as the model takes it.

    Args:
      datasets: those that `placed.dataset` counts.
      placed: the sequences.
      shape: rows B and tokens L of each.
      layout: special tokens around the chains.
      masking_of: how residues are selected and replaced.

    Returns:
      Arrays `[B, L]`: `tokens` (corrupted) and `targets` uint8; `loss_mask` bool, the selected
      places; `segment` uint8, 0 padding, 1 heavy, 2 light (a special token belongs to the chain
      before it, the first to the first chain); `region` uint8, codes of `data.regions`, 0 for
      special tokens; `antibody` uint8, 0 padding, else the number of the sequence within its row;
      `position` uint16, place within the sequence, 0 for padding.
    """
    count, skip = _shown(datasets, placed, layout, masking_of.seed)
    preference = masking_of.policy.kind
    columns = ("tokens", "region") + (("mutated",) if preference == "nongermline" else ())
    places = shape[0] * shape[1]
    arrays = {c: np.zeros(places, np.uint8) for c in columns}
    arrays["tokens"].fill(PAD)
    first = write_special_tokens(
        arrays["tokens"], placed.start, count["heavy"], count["light"], layout
    )
    chains = _Chains(count, skip, dict(zip(CHAINS, first, strict=True)))
    _copy_residues(datasets, placed, chains, arrays)
    targets = arrays["tokens"]
    preferred = {
        "cdr3": lambda: arrays["region"] == CDR3,
        "nongermline": lambda: arrays["mutated"] == 1,
    }.get(preference, lambda: None)()
    tokens, loss_mask = _mask(targets, preferred, placed, chains, masking_of)
    batch = {"tokens": tokens, "targets": targets, "loss_mask": loss_mask}
    batch |= _numbering(placed, chains, places) | {"region": arrays["region"]}
    return {name: array.reshape(shape) for name, array in batch.items()}


class _Chains(NamedTuple):
    """Where the chains of each sequence go; `{chain: int64 [n]}`.

    Attributes:
      shown: residues in the batch.
      skip: residues before them that a crop leaves out.
      at: place of the first in the batch.
    """

    shown: dict[str, np.ndarray]
    skip: dict[str, np.ndarray]
    at: dict[str, np.ndarray]


def _shown(
    datasets: Sequence[Dataset], placed: Placed, layout: Layout, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Residues of each chain that fit, and those that a crop leaves out before them."""
    rows = {"heavy": placed.heavy, "light": placed.light}
    count = {chain: _lengths(datasets, placed.dataset, chain, r) for chain, r in rows.items()}
    excess = row_sizes(count["heavy"], count["light"], layout) - placed.size
    skip = {chain: np.zeros(len(excess), np.int64) for chain in CHAINS}
    long = np.flatnonzero(excess > 0)
    if len(long):
        bits = masking.record_bits(seed, placed.key[long] ^ _CROP_SALT, placed.epoch[long])
        draw = (bits >> np.uint64(32)).astype(np.int64)
        for chain in CHAINS:
            mine = count[chain][long] > 0
            at = long[mine]
            skip[chain][at] = draw[mine] * (excess[at] + 1) >> 32
            count[chain][at] -= excess[at]
    return count, skip


def _lengths(
    datasets: Sequence[Dataset], dataset: np.ndarray, chain: str, rows: np.ndarray
) -> np.ndarray:
    if len(datasets) == 1:
        lengths = datasets[0].lengths[chain][rows]
    else:
        lengths = np.zeros(len(rows), np.int64)
        for number in np.unique(dataset):
            mine = dataset == number
            lengths[mine] = datasets[number].lengths[chain][rows[mine]]
    return np.where(rows == NONE, 0, lengths)


def _copy_residues(
    datasets: Sequence[Dataset], placed: Placed, chains: _Chains, arrays: dict[str, np.ndarray]
) -> None:
    for chain, rows in (("heavy", placed.heavy), ("light", placed.light)):
        for number, dataset in enumerate(datasets):
            mine = np.flatnonzero((chains.shown[chain] > 0) & (placed.dataset == number))
            dataset.copy_residues(
                chain,
                rows[mine],
                arrays,
                at=chains.at[chain][mine],
                skip=chains.skip[chain][mine],
                count=chains.shown[chain][mine],
            )


def _numbering(placed: Placed, chains: _Chains, places: int) -> Batch:
    """`segment`, `antibody` and `position`."""
    whole = masking.extents(placed.start, places)
    # tokens before the light chain belong to the heavy one, all where there is no light chain
    heavy, light = chains.shown["heavy"], chains.shown["light"]
    first = np.where(light > 0, (chains.at["light"] - placed.start) * (heavy > 0), placed.size)
    runs = np.stack([first, placed.size - first, whole - placed.size], 1)
    segment = np.repeat(np.tile(np.array([1, 2, 0], np.uint8), len(first)), runs.ravel())
    number = np.stack([placed.number, np.zeros_like(placed.number)], 1).astype(np.uint8)
    antibody = np.repeat(number.ravel(), np.stack([placed.size, runs[:, 2]], 1).ravel())
    # modulo 2^16: rows are shorter than that
    position = np.arange(places, dtype=np.uint32).astype(np.uint16)
    position -= np.repeat(placed.start.astype(np.uint16), whole)
    position *= antibody > 0
    return {"segment": segment, "antibody": antibody, "position": position}


def _mask(
    targets: np.ndarray,
    preferred: np.ndarray | None,
    placed: Placed,
    chains: _Chains,
    masking_of: Masking,
) -> tuple[np.ndarray, np.ndarray]:
    residue = is_amino_acid(targets)
    record = masking.record_bits(masking_of.seed, placed.key, placed.epoch)
    bits = masking.position_bits(record, placed.start, len(targets))
    if masking_of.policy.kind == "span":
        selected = _spans(record, chains, masking_of.mean, len(targets))
        rate = np.ones(1, np.float32)
    else:
        rates = masking.record_rates(
            masking_of.policy, masking_of.mean, residue, preferred, placed.start
        )
        selected, rate = masking.select(bits, residue, rates, placed.start)
    return masking.corrupt(targets, selected, bits, rate), selected


def _spans(record: np.ndarray, chains: _Chains, mean: float, places: int) -> np.ndarray:
    parts = []
    for number, chain in enumerate(CHAINS):
        mine = chains.shown[chain] > 0
        salted = record[mine] ^ _CHAIN_SALT * np.uint64(number)
        parts.append((salted, chains.shown[chain][mine], chains.at[chain][mine]))
    bits, count, at = (np.concatenate(part) for part in zip(*parts, strict=True))
    covered, of = masking.select_spans(bits, count, mean)
    place = np.arange(len(of)) + (at - (np.cumsum(count) - count))[of]
    selected = np.zeros(places, bool)
    selected[place[covered]] = True
    return selected
