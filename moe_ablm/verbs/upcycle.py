"""`python -m moe_ablm upcycle --run DENSE --out RUN`: experts from a dense model's FFNs."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb; those of the experts mean what they mean in configs/base.py."""
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DENSE", help="a dense run or import")
    add("--out", type=Path, required=True, metavar="RUN", help="new directory to write")
    add("--experts", type=int, default=8, help="experts a layer (default 8)")
    add("--k", type=int, default=2, help="experts a token, 2 or more (default 2)")
    add("--placement", default="alternate",
        help="every, alternate (default), last_N, or layer numbers such as 1,3,5")  # fmt: skip
    add("--first-dense", type=int, default=1, metavar="N", help="first N layers stay dense (1)")
    add("--seed", type=int, default=0, help="of the fresh routers (default 0)")


def run(args: argparse.Namespace) -> None:
    """Loads, upcycles and writes; tells which settings training needs."""
    from moe_ablm.errors import UserError
    from moe_ablm.interop.load import load_model
    from moe_ablm.interop.saved import save_model
    from moe_ablm.interop.upcycle import upcycle
    from moe_ablm.model import flops
    from moe_ablm.model.families import TopK

    for flag in ("first_dense", "seed"):
        if getattr(args, flag) < 0:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(args, flag)}: expected 0 or more")
    moe = TopK(
        experts=args.experts, k=args.k, placement=args.placement, first_dense=args.first_dense
    )
    model = upcycle(load_model(args.run), moe, args.seed)
    save_model(model, args.out)
    print(
        f"{args.out}: {flops.params_total(model.spec):,} parameters "
        f"({flops.params_active(model.spec):,} active); to train it: --config.train.init="
        f"{args.out} --config.model.moe.router=topk --config.model.moe.experts={args.experts} "
        f"--config.model.moe.k={args.k} --config.model.moe.placement={args.placement} "
        f"--config.model.moe.first_dense={args.first_dense}"
    )
