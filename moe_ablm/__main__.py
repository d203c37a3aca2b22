"""The verbs beside training: `python -m moe_ablm VERB --help`.

Exit codes: 0 done, 2 the input is wrong (one line on stderr), 1 anything else.
"""

import argparse
import importlib
import logging
import os
import sys

from moe_ablm.allocator import restart_with_huge_pages
from moe_ablm.errors import UserError

# each in the module of moe_ablm.verbs of its name, imported only for that verb
VERBS = {
    "simulate": "antibody pairs from human germlines, with exact truth for every residue",
    "annotate": "regions, genes and germline of amino-acid chains",
    "prepare": "sequence files -> a dataset directory",
    "describe": "what a dataset holds, in words and pictures",
    "report": "tables and figures of a run",
    "import": "Hugging Face directory of ESM-2 or BALM -> a run that every verb reads",
    "export": "a run -> a directory for transformers or BALM, with a model card",
    "upcycle": "a dense run -> one with experts that computes the same",
    "embed": "vectors of antibodies, chains or residues",
    "score": "pseudo-log-likelihood and perplexity of antibodies",
    "infill": "masked residues filled in",
    "scan": "all single mutants, scored",
    "route": "experts of every residue and layer",
    "attention": "attention between heavy and light chain",
    "evaluate": "perplexity, mutations, experts, classifiers ...: all in one report",
    "compare": "evaluations of several models and seeds: differences, and what holds",
    "fit": "a table of runs -> a scaling law",
}
# modules of several verbs
SHARED = {
    **dict.fromkeys(("embed", "score", "infill", "scan", "route", "attention"), "asking"),
    **dict.fromkeys(("import", "export", "upcycle"), "weights"),
}


def main(argv: list[str]) -> int:
    """Runs a verb; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m moe_ablm", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    named = argv[1] if len(argv) > 1 else None
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
    arguments = parser.parse_args(argv[1:])
    try:
        return arguments.carry_out(arguments) or 0
    except UserError as error:
        print(f"moe_ablm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # whoever read stdout, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    if any(SHARED.get(verb, verb) in ("asking", "evaluate") for verb in sys.argv[1:2]):
        restart_with_huge_pages()
    sys.exit(main(sys.argv))
