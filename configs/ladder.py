"""The ESM-2 size ladder on antibody pairs, dense or with experts.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python -m moe_ablm.train --config=configs/ladder.py:size=8m --workdir=runs/8m
    python -m moe_ablm.train --config=configs/ladder.py:size=35m,data=half,router=top2,experts=8 \
        --workdir=runs/35m-half-top2

Arguments:
  size: 8m, 35m, 150m, 350m, 650m.
  data: quarter, half, full.
  router: none, or topK with a number K.
  experts: number of experts.
  dropout: rate of all dropouts.
  encoder: esm2, or study, the encoders of the AbLM scaling study as transformers' EsmConfig makes
    them by default: no token dropout, layer_norm_eps 1e-12.

Schedule, batch and dropout are those of the AbLM scaling study (500k steps of 128, 0.1). With
encoder=study what differs from it are initial weights and the order of the data, which follow our
seed, and bfloat16 on accelerators. Runs made before dropout existed resume with dropout=0.
"""

from configs.base import get_config as base
from moe_ablm.config import parse_argument
from moe_ablm.errors import UserError

ARGUMENTS = {"size": "8m", "data": "full", "router": "none", "experts": "8", "dropout": "0.1",
             "encoder": "esm2"}  # fmt: skip


def get_config(arg: str | None = None):
    """A rung of the ladder."""
    a = parse_argument(arg, ARGUMENTS)
    try:
        dropout = float(a["dropout"])
    except ValueError as error:
        raise UserError(
            f"--config=...:{arg}: dropout={a['dropout']!r}: expected a number from 0 to below 1"
        ) from error
    if a["encoder"] not in ("esm2", "study"):
        raise UserError(f"--config=...:{arg}: encoder={a['encoder']!r}: expected esm2 or study")
    c = base()
    c.data.path = "data/pairs"
    c.data.fraction = a["data"]
    c.model.size = a["size"]
    if a["router"] != "none":
        k = a["router"].removeprefix("top")
        if not k.isdecimal() or not a["experts"].isdecimal():
            raise UserError(
                f"--config=...:{arg}: router={a['router']!r}, experts={a['experts']!r}: expected "
                "router none or topK such as top2, experts a number"
            )
        c.model.moe.router = "topk"
        c.model.moe.k = int(k)
        c.model.moe.experts = int(a["experts"])
    if a["encoder"] == "study":
        c.model.token_dropout = False
        c.model.layer_norm_eps = 1e-12
    for name in ("attention_dropout", "hidden_dropout", "embedding_dropout"):
        c.model[name] = dropout
    c.train.steps = 500_000
    c.train.batch = 128
    c.train.lr = 1e-4
    c.train.warmup = 30_000
    c.eval.every = 5_000
    c.checkpoint.every = 5_000
    return c
