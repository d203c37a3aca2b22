"""Flags, sources and progress bar of the verbs that read sequence files."""

import argparse
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from moe_ablm.data.germline import HUMAN, parse_germlines
from moe_ablm.data.positions import SCHEMES
from moe_ablm.data.readers import FORMATS, Reading
from moe_ablm.errors import UserError
from moe_ablm.progress import WatchedBar

if TYPE_CHECKING:  # pyarrow only when something is read
    from moe_ablm.data.readers import Source

RUN = "a trained run, an import, or hf:ORG/NAME[@REVISION] on the Hugging Face hub"  # of --run
ASKED = f"{RUN}, or transformers:DIR"  # of --run of verbs that only ask


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
    parser.add_argument("--reannotate", action="store_true", help="replace existing annotation")
    add_germlines(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes for annotation (default: all cores)",
    )


def add_format_arguments(parser: argparse.ArgumentParser, bad_row: str) -> None:
    """Flags that say how files are read, the same for every verb that reads any."""
    parser.epilog = "formats: " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--format", metavar="NAME", help="file format (default: detected)")
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
        help="what to do with chains of nucleotides (default: translate them where a repertoire "
        "table or a FASTA holds nothing else)",
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
        "--contigs", type=Path, metavar="FASTA", help="contigs of a 10x table without regions"
    )


def add_germlines(parser: argparse.ArgumentParser) -> None:
    """The flag that says by which germlines V domains are found, annotated and numbered."""
    parser.add_argument(
        "--germlines",
        default=HUMAN,
        metavar="human,DIR",
        help="by which V domains are found, annotated and numbered: human (default), a folder of "
        "FASTA files of another species with IMGT's gaps (OGRDB's), or several, of which those "
        "that fit an antibody best are taken",
    )


def add_numbering(parser: argparse.ArgumentParser, default: str | None = "imgt") -> None:
    """The flag that says whose numbers residues have."""
    parser.add_argument(
        "--numbering",
        choices=SCHEMES,
        default=default,
        help="numbering scheme of residues (default: " + ("%(default)s)" if default else "none)"),
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """What `add_format_arguments` and `add_germlines` say of how files are read.

    Raises:
      UserError: see `parse_columns`, `parse_germlines`.
    """
    from moe_ablm.data.readers import parse_columns

    return Reading(
        columns=parse_columns(args.columns),
        nucleotides=args.nucleotides,
        keep_flagged=args.keep_flagged,
        dominance=args.dominance,
        contigs=args.contigs,
        germlines=parse_germlines(getattr(args, "germlines", HUMAN)),  # not of every verb
    )


def sources_of(args: argparse.Namespace) -> "list[Source]":
    """The sources that the flags name; nothing but the first lines of files is read yet.

    Raises:
      UserError: see `open_sources`, `reading_of`; `--workers` is not positive.
    """
    from moe_ablm.data.readers import open_sources

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected at least 1")
    return open_sources(
        args.input,
        format=args.format,
        on_bad_row=args.on_bad_row,
        reading=reading_of(args),
    )


class Course:
    """How far the reading of some sources is, and how many rows there will be."""

    def __init__(self, sources: "list[Source]"):
        self._reports = [source.report for source in sources]
        self._sizes = [sum(p.stat().st_size for p in source.paths) for source in sources]
        self._consumed = [0] * len(sources)
        for number, report in enumerate(self._reports):
            report.progress = functools.partial(self._consumed.__setitem__, number)

    @property
    def settled(self) -> int:
        """Rows whose fate is known."""
        return sum(r.kept + r.joined + r.rejected.total() for r in self._reports)

    @property
    def at(self) -> str:
        """The source that is being read; "" when all rows are settled."""
        parts = zip(self._reports, self._consumed, self._sizes, strict=True)
        names = [report.origin for report, consumed, size in parts if consumed < size]
        if not names and self.settled < sum(report.read for report in self._reports):
            return self._reports[-1].origin
        return names[0] if names else ""

    def rows(self) -> int | None:
        """Rows of all sources, by the share of their bytes that is read; None: nothing is yet."""
        share = sum(self._consumed) / max(sum(self._sizes), 1)
        read = sum(report.read for report in self._reports)
        return max(round(read / share), read) if share else None

    def antibodies(self) -> int | None:
        """As `rows`, without the share of those that are left out or joined to others."""
        rows, read = self.rows(), sum(report.read for report in self._reports)
        lost = sum(r.joined + r.rejected.total() for r in self._reports)
        return round(rows * (read - lost) / read) if rows and read else None


def reading_progress(verb: str, sources: "list[Source]", after: str = "") -> WatchedBar:
    """A bar over the rows of all files; silent without a terminal.

    Use as a context manager around whatever exhausts the sources.

    Args:
      verb: what is done.
      sources: to be read.
      after: what remains to be done when all rows are read.
    """
    course, began = Course(sources), time.monotonic()

    def look() -> dict[str, Any]:
        speed = course.settled / max(time.monotonic() - began, 1e-3)
        rate = f"{speed:,.0f} rows/s" if course.at else ""
        return {
            "completed": course.settled,
            "total": course.rows(),
            "description": course.at or after,
            "rate": rate,
        }

    columns = (
        TextColumn(f"{verb}: {{task.description}}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    return WatchedBar(look, *columns)
