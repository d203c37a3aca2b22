"""`python -m moe_ablm route`: the experts of every residue in every layer, and their weights."""

import argparse

from moe_ablm.verbs.asking import Question, add_asking_arguments, ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_asking_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Writes a line for each residue, layer and expert."""
    from moe_ablm.inference import route

    ask(args, Question({}, route.table, lambda e, antibody: (1, route.bytes_of(e, antibody))))
