"""Annotation of amino-acid V domains: regions (IMGT), V and J genes, germline, mutations, CDR3.

Chains with a leader peptide or a constant region are cut to the V domain. What is no whole V
domain of the chain that it is said to be is rejected with a reason, never guessed.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.process import BaseProcess

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import tokenizer
from moe_ablm.data.align import ACCEPTED, REASONS
from moe_ablm.data.best_germlines import best_fitting
from moe_ablm.data.dataset import flat
from moe_ablm.data.domains import Domains, find_domains
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError

ROWS_A_TASK = 1024  # rows that a process annotates at a time; bounds the memory

# A chain that has these is not annotated again; its CDR3 and its identity follow from them.
NEEDED = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
CALLS = ("v_call", "j_call")
SEGMENTS = "gene_segment_mask_aa"  # kept where it is there, never computed
RESIDUE_COLUMNS = (*NEEDED[:3], SEGMENTS)
DISAGREE = "columns_disagree"


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


def annotate_chains(
    sequences: Sequence[str], chain: str, germlines: str = HUMAN
) -> list[ChainAnnotation | str]:
    """Annotates amino-acid sequences that each hold one V domain of a chain.

    Args:
      sequences: letters; case is ignored. Anything before and after the V domain is cut.
      chain: "heavy" or "light".
      germlines: "human" or a folder (see `germline.load_germlines`).

    Returns:
      For each sequence, in order, its annotation, or the one of `REASONS` why it has none. It
      depends on that sequence alone.

    Raises:
      ValueError: another `chain`.
    """
    if chain not in CHAINS:
        raise ValueError(f"chain {chain!r}: expected one of {CHAINS}")
    annotations = []
    for first in range(0, len(sequences), ROWS_A_TASK):
        encoded = [sequence.encode() for sequence in sequences[first : first + ROWS_A_TASK]]
        offsets = np.cumsum([0, *map(len, encoded)])
        letters = np.frombuffer(b"".join(encoded), np.uint8)
        domains = find_domains(letters, offsets, chain, germlines=germlines)
        annotations += [_row(domains, row) for row in range(len(encoded))]
    return annotations


def chains_of(sequences: Sequence[str], germlines: Sequence[str] = (HUMAN,)) -> list[str]:
    """The chain of each sequence by the V domain on it: "heavy", "light", or "" for neither.

    One that holds both, a single-chain Fv, counts as heavy. Of several germlines the first ones
    that say so decide.
    """
    found = [""] * len(sequences)
    for name in germlines:
        for chain in CHAINS:
            rest = [i for i, known in enumerate(found) if not known]
            told = annotate_chains([sequences[i] for i in rest], chain, name)
            for i, result in zip(rest, told, strict=True):
                found[i] = "" if isinstance(result, str) else chain
    return found


def _row(domains: Domains, row: int) -> ChainAnnotation | str:
    if domains.reason[row] != ACCEPTED:
        return REASONS[domains.reason[row]]
    length, first = domains.length[row], domains.cdr3_start[row]
    sequence, germline, cdr_mask, mutated = (
        array[row, :length].tobytes().decode()
        for array in (domains.residues, domains.germline, domains.cdr, domains.mutated)
    )
    v_call, j_call = domains.v_call[row], domains.j_call[row]
    return ChainAnnotation(
        sequence_aa=sequence,
        germline_aa=germline,
        cdr_mask_aa=cdr_mask,
        nongermline_mask_aa=mutated,
        v_gene=v_call.split("|")[0],
        j_gene=j_call.split("|")[0],
        v_call=v_call,
        j_call=j_call,
        cdr3_aa=sequence[first : first + domains.cdr3_length[row]],
        v_identity_aa=float(domains.v_identity[row]),
        start=int(domains.start[row]),
    )


def annotate_batch(
    batch: pa.RecordBatch,
    *,
    reannotate: bool = False,
    workers: int = 1,
    germlines: Sequence[str] = (HUMAN,),
) -> tuple[pa.RecordBatch, Counter]:
    """Annotates the chains of a batch that lack annotation.

    Given values are trusted: germline, masks, genes, CDR3, identity. A chain that has
    all of them passes unchanged, else the missing ones are computed, the sequence is cut to the V
    domain and the given per-residue strings with it.

    Args:
      batch: `sequence_aa_heavy` and/or `sequence_aa_light` ("" or null: no such chain), any
        columns of the annotated table, and any others, which are passed on.
      reannotate: also compute the annotation that is there.
      workers: processes; the result does not depend on their number.
      germlines: "human" or a folder (see `germline.load_germlines`), or several, of which those
        that fit a row best annotate it.

    Returns:
      The rows whose chains all have annotation, in order, and the number of the others by reason
      ("heavy: truncated_end"; a row is counted once). Both chains have all columns of
      the annotated table, `v_call_*` and `j_call_*` included. With several germlines a column
      `germlines` has the ones of each row, "" where its annotation was given.

    Raises:
      UserError: no chain's column, a column of a wrong type, or workers below 1.
    """
    done, reasons = start_annotation(
        batch, reannotate=reannotate, workers=workers, germlines=germlines
    )()
    return done, Counter(reasons[reasons != ""].tolist())


def start_annotation(
    batch: pa.RecordBatch,
    *,
    reannotate: bool = False,
    workers: int = 1,
    germlines: Sequence[str] = (HUMAN,),
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
    with _without_ctrl_c():
        every = len(tasks)
        parts = run(_annotate_rows, tasks, [reannotate] * every, [tuple(germlines)] * every)

    def finish() -> tuple[pa.RecordBatch, np.ndarray]:
        done, reasons = zip(*parts, strict=True)
        return pa.concat_batches(done), np.concatenate(reasons)

    return finish


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy the locks of pyarrow's (and, in a test, jax's) threads
    context = multiprocessing.get_context("spawn")
    with _silent_tracker():
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


@contextmanager
def _silent_tracker() -> Iterator[None]:
    """The process that tracks semaphores, begun meanwhile, does not warn that it removes them: that
    it does where Ctrl-C ends a command before its pool."""
    before = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = f"{before},{quiet}" if before else quiet
    try:
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that begin meanwhile never hear of Ctrl-C: it is for the one who began them.

    Here it waits until they have: one whose start an exception breaks off prints a traceback. The
    mask alone does not stop it, since another thread may take the signal for the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *caught: late.append(caught))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if late and callable(before):
            before(*late[0])


def _die_with_parent() -> None:
    """Ends this worker when the process that started it is killed, which the pool does not see."""

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _annotate_rows(
    batch: pa.RecordBatch, reannotate: bool, germlines: tuple[str, ...]
) -> tuple[pa.RecordBatch, np.ndarray]:
    found = [_annotated_by(batch, reannotate, name) for name in germlines]
    done, reason = found[0]
    if len(found) > 1:
        computed = np.logical_or.reduce([lacks_annotation(batch, c, reannotate) for c in CHAINS])
        done, reason = best_fitting(found, germlines, computed)
    accepted = reason == ""
    return done if accepted.all() else done.filter(pa.array(accepted)), reason


def _annotated_by(
    batch: pa.RecordBatch, reannotate: bool, germlines: str
) -> tuple[pa.RecordBatch, np.ndarray]:
    """All rows annotated by one set of germlines, and why some are not."""
    columns: dict[str, pa.Array] = {}
    reason = np.full(batch.num_rows, "", object)
    empty = np.ones(batch.num_rows, bool)
    for chain in CHAINS:
        computed, faults = annotate_columns(
            batch, chain, reannotate=reannotate, germlines=germlines
        )
        columns |= {f"{name}_{chain}": array for name, array in computed.items()}
        here = (reason == "") & (faults != "")
        reason[here] = [f"{chain}: {fault}" for fault in faults[here]]
        empty &= length_of(computed["sequence_aa"]) == 0
    empty &= reason == ""
    reason[empty] = "no_sequence"
    passed = {n: batch[n] for n in batch.schema.names if n not in columns}
    first = {n: passed.pop(n) for n in ("sequence_id",) if n in passed}
    return pa.record_batch(first | columns | passed), reason


def lacks_annotation(batch: pa.RecordBatch, chain: str, reannotate: bool) -> np.ndarray:
    """Which rows have a chain that is to be annotated, bool `[rows]`."""
    given = [length_of(texts(batch, f"{name}_{chain}")) > 0 for name in NEEDED]
    complete = np.logical_and.reduce(given) & (not reannotate)
    return (length_of(texts(batch, f"sequence_aa_{chain}")) > 0) & ~complete


def annotate_columns(
    batch: pa.RecordBatch, chain: str, *, reannotate: bool, germlines: str = HUMAN
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """Annotates one chain of every row.

    Args:
      batch: may have any of the columns of the annotated table.
      chain: "heavy" or "light".
      reannotate: ignore the annotation that is there.
      germlines: "human" or a folder.

    Returns:
      Columns by their name without the chain, and for each row the reason (object `[rows]`) why
      it is not annotated: "", one of `REASONS`, or "columns_disagree" where a string has another
      length than the sequence or a given CDR3 is not where the CDR3 is. The values of rows with
      a reason mean nothing.
    """
    n = batch.num_rows
    sequence = pc.ascii_upper(texts(batch, f"sequence_aa_{chain}"))
    names = (SEGMENTS,) if reannotate else (*NEEDED, SEGMENTS, *CALLS, "cdr3_aa")
    given = {name: texts(batch, f"{name}_{chain}") for name in names}
    none = pa.array([""] * n, pa.string())
    given = {name: given.get(name, none) for name in (*NEEDED, SEGMENTS, *CALLS, "cdr3_aa")}
    complete = np.logical_and.reduce([length_of(given[name]) > 0 for name in NEEDED])
    reason = _faults(sequence, given, complete)
    rows = np.flatnonzero((length_of(sequence) > 0) & ~complete & (reason == ""))
    domains = find_domains(*flat(sequence.take(pa.array(rows))), chain, germlines=germlines)
    reason[rows] = np.array(REASONS, object)[domains.reason]
    accepted = np.flatnonzero(domains.reason == ACCEPTED)
    rows, domains = rows[accepted], domains.take(accepted)
    columns = _residue_columns(sequence, given, reason, rows, domains)
    columns |= _gene_columns(given, rows, domains)
    columns |= _cdr3_and_identity(columns)
    computed = np.full(n, np.nan)
    computed[rows] = domains.v_identity
    identity = np.where(np.isnan(computed), columns["v_identity_aa"], computed)
    if not reannotate:
        known = numbers(batch, f"v_identity_aa_{chain}")
        identity = np.where(np.isnan(known), identity, known)
    columns["v_identity_aa"] = pa.array(identity, mask=np.isnan(identity))
    contradicts = (length_of(given["cdr3_aa"]) > 0) & (reason == "")
    contradicts &= pc.not_equal(given["cdr3_aa"], columns["cdr3_aa"]).to_numpy(zero_copy_only=False)
    reason[contradicts] = DISAGREE
    if f"{SEGMENTS}_{chain}" not in batch.schema.names:
        del columns[SEGMENTS]
    return columns, reason


def texts(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column as strings, "" where it is null or not there; raises UserError for other types."""
    if name not in batch.schema.names:
        return pa.array([""] * batch.num_rows, pa.string())
    kind = batch[name].type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"annotate: column {name} holds {kind}; expected strings")
    return pc.fill_null(batch[name].cast(pa.string()), "")


def numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as float64 `[rows]`, NaN where it is null, empty or not there."""
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    column = batch[name]
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, column)
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise UserError(f"annotate: column {name}: expected numbers ({error})") from error


def length_of(strings: pa.Array) -> np.ndarray:
    """Bytes of each string, int64 `[rows]`."""
    return np.diff(flat(strings)[1])


def _faults(sequence: pa.Array, given: dict[str, pa.Array], complete: np.ndarray) -> np.ndarray:
    """Why rows cannot be used as they are given (object `[rows]`)."""
    reason = np.full(len(sequence), "", object)
    letters, offsets = flat(sequence)
    lengths = np.diff(offsets)
    wrong = np.searchsorted(offsets, np.flatnonzero(tokenizer.invalid(letters)), "right") - 1
    reason[wrong[complete[wrong]]] = "nonstandard_residue"  # others: the annotator's decision
    for name in RESIDUE_COLUMNS:
        length = length_of(given[name])
        reason[(length > 0) & (length != lengths)] = DISAGREE
    return reason


def _strings(values: np.ndarray, counts: np.ndarray) -> pa.Array:
    """Strings of `counts` `[rows]` ASCII letters each, from the letters end to end."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.StringArray.from_buffers(len(counts), *buffers[1:])


def _either(first: pa.Array, second: pa.Array) -> pa.Array:
    """The first string of each row, the second where that is empty."""
    return pc.if_else(pc.equal(first, ""), second, first)


