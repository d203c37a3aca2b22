"""`python -m moe_ablm simulate`: antibody pairs from human germlines, with exact truth."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from moe_ablm.data.simulate import BACKENDS, SimulationParams, pairing_information, simulate
from moe_ablm.errors import UserError
from moe_ablm.files import replacing
from moe_ablm.progress import bar
from moe_ablm.verbs.writing import add_overwrite, out_directory, out_file

LICENCE = "simulated from OGRDB germline genes; no restriction"
MOST_PAIRS = 10**9  # a week's work and some 500 GB
_WRITERS = {".parquet": pa.parquet.ParquetWriter, ".csv": pa.csv.CSVWriter}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, required=True, help="number of pairs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the repertoire (default 0)")
    parser.add_argument(
        "--out",
        type=_table_or_dataset,
        required=True,
        help="FILE.parquet or FILE.csv for a table; a name without ending is a dataset directory",
    )
    add_overwrite(parser)
    parser.add_argument(
        "--pairing-tilt",
        type=float,
        default=0.0,
        help="log odds for pairing V genes of one class (default 0: chains are independent)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="germline",
        help="model of V(D)J recombination: germline (default), or olga (needs the extra `olga`)",
    )


def _table_or_dataset(text: str) -> Path:
    tables = Path(text).suffix in _WRITERS
    return out_file(*_WRITERS)(text) if tables else out_directory(text)


def run(args: argparse.Namespace) -> None:
    if args.out.is_file() and not args.overwrite:
        raise UserError(f"--out {args.out} is there already: choose another name, or --overwrite")
    if not 1 <= args.pairs <= MOST_PAIRS:
        raise UserError(f"--pairs {args.pairs}: expected at least 1 and at most {MOST_PAIRS:,}")
    params = SimulationParams(pairing_tilt=args.pairing_tilt, backend=args.backend)
    batches = with_progress(simulate(args.pairs, args.seed, params), args.pairs)
    if args.out.suffix in _WRITERS:
        write_table(batches, args.out)
    else:
        from moe_ablm.data.prepare import prepare_batches

        source = (
            f"simulated: seed {args.seed}, backend {args.backend}, "
            f"pairing tilt {args.pairing_tilt:g}"
        )
        prepare_batches(batches, args.out, source=source, licence=LICENCE)
    print(
        f"{args.pairs:,} simulated pairs -> {args.out} (heavy and light V genes share "
        f"{pairing_information(params):.4f} bits)"
    )


def write_table(batches: Iterable[pa.RecordBatch], out: Path) -> None:
    """Writes batches to a .parquet or .csv file, under a temporary name until it is whole.

    Raises UserError where the file cannot be written; nothing is left of it then.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial, contextlib.ExitStack() as stack:
            writer = None
            for batch in batches:
                if writer is None:
                    writer = stack.enter_context(_WRITERS[out.suffix](partial, batch.schema))
                writer.write_batch(batch)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out} cannot be written: {reason}; nothing is left") from error


def with_progress(batches: Iterable[pa.RecordBatch], total: int) -> Iterator[pa.RecordBatch]:
    """Passes batches on; draws a bar with rate and time left on a terminal."""
    columns = (
        TextColumn("simulate"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    with bar(*columns, transient=False) as progress:
        task = progress.add_task("", total=total)
        for batch in batches:
            yield batch
            progress.advance(task, batch.num_rows)
