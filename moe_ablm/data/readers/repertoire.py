"""Repertoire tables: OAS (paired, unpaired), AIRR rearrangements, 10x contig annotations.

Only sequences, ids, cells and donors are taken from them. Genes and regions are annotated anew, so
that antibodies of different sources are described, clustered and split by one rule.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.cells import MISSING_COUNT, join_cells
from moe_ablm.data.readers.check import place_of
from moe_ablm.data.readers.columns import LINE, ROW, once
from moe_ablm.data.readers.report import Report
from moe_ablm.data.readers.rows import read_rows
from moe_ablm.data.regions import CHAINS

_COUNTS = ("umi_count", "umis", "duplicate_count", "consensus_count", "reads")
_SAMPLES = ("repertoire_id", "sample_id", "subject_id")
_TRUE = ("t", "true", "1", "yes", "")
_TEN_X = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")


def read_oas_paired(
    path: Path, report: Report, columns: Mapping[str, str] | None
) -> Iterator[pa.RecordBatch]:
    """OAS paired CSV, with or without its first line of JSON."""

    def choose(header: Sequence[str]) -> dict[str, str]:
        mapping = {f"sequence_aa_{c}": f"sequence_alignment_aa_{c}" for c in CHAINS}
        for column in mapping.values():
            once(header, column, report.source)
        optional = {f"productive_{c}": f"productive_{c}" for c in CHAINS}
        optional["sequence_id"] = "sequence_id_heavy"
        return mapping | {k: v for k, v in optional.items() if v in header}

    for batch in read_rows(path, report, choose):
        for chain in CHAINS:
            batch = _productive(_without_gaps(batch, f"sequence_aa_{chain}"), chain, report)
        yield _with_donor(batch, report)


def read_oas_unpaired(
    path: Path, report: Report, columns: Mapping[str, str] | None
) -> Iterator[pa.RecordBatch]:
    """OAS unpaired CSV, with or without its first line of JSON; every row is a single chain."""
    yield from _read_chains(path, report, cell=())


def read_airr(
    path: Path, report: Report, columns: Mapping[str, str] | None
) -> Iterator[pa.RecordBatch]:
    """AIRR rearrangements; chains of one `cell_id` (of one sample) become an antibody."""
    yield from _read_chains(path, report, cell=("cell_id",))


def read_10x(
    path: Path, report: Report, columns: Mapping[str, str] | None
) -> Iterator[pa.RecordBatch]:
    """10x `*_contig_annotations.csv` (Cell Ranger >= 5): seven regions joined to the V domain."""

    def choose(header: Sequence[str]) -> dict[str, str]:
        for column in ("barcode", "contig_id", "cdr3"):
            once(header, column, report.source)
        wanted = ("barcode", "contig_id", "chain", "productive", *_TEN_X, *_COUNTS)
        return {name: name for name in wanted if name in header}

    def chains() -> Iterator[pa.RecordBatch]:
        for batch in read_rows(path, report, choose):
            batch = _productive(batch, "", report)
            regions = [batch[n] for n in _TEN_X if n in batch.schema.names]
            renamed = {"cell": batch["barcode"], "sequence_id": batch["contig_id"]}
            sequence = pc.binary_join_element_wise(*regions, "")
            yield from _immunoglobulins(batch, sequence, renamed, report)

    yield from join_cells(chains(), report)


def _read_chains(path: Path, report: Report, cell: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    sequences = ("sequence_alignment_aa", "sequence_aa")
    others = ("sequence_id", "locus", "v_call", "productive", *cell, *_SAMPLES, *_COUNTS)

    def choose(header: Sequence[str]) -> dict[str, str]:
        once(header, next((n for n in sequences if n in header), sequences[-1]), report.source)
        return {name: name for name in (*sequences, *others) if name in header}

    def chains() -> Iterator[pa.RecordBatch]:
        for batch in read_rows(path, report, choose):
            batch = _productive(batch, "", report)
            names = batch.schema.names
            domain, *whole = [batch[n] for n in sequences if n in names]
            for other in whole:  # the alignment is the V domain; without it the whole translation
                domain = pc.if_else(pc.equal(domain, ""), other, domain)
            samples = [batch[n] for n in _SAMPLES if n in names]
            renamed = {"donor": batch["subject_id"]} if "subject_id" in names else {}
            if cell and cell[0] in names:
                key = pc.binary_join_element_wise(*samples, batch[cell[0]], "|")
                renamed["cell"] = pc.if_else(pc.equal(batch[cell[0]], ""), "", key)
            yield from _immunoglobulins(batch, domain, renamed, report)

    for batch in join_cells(chains(), report):
        yield _with_donor(batch, report)


def _immunoglobulins(
    batch: pa.RecordBatch, sequence: pa.Array, renamed: dict[str, pa.Array], report: Report
) -> Iterator[pa.RecordBatch]:
    """Rows of heavy and light chains as `join_cells` wants them; T-cell receptors are rejected."""
    names, empty = batch.schema.names, pa.array([""] * batch.num_rows, pa.string())
    loci = next((batch[n] for n in ("locus", "chain", "v_call") if n in names), empty)
    chain = [_chain(locus) for locus in loci.to_pylist()]
    known = [c is not None for c in chain]
    if not all(known):
        where = place_of(batch, known.index(False))
        report.reject("not an immunoglobulin locus", where, known.count(False))
    counts = next((_numbers(batch[n]) for n in _COUNTS if n in names), None)
    columns = {
        "cell": empty,
        "chain": pa.array(chain, pa.string()),
        "sequence": pc.replace_substring_regex(sequence, r"[-.]", ""),
        "sequence_id": batch["sequence_id"] if "sequence_id" in names else empty,
        ROW: batch[ROW],
        LINE: batch[LINE],
    }
    columns |= renamed | ({"count": counts} if counts is not None else {})
    yield pa.record_batch(columns).filter(pa.array(known, pa.bool_()))


def _chain(locus: str) -> str | None:
    """Chain of a locus or V call: IGH or H; IGK, IGL, K or L; empty when it is not given."""
    name = locus.strip().upper().removeprefix("IG")[:1]
    if not locus.strip():
        return ""
    return "heavy" if name == "H" else "light" if name in ("K", "L") else None


def _numbers(column: pa.Array) -> pa.Array:
    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return MISSING_COUNT

    return pa.array([number(text) for text in column.to_pylist()], pa.float64())


def _productive(batch: pa.RecordBatch, chain: str, report: Report) -> pa.RecordBatch:
    """Leaves out rows that say of themselves that they are not productive."""
    name = f"productive_{chain}" if chain else "productive"
    if name not in batch.schema.names:
        return batch
    good = np.array([text.lower() in _TRUE for text in batch[name].to_pylist()], bool)
    if good.all():
        return batch
    reason = f"not productive ({chain} chain)" if chain else "not productive"
    report.reject(reason, place_of(batch, int(np.argmin(good))), int((~good).sum()))
    return batch.filter(pa.array(good))


def _without_gaps(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    ungapped = pc.replace_substring_regex(batch[name], r"[-.]", "")
    return batch.set_column(batch.schema.get_field_index(name), name, ungapped)


def _with_donor(batch: pa.RecordBatch, report: Report) -> pa.RecordBatch:
    """The donor of the rows, or else the subject of the OAS metadata line, with its study."""
    subject = str(report.metadata.get("Subject", "no"))
    if subject.lower() in ("no", "none", "") or not batch.num_rows:
        return batch
    study = report.metadata.get("Author", report.metadata.get("Run", ""))
    subject = f"{study}: {subject}"  # each study counts its subjects from 1
    names = batch.schema.names
    if "donor" not in names:
        return batch.append_column("donor", pa.array([subject] * batch.num_rows, pa.string()))
    donor = pc.if_else(pc.equal(batch["donor"], ""), subject, batch["donor"])
    return batch.set_column(names.index("donor"), "donor", donor)
