"""`python -m moe_ablm export --run RUN --format hf|balm --out DIR`: weights for others' code."""

import argparse
from pathlib import Path

FORMATS = ("hf", "balm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help="work directory of a run, or an import")
    add("--format", choices=FORMATS, required=True,
        help="hf: EsmForMaskedLM, dense models; balm: BALM, dense or with experts")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="new directory to write")
    add("--licence", help="for the model card, as mit or cc-by-4.0 (default: as its weights came)")


def run(args: argparse.Namespace) -> None:
    """Loads the best checkpoint and writes it in the other form."""
    from moe_ablm.interop.balm import export_balm
    from moe_ablm.interop.esm2 import export_esm2
    from moe_ablm.interop.load import load_model

    model = load_model(args.run)
    write = {"hf": export_esm2, "balm": export_balm}[args.format]
    write(model, args.out, args.licence)
    print(f"{args.out}: {model.source}")
