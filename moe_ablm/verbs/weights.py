"""The verbs that read and write weights: import, export, upcycle."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.model import flops
from moe_ablm.model.families import TopK
from moe_ablm.verbs.reading import RUN
from moe_ablm.verbs.writing import out_directory


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `import`."""
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="HF_DIR",
        help="directory with config.json and model.safetensors (or shards and index)")  # fmt: skip
    add("--out", type=out_directory, required=True, metavar="RUN", help="new directory to write")
    add("--layout", choices=sorted(LAYOUTS),
        help="how a pair becomes a row (default: esm, <cls>H<cls><cls>L<eos>; of BALM and RoBERTa "
        "balm, <cls>H<eos>L<eos>; of an export of ours its own)")  # fmt: skip


def import_(args: argparse.Namespace) -> None:
    """Reads, checks, converts and writes; prints what was left out."""
    from moe_ablm.interop.load import import_directory
    from moe_ablm.interop.saved import save_model

    model = import_directory(args.input, args.layout)
    save_model(model, args.out)
    for note in model.notes:
        print(f"note: {note}")
    print(
        f"{args.out}: {model.source}, {flops.params_total(model.spec):,} parameters, rows of up to "
        f"{model.length} tokens, layout {model.layout_name}"
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help=RUN)
    add("--format", choices=("native", "hf", "balm", "transformers"), required=True,
        help="native: any model, for moe_ablm; transformers: any model, with the code that loads "
        "it; hf: EsmForMaskedLM, or RobertaForMaskedLM for its norms, dense models; balm: BALM, "
        "dense or with experts")  # fmt: skip
    add("--out", type=out_directory, required=True, metavar="DIR", help="new directory to write")
    add("--push", metavar="ORG/NAME",
        help="also upload it to the Hugging Face hub, privately where the name is new")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights in the files (default float32)")  # fmt: skip
    add("--shard-size", type=_size, metavar="SIZE",
        help="most of a file of weights, as 500MB or 5GB (default: all in one)")  # fmt: skip
    add("--licence", help="for the model card, as mit or cc-by-4.0 (default: as its weights came)")


def _size(text: str) -> int:
    """Bytes of a size, in the decimal units of Hugging Face."""
    match = re.fullmatch(r"([1-9]\d*)([KMG]B)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def export(args: argparse.Namespace) -> None:
    """Loads the best checkpoint and writes it in another form."""
    from moe_ablm.evaluation.supervised.saved_head import HEAD_FILE
    from moe_ablm.interop import hub, roberta
    from moe_ablm.interop.balm import export_balm
    from moe_ablm.interop.esm2 import export_esm2
    from moe_ablm.interop.load import load_model
    from moe_ablm.interop.native import export_native
    from moe_ablm.interop.tensors import Storage
    from moe_ablm.interop.transformers_moe import export_transformers

    if args.push:
        hub.require_pushable(args.push)
    model = load_model(args.run)
    if args.format != "native":
        model.require_head(f"--format {args.format}")
    if args.dtype != "float32":
        model = replace(model, notes=(*model.notes, f"weights were rounded to {args.dtype}"))
    writers = {
        "native": export_native,
        "hf": roberta.export_roberta if roberta.fits(model.spec) else export_esm2,
        "balm": export_balm,
        "transformers": export_transformers,
    }
    write = writers[args.format]
    write(model, args.out, args.licence, Storage(args.dtype, args.shard_size))
    print(f"{args.out}: {model.source}")
    if not hub.is_hub_name(args.run) and (args.run / HEAD_FILE).exists():
        print(f"the head of {args.run} is not exported: predict takes {args.run} itself")
    if args.push:
        print(f"{hub.push(args.out, args.push)}: --run hf:{args.push}")


def add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `upcycle`; those of the experts mean what they mean in configs/base.py."""
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DENSE", help=f"dense: {RUN}")
    add("--out", type=out_directory, required=True, metavar="RUN", help="new directory to write")
    add("--experts", type=int, default=8, help="experts per layer (default 8)")
    add("--k", type=int, default=2, help="experts per token, 2 or more (default 2)")
    add("--placement", default="alternate",
        help="every, alternate (default), last_N, or layer numbers such as 1,3,5")  # fmt: skip
    add(
        "--first-dense",
        type=int,
        default=1,
        metavar="N",
        help="keep the first N layers dense (default 1)",
    )
    add("--seed", type=int, default=0, help="seed of the new routers (default 0)")


def upcycle(args: argparse.Namespace) -> None:
    """Loads, upcycles and writes; prints the settings that training needs."""
    from moe_ablm.interop import upcycle as upcycling
    from moe_ablm.interop.load import load_model
    from moe_ablm.interop.saved import save_model

    for flag in ("first_dense", "seed"):
        if getattr(args, flag) < 0:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(args, flag)}: expected 0 or more")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: expected 0 to 2^32 - 1")
    moe = TopK(
        experts=args.experts, k=args.k, placement=args.placement, first_dense=args.first_dense
    )
    model = upcycling.upcycle(load_model(args.run), moe, args.seed)
    save_model(model, args.out)
    print(
        f"{args.out}: {flops.params_total(model.spec):,} parameters "
        f"({flops.params_active(model.spec):,} active); to train it: --config.train.init="
        f"{args.out} --config.model.moe.router=topk --config.model.moe.experts={args.experts} "
        f"--config.model.moe.k={args.k} --config.model.moe.placement={args.placement} "
        f"--config.model.moe.first_dense={args.first_dense}"
    )


VERBS = {
    "import": (add_import_arguments, import_),
    "export": (add_export_arguments, export),
    "upcycle": (add_upcycle_arguments, upcycle),
}
