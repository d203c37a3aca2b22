"""Sends the rows that lack annotation through the annotator; trusted columns stay as they are."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.check import place_of
from moe_ablm.data.readers.columns import ANY_CHAIN, ROW
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CHAINS

_Annotate = Callable[[pa.RecordBatch], tuple[pa.RecordBatch, Counter]]
_NEEDED = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")


def annotated(
    batches: Iterable[pa.RecordBatch],
    report: Report,
    *,
    reannotate: bool = False,
    workers: int = 1,
) -> Iterator[pa.RecordBatch]:
    """Passes batches on with every annotation column of the study.

    Args:
      batches: checked batches of a reader.
      report: told of the rows that the annotator rejects, by its reasons.
      reannotate: compute annotation that is there, too.
      workers: processes of the annotator.
    """

    def annotate(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Counter]:
        from moe_ablm.data.annotate import annotate_batch  # germline tables: only when needed

        return annotate_batch(batch, reannotate=reannotate, workers=workers)

    for batch in batches:
        if batch.num_rows == 0:
            continue
        if ANY_CHAIN in batch.schema.names:
            undecided = np.asarray(batch[ANY_CHAIN])
            batch = batch.drop_columns([ANY_CHAIN])
            if undecided.any():
                yield from _as_either(batch.filter(pa.array(undecided)), annotate, report)
                batch = batch.filter(pa.array(~undecided))
        if batch.num_rows and (reannotate or not is_annotated(batch)):
            batch = _annotate(batch, annotate, report)
        if batch.num_rows:
            yield batch


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


def _annotate(batch: pa.RecordBatch, annotate: _Annotate, report: Report) -> pa.RecordBatch:
    done, rejected = annotate(batch)
    kept = set(done[ROW].to_pylist())
    first = next((i for i, row in enumerate(batch[ROW].to_pylist()) if row not in kept), 0)
    for reason, rows in rejected.items():
        report.reject(f"annotation: {reason}", f"from {place_of(batch, first)} on", rows)
    return done


def _as_either(
    batch: pa.RecordBatch, annotate: _Annotate, report: Report
) -> Iterator[pa.RecordBatch]:
    """Rows whose one sequence stands under heavy but may be of either chain."""
    heavy, _ = annotate(batch)
    if heavy.num_rows:
        yield heavy
    rest = batch.filter(pc.invert(pc.is_in(batch[ROW], heavy[ROW])))
    if rest.num_rows == 0:
        return
    empty = pa.array([""] * rest.num_rows, pa.string())
    columns = {n: rest[n] for n in rest.schema.names if not n.endswith(("_heavy", "_light"))}
    columns |= {"sequence_aa_heavy": empty, "sequence_aa_light": rest["sequence_aa_heavy"]}
    light = _annotate(pa.record_batch(columns), annotate, report)
    if light.num_rows:
        yield light
