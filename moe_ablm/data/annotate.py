"""Annotation of amino-acid V domains: regions (IMGT), V and J genes, germline, mutations, CDR3.

Chains with a leader peptide or a constant region are cut to the V domain. What is no whole V
domain of the chain that it is said to be is rejected with a reason, never guessed.
"""

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from moe_ablm.data.align import ACCEPTED, REASONS
from moe_ablm.data.annotated_columns import annotate_columns, length_of
from moe_ablm.data.domains import Domains, find_domains
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError

ROWS_A_TASK = 1024  # rows that a process annotates at a time; bounds the memory


@dataclass(frozen=True)
class ChainAnnotation:
    """An annotated V domain; all per-residue strings have the length of `sequence_aa`."""

    sequence_aa: str  # the V domain alone
    germline_aa: str  # V before the CDR3 and framework 4 as in the germline, CDR3 as observed
    cdr_mask_aa: str  # "0" framework, "1", "2", "3" the CDR's number
    nongermline_mask_aa: str  # "1" where germline and sequence differ
    v_gene: str
    j_gene: str
    v_call: str  # all V genes that explain the chain equally well, joined by "|"; v_gene is first
    j_call: str
    cdr3_aa: str
    v_identity_aa: float  # share of identical residues among the aligned ones up to C104
    start: int  # index of the domain's first residue in the given sequence


@dataclass(frozen=True)
class Rejection:
    """A sequence without annotation, and why: one of `REASONS`."""

    reason: str


def annotate_chains(sequences: Sequence[str], chain: str) -> list[ChainAnnotation | Rejection]:
    """Annotates amino-acid sequences that each hold one V domain of a chain.

    Args:
      sequences: letters; case is ignored. Anything before and after the V domain is cut.
      chain: "heavy" or "light".

    Returns:
      One entry for each sequence, in order; it depends on that sequence alone.

    Raises:
      ValueError: another `chain`.
    """
    if chain not in CHAINS:
        raise ValueError(f"chain {chain!r}: expected one of {CHAINS}")
    annotations = []
    for first in range(0, len(sequences), ROWS_A_TASK):
        encoded = [sequence.encode() for sequence in sequences[first : first + ROWS_A_TASK]]
        offsets = np.cumsum([0, *map(len, encoded)])
        domains = find_domains(np.frombuffer(b"".join(encoded), np.uint8), offsets, chain)
        annotations += [_row(domains, row) for row in range(len(encoded))]
    return annotations


def _row(domains: Domains, row: int) -> ChainAnnotation | Rejection:
    if domains.reason[row] != ACCEPTED:
        return Rejection(REASONS[domains.reason[row]])
    length, first = domains.length[row], domains.cdr3_start[row]
    texts = [
        array[row, :length].tobytes().decode()
        for array in (domains.residues, domains.germline, domains.cdr, domains.mutated)
    ]
    v_call, j_call = domains.v_call[row], domains.j_call[row]
    return ChainAnnotation(
        *texts,
        v_gene=v_call.split("|")[0],
        j_gene=j_call.split("|")[0],
        v_call=v_call,
        j_call=j_call,
        cdr3_aa=texts[0][first : first + domains.cdr3_length[row]],
        v_identity_aa=float(domains.v_identity[row]),
        start=int(domains.start[row]),
    )


def annotate_batch(
    batch: pa.RecordBatch, *, reannotate: bool = False, workers: int = 1
) -> tuple[pa.RecordBatch, Counter]:
    """Annotates the chains of a batch that lack annotation.

    Values that are there are trusted: germline, masks, genes, CDR3, identity. A chain that has
    all of them passes unchanged, else the missing ones are computed, the sequence is cut to the V
    domain and the given per-residue strings with it.

    Args:
      batch: `sequence_aa_heavy` and/or `sequence_aa_light` ("" or null: no such chain), any
        columns of the annotated table, and any others, which are passed on.
      reannotate: compute what is there, too.
      workers: processes; the result does not depend on their number.

    Returns:
      The rows whose chains all have annotation, in order, and the number of the others by reason
      ("heavy: truncated_end"; a row is counted once). Both chains have all columns of
      the annotated table, `v_call_*` and `j_call_*` included.

    Raises:
      UserError: no chain's column, a column of a wrong type, or workers below 1.
    """
    done, reasons = start_annotation(batch, reannotate=reannotate, workers=workers)()
    return done, Counter(reasons[reasons != ""].tolist())


def start_annotation(
    batch: pa.RecordBatch, *, reannotate: bool = False, workers: int = 1
) -> Callable[[], tuple[pa.RecordBatch, np.ndarray]]:
    """Hands a batch to the processes and returns at once; the returned function waits for them.

    With one worker, or one task, the work is done when that function is called. Arguments, errors
    and annotated rows are those of `annotate_batch`; with them come the reasons of all rows of the
    batch (object `[rows]`, "" for an annotated one).
    """
    if workers < 1:
        raise UserError(f"annotate: {workers} workers; expected at least 1")
    if not any(f"sequence_aa_{chain}" in batch.schema.names for chain in CHAINS):
        raise UserError(
            "annotate: no column sequence_aa_heavy or sequence_aa_light; found "
            + ", ".join(batch.schema.names)
        )
    starts = range(0, max(batch.num_rows, 1), ROWS_A_TASK)
    tasks = [batch.slice(start, ROWS_A_TASK) for start in starts]
    run = map if workers == 1 or len(tasks) == 1 else _pool(workers).map
    parts = run(_annotate_rows, tasks, [reannotate] * len(tasks))

    def finish() -> tuple[pa.RecordBatch, np.ndarray]:
        done, reasons = zip(*parts, strict=True)
        return pa.concat_batches(done), np.concatenate(reasons)

    return finish


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy the locks of pyarrow's (and, in a test, jax's) threads
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """Ends this worker when the process that started it is killed, which the pool does not see."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _annotate_rows(batch: pa.RecordBatch, reannotate: bool) -> tuple[pa.RecordBatch, np.ndarray]:
    columns: dict[str, pa.Array] = {}
    reason = np.full(batch.num_rows, "", object)
    empty = np.ones(batch.num_rows, bool)
    for chain in CHAINS:
        found, faults = annotate_columns(batch, chain, reannotate=reannotate)
        columns |= {f"{name}_{chain}": array for name, array in found.items()}
        here = (reason == "") & (faults != "")
        reason[here] = [f"{chain}: {fault}" for fault in faults[here]]
        empty &= length_of(found["sequence_aa"]) == 0
    empty &= reason == ""
    reason[empty] = "no_sequence"
    passed = {n: batch[n] for n in batch.schema.names if n not in columns}
    first = {n: passed.pop(n) for n in ("sequence_id",) if n in passed}
    done = pa.record_batch(first | columns | passed)
    accepted = reason == ""
    return done if accepted.all() else done.filter(pa.array(accepted)), reason
