"""Soft-MoE and expert choice in a protein encoder (openreview gq0R7xiPjg), without router losses.

    python -m moe_ablm prepare --input uniref50.fasta --out data/proteins
    python -m moe_ablm.train --workdir=runs/soft \
        --config=configs/soft_moe_protein.py:router=soft,placement=interleaved,l2=1,size=8m
    python -m moe_ablm.train --workdir=runs/choice \
        --config=configs/soft_moe_protein.py:router=expert_choice,placement=consecutive,size=8m

Arguments:
  router: soft, expert_choice.
  placement: interleaved (every other layer has experts), consecutive (the last half of the layers,
    which is the same number), every.
  l2: 1 or 0, whether the router's inputs and weights have unit length; soft only.
  size: 8m, 35m, 150m, 350m, 650m of the ESM-2 ladder.

The abstract gives no sizes, so width, depth, 8 experts, length and batch are choices made here. It
gives about 39 billion tokens and equal compute. 150,000 steps of 512 rows of 512 tokens are 39.3
billion positions. With both routers a position costs the work of one expert, which is that of a
dense FFN (soft-MoE: 8 x 64 slots for 512 positions). Soft-MoE's mixing is added to this: its
forward pass is 21.9 MFLOPs a token at 8m interleaved, that of expert choice 18.9.

On antibodies: `--config.data.path=data/pairs --config.data.length=256 --config.model.moe.slots=32`.
"""

from configs.base import get_config as base
from moe_ablm.config import parse_argument
from moe_ablm.errors import UserError
from moe_ablm.model.spec import SIZES

CHOICES = {
    "router": ("soft", "expert_choice"),
    "placement": ("interleaved", "consecutive", "every"),
    "l2": ("0", "1"),
    "size": tuple(SIZES),
}
LENGTH, EXPERTS = 512, 8


def get_config(arg: str | None = None):
    """One router, placement and size."""
    a = parse_argument(arg, {name: c[0] for name, c in CHOICES.items()}, CHOICES)
    if a["l2"] == "1" and a["router"] != "soft":
        raise UserError(f"--config=...:{arg}: l2=1 needs router=soft; expected l2=0")
    c = base()
    c.data.path = "data/proteins"
    c.data.length = LENGTH
    c.model.size = a["size"]
    half = SIZES[a["size"]][0] // 2
    moe = c.model.moe
    moe.router = a["router"]
    moe.experts = EXPERTS
    moe.k = 1
    moe.slots = LENGTH // EXPERTS
    moe.l2 = a["l2"] == "1"
    moe.placement = {
        "interleaved": "alternate",
        "consecutive": f"last_{half}",
        "every": "every",
    }[a["placement"]]
    moe.first_dense = 0
    moe.load_balance = moe.z_loss = 0.0
    c.train.steps = 150_000
    c.train.batch = 512
    c.train.warmup = 2_000
    c.eval.every = c.checkpoint.every = 5_000
    return c
