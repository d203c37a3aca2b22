"""`python -m moe_ablm prepare`: sequence files in, a dataset directory out."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from moe_ablm.data.complete import annotated
from moe_ablm.data.intake import SplitRule
from moe_ablm.data.prepare import prepare, require_new
from moe_ablm.data.readers import Source
from moe_ablm.verbs.intake_report import add_report_argument, require_report, write_report
from moe_ablm.verbs.reading import add_reading_arguments, reading_progress, sources_of
from moe_ablm.verbs.writing import out_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    add_report_argument(parser)
    parser.add_argument(
        "--out", type=out_directory, required=True, metavar="DIR", help="new directory to write"
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
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="leave out antibodies whose chains stand in an earlier row of any file",
    )
    parser.add_argument("--licence", default="not stated", help="licence note for dataset.json")


def run(args: argparse.Namespace) -> None:
    require_new(args.out)
    require_report(args.report)
    rule = SplitRule(
        args.split,
        args.identity,
        args.recluster,
        *(tuple(filter(None, d.split(","))) for d in (args.valid_donors, args.test_donors)),
    )
    sources = sources_of(args)

    def stream(source: Source) -> Iterator:
        batches = source.batches()
        if source.is_protein:
            return batches
        return annotated(batches, source.report, reannotate=args.reannotate, workers=args.workers)

    with reading_progress("prepare", sources, "clustering, splitting, writing"):
        card = prepare(
            [(s.report, stream(s)) for s in sources],
            args.out,
            licence=args.licence,
            rule=rule,
            deduplicate=args.deduplicate,
        )
    write_report(args.report, [source.report for source in sources])
    _print_summary(card, args.out)


def _print_summary(card: dict, out: Path) -> None:
    console = Console(markup=False, emoji=False)
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
