"""`python -m moe_ablm report --run DIR`: the table and figures of a run, from its results alone."""

import argparse
from pathlib import Path

from rich.console import Console

from moe_ablm.errors import UserError
from moe_ablm.evaluation.tables import region_table
from moe_ablm.results import read_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, required=True, help="work directory of a run")
    parser.add_argument("--out", type=Path, help="where figures go (default: RUN/figures)")


def run(args: argparse.Namespace) -> None:
    """Prints the table of the newest evaluation and draws loss and routing."""
    from moe_ablm.evaluation.figures import draw_loss, draw_routing

    file = args.run / "results.jsonl"
    records = read_results(file)
    evaluations = [r for r in records if r["kind"] == "eval"]
    if not evaluations:
        raise UserError(
            f"{file}: {'holds no evaluation yet' if file.exists() else 'is not there'}; --run must "
            "be the work directory of a run that has evaluated at least once"
        )
    Console().print(region_table(evaluations[-1]))
    out = args.out or args.run / "figures"
    out.mkdir(parents=True, exist_ok=True)
    draw_loss(records, out / "loss.png")
    print(f"loss curve: {out / 'loss.png'}")
    if "routed" in evaluations[-1]:
        draw_routing(evaluations[-1]["routed"], out / "routing.png")
        print(f"expert by region: {out / 'routing.png'}")
