"""What decides where a row goes: its clonal group, its donor, its cluster label."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import split as splits
from moe_ablm.data import tokenizer
from moe_ablm.data.dataset import flat
from moe_ablm.data.readers.check import place_of
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CDR3, CHAINS
from moe_ablm.errors import UserError


def as_ascii(strings: pa.Array) -> list[bytes]:
    """A string array as a list of bytes."""
    values, offsets = flat(strings)
    text = values.tobytes()
    ends = offsets.tolist()
    return [text[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def clonal_groups(
    stored: pa.RecordBatch, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Group and member hashes (uint64 `[rows]`) and CDRH3s of stored rows.

    A light chain alone has no CDRH3: its group is V gene, J gene and CDRL3. What is not annotated
    (general proteins) is a group of its own, named by its sequence.
    """
    heavy, light = (_cdr3(stored, chain) for chain in CHAINS)
    genes = [stored[f"{c}_{g}_gene"].to_pylist() for c in CHAINS for g in "vj"]
    group = splits.group_hashes(genes[0], genes[1], np.array([len(c) for c in heavy], np.int64))
    for i, (hv, lv) in enumerate(zip(genes[0], genes[2], strict=True)):
        if not hv:
            own = f"{lv}|{genes[3][i]}|{light[i].decode()}" if lv else f"record {key[i]}"
            group[i], heavy[i] = splits.hash64(own), b""
    member = np.array(
        [splits.hash64(f"{g}|{c.decode()}") for g, c in zip(group.tolist(), heavy, strict=True)],
        np.uint64,
    )
    return group, member, heavy


def _cdr3(stored: pa.RecordBatch, chain: str) -> list[bytes]:
    tokens, region = stored[f"{chain}_tokens"], stored[f"{chain}_region"]
    inside = np.asarray(region.values) == CDR3
    offsets = np.concatenate([[0], np.cumsum(inside)])[np.asarray(region.offsets)].tolist()
    letters = tokenizer.decode(np.asarray(tokens.values)[inside]).encode()
    return [letters[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def donor_draws(
    batch: pa.RecordBatch, report: Report, valid_donors: Sequence[str], test_donors: Sequence[str]
) -> np.ndarray:
    """What decides a donor-wise split (uint64 `[rows]`, for `split.split_of`).

    It is the hash of the row's donor; where donors are named for a split, they go there and all
    others to train.

    Raises:
      UserError: a row without donor.
    """
    names = batch["donor"].to_pylist() if "donor" in batch.schema.names else [""] * batch.num_rows
    if not all(names):
        raise UserError(
            f"{report.source}: {place_of(batch, names.index(''))}: no donor, which --split donor "
            "needs; add a column `donor`, or name it with --columns donor=COLUMN"
        )
    train, valid, test = (int((share - 0.01) * 2**64) for share in splits.SHARES)
    named = dict.fromkeys(valid_donors, valid) | dict.fromkeys(test_donors, test)
    other = (lambda name: train) if named else splits.hash64
    return np.array([named[n] if n in named else other(n) for n in names], np.uint64)


def is_labelled(batch: pa.RecordBatch) -> bool:
    """Whether every row has a cluster of its source's making."""
    if "cluster" not in batch.schema.names:
        return False
    column = batch["cluster"]
    return column.null_count == 0 and not pc.any(pc.equal(column.cast(pa.string()), "")).as_py()


def label_numbers(column: pa.Array) -> np.ndarray:
    """Cluster labels as int64: integers stay what they are, other text becomes a hash."""

    def number(text: str) -> int:
        if text.isdecimal() and len(text) <= 18 and str(int(text)) == text:
            return int(text)
        return splits.hash64(text, b"ablm-label") >> 1

    encoded = column.cast(pa.string()).dictionary_encode()
    values = np.array([number(v) for v in encoded.dictionary.to_pylist()], np.int64)
    return values[encoded.indices.to_numpy()]
