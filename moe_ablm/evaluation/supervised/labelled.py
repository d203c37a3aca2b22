"""Labelled antibodies from files: annotated, each once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.annotate import annotate_batch
from moe_ablm.data.masking import mix
from moe_ablm.data.readers import open_sources
from moe_ablm.data.regions import CHAINS, regions_from_cdr_mask
from moe_ablm.data.split import record_keys
from moe_ablm.errors import UserError
from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated, Chain


def read_labelled(paths: Sequence[Path]) -> tuple[list[Annotated], list[str]]:
    """Antibodies with the label of the column `label`, cut to their V domains, in file order.

    Genes, regions and mutations are those of the file where they are there, else computed.

    Returns:
      The antibodies, and notes on rows that were left out: malformed, without annotation, seen
      before, or seen with another label.

    Raises:
      UserError: no such file, an unknown format, or no label.
    """
    found: dict[int, Annotated] = {}
    labels: dict[int, set[str]] = {}
    read = kept = 0
    for source in open_sources([str(path) for path in paths], on_bad_row="skip"):
        for batch in source.batches():
            if "label" not in batch.schema.names:
                raise UserError(
                    f"--data specificity={source.report.source}: no column label; expected the "
                    "columns h_sequence, l_sequence, label"
                )
            for antibody in _annotated(batch):
                kept += 1
                found.setdefault(antibody.key, antibody)
                labels.setdefault(antibody.key, set()).add(antibody.label)
        read += source.report.read
    certain = [a for key, a in found.items() if len(labels[key]) == 1 and a.label]
    lost = {
        "malformed or without annotation": read - kept,
        "equal to another one": kept - len(found),
        "without a label, or with several": len(found) - len(certain),
    }
    notes = [f"{n:,} of {read:,} rows are {what}: left out" for what, n in lost.items() if n]
    return certain, notes


def _annotated(batch: pa.RecordBatch) -> list[Annotated]:
    done, _ = annotate_batch(batch)
    heavy, light = (_chains(done, chain) for chain in CHAINS)
    letters = [[c.letters.encode() for c in chains] for chains in (heavy, light)]
    keys = record_keys(*letters)[0].tolist()
    names = done["sequence_id"].to_pylist() if "sequence_id" in done.schema.names else keys
    labels = (label or "" for label in done["label"].cast(pa.string()).to_pylist())
    return [
        Annotated(str(name), str(key), key, *chains, label)
        for name, key, *chains, label in zip(names, keys, heavy, light, labels, strict=True)
    ]


def _chains(batch: pa.RecordBatch, chain: str) -> list[Chain]:
    names = ("sequence_aa", "germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
    columns = [batch[f"{name}_{chain}"].to_pylist() for name in names]
    return [_chain(*values) if values[0] else NO_CHAIN for values in zip(*columns, strict=True)]


def _chain(letters: str, germline: str, cdr: str, mutated: str, v_gene: str, j_gene: str) -> Chain:
    codes = np.frombuffer(cdr.encode(), np.uint8)
    region = regions_from_cdr_mask(codes, np.array([0, len(codes)]))
    mutations = np.frombuffer(mutated.encode(), np.uint8) - np.uint8(ord("0"))
    return Chain(letters, germline, region, mutations, np.zeros_like(region), v_gene, j_gene)


def drawn(antibodies: Sequence[Annotated], most: int, seed: int) -> list[Annotated]:
    """Up to `most` of them by a hash of sequence and seed, ordered by it: no matter how the file
    is ordered, and fewer are the first of more."""
    keys = np.array([a.key for a in antibodies], np.uint64)
    with np.errstate(over="ignore"):
        order = np.argsort(mix(keys + mix(np.uint64(seed))), kind="stable")
    return [antibodies[i] for i in order[:most]]
