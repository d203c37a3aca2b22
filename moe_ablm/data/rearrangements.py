"""Annotated antibodies as AIRR rearrangements: a row for each chain, joined by `cell_id`.

Names are those of the AIRR schema 1.4 (docs.airr-community.org); what nucleotides alone tell is
left blank.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.regions import CHAINS, REGIONS, regions_from_cdr_mask

# required by the schema, and not known of proteins
_BLANK = (
    *("sequence", "d_call", "sequence_alignment", "germline_alignment", "junction"),
    *("v_cigar", "d_cigar", "j_cigar"),
)
# columns of an annotated table -> AIRR's names
_OF_CHAIN = {
    "sequence_aa": "sequence_aa",
    "germline_aa": "germline_alignment_aa",
    "cdr3_aa": "cdr3_aa",
    "v_identity_aa": "v_identity_aa",
    "nongermline_mask_aa": "nongermline_mask_aa",
    "gene_segment_mask_aa": "gene_segment_mask_aa",
    "numbers": "numbers",
}
_OF_CELL = {"cluster": "clone_id", "donor": "subject_id"} | {
    name: name for name in ("source", "label", "germlines")
}
_REGION_NAMES = ("fwr1_aa", "cdr1_aa", "fwr2_aa", "cdr2_aa", "fwr3_aa", "cdr3_aa", "fwr4_aa")


def rearrangements(batch: pa.RecordBatch, first: int = 0) -> pa.RecordBatch:
    """The chains of annotated antibodies, heavy before light: AIRR columns, then others.

    Args:
      batch: columns of an annotated table; of other columns those of `_OF_CELL` are kept.
      first: antibodies before these; one without an id has its number, from 1, instead.
    """
    ids = enumerate(batch["sequence_id"].to_pylist(), start=first + 1)
    named = pa.array([name or str(number) for number, name in ids], pa.string())
    batch = batch.set_column(batch.schema.get_field_index("sequence_id"), "sequence_id", named)
    chains = [_chains(batch, chain) for chain in CHAINS]
    both = pa.Table.from_batches(chains).combine_chunks()
    rows = np.concatenate([np.flatnonzero(_there(batch, chain)) for chain in CHAINS])
    order = np.argsort(rows, kind="stable")  # the heavy chains come first
    return both.take(pa.array(order)).to_batches()[0] if len(order) else chains[0]


def _there(batch: pa.RecordBatch, chain: str) -> np.ndarray:
    return np.asarray(pc.not_equal(batch[f"sequence_aa_{chain}"], ""), bool)


def _chains(batch: pa.RecordBatch, chain: str) -> pa.RecordBatch:
    batch = batch.filter(pa.array(_there(batch, chain)))
    blank = pa.array([""] * batch.num_rows, pa.string())
    names = batch["sequence_id"].to_pylist()
    v_gene = batch[f"v_gene_{chain}"].to_pylist()
    columns: dict[str, pa.Array] = {
        "sequence_id": pa.array([f"{name}_{chain[0].upper()}" for name in names], pa.string()),
        "cell_id": batch["sequence_id"],
        "locus": pa.array([gene[:3] for gene in v_gene], pa.string()),
    }
    for segment in "vj":
        calls = batch[f"{segment}_call_{chain}"]
        columns[f"{segment}_call"] = pc.replace_substring(calls, "|", ",")
    columns |= dict.fromkeys(_BLANK, blank)
    columns["rev_comp"] = pa.array(["F"] * batch.num_rows, pa.string())
    # a whole V domain of amino acids alone: in frame, no stop codon
    columns["productive"] = pa.array(["T"] * batch.num_rows, pa.string())
    parts = _parts(batch, chain)
    columns["junction_aa"] = pa.array(
        [c[-1:] + cdr3 + w[:1] for c, cdr3, w in zip(*(parts[i] for i in (4, 5, 6)), strict=True)],
        pa.string(),
    )
    columns |= {n: pa.array(p, pa.string()) for n, p in zip(_REGION_NAMES, parts, strict=True)}
    for name, new in _OF_CHAIN.items():
        if f"{name}_{chain}" in batch.schema.names:
            columns[new] = batch[f"{name}_{chain}"]
    columns |= {new: batch[name] for name, new in _OF_CELL.items() if name in batch.schema.names}
    return pa.record_batch(columns)


def _parts(batch: pa.RecordBatch, chain: str) -> Sequence[Sequence[str]]:
    """The seven regions of each row's chain, FR1 first."""
    sequences = batch[f"sequence_aa_{chain}"].to_pylist()
    masks = "".join(batch[f"cdr_mask_aa_{chain}"].to_pylist())
    ends = np.cumsum([0, *map(len, sequences)])
    regions = regions_from_cdr_mask(np.frombuffer(masks.encode(), np.uint8), ends)
    letters = np.array(list("".join(sequences)), "U1")
    parts = []
    for code in range(1, len(REGIONS)):
        inside = regions == code
        counts = np.concatenate([[0], np.cumsum(inside)])[ends]
        text = "".join(letters[inside].tolist())
        parts.append([text[a:b] for a, b in zip(counts[:-1], counts[1:], strict=True)])
    return parts
