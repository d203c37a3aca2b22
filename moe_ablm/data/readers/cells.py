"""Chains that stand in rows of their own become antibodies: joined by their cell."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.readers.check import place_of
from moe_ablm.data.readers.columns import ANY_CHAIN, LINE, ROW
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.spill import Partitions
from moe_ablm.data.split import hash64

_CHAINS = pa.schema(
    [(n, pa.string()) for n in ("cell", "chain", "sequence_id", "sequence", "donor")]
    + [("count", pa.float64()), (ROW, pa.int64()), (LINE, pa.int64())]
)
_ANTIBODIES = pa.schema(
    [(n, pa.string()) for n in ("sequence_id", "sequence_aa_heavy", "sequence_aa_light", "donor")]
    + [(ANY_CHAIN, pa.bool_()), (ROW, pa.int64()), (LINE, pa.int64())]
)
MISSING_COUNT = -1.0


def join_cells(batches: Iterable[pa.RecordBatch], report: Report) -> Iterator[pa.RecordBatch]:
    """Joins the heavy and light chain of each cell; rows of a cell may stand anywhere in the file.

    Of several light chains of a cell the one with the highest count (UMIs, or reads) is taken, the
    first where counts are equal or not given; the others are counted as rejected and the cell is
    noted. A cell with several heavy chains is no single cell and is rejected whole. A cell with one
    chain, and a row without a cell, stays a single chain.

    Args:
      batches: columns `cell` (empty: none), `chain` ("heavy", "light" or empty for unknown),
        `sequence_id`, `sequence`, `_row`, `_line`, and where known `count` and `donor`.
      report: counts what is rejected, joined and noted.

    Yields:
      Batches with `sequence_id` (the cell, where there is one), `sequence_aa_heavy`,
      `sequence_aa_light`, `donor`, `_any_chain`, `_row`, `_line`. Rows without a cell come first,
      in the order of the file; then cells, in an order that depends on their names alone.
    """
    with tempfile.TemporaryDirectory(prefix="moe_ablm-cells-") as scratch:
        cells = Partitions(Path(scratch), "cells", _CHAINS)
        for batch in batches:
            batch = _with_all_columns(batch)
            keys = [hash64(cell) if cell else 0 for cell in batch["cell"].to_pylist()]
            alone = np.array(keys, np.uint64) == 0
            if alone.any():
                where = place_of(batch, int(np.argmax(alone)))
                report.note("chain that names no cell: kept alone", where, int(alone.sum()))
                single = [_antibody(row, None) for row in batch.filter(pa.array(alone)).to_pylist()]
                yield pa.RecordBatch.from_pylist(single, schema=_ANTIBODIES)
            if not alone.all():
                kept = np.array(keys, np.uint64)[~alone]
                cells.add(batch.filter(pa.array(~alone)), kept)
        cells.close()
        for part in cells.parts():
            rows = _joined(part.to_pylist(), report)
            if rows:
                yield pa.RecordBatch.from_pylist(rows, schema=_ANTIBODIES)


def _with_all_columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    n = batch.num_rows
    default = {"donor": [""] * n, "count": [MISSING_COUNT] * n}
    columns = [
        batch[f.name] if f.name in batch.schema.names else pa.array(default[f.name], f.type)
        for f in _CHAINS
    ]
    return pa.record_batch(columns, schema=_CHAINS)


def _antibody(first: dict, second: dict | None) -> dict:
    """A stored row of one or two chains; of two the first is the heavy one."""
    chain = "light" if first["chain"] == "light" else "heavy"
    row = {"sequence_aa_heavy": "", "sequence_aa_light": second["sequence"] if second else ""}
    row |= {f"sequence_aa_{chain}": first["sequence"], ANY_CHAIN: first["chain"] == ""}
    row["sequence_id"] = first["cell"] or first["sequence_id"]
    return row | {name: first[name] for name in ("donor", ROW, LINE)}


def _joined(rows: list[dict], report: Report) -> list[dict]:
    cells: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], {"heavy": [], "light": [], "": []})[row["chain"]].append(row)
    antibodies = []
    for chains in cells.values():
        heavy, light = chains["heavy"], chains["light"]
        if len(heavy) > 1:
            where = place(heavy[0][ROW], heavy[0][LINE])
            report.reject("cell with several heavy chains", where, len(heavy) + len(light))
            continue
        if len(light) > 1:
            where = place(light[0][ROW], light[0][LINE])
            report.note("cell with several light chains: the most abundant taken", where)
            report.reject("further light chain of a cell", where, len(light) - 1)
            light = [max(light, key=lambda r: (r["count"], -r[ROW]))]
        if heavy and light:
            report.joined += 1
            antibodies.append(_antibody(heavy[0], light[0]))
            continue
        for row in heavy + light:
            missing = "light" if heavy else "heavy"
            report.note(f"cell without {missing} chain: kept alone", place(row[ROW], row[LINE]))
            antibodies.append(_antibody(row, None))
    return antibodies
