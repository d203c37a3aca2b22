"""From --input to checked batches: recognises the format of a file and calls its reader."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from moe_ablm.data.dataset import sha256_file
from moe_ablm.data.readers import fasta, repertoire, study
from moe_ablm.data.readers.check import LONGEST_CHAIN, LONGEST_PROTEIN, check_batch
from moe_ablm.data.readers.columns import (
    STUDY_COLUMNS,
    chain_columns,
    format_of_columns,
    format_of_header,
    no_chains,
)
from moe_ablm.data.readers.contig_json import is_contig_json
from moe_ablm.data.readers.options import AS_USUAL, FORMATS, Reading
from moe_ablm.data.readers.parquet import is_parquet
from moe_ablm.data.readers.report import Report, existing_file, nearest
from moe_ablm.data.readers.rows import columns_with_chains, header_of
from moe_ablm.data.readers.stream import first_lines
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError

_READERS = {
    "table": study.read_table,
    "joined": study.read_joined,
    "lines": study.read_lines,
    "oas-paired": repertoire.read_oas_paired,
    "oas-unpaired": repertoire.read_oas_unpaired,
    "airr": repertoire.read_airr,
    "10x": repertoire.read_10x,
}


@dataclass
class Source:
    """One source of antibodies: a file, or a FASTA file for each chain.

    Attributes:
      paths: the file, or the heavy and the light FASTA.
      format: a name out of `FORMATS`.
      report: what became of its rows; complete once `batches` is exhausted.
      reading: how it is read.
      letters: allowed in sequences (see `check_batch`).
    """

    paths: tuple[Path, ...]
    format: str
    report: Report
    reading: Reading = AS_USUAL
    letters: str = AMINO_ACIDS

    @property
    def is_protein(self) -> bool:
        """General proteins, which are not annotated."""
        return self.format == "protein"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Checked batches: columns of the study, `_row`, `_line` (see `check_batch`)."""
        if self.format == "protein":
            raw = fasta.read_proteins(self.paths[0], self.report)
        elif self.format == "fasta":
            raw = fasta.read_chains(self.paths, self.report, self.reading)
        else:
            raw = _READERS[self.format](self.paths[0], self.report, self.reading)
        longest = LONGEST_PROTEIN if self.is_protein else LONGEST_CHAIN
        delivered = rejected = 0
        while True:
            before = self.report.rejected.total()  # who takes the batches rejects rows, too
            batch = next(raw, None)
            if batch is not None:
                batch = check_batch(batch, self.report, longest=longest, letters=self.letters)
                delivered += batch.num_rows
            rejected += self.report.rejected.total() - before
            if batch is None:
                break
            yield batch
        self.report.settle(delivered, rejected)
        self.report.files = [
            {"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in self.paths
        ]


def open_sources(
    inputs: Sequence[str],
    *,
    format: str | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
    letters: str = AMINO_ACIDS,
    reading: Reading = AS_USUAL,
) -> list[Source]:
    """Finds the format of every input by its content; nothing but its first lines is read yet.

    Args:
      inputs: paths, or `heavy=H.fasta,light=L.fasta`. Two FASTA files with equal ids in a row are
        taken as the two chains of the same antibodies.
      format: a name out of `FORMATS`; None: recognised by the content.
      on_bad_row: whether a malformed row raises UserError or is counted and left out.
      letters: allowed in sequences (see `check_batch`).
      reading: how sources are read.

    Raises:
      UserError: no such file, an empty one, or none of the formats (says which columns were found).
    """
    if format is not None and format not in FORMATS:
        near = nearest(format, FORMATS)
        raise UserError(
            f"--format {format}: expected one of {', '.join(FORMATS)}"
            + (f"; did you mean {near}?" if near else "")
        )
    if reading.contigs is not None:
        existing_file(reading.contigs, "--contigs")
    sources: list[Source] = []
    for text in inputs:
        paths = _paths(text)
        kind = format or _format_of(paths, reading)
        if len(paths) == 2 and kind != "fasta":
            raise UserError(f"--input {text}: two files are read together only as FASTA")
        if kind == "fasta" and sources and _are_two_chains(sources[-1], paths):
            paths = (*sources.pop().paths, *paths)
        names = " + ".join(map(str, paths))
        origin = " + ".join(p.name for p in paths)
        report = Report(names, on_bad_row, format=kind, origin=origin, germlines=reading.germlines)
        sources.append(Source(paths, kind, report, reading, letters))
    return sources


def _paths(text: str) -> tuple[Path, ...]:
    if text.startswith("heavy=") and ",light=" in text:
        heavy, _, light = text.removeprefix("heavy=").partition(",light=")
        return existing_file(Path(heavy)), existing_file(Path(light))
    return (existing_file(Path(text)),)


def _format_of(paths: tuple[Path, ...], reading: Reading) -> str:
    path, lines = paths[0], []
    if not is_parquet(path):
        if is_contig_json(path):
            return "10x"
        lines = first_lines(path, 1)
        if lines and lines[0].startswith(">"):
            return "protein" if fasta.is_protein_header(lines[0]) else "fasta"
    if reading.columns is not None:
        return format_of_columns(reading.columns)
    header = header_of(path)
    kind = format_of_header(header)
    if kind is None and study.is_line_of_chains(lines[0] if lines else ""):
        return "lines"
    if kind is None or (kind == "table" and _second_chain(path, header, reading)):
        raise UserError(no_chains(header, str(path), columns_with_chains(path)))
    return kind


def _second_chain(path: Path, header: Sequence[str], reading: Reading) -> bool:
    """Whether a table of which one chain's column is known holds the other under another name."""
    heavy, light = chain_columns(header)
    if heavy and light:
        return False
    missing = "light" if heavy else "heavy"
    from moe_ablm.data.annotate import chains_of  # parasail and the germline tables

    for name, values in columns_with_chains(path).items():
        if name not in (heavy, light, *STUDY_COLUMNS):
            found = chains_of(values, reading.germlines)
            if found.count(missing) * 2 > len(found):
                return True
    return False


def _are_two_chains(before: Source, paths: tuple[Path, ...]) -> bool:
    if before.format != "fasta" or len(before.paths) != 1 or len(paths) != 1:
        return False
    return fasta.same_first_ids(before.paths[0], paths[0])
