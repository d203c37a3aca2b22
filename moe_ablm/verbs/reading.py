"""Flags, sources and progress bar of the verbs that read sequence files."""

import argparse
import itertools
import os
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moe_ablm.data.positions import SCHEMES
from moe_ablm.data.readers import FORMATS, Reading, Source, open_sources, parse_columns
from moe_ablm.errors import UserError
from moe_ablm.progress import bar


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which files are read, how, and how many processes annotate."""
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="FILE",
        help="a file of sequences, or heavy=H.fasta,light=L.fasta; repeat it for several sources",
    )
    add_format_arguments(parser, "stop at a malformed row (default), or count it and leave it out")
    parser.add_argument(
        "--reannotate", action="store_true", help="replace annotation that is there"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes for annotation (default: all cores)",
    )


def add_format_arguments(parser: argparse.ArgumentParser, bad_row: str) -> None:
    """Flags that say how files are read, the same for every verb that reads any."""
    parser.epilog = "formats: " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--format", metavar="NAME", help="instead of what the content says")
    parser.add_argument(
        "--columns",
        metavar="heavy=A,light=B",
        help="columns of the chains (or sequence=C with cell, locus, umis, reads), and of id, "
        "donor, label, cluster",
    )
    parser.add_argument("--on-bad-row", choices=("fail", "skip"), default="fail", help=bad_row)
    parser.add_argument(
        "--nucleotides",
        choices=("refuse", "translate"),
        help="chains of nucleotides (default: translated where a repertoire table or a FASTA holds "
        "nothing else)",
    )
    parser.add_argument(
        "--keep-flagged",
        action="store_true",
        help="keep rows flagged as not productive, no cell, of low confidence, not of full length",
    )
    parser.add_argument(
        "--dominance",
        type=float,
        default=Reading.dominance,
        metavar="RATIO",
        help="how many times as abundant as the next a cell's heavy chain must be (default "
        "%(default)g)",
    )
    parser.add_argument(
        "--contigs", type=Path, metavar="FASTA", help="of a 10x table without regions"
    )


def add_numbering(parser: argparse.ArgumentParser, default: str | None = "imgt") -> None:
    """The flag that says whose numbers residues have."""
    parser.add_argument(
        "--numbering",
        choices=SCHEMES,
        default=default,
        help="of residues" + (" (default: %(default)s)" if default else " (default: none)"),
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """What `add_format_arguments` says of how files are read."""
    return Reading(
        columns=parse_columns(args.columns),
        nucleotides=args.nucleotides,
        keep_flagged=args.keep_flagged,
        dominance=args.dominance,
        contigs=args.contigs,
    )


def sources_of(args: argparse.Namespace) -> list[Source]:
    """The sources that the flags name; nothing but the first lines of files is read yet.

    Raises:
      UserError: see `open_sources`; `--workers` is not positive.
    """
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected at least 1")
    return open_sources(
        args.input,
        format=args.format,
        on_bad_row=args.on_bad_row,
        reading=reading_of(args),
    )


def reading_progress(verb: str, sources: list[Source]) -> Progress:
    """A bar over the bytes of all files, to which sources report; silent without a terminal.

    Use as a context manager around whatever exhausts the sources.
    """
    columns = (
        TextColumn(f"{verb} {{task.description}}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]} rows/s"),
    )
    shown = bar(*columns)
    sizes = [sum(path.stat().st_size for path in source.paths) for source in sources]
    task = shown.add_task("", total=sum(sizes), rate="")
    for source, before in zip(sources, itertools.accumulate(sizes, initial=0), strict=False):

        def show(consumed: int, source: Source = source, before: int = before) -> None:
            rows = sum(s.report.read for s in sources) / (shown.tasks[task].elapsed or 1.0)
            shown.update(
                task,
                completed=before + consumed,
                description=source.report.origin,
                rate=f"{rows:,.0f}",
            )

        source.report.progress = show
    return shown
