"""`python -m moe_ablm import --input HF_DIR --out RUN`: weights of others become a run."""

import argparse
from pathlib import Path

from moe_ablm.data.tokenizer import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="HF_DIR",
        help="directory with config.json and model.safetensors (or shards and index)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="RUN", help="new directory to write")
    add("--layout", choices=sorted(LAYOUTS),
        help="how a pair becomes a row (default: esm, <cls>H<cls><cls>L<eos>; of BALM balm, "
        "<cls>H<eos>L<eos>; of an export of ours its own)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Reads, checks, converts and writes; tells what was left out."""
    from moe_ablm.interop.directory import import_directory
    from moe_ablm.interop.saved import save_model
    from moe_ablm.model import flops

    model = import_directory(args.input, args.layout)
    save_model(model, args.out)
    for note in model.notes:
        print(f"note: {note}")
    print(
        f"{args.out}: {model.source}, {flops.params_total(model.spec):,} parameters, rows of up to "
        f"{model.length} tokens, layout {model.layout_name}"
    )
