"""`python -m moe_ablm curves`: runs of a sweep, clustered by the course of a metric."""

import argparse
from pathlib import Path

from moe_ablm.errors import ArgumentError
from moe_ablm.files import all_or_none
from moe_ablm.verbs.writing import out_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        required=True,
        metavar="RUNS|FILE",
        help="a folder of runs, or a table with the columns run, step and the metric",
    )
    add(
        "--metric",
        default="loss",
        metavar="NAME",
        help="a key of results.jsonl, as loss, loss_by_region.CDRH3, grad_norm, or a statistic of "
        "routers, as load_entropy, dropped, logit_rms (default loss)",
    )
    add("--seed", type=int, default=0, help="seed of the starts (default 0)")
    add("--out", type=out_directory, required=True, metavar="DIR", help="report.html, runs.csv ...")


def run(args: argparse.Namespace) -> None:
    """Reads, clusters, prints and writes.

    Raises:
      UserError: the input is wrong; nothing is written.
    """
    from rich.console import Console

    from moe_ablm.results import versions
    from moe_ablm.scaling.curves_report import sentences, verdict_table, write_curves
    from moe_ablm.scaling.gp_mixture import cluster
    from moe_ablm.scaling.trajectories import read_trajectories

    if args.seed < 0:
        raise ArgumentError("seed", args.seed, "expected 0 or more")
    curves = read_trajectories(args.input, args.metric)
    clusters = cluster(curves.steps, curves.values, args.seed)
    provenance = {
        "version": versions("moe_ablm").get("moe_ablm", "not installed"),
        "input": str(args.input),
        "seed": args.seed,
    }
    with all_or_none(args.out) as directory:
        files = write_curves(directory, curves, clusters, args.metric, provenance)
    console = Console()
    console.print(verdict_table(curves, clusters))
    for line in sentences(curves, clusters, args.metric):
        console.print(line, markup=False, highlight=False)
    for file in files:
        print(args.out / file.name)
