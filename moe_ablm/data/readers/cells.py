"""Chains that stand in rows of their own become antibodies: joined by their cell."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.readers.columns import ANY_CHAIN, LINE, ROW, place_of
from moe_ablm.data.readers.options import AS_USUAL, Reading
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.spill import Partitions
from moe_ablm.data.split import hash64

# Counts by which chains of a cell are compared, the better one first.
COUNTS = ("umis", "reads")
_CHAINS = pa.schema(
    [(n, pa.string()) for n in ("cell", "chain", "sequence_id", "sequence", "donor")]
    + [(n, pa.float64()) for n in COUNTS]
    + [(ROW, pa.int64()), (LINE, pa.int64())]
)
_ANTIBODIES = pa.schema(
    [(n, pa.string()) for n in ("sequence_id", "sequence_aa_heavy", "sequence_aa_light", "donor")]
    + [(ANY_CHAIN, pa.bool_()), (ROW, pa.int64()), (LINE, pa.int64())]
)
MISSING_COUNT = -1.0


def join_cells(
    batches: Iterable[pa.RecordBatch], report: Report, reading: Reading = AS_USUAL
) -> Iterator[pa.RecordBatch]:
    """Joins the heavy and light chain of each cell; rows of a cell may stand anywhere in the file.

    Of several light chains of a cell the most abundant is taken: by UMIs, of equal ones by reads,
    and by reads alone where a chain has no number of UMIs; the first where that does not decide.
    Of several heavy chains one is taken that is `reading.dominance` times as abundant as the next;
    without such a one the cell is no single cell and is rejected whole. The others are counted as
    rejected and the cell is noted. A cell with one chain, and a row without a cell, stays a single
    chain. Of which kind a chain of a cell is that does not say so, annotation finds out.

    Args:
      batches: columns `cell` (empty: none), `chain` ("heavy", "light" or empty for unknown),
        `sequence_id`, `sequence`, `_row`, `_line`, and where known `umis`, `reads` and `donor`.
      report: counts what is rejected, joined and noted.
      reading: the choices of the user.

    Yields:
      Batches with `sequence_id` (the cell, where there is one), `sequence_aa_heavy`,
      `sequence_aa_light`, `donor`, `_any_chain`, `_row`, `_line`. Rows without a cell come first,
      in the order of the file; then cells, in an order that depends on their names alone.
    """
    with tempfile.TemporaryDirectory(prefix="moe_ablm-cells-") as scratch:
        cells = Partitions(Path(scratch), "cells", _CHAINS)
        for batch in batches:
            batch = _with_chains_found(_with_all_columns(batch), report, reading)
            keys = [hash64(cell) if cell else 0 for cell in batch["cell"].to_pylist()]
            alone = np.array(keys, np.uint64) == 0
            if alone.any():
                where = place_of(batch, int(np.argmax(alone)))
                report.note("chain that names no cell: read alone", where, int(alone.sum()))
                single = [_antibody(row, None) for row in batch.filter(pa.array(alone)).to_pylist()]
                yield pa.RecordBatch.from_pylist(single, schema=_ANTIBODIES)
            if not alone.all():
                kept = np.array(keys, np.uint64)[~alone]
                cells.add(batch.filter(pa.array(~alone)), kept)
        cells.close()
        for part in cells.parts():
            rows = _joined(part.to_pylist(), report, reading)
            if rows:
                yield pa.RecordBatch.from_pylist(rows, schema=_ANTIBODIES)


def _with_all_columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    n = batch.num_rows
    default = {"donor": [""] * n} | dict.fromkeys(COUNTS, [MISSING_COUNT] * n)
    columns = [
        batch[f.name] if f.name in batch.schema.names else pa.array(default[f.name], f.type)
        for f in _CHAINS
    ]
    return pa.record_batch(columns, schema=_CHAINS)


def _with_chains_found(batch: pa.RecordBatch, report: Report, reading: Reading) -> pa.RecordBatch:
    """Names the chain of the rows of cells that do not, and rejects what is no V domain."""
    rows = batch.to_pylist() if "" in batch["chain"].to_pylist() else []
    unknown = [i for i, row in enumerate(rows) if row["cell"] and not row["chain"]]
    if not unknown:
        return batch
    from moe_ablm.data.annotate import chains_of  # parasail and the germline tables

    good = np.ones(batch.num_rows, bool)
    found = chains_of([rows[i]["sequence"] for i in unknown], reading.germlines)
    for i, chain in zip(unknown, found, strict=True):
        rows[i]["chain"] = chain
        if not chain:
            good[i] = False
            report.reject("neither heavy nor light chain", place_of(batch, i))
    return pa.RecordBatch.from_pylist(rows, schema=_CHAINS).filter(pa.array(good))


def _antibody(first: dict, second: dict | None) -> dict:
    """A stored row of one or two chains; of two the first is the heavy one."""
    chain = "light" if first["chain"] == "light" else "heavy"
    row = {"sequence_aa_heavy": "", "sequence_aa_light": second["sequence"] if second else ""}
    row |= {f"sequence_aa_{chain}": first["sequence"], ANY_CHAIN: first["chain"] == ""}
    row["sequence_id"] = first["cell"] or first["sequence_id"]
    return row | {name: first[name] for name in ("donor", ROW, LINE)}


def _joined(rows: list[dict], report: Report, reading: Reading) -> list[dict]:
    cells: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], {"heavy": [], "light": []})[row["chain"]].append(row)
    antibodies = []
    for chains in cells.values():
        light = _one_light(chains["light"], report)
        heavy = _one_heavy(chains["heavy"], len(light), report, reading.dominance)
        if heavy is None:
            continue
        if heavy and light:
            report.joined += 1
            antibodies.append(_antibody(heavy[0], light[0]))
            continue
        for row in heavy + light:
            missing = "light" if heavy else "heavy"
            report.note(f"cell without {missing} chain: read alone", _place(row))
            antibodies.append(_antibody(row, None))
    return antibodies


def _place(row: dict) -> str:
    return place(row[ROW], row[LINE])


def _one_light(chains: list[dict], report: Report) -> list[dict]:
    """The light chain of a cell, if it has any."""
    chains = _distinct(chains, report)
    if len(chains) < 2:
        return chains
    chains, known = _by_abundance(chains)
    told = any(chains[0][name] != chains[1][name] for name in known)
    how = "the most abundant taken" if told else "the first taken, no count tells them apart"
    report.note(f"cell with several light chains: {how}", _place(chains[0]))
    report.reject("further light chain of a cell", _place(chains[1]), len(chains) - 1)
    return chains[:1]


def _one_heavy(
    chains: list[dict], light: int, report: Report, dominance: float
) -> list[dict] | None:
    """The heavy chain of a cell, if it has any; None where the cell, `light` too, is rejected."""
    chains = _distinct(chains, report)
    if len(chains) < 2:
        return chains
    chains, known = _by_abundance(chains)
    first, second = ([row[name] for name in known[:1]] or [0.0] for row in chains[:2])
    if first[0] < max(dominance * second[0], 1):
        where = _place(min(chains, key=lambda row: row[ROW]))
        report.reject("cell with several heavy chains", where, len(chains) + light)
        return None
    told = f"one at least {dominance:g} times as abundant as the next taken"
    report.note(f"cell with several heavy chains: {told}", _place(chains[0]))
    report.reject("further heavy chain of a cell", _place(chains[1]), len(chains) - 1)
    return chains[:1]


def _distinct(chains: list[dict], report: Report) -> list[dict]:
    """The chains of a cell without those that repeat another one, letter by letter."""
    if len(chains) < 2:
        return chains
    kept: dict[str, dict] = {}
    for row in chains:
        same = kept.setdefault(row["sequence"], row)
        if same is not row:
            report.reject("chain that its cell has already", _place(row))
            for name in COUNTS:
                same[name] = max(same[name], row[name])
    return list(kept.values())


def _by_abundance(chains: list[dict]) -> tuple[list[dict], list[str]]:
    """Chains of a cell, the most abundant first, and the counts that all have; else file order."""
    chains = sorted(chains, key=lambda row: row[ROW])
    known = [n for n in COUNTS if all(row[n] != MISSING_COUNT for row in chains)]
    return sorted(chains, key=lambda row: [-row[name] for name in known]), known
