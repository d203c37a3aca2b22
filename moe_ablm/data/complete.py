"""Annotates the rows that lack annotation; given columns are trusted and stay as they are."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.columns import ANY_CHAIN, ROWS_PER_BATCH, place_of
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CHAINS, OTHER_CHAIN

_NEEDED = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
# Waits for the annotated rows of a batch and the reasons of all its rows (see `start_annotation`).
_Finish = Callable[[], tuple[pa.RecordBatch, np.ndarray]]
# Tasks of the annotator that wait for each process, so that none is idle while rows are read.
_TASKS_AHEAD = 2
# By human germlines three quarters of the mouse ones are below (docs/annotation.md), of human
# chains those that are mutated most.
LOW_IDENTITY = 0.75
_SECOND_DOMAIN = 80  # residues beside a V domain that may be one of the other chain


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
      report: counts the rows that the annotator rejects, by its reasons; says by which germlines.
      reannotate: compute annotation that is there, too.
      workers: processes of the annotator; with several, batches are read ahead.
      all_columns: give complete rows the columns that a dataset does not store, too.
    """
    # imports parasail and builds the germline tables: only when needed
    from moe_ablm.data.annotate import ROWS_A_TASK, start_annotation

    def start(batch: pa.RecordBatch) -> _Finish:
        return start_annotation(
            batch, reannotate=reannotate, workers=workers, germlines=report.germlines
        )

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
            started.append(_finished(batch, start(batch), start, report))
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


def _finished(
    batch: pa.RecordBatch,
    finish: _Finish,
    start: Callable[[pa.RecordBatch], _Finish],
    report: Report,
) -> Iterator[pa.RecordBatch]:
    """The annotated rows of a batch, if any; the others are rejected."""
    done, reasons = finish()
    _reject(batch, reasons, report)
    if done.num_rows:
        given = batch if not reasons.any() else batch.filter(pa.array(reasons == ""))
        for chain in CHAINS:
            done = _with_second_domains(done, given, chain, start, report)
        _note_fit(done, report)
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
        heavy = _with_second_domains(heavy, accepted, "heavy", start, report)
        _note_fit(heavy, report)
        yield heavy
    rest = batch.filter(pa.array(reasons != ""))
    if rest.num_rows == 0:
        return
    done, second = start(_as_other(rest, "heavy"))()
    both = zip(reasons[reasons != ""], second, strict=True)
    _reject(rest, np.array([_reason_of_either(*r) for r in both], object), report)
    if done.num_rows:
        _note_fit(done, report)
        yield done


def _note_fit(done: pa.RecordBatch, report: Report) -> None:
    """Counts which of several germlines fit, and chains that resemble no V gene much: those are of
    another species, as a rule."""
    if "germlines" in done.schema.names:
        names = done["germlines"].to_pylist()
        for name, rows in Counter(filter(None, names)).items():
            where = place_of(done, names.index(name))
            report.note(f"germlines that fit best: {name}", where, rows)
    for chain in CHAINS:
        identity = done[f"v_identity_aa_{chain}"].to_numpy(zero_copy_only=False)
        low = np.flatnonzero(identity < LOW_IDENTITY)  # of no chain it is NaN
        if len(low):
            remark = f"{chain}: less than {LOW_IDENTITY:.0%} V identity: another species?"
            report.note(remark, place_of(done, low[0]), len(low))


def _as_other(batch: pa.RecordBatch, chain: str) -> pa.RecordBatch:
    """The rows with the sequence of a chain as that of the other one, and none of it."""
    empty = pa.array([""] * batch.num_rows, pa.string())
    columns = {n: batch[n] for n in batch.schema.names if not n.endswith(("_heavy", "_light"))}
    columns |= {f"sequence_aa_{c}": empty for c in CHAINS}
    columns[f"sequence_aa_{OTHER_CHAIN[chain]}"] = batch[f"sequence_aa_{chain}"]
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
    done: pa.RecordBatch,
    given: pa.RecordBatch,
    chain: str,
    start: Callable[[pa.RecordBatch], _Finish],
    report: Report,
) -> pa.RecordBatch:
    """Annotated rows with the other V domain of sequences that hold one beside a chain's, scFv.

    Args:
      done: annotated rows.
      given: the rows as they were read.
      chain: where the sequence stands, without one of the other chain.
      start: of the annotation.
      report: counts them.
    """
    other = OTHER_CHAIN[chain]
    name, second = f"sequence_aa_{chain}", f"sequence_aa_{other}"
    if not {name, second} <= set(given.schema.names):
        return done
    left = pc.subtract(*(pc.binary_length(batch[name]) for batch in (given, done)))
    alone = pc.equal(given[second], "")
    rows = np.flatnonzero(np.asarray(pc.and_(pc.greater_equal(left, _SECOND_DOMAIN), alone)))
    likely = [_may_hold(given, done, int(row), name, other, report.germlines) for row in rows]
    rows = rows[np.array(likely, bool)]
    if not len(rows):
        return done
    whole = given.take(pa.array(rows))
    found, reasons = start(_as_other(whole, chain))()
    rows, whole = rows[reasons == ""], whole.filter(pa.array(reasons == ""))
    domains = zip(
        whole[name].to_pylist(),
        done[name].take(pa.array(rows)).to_pylist(),
        found[second].to_pylist(),
        strict=True,
    )
    apart = [both.upper().replace(one, "", 1).find(two) >= 0 for both, one, two in domains]
    rows, found = rows[apart], found.filter(pa.array(apart, pa.bool_()))
    if not len(rows):
        return done
    report.note("single-chain Fv: both domains", place_of(given, rows[0]), len(rows))
    spread = np.full(done.num_rows, -1)
    spread[rows] = np.arange(len(rows))
    there = pa.array(spread, mask=spread < 0)
    for i, column in enumerate(done.schema.names):
        if column.endswith(f"_{other}") and column in found.schema.names:
            filled = found[column].take(there)
            done = done.set_column(i, column, pc.coalesce(filled, done[column]))
    return done


def _may_hold(
    given: pa.RecordBatch,
    done: pa.RecordBatch,
    row: int,
    name: str,
    other: str,
    germlines: Sequence[str],
) -> bool:
    """Whether what stands around a domain shares words with germlines of the other chain."""
    from moe_ablm.data.align import MIN_SHARED_WORDS
    from moe_ablm.data.germline_scores import encode, v_table, words

    rest = given[name][row].as_py().upper().replace(done[name][row].as_py(), " ", 1)
    here = np.unique(words(encode(rest)))
    tables = [v_table(other, name).has_word for name in germlines]
    return any(table[here].sum(axis=0, dtype=int).max() >= MIN_SHARED_WORDS for table in tables)
