"""`python -m moe_ablm annotate`: sequence files in, one annotated parquet table out."""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from moe_ablm.data.complete import annotated
from moe_ablm.data.readers import Source
from moe_ablm.data.readers.report import why_nothing
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError
from moe_ablm.files import replacing
from moe_ablm.verbs.intake_report import add_report_argument, require_report, write_report
from moe_ablm.verbs.reading import add_reading_arguments, reading_progress, sources_of
from moe_ablm.verbs.writing import add_overwrite, out_file

COLUMNS = (
    *("sequence_aa", "germline_aa", "cdr_mask_aa", "nongermline_mask_aa"),
    *("v_gene", "j_gene", "v_call", "j_call", "cdr3_aa", "v_identity_aa"),
)
# Written where a source has them.
OPTIONAL = tuple(f"gene_segment_mask_aa_{c}" for c in CHAINS) + (
    *("cluster", "donor", "source", "label"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    add_report_argument(parser)
    parser.add_argument("--out", type=out_file(".parquet"), required=True, metavar="FILE.parquet")
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
        streams = [_stream(source, args.reannotate, args.workers) for source in sources]
        _write(streams, args.out, sources)
    write_report(args.report, [source.report for source in sources])
    _print_summary(sources, args.out, time.monotonic() - started)


def _stream(source: Source, reannotate: bool, workers: int) -> Iterator[pa.RecordBatch]:
    batches = annotated(
        source.batches(), source.report, reannotate=reannotate, workers=workers, all_columns=True
    )
    for batch in batches:
        source.report.kept += batch.num_rows
        yield batch
    source.report.settle(source.report.kept)


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
        with (
            replacing(out) as partial,
            pq.ParquetWriter(partial, schema, compression="zstd") as writer,
        ):
            for first, stream in zip(firsts, streams, strict=True):
                for batch in itertools.chain([first] if first is not None else [], stream):
                    writer.write_batch(_in_schema(batch, schema))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out} cannot be written: {reason}; nothing is left") from error


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
