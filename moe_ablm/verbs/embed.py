"""`python -m moe_ablm embed`: hidden states of a residue, a chain or an antibody each."""

import argparse

from moe_ablm.verbs.asking import Question, add_asking_arguments, ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--level",
        choices=("antibody", "chain", "residue"),
        default="antibody",
        help="a vector each; of antibodies and chains the mean over their residues",
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="0 is the token embedding, -1 (default) the last layer, after its norm",
    )


def run(args: argparse.Namespace) -> None:
    """Writes `embedding` of every antibody, chain or residue."""

    def answer(engine, antibodies):
        from moe_ablm.inference.embed import table

        return table(engine, antibodies, args.level, args.layer)

    def cost(engine, antibody):
        vectors = antibody.residues if args.level == "residue" else 2
        return 1, vectors * (4 * engine.model.spec.d_model + 64)

    ask(args, Question({"level": args.level, "layer": args.layer}, answer, cost))
