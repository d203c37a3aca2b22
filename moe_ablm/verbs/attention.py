"""`python -m moe_ablm attention`: attention between the heavy and the light chain."""

import argparse

from moe_ablm.verbs.asking import Question, add_asking_arguments, ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--layer", type=int, default=-1, help="0 is the first layer, -1 (default) the last one"
    )
    parser.add_argument(
        "--heads", action="store_true", help="every head, too; else their mean alone"
    )


def run(args: argparse.Namespace) -> None:
    """Writes a line for each pair of residues of different chains."""
    from moe_ablm.inference import attention

    question = Question(
        {"layer": args.layer, "heads": args.heads},
        lambda engine, found: attention.table(engine, found, args.layer, args.heads),
        lambda engine, antibody: (1, attention.bytes_of(engine, antibody)),
        refuse=attention.needs_both,
    )
    ask(args, question)