def _cut(strings: pa.Array, start: np.ndarray, stop: np.ndarray) -> pa.Array:
    """Letters `start` to `stop` `[rows]` of each string."""
    letters, offsets = flat(strings)
    lengths = np.diff(offsets)
    index = np.arange(len(letters)) - np.repeat(offsets[:-1], lengths)
    inside = (index >= np.repeat(start, lengths)) & (index < np.repeat(stop, lengths))
    return _strings(letters[inside], np.clip(stop, None, lengths) - np.clip(start, None, lengths))


def _residue_columns(
    sequence: pa.Array,
    given: dict[str, pa.Array],
    reason: np.ndarray,
    rows: np.ndarray,
    domains: Domains,
) -> dict[str, pa.Array]:
    """Per-residue strings, cut to the domain; all empty where a row has a reason."""
    start, stop = np.zeros(len(sequence), np.int64), length_of(sequence)
    stop[reason != ""] = 0
    start[rows], stop[rows] = domains.start, domains.start + domains.length
    columns = {"sequence_aa": _cut(sequence, start, stop)}
    counts = np.zeros(len(sequence), np.int64)
    counts[rows] = domains.length
    inside = np.arange(domains.residues.shape[1]) < domains.length[:, None]
    for name, computed in (("germline_aa", domains.germline), ("cdr_mask_aa", domains.cdr)):
        spread = _strings(computed[inside], counts)
        columns[name] = _either(_cut(given[name], start, stop), spread)
    letters, offsets = flat(columns["sequence_aa"])
    differs = (letters != flat(columns["germline_aa"])[0]).astype(np.uint8) + np.uint8(ord("0"))
    derived = _strings(differs, np.diff(offsets))
    columns["nongermline_mask_aa"] = _either(
        _cut(given["nongermline_mask_aa"], start, stop), derived
    )
    columns[SEGMENTS] = _cut(given[SEGMENTS], start, stop)
    return columns


