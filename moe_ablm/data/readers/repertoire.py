"""Repertoire tables: OAS (paired, unpaired), AIRR and Change-O rearrangements, 10x contigs.

Only sequences, ids, cells, counts and donors are taken from them. Genes and regions are annotated
anew, so that antibodies of different sources are described, clustered and split by one rule.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.cells import MISSING_COUNT, join_cells
from moe_ablm.data.readers.columns import (
    ALIGNED_CHAINS,
    AMINO_ACID_CHAINS,
    FLAGS,
    LINE,
    NUCLEOTIDE_CHAINS,
    ROW,
    V_STARTS,
    column_named,
    given_columns,
    listed,
    once,
    place_of,
)
from moe_ablm.data.readers.contig_json import is_contig_json, read_contigs
from moe_ablm.data.readers.missing import is_missing, without_words
from moe_ablm.data.readers.nucleotides import first_codons, translated
from moe_ablm.data.readers.options import Reading
from moe_ablm.data.readers.report import Report
from moe_ablm.data.readers.rows import read_rows
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError

# AIRR's, Change-O's and 10x's names; of several that are there a row takes the first with a value.
_NAMES = {
    "sequence_id": ("sequence_id",),
    "cell": ("cell_id", "cell"),
    "locus": ("locus",),
    "v_call": ("v_call",),
    "c_call": ("c_call",),
    "umis": ("umi_count", "umis", "umicount", "duplicate_count", "dupcount"),
    "reads": ("consensus_count", "conscount", "reads", "read_count"),
    "donor": ("subject_id", "subject", "donor", "donor_id"),
    "productive": ("productive", "functional"),
    "is_cell": ("is_cell",),
    "high_confidence": ("high_confidence",),
    "full_length": ("full_length",),
}
_CODON = "codon"
_SAMPLES = ("repertoire_id", "sample_id", "subject_id")
_TEN_X = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")
_TEN_X_DONORS = ("donor", "sample", "origin")
_TRUE = ("t", "true", "1", "1.0", "yes", "y")
_REASON_OF_FLAG = {
    "productive": "not productive",
    "is_cell": "not a cell",
    "high_confidence": "low confidence",
    "full_length": "not full length",
}
# A gene or locus anywhere in a text: "Homsap IGKV1-39*01 F", "IGHV3-23*00(1251.2)", "IGH".
_GENE = re.compile(r"(?<![A-Z])(?:IG([HKL])|TR([ABGD]))")
_ISOTYPE = re.compile(r"IG[GAMDE]\d*")
_CHAIN_NAMES = {
    "heavy": ("H", "VH", "HEAVY", "HC"),
    "light": ("L", "K", "VL", "VK", "LIGHT", "KAPPA", "LAMBDA", "LC"),
}
T_CELL = "T-cell receptor"


def read_oas_paired(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
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
            batch = _without_gaps(batch, f"sequence_aa_{chain}")
            if not reading.keep_flagged:
                why = f"not productive ({chain} chain)"
                batch = _true(batch, f"productive_{chain}", why, report)
        yield _with_donor(batch, report)


def read_oas_unpaired(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
    """OAS unpaired CSV, with or without its first line of JSON; every row is a single chain."""
    yield from _read_chains(path, report, reading, cells=False)


def read_airr(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
    """AIRR and Change-O tables; chains of one `cell_id` (of one sample) become an antibody."""
    yield from _read_chains(path, report, reading, cells=True)


def read_10x(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
    """10x `*_contig_annotations.csv`: seven regions joined to the V domain.

    Of Cell Ranger before 5, which writes no regions, the contigs' own FASTA is translated.
    """
    contigs = _contigs(reading.contigs) if reading.contigs else None

    def choose(header: Sequence[str]) -> dict[str, str]:
        for column in ("barcode", "contig_id", "cdr3"):
            once(header, column, report.source)
        lacking = [name for name in _TEN_X if name not in header]
        if contigs is None and lacking:
            raise UserError(
                f"{report.source}: contigs without regions (Cell Ranger before 5): no column "
                f"{lacking[0]}; give the FASTA beside the table: --contigs filtered_contig.fasta"
            )
        wanted = ("barcode", "contig_id", "chain", *FLAGS, *_TEN_X, *_TEN_X_DONORS)
        genes = {"v_call": "v_gene", "c_call": "c_gene", "umis": "umis", "reads": "reads"}
        mapping = {name: name for name in wanted} | genes
        return {name: column for name, column in mapping.items() if column in header}

    def rows() -> Iterator[pa.RecordBatch]:
        if is_contig_json(path):
            for batch in read_contigs(path, report):
                yield without_words(batch, report)
        else:
            yield from read_rows(path, report, choose)

    def chains() -> Iterator[pa.RecordBatch]:
        for batch in rows():
            names = batch.schema.names
            donors = [batch[n] for n in _TEN_X_DONORS if n in names]
            cell = pc.binary_join_element_wise(*donors, batch["barcode"], "|")
            columns = {
                "cell": pc.if_else(pc.equal(batch["barcode"], ""), "", cell),
                "sequence_id": batch["contig_id"],
                "donor": _first_given(donors, batch.num_rows),
            }
            if contigs is None:
                regions = [batch[n] for n in _TEN_X if n in names]
                columns["sequence"] = pc.binary_join_element_wise(*regions, "")
            else:
                found = [contigs.get(name, "") for name in batch["contig_id"].to_pylist()]
                columns["sequence"] = pa.array(found, pa.string())
            for name, column in columns.items():
                batch = _with(batch, name, column)
            if contigs is None:
                batch = _whole(batch, report)
            yield from _immunoglobulins(batch, report, reading, translate=contigs is not None)

    yield from join_cells(chains(), report, reading)


def _contigs(path: Path) -> dict[str, str]:
    """Nucleotides by the name of the contig, all in memory: some 1 KB each."""
    from moe_ablm.data.readers.fasta import records

    return {r.id: r.sequence for r in records(path, Report(str(path)))}


def _whole(batch: pa.RecordBatch, report: Report) -> pa.RecordBatch:
    """Leaves out contigs that lack a region: what is left of them is no V domain."""
    empty = np.stack([pc.equal(batch[name], "").to_numpy(zero_copy_only=False) for name in _TEN_X])
    if not empty.any():
        return batch
    for lacking in np.unique(empty, axis=1).T:
        rows = np.flatnonzero((empty == lacking[:, None]).all(axis=0))
        if lacking.all():
            report.reject("no sequence", place_of(batch, rows[0]), len(rows))
        elif lacking.any():
            names = ", ".join(np.array(_TEN_X)[lacking])
            report.reject(f"region missing: {names}", place_of(batch, rows[0]), len(rows))
    return batch.filter(pa.array(~empty.any(axis=0)))


def _read_chains(
    path: Path, report: Report, reading: Reading, cells: bool
) -> Iterator[pa.RecordBatch]:
    alternatives: dict[str, list[str]] = {}  # column -> columns of the batch, the first one first
    translate = False
    aligned: list[bool] = []  # of the columns of nucleotides, if those are read

    def choose(header: Sequence[str]) -> dict[str, str]:
        nonlocal translate, aligned
        mapping = {}
        given = given_columns(header, report.source, reading.columns or {})
        names = _NAMES | ({} if "sequence" in given else {"sequence": AMINO_ACID_CHAINS})
        for name, known in names.items():
            columns = [given[name]] if name in given else _present(header, known)
            for i, column in enumerate(dict.fromkeys(columns)):
                mapping[f"{name}#{i}"] = column
                alternatives.setdefault(name, []).append(f"{name}#{i}")
        if "sequence" in given:
            mapping["sequence#0"], alternatives["sequence"] = given["sequence"], ["sequence#0"]
            translate = reading.nucleotides == "translate"
        elif "sequence" not in alternatives:
            bases = tuple(name for name in NUCLEOTIDE_CHAINS if column_named(header, name))
            if not bases or reading.nucleotides == "refuse":
                raise UserError(
                    f"{report.source}: no column {AMINO_ACID_CHAINS[-1]}; found {listed(header)}"
                )
            for name, names_of in ({"sequence": bases} | V_STARTS).items():
                present = _present(header, names_of)
                alternatives[name] = [f"{name}#{i}" for i in range(len(present))]
                mapping |= dict(zip(alternatives[name], present, strict=True))
            translate, aligned = True, [name in ALIGNED_CHAINS for name in bases]
        return mapping | {name: name for name in _SAMPLES if name in header}

    def chains() -> Iterator[pa.RecordBatch]:
        for batch in read_rows(path, report, choose):
            columns = {
                name: _first_given([batch[n] for n in some], batch.num_rows)
                for name, some in alternatives.items()
            }
            samples = [batch[n] for n in _SAMPLES if n in batch.schema.names]
            cell = columns.pop("cell", None)
            if cells and cell is not None:
                key = pc.binary_join_element_wise(*samples, cell, "|")
                columns["cell"] = pc.if_else(pc.equal(cell, ""), "", key)
            if aligned:
                reads = [batch[n] for n in alternatives["sequence"]]
                starts = [columns.pop(name) for name in V_STARTS]
                columns[_CODON] = _first_codons(reads, aligned, starts)
            columns |= {ROW: batch[ROW], LINE: batch[LINE]}
            yield from _immunoglobulins(
                pa.record_batch(columns), report, reading, translate=translate
            )

    for batch in join_cells(chains(), report, reading):
        yield _with_donor(batch, report)


def _first_codons(
    reads: Sequence[pa.Array], aligned: Sequence[bool], starts: Sequence[pa.Array]
) -> pa.Array:
    """`first_codons` of the first read of each row that is not empty."""
    texts = [column.to_pylist() for column in reads]
    chosen = [
        next((k for k, text in enumerate(row) if text), 0) for row in zip(*texts, strict=True)
    ]
    codons = first_codons(
        [texts[k][i] for i, k in enumerate(chosen)],
        [aligned[k] for k in chosen],
        *(column.to_pylist() for column in starts),
    )
    return pa.array(codons, pa.int64())


def _present(header: Sequence[str], names: Sequence[str]) -> list[str]:
    found = (column_named(header, name) for name in names)
    return [column for column in found if column is not None]


def _first_given(columns: Sequence[pa.Array], rows: int) -> pa.Array:
    """For each row the first value that is not empty."""
    if not columns:
        return pa.array([""] * rows, pa.string())
    first, *others = columns
    for other in others:
        first = pc.if_else(pc.equal(first, ""), other, first)
    return first


def _with(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    if name not in batch.schema.names:
        return batch.append_column(name, column)
    return batch.set_column(batch.schema.get_field_index(name), name, column)


def _immunoglobulins(
    batch: pa.RecordBatch, report: Report, reading: Reading, *, translate: bool
) -> Iterator[pa.RecordBatch]:
    """Rows of heavy and light chains as `join_cells` wants them; others are rejected."""
    batch = _without_gaps(batch, "sequence")
    batch = _kept(batch, pc.not_equal(batch["sequence"], ""), "no sequence", report)
    for flag, reason in _REASON_OF_FLAG.items():
        if not reading.keep_flagged:
            batch = _true(batch, flag, reason, report)
    names = batch.schema.names
    texts = [batch[n].to_pylist() for n in ("locus", "chain", "v_call", "c_call") if n in names]
    chain = [chain_of(row) for row in zip(*texts, strict=True)] or [""] * batch.num_rows
    batch = _with(batch, "chain", pa.array(chain, pa.string()))
    batch = _kept(batch, pc.not_equal(batch["chain"], T_CELL), T_CELL, report)
    if translate or reading.nucleotides == "translate":
        codon = _CODON if _CODON in batch.schema.names else None
        batch = translated(batch, ["sequence"], report, reading, "chain", codon)
    empty = pa.array([""] * batch.num_rows, pa.string())
    names = batch.schema.names
    columns = {
        name: batch[name] if name in names else empty
        for name in ("cell", "chain", "sequence", "sequence_id", "donor")
    }
    columns |= {name: _numbers(batch[name]) for name in ("umis", "reads") if name in names}
    yield pa.record_batch(columns | {ROW: batch[ROW], LINE: batch[LINE]})


def chain_of(texts: Sequence[str]) -> str:
    """The chain that texts such as a locus, a V call and a C call name, the first that does.

    Returns:
      "heavy", "light", `T_CELL`, or "" where none names a locus.
    """
    for text in texts:
        upper = text.strip().upper()
        if found := _GENE.search(upper):
            return T_CELL if found[2] else "heavy" if found[1] == "H" else "light"
        if _ISOTYPE.fullmatch(upper):
            return "heavy"
        for chain, names in _CHAIN_NAMES.items():
            if upper in names:
                return chain
    return ""


def _numbers(column: pa.Array) -> pa.Array:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            return MISSING_COUNT
        return value if 0 <= value < float("inf") else MISSING_COUNT

    return pa.array([number(text) for text in column.to_pylist()], pa.float64())


def _true(batch: pa.RecordBatch, name: str, reason: str, report: Report) -> pa.RecordBatch:
    """Leaves out rows whose flag `name` is there, is not blank and does not say yes.

    "None" is what Cell Ranger writes where it cannot tell whether a contig is productive.
    """
    if name not in batch.schema.names:
        return batch

    def says_yes(text: str) -> bool:
        text = text.strip().lower()
        return text in _TRUE or text.startswith(name) or (text != "none" and is_missing(text))

    known = {text: says_yes(text) for text in pc.unique(batch[name]).to_pylist()}
    good = pa.array([known[text] for text in batch[name].to_pylist()], pa.bool_())
    return _kept(batch, good, reason, report)


def _kept(batch: pa.RecordBatch, good: pa.Array, reason: str, report: Report) -> pa.RecordBatch:
    """The rows that are `good`; the others are rejected."""
    keep = np.asarray(good, bool)
    if keep.all():
        return batch
    report.reject(reason, place_of(batch, int(np.argmin(keep))), int((~keep).sum()))
    return batch.filter(pa.array(keep))


def _without_gaps(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    return _with(batch, name, pc.replace_substring_regex(batch[name], r"[-.]", ""))


def _with_donor(batch: pa.RecordBatch, report: Report) -> pa.RecordBatch:
    """The donor of the rows, or else the subject of the OAS metadata line, with its study."""
    subject = str(report.metadata.get("Subject", "no"))
    if subject.lower() == "no" or is_missing(subject) or not batch.num_rows:
        return batch
    study = report.metadata.get("Author", report.metadata.get("Run", ""))
    subject = f"{study}: {subject}"  # each study counts its subjects from 1
    names = batch.schema.names
    if "donor" not in names:
        return batch.append_column("donor", pa.array([subject] * batch.num_rows, pa.string()))
    return _with(batch, "donor", pc.if_else(pc.equal(batch["donor"], ""), subject, batch["donor"]))
