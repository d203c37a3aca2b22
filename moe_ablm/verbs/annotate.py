"""`python -m moe_ablm annotate`: sequence files in, one annotated table out."""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from moe_ablm.data.complete import annotated
from moe_ablm.data.readers import Source
from moe_ablm.data.readers.columns import place_of
from moe_ablm.data.readers.report import Report, why_nothing
from moe_ablm.data.rearrangements import rearrangements
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError
from moe_ablm.files import replacing
from moe_ablm.verbs.intake_report import add_report_argument, require_report, write_report
from moe_ablm.verbs.reading import (
    add_numbering,
    add_reading_arguments,
    reading_progress,
    sources_of,
)
from moe_ablm.verbs.writing import add_overwrite, out_file

if TYPE_CHECKING:
    from moe_ablm.data.numbering import Numbering  # parasail and the germline tables

COLUMNS = (
    *("sequence_aa", "germline_aa", "cdr_mask_aa", "nongermline_mask_aa"),
    *("v_gene", "j_gene", "v_call", "j_call", "cdr3_aa", "v_identity_aa"),
)
# Written where a source has them.
OPTIONAL = tuple(f"{name}_{c}" for name in ("gene_segment_mask_aa", "numbers") for c in CHAINS) + (
    *("cluster", "donor", "source", "label", "germlines"),
)
ENDINGS = (".parquet", ".csv", ".tsv")  # .tsv has AIRR's columns, a row for each chain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    add_report_argument(parser)
    parser.add_argument(
        "--out",
        type=out_file(*ENDINGS),
        required=True,
        metavar="FILE",
        help=".parquet, .csv, or .tsv with AIRR's columns and a row for each chain",
    )
    add_numbering(parser, default=None)
    add_overwrite(parser)


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {args.out} is there already: choose another name, or --overwrite")
    require_report(args.report)
    sources = sources_of(args)
    if any(args.out.exists() and args.out.samefile(path) for s in sources for path in s.paths):
        raise UserError(f"--out {args.out} is an input: choose another name")
    for source in sources:
        if source.is_protein:
            raise UserError(f"--input {source.report.source}: general proteins, no antibody chains")
    started = time.monotonic()
    with reading_progress("annotate", sources):
        streams = [_stream(source, args) for source in sources]
        _write(streams, args.out, sources)
    write_report(args.report, [source.report for source in sources])
    _print_summary(sources, args.out, time.monotonic() - started)


def _stream(source: Source, args: argparse.Namespace) -> Iterator[pa.RecordBatch]:
    batches = annotated(
        source.batches(),
        source.report,
        reannotate=args.reannotate,
        workers=args.workers,
        all_columns=True,
    )
    for batch in batches:
        if args.numbering is not None:
            batch = _with_numbers(batch, args.numbering, source.report)
        source.report.kept += batch.num_rows
        yield batch
    source.report.settle(source.report.kept)


def _with_numbers(batch: pa.RecordBatch, scheme: str, report: Report) -> pa.RecordBatch:
    """The batch with `numbers_*`, the number of each residue, apart by spaces."""
    from moe_ablm.data.numbering import Numbering

    for chain in CHAINS:
        sequences = batch[f"sequence_aa_{chain}"].to_pylist()
        texts = [""] * len(sequences)
        for row, numbering in _numbered(batch, sequences, chain, scheme, report):
            # annotation that is trusted may be of what is no whole V domain, or not cut to it
            if isinstance(numbering, Numbering) and len(numbering.numbers) == len(sequences[row]):
                texts[row] = " ".join(numbering.numbers)
            else:
                report.note(f"{chain}: no V domain to number", place_of(batch, row))
        batch = batch.append_column(f"numbers_{chain}", pa.array(texts, pa.string()))
    return batch


def _numbered(
    batch: pa.RecordBatch, sequences: list[str], chain: str, scheme: str, report: Report
) -> "Iterator[tuple[int, Numbering | str]]":
    """Rows with a sequence and its numbering by the germlines that annotate the row."""
    from moe_ablm.data.numbering import number_chains

    first, *_ = called = [Path(name).resolve().name for name in report.germlines]
    fitting = batch["germlines"].to_pylist() if "germlines" in batch.schema.names else []
    fitting = [name or first for name in fitting] or [first] * len(sequences)
    for name, germlines in zip(called, report.germlines, strict=True):
        there = [row for row, text in enumerate(sequences) if text and fitting[row] == name]
        texts = [sequences[row] for row in there]
        yield from zip(there, number_chains(texts, chain, scheme, germlines=germlines), strict=True)


def _write(streams: list[Iterator[pa.RecordBatch]], out: Path, sources: list[Source]) -> None:
    """Writes all streams to one file, under a temporary name until it is whole.

    Raises UserError where nothing is left to write, or the file cannot be written.
    """
    firsts = [next(stream, None) for stream in streams]
    present = {name for first in firsts if first is not None for name in first.schema.names}
    names = ["sequence_id", *(f"{name}_{chain}" for chain in CHAINS for name in COLUMNS)]
    names += [name for name in OPTIONAL if name in present]
    if not present:
        why = why_nothing(source.report for source in sources)
        raise UserError(f"no antibody is left to write to {out}: {why}")
    schema = pa.schema(
        [(n, pa.float64() if n.startswith("v_identity") else pa.string()) for n in names]
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial, _Writer(partial, out.suffix, schema) as writer:
            for first, stream in zip(firsts, streams, strict=True):
                for batch in itertools.chain([first] if first is not None else [], stream):
                    writer.write(_in_schema(batch, schema))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out} cannot be written: {reason}; nothing is left") from error


class _Writer:
    """A file in the format of its ending; use it as a context manager."""

    def __init__(self, path: Path, ending: str, schema: pa.Schema):
        self._rows = 0
        self._by_chain = ending == ".tsv"
        if self._by_chain:
            empty = [pa.array([], field.type) for field in schema]
            schema = rearrangements(pa.record_batch(empty, schema=schema)).schema
        if ending == ".parquet":
            self._file = pq.ParquetWriter(path, schema, compression="zstd")
        else:
            delimiter = "\t" if self._by_chain else ","
            options = csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
            self._file = csv.CSVWriter(path, schema, write_options=options)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Writes the rows of a batch of the schema."""
        rows = rearrangements(batch, self._rows) if self._by_chain else batch
        self._file.write_batch(rows)
        self._rows += batch.num_rows


def _in_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    empty = pa.array([""] * batch.num_rows, pa.string())
    arrays = [
        batch[field.name].cast(field.type) if field.name in batch.schema.names else empty
        for field in schema
    ]
    return pa.record_batch(arrays, schema=schema)


def _print_summary(sources: list[Source], out: Path, seconds: float) -> None:
    table = Table(title=f"{out}: {seconds:.1f} s", title_justify="left", highlight=True)
    for name in ("source", "", "rows", "first"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for report in (source.report for source in sources):
        table.add_row(f"{report.origin} ({report.format})", "read", f"{report.read:,}")
        table.add_row("", "annotated", f"{report.kept:,}")
        if report.joined:
            table.add_row("", "joined to an annotated one", f"{report.joined:,}")
        for kind, counts in (("rejected", report.rejected), ("note", report.notes)):
            for reason, rows in counts.most_common():
                table.add_row("", f"{kind}: {reason}", f"{rows:,}", report.first[reason])
        table.add_section()
    Console(markup=False, emoji=False).print(table)
