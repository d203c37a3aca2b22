"""Annotates the rows that lack annotation; given columns are trusted and stay as they are."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.columns import ANY_CHAIN, ROWS_PER_BATCH, place_of
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CHAINS

_NEEDED = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
# Waits for the annotated rows of a batch and the reasons of all its rows (see `start_annotation`).
_Finish = Callable[[], tuple[pa.RecordBatch, np.ndarray]]
# Tasks of the annotator that wait for each process, so that none is idle while rows are read.
_TASKS_AHEAD = 2
_SECOND_DOMAIN = 80  # residues beside a heavy V domain that may be a light one


def annotated(
    batches: Iterable[pa.RecordBatch],
    report: Report,
    *,
    reannotate: bool = False,
    workers: int = 1,
    all_columns: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Passes batches on with every annotation column that a dataset stores.

    Args:
      batches: checked batches of a reader.
      report: counts the rows that the annotator rejects, by its reasons.
      reannotate: compute annotation that is there, too.
      workers: processes of the annotator; with several, batches are read ahead.
      all_columns: give complete rows the columns that a dataset does not store, too.
    """
    # imports parasail and builds the germline tables: only when needed
    from moe_ablm.data.annotate import ROWS_A_TASK, start_annotation

    def start(batch: pa.RecordBatch) -> _Finish:
        return start_annotation(batch, reannotate=reannotate, workers=workers)

    ahead = 0 if workers == 1 else max(1, _TASKS_AHEAD * workers * ROWS_A_TASK // ROWS_PER_BATCH)
    started: deque[Iterator[pa.RecordBatch]] = deque()
    for batch in batches:
        if ANY_CHAIN in batch.schema.names:
            undecided = np.asarray(batch[ANY_CHAIN], bool)
            batch = batch.drop_columns([ANY_CHAIN])
            if undecided.any():
                either = batch.filter(pa.array(undecided))
                started.append(_as_either(either, start(either), start, report))
                batch = batch.filter(pa.array(~undecided))
        if batch.num_rows and (all_columns or reannotate or not is_annotated(batch)):
            started.append(_finished(batch, start(batch), report))
        elif batch.num_rows:
            started.append(iter([batch]))
        while len(started) > ahead:
            yield from started.popleft()
    for rest in started:
        yield from rest


def is_annotated(batch: pa.RecordBatch) -> bool:
    """Whether every chain of every row has all the annotation that a dataset stores."""
    for chain in CHAINS:
        present = pc.not_equal(batch[f"sequence_aa_{chain}"], "")
        for column in _NEEDED:
            if not pc.any(present).as_py():
                break
            name = f"{column}_{chain}"
            if name not in batch.schema.names:
                return False
            if pc.any(pc.and_(present, pc.equal(batch[name], ""))).as_py():
                return False
    return True


def _finished(batch: pa.RecordBatch, finish: _Finish, report: Report) -> Iterator[pa.RecordBatch]:
    """The annotated rows of a batch, if any; the others are rejected."""
    done, reasons = finish()
    _reject(batch, reasons, report)
    if done.num_rows:
        yield done


def _reject(batch: pa.RecordBatch, reasons: np.ndarray, report: Report) -> None:
    for reason in sorted(set(reasons) - {""}):
        rows = np.flatnonzero(reasons == reason)
        report.reject(f"annotation: {reason}", place_of(batch, rows[0]), len(rows))


def _as_either(
    batch: pa.RecordBatch,
    finish: _Finish,
    start: Callable[[pa.RecordBatch], _Finish],
    report: Report,
) -> Iterator[pa.RecordBatch]:
    """Rows whose one sequence stands under heavy but may be of either chain, or hold both."""
    heavy, reasons = finish()
    if heavy.num_rows:
        accepted = batch.filter(pa.array(reasons == ""))
        yield _with_second_domains(heavy, accepted, start, report)
    rest = batch.filter(pa.array(reasons != ""))
    if rest.num_rows == 0:
        return
    done, second = start(_as_light(rest))()
    both = zip(reasons[reasons != ""], second, strict=True)
    _reject(rest, np.array([_reason_of_either(*r) for r in both], object), report)
    if done.num_rows:
        yield done


def _as_light(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows with the sequence of the heavy chain as light one, and no heavy one."""
    empty = pa.array([""] * batch.num_rows, pa.string())
    columns = {n: batch[n] for n in batch.schema.names if not n.endswith(("_heavy", "_light"))}
    columns |= {"sequence_aa_heavy": empty, "sequence_aa_light": batch["sequence_aa_heavy"]}
    return pa.record_batch(columns)


def _reason_of_either(heavy: str, light: str) -> str:
    """Why a chain is neither, from what was said of it as heavy and as light chain; "" if it is."""
    if not light:
        return ""
    (_, _, as_heavy), (_, _, as_light) = heavy.partition(": "), light.partition(": ")
    if as_heavy == as_light:
        return as_heavy
    # what the other chain's germlines explain better is not this chain's
    said_nothing = ("wrong_chain", "not_a_v_domain")
    return light if as_heavy in said_nothing and as_light not in said_nothing else heavy


def _with_second_domains(
    heavy: pa.RecordBatch,
    given: pa.RecordBatch,
    start: Callable[[pa.RecordBatch], _Finish],
    report: Report,
) -> pa.RecordBatch:
    """Annotated heavy chains with the light V domain of those that hold one beside, scFv.

    Args:
      heavy: annotated rows.
      given: the rows as they were read.
      start: of the annotation.
      report: counts them.
    """
    rest = pc.subtract(*(pc.binary_length(b["sequence_aa_heavy"]) for b in (given, heavy)))
    rows = np.flatnonzero(np.asarray(rest) >= _SECOND_DOMAIN)
    if not len(rows):
        return heavy
    whole = given.take(pa.array(rows))
    light, reasons = start(_as_light(whole))()
    rows, whole = rows[reasons == ""], whole.filter(pa.array(reasons == ""))
    domains = zip(
        whole["sequence_aa_heavy"].to_pylist(),
        heavy["sequence_aa_heavy"].take(pa.array(rows)).to_pylist(),
        light["sequence_aa_light"].to_pylist(),
        strict=True,
    )
    apart = [
        both.upper().replace(first, "", 1).find(second) >= 0 for both, first, second in domains
    ]
    rows, light = rows[apart], light.filter(pa.array(apart, pa.bool_()))
    if not len(rows):
        return heavy
    report.note("single-chain Fv: both domains", place_of(given, rows[0]), len(rows))
    spread = np.full(heavy.num_rows, -1)
    spread[rows] = np.arange(len(rows))
    there = pa.array(spread, mask=spread < 0)
    for i, name in enumerate(heavy.schema.names):
        if name.endswith("_light"):
            filled = light[name].take(there)
            heavy = heavy.set_column(i, name, pc.coalesce(filled, heavy[name]))
    return heavy
