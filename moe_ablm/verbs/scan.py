"""`python -m moe_ablm scan`: all single mutants of antibodies, as a table and a heat map."""

import argparse
from pathlib import Path

from moe_ablm.errors import UserError
from moe_ablm.verbs.asking import Question, add_asking_arguments, ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--method",
        choices=("masked-marginal", "wild-type-marginal", "mutant-marginal"),
        default="masked-marginal",
        help="a pass a residue, one pass in all, or 19 passes a residue",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="a heat map of every antibody, as PNG"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the log-odds of every mutant."""
    if args.figures is not None:
        try:
            args.figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--figures {args.figures}: {error.strerror}") from error
    from moe_ablm.inference import scan

    def answer(engine, antibodies):
        scores = scan.scan(engine, antibodies, args.method)
        if args.figures is not None:
            from moe_ablm.inference.heatmap import draw_scan, figure_path

            for antibody, found in zip(antibodies, scores, strict=True):
                path = figure_path(args.figures, antibody)
                draw_scan(antibody, found, args.method, path)
        return scan.table(antibodies, scores)

    def cost(engine, antibody):
        return scan.passes(antibody, args.method), antibody.residues * 19 * 128

    ask(args, Question({"method": args.method}, answer, cost))
