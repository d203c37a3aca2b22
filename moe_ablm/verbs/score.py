"""`python -m moe_ablm score`: pseudo-log-likelihood and perplexity of antibodies."""

import argparse

from moe_ablm.verbs.asking import Question, add_asking_arguments, ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--level",
        choices=("antibody", "residue"),
        default="antibody",
        help="a line each; by residue its log-likelihood",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="mask nothing: some 200 times quicker, and too optimistic",
    )
    parser.add_argument("--by-region", action="store_true", help="frameworks and CDRs apart (IMGT)")


def run(args: argparse.Namespace) -> None:
    """Writes the scores of every antibody or residue."""

    def answer(engine, antibodies):
        from moe_ablm.inference.score import table

        return table(engine, antibodies, args.level, args.one_pass, args.by_region)

    def cost(engine, antibody):
        # log-probabilities of all tokens are held for a while
        held = 4 * engine.model.spec.vocabulary + 128
        return (1 if args.one_pass else antibody.residues), antibody.residues * held

    options = {"level": args.level, "one_pass": args.one_pass, "by_region": args.by_region}
    ask(args, Question(options, answer, cost))
