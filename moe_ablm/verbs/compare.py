"""`python -m moe_ablm compare`: evaluations of several models, seeds of a kind taken together."""

import argparse
from pathlib import Path

from moe_ablm.errors import UserError, suggestion
from moe_ablm.files import all_or_none
from moe_ablm.verbs.writing import add_results_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add(
        "--input",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a directory of `evaluate`; repeatable; the same name again: another seed of a kind",
    )
    add(
        "--reference",
        metavar="NAME",
        help="the kind that the others are compared with (default: the first)",
    )
    add_results_directory(parser)


def run(args: argparse.Namespace) -> None:
    """Compares; writes results and report.

    Raises:
      UserError: an evaluation is unfinished or damaged, or they are not of the same data and
        settings; nothing is written.
    """
    named = [_named(text) for text in args.input]
    places = [directory.resolve() for _, directory in named]
    for (name, directory), place in zip(named, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"--input {name}={directory}: this evaluation is given twice")
    names = list(dict.fromkeys(name for name, _ in named))
    if args.reference is not None and args.reference not in names:
        raise UserError(
            f"--reference {args.reference}: no such name{suggestion(args.reference, names)}; "
            f"expected one of {', '.join(names)}"
        )
    from moe_ablm.evaluation.reporting.claims import claims_of
    from moe_ablm.evaluation.reporting.compare import compare
    from moe_ablm.evaluation.reporting.compare_report import write_comparison
    from moe_ablm.evaluation.reporting.results import IDENTITY, read_evaluated, require_same_basis

    if (args.out / IDENTITY).exists():
        raise UserError(f"--out {args.out} holds an evaluation: choose another directory")
    runs = [read_evaluated(name, directory) for name, directory in named]
    if len(runs) < 2:
        raise UserError("--input is given once: a comparison needs two evaluations or more")
    runs.sort(key=lambda r: r.kind != (args.reference or names[0]))
    require_same_basis(runs)
    comparison = compare(runs)
    claims = claims_of(comparison)
    with all_or_none(args.out) as directory:
        files = write_comparison(directory, comparison, claims, command_of(args))
    for claim in claims:
        print(f"{claim.text} {claim.verdict}")
    for file in files:
        print(args.out / file.name)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UserError(f"--input {text}: expected NAME=DIR, as dense=evaluation/dense")
    return name, Path(path)


def command_of(args: argparse.Namespace) -> list[str]:
    """The command line."""
    line = ["python", "-m", "moe_ablm", "compare"]
    line += [part for text in args.input for part in ("--input", text)]
    line += ["--reference", args.reference] if args.reference else []
    return [*line, "--out", str(args.out)]
