"""`python -m moe_ablm prepare`: sequence files in, a dataset directory out."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from moe_ablm.data.complete import annotated
from moe_ablm.data.intake import SplitRule
from moe_ablm.data.prepare import prepare, require_new
from moe_ablm.data.readers import FORMATS, Source, open_sources, parse_columns

HELP = "sequence files -> a dataset directory"
_EPILOG = "formats: " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="FILE",
        help="a file of sequences, or heavy=H.fasta,light=L.fasta; repeat it for several sources",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--format", metavar="NAME", help="instead of what the content says")
    parser.add_argument(
        "--columns",
        metavar="heavy=A,light=B",
        help="columns of the chains, and of id, donor, label, cluster",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("fail", "skip"),
        default="fail",
        help="stop at a malformed row (default), or count it and leave it out",
    )
    parser.add_argument(
        "--reannotate", action="store_true", help="replace annotation that is there"
    )
    parser.add_argument("--recluster", action="store_true", help="replace a `cluster` column")
    parser.add_argument(
        "--identity",
        type=float,
        default=SplitRule.identity,
        help="identity that links CDRH3s (mmseqs: chains) to a cluster (default %(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=get_args(SplitRule.__annotations__["by"]),
        default=SplitRule.by,
        help="what stays whole on one side of the split (default %(default)s)",
    )
    for name in ("valid", "test"):
        parser.add_argument(
            f"--{name}-donors",
            metavar="A,B",
            default="",
            help=f"donors of the {name} split, for --split donor (default: by hash)",
        )
    parser.add_argument("--licence", default="not stated", help="licence note for dataset.json")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes for annotation"
    )


def run(args: argparse.Namespace) -> None:
    require_new(args.out)
    rule = SplitRule(
        args.split,
        args.identity,
        args.recluster,
        *(tuple(filter(None, d.split(","))) for d in (args.valid_donors, args.test_donors)),
    )
    sources = open_sources(
        args.input,
        format=args.format,
        columns=parse_columns(args.columns),
        on_bad_row=args.on_bad_row,
    )

    def stream(source: Source) -> Iterator:
        batches = source.batches()
        if source.is_protein:
            return batches
        return annotated(batches, source.report, reannotate=args.reannotate, workers=args.workers)

    with _progress(sources):
        card = prepare(
            [(s.report, stream(s)) for s in sources], args.out, licence=args.licence, rule=rule
        )
    _print_summary(card, args.out)


def _progress(sources: list[Source]) -> Progress:
    """A bar over the bytes of all files, to which sources report; silent without a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("prepare {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rows]} rows/s"),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task("", total=sum(p.stat().st_size for s in sources for p in s.paths), rows="")
    before = 0
    for source in sources:

        def show(consumed: int, source: Source = source, before: int = before) -> None:
            elapsed = bar.tasks[task].elapsed or 1.0
            rows = sum(s.report.read for s in sources)
            bar.update(
                task,
                completed=before + consumed,
                description=source.report.origin,
                rows=f"{rows / elapsed:,.0f}",
            )

        source.report.progress = show
        before += sum(p.stat().st_size for p in source.paths)
    return bar


def _print_summary(card: dict, out: Path) -> None:
    console = Console()
    table = Table(title=f"{out}", title_justify="left", highlight=True)
    table.add_column("source / split")
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_column("first")
    for source in card["sources"]:
        name = f"{source['name']} ({source['format']})"
        table.add_row(name, "read", f"{source['read']:,}")
        table.add_row("", "kept", f"{source['kept']:,}")
        if source["joined"]:
            table.add_row("", "joined to a kept one", f"{source['joined']:,}")
        for kind, counts in (("rejected", source["rejected"]), ("note", source["notes"])):
            for reason, rows in counts.items():
                table.add_row("", f"{kind}: {reason}", f"{rows:,}", source["first"][reason])
        table.add_section()
    for split, rows in card["splits"].items():
        quarter, half = (card["fractions"][split][f] for f in ("quarter", "half"))
        table.add_row(split, f"quarter {quarter:,}, half {half:,}, full", f"{rows:,}")
    table.add_section()
    table.add_row("clusters", card["cluster_rule"], f"{card['clusters']:,}")
    tokens = sum(card["residues"].values())
    table.add_row("tokens", "residues of both chains", f"{tokens:,}")
    console.print(table)
    for warning in card["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
