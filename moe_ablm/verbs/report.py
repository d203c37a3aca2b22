"""`python -m moe_ablm report --run DIR`: the table and figures of a run, from its results alone."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from moe_ablm.errors import UserError
from moe_ablm.evaluation.tables import region_table, stability_lines
from moe_ablm.results import read_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--run", type=Path, required=True, help="work directory of a run")
    parser.add_argument("--out", type=Path, help="where figures go (default: RUN/figures)")


def run(args: argparse.Namespace) -> None:
    """Prints the newest evaluation and the stability verdict, and draws loss and routing."""
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
    print("\n".join(_stability(args.run / "run.json")))
    out = args.out or args.run / "figures"
    out.mkdir(parents=True, exist_ok=True)
    draw_loss(records, out / "loss.png")
    print(f"loss curve: {out / 'loss.png'}")
    if "routed" in evaluations[-1]:
        draw_routing(evaluations[-1]["routed"], out / "routing.png")
        print(f"expert by region: {out / 'routing.png'}")


def _stability(file: Path) -> list[str]:
    """What `run.json` says of stability."""
    if not file.exists():
        return ["stability: not known before the run ends"]
    try:
        content = json.loads(file.read_text())
        if content["status"] == "diverged":
            return [f"stability: diverged ({content['error']})"]
        return stability_lines(content["stability"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}): train again with the same command; it is made anew"
        ) from error
