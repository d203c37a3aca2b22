"""All commands: `python -m moe_ablm VERB --help`, or `moe-ablm VERB --help` where it is installed.

Exit codes: 0 done, 2 the input or the machine is wrong (one line on stderr), 130 Ctrl-C, 1 anything
else.
"""

import argparse
import importlib
import logging
import math
import os
import sys

from moe_ablm.allocator import restart_with_huge_pages
from moe_ablm.endings import Parser, end
from moe_ablm.errors import ArgumentError
from moe_ablm.preemption import Interrupts, leave
from moe_ablm.store_flags import at_hand

# each in the module of moe_ablm.verbs of its name, imported only for that verb
VERBS = {
    "simulate": "antibody pairs from human germlines, with exact truth for every residue",
    "annotate": "regions, genes and germline of amino-acid chains",
    "prepare": "sequence files -> a dataset directory",
    "describe": "what a dataset holds, in words and pictures",
    "report": "tables and figures of a run",
    "import": "Hugging Face directory of ESM-2 or BALM -> a run that every verb reads",
    "export": "a run -> a directory to pass on: of our own, for transformers or for BALM",
    "upcycle": "a dense run -> one with experts that computes the same",
    "embed": "vectors of antibodies, chains or residues",
    "score": "pseudo-log-likelihood and perplexity of antibodies",
    "infill": "masked residues filled in",
    "scan": "all single mutants, scored",
    "route": "experts of every residue and layer",
    "attention": "attention between heavy and light chain",
    "app": "a page in the browser: one antibody, seen through a model",
    "finetune": "a head for a laboratory's assay, tested between clones and kept",
    "predict": "what a fine-tuned model says of new antibodies",
    "evaluate": "perplexity, mutations, experts, classifiers ...: all in one report",
    "compare": "evaluations of several models and seeds: differences, and what holds",
    "fit": "a table of runs -> a scaling law",
    "curves": "runs of a sweep -> clusters of the courses of a metric",
}
# have command lines of their own, with the keys of a config
TRAIN, QUICKSTART = "train", "quickstart"
# modules of several verbs
SHARED = {
    **dict.fromkeys(
        ("embed", "score", "infill", "scan", "route", "attention", "predict"), "questions"
    ),
    **dict.fromkeys(("import", "export", "upcycle"), "weights"),
}
# what is kept of an interrupted command
RESUMED = ("questions", "evaluate")


def main(argv: list[str]) -> int:
    """Runs a verb; returns the exit code."""
    if argv[1:2] == [TRAIN]:
        from moe_ablm import train

        return train.main([f"{argv[0]} {TRAIN}", *argv[2:]])
    if argv[1:2] == [QUICKSTART]:
        from moe_ablm.verbs import quickstart

        return quickstart.main(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with Interrupts() as interrupts:
        return end(lambda: _carry_out(argv, interrupts))


def _carry_out(argv: list[str], interrupts: Interrupts) -> int | None:
    arguments = parser_of(argv[1] if len(argv) > 1 else None).parse_args(argv[1:])
    for name, value in vars(arguments).items():
        if isinstance(value, float) and math.isnan(value):
            raise ArgumentError(name, value, "expected a number")
    goes_on = SHARED.get(arguments.verb, arguments.verb) in RESUMED
    if goes_on and getattr(arguments, "out", None):
        interrupts.after = "the same command goes on after what is done"
    with at_hand(arguments, goes_on):
        return arguments.carry_out(arguments)


def parser_of(named: str | None) -> argparse.ArgumentParser:
    """The parser of all verbs; flags has only the one that is named."""
    parser = Parser(prog="python -m moe_ablm", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser(QUICKSTART, help="a small model on embedded data, trained and reported")
    verbs.add_parser(TRAIN, help="a model; python -m moe_ablm.train --help")
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        if name == named:
            module = importlib.import_module(f"moe_ablm.verbs.{SHARED.get(name, name)}")
            if name in SHARED:
                add_arguments, run = module.VERBS[name]
            else:
                add_arguments, run = module.add_arguments, module.run
            add_arguments(verb)
            verb.set_defaults(carry_out=run)
    return parser


def complete() -> None:
    """Answers a shell that asks for completions, as argcomplete does; ends the process."""
    import argcomplete

    verb = [*os.environ["COMP_LINE"].split()[1:], None][0]
    argcomplete.autocomplete(parser_of(verb), always_complete_options="long")


def console() -> None:
    """The command line of this process; ends the process."""
    if "_ARGCOMPLETE" in os.environ:  # set by the shell's hook alone
        complete()
    computing = ("questions", "app", "evaluate", "finetune", TRAIN, QUICKSTART)
    if any(SHARED.get(verb, verb) in computing for verb in sys.argv[1:2]):
        restart_with_huge_pages()
    Interrupts.alone = True
    leave(main(sys.argv))


if __name__ == "__main__":
    console()