def _gene_columns(
    given: dict[str, pa.Array], rows: np.ndarray, domains: Domains
) -> dict[str, pa.Array]:
    columns = {}
    for segment, calls in (("v", domains.v_call), ("j", domains.j_call)):
        call = np.full(len(given["v_gene"]), "", object)
        call[rows] = calls
        gene = [text.partition("|")[0] for text in call]
        known = given[f"{segment}_gene"]
        columns[f"{segment}_gene"] = _either(known, pa.array(gene, pa.string()))
        computed = _either(known, pa.array(call, pa.string()))
        columns[f"{segment}_call"] = _either(given[f"{segment}_call"], computed)
    return columns


def _cdr3_and_identity(columns: dict[str, pa.Array]) -> dict[str, pa.Array | np.ndarray]:
    """CDR3 and V identity (NaN where there is no residue before a CDR3) as the masks say."""
    letters, offsets = flat(columns["sequence_aa"])
    n, row = len(offsets) - 1, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    in_cdr3 = flat(columns["cdr_mask_aa"])[0] == ord("3")
    mutated = flat(columns["nongermline_mask_aa"])[0] == ord("1")
    seen = np.concatenate([[0], np.cumsum(in_cdr3)])
    before = seen[1:] == seen[offsets[:-1]][row]
    before &= (seen[offsets[1:]] > seen[offsets[:-1]])[row]
    total = np.bincount(row[before], minlength=n)
    differing = np.bincount(row[before & mutated], minlength=n)
    with np.errstate(invalid="ignore"):
        identity = 1.0 - differing / total
    cdr3 = _strings(letters[in_cdr3], np.bincount(row[in_cdr3], minlength=n))
    return {"cdr3_aa": cdr3, "v_identity_aa": identity}
