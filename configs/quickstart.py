"""A small MoE encoder on simulated antibodies: minutes on two cores, no data needed.

    moe-ablm quickstart      # or: make quickstart

does what these two do:

    python -m moe_ablm train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m moe_ablm report --run runs/quickstart
"""

from configs.base import get_config as base


def get_config():
    """Four layers, two of them with 8 experts, top-2."""
    c = base()
    c.data.length = 256
    c.model.size = "quickstart"
    c.model.layers = 4
    c.model.d_model = 128
    c.model.ffn = 512
    c.model.heads = 4
    c.model.moe.router = "topk"
    c.train.steps = 500
    c.train.batch = 16
    c.train.lr = 2e-3
    c.train.warmup = 60
    c.eval.every = 100
    c.eval.pairs = 512
    c.checkpoint.every = 100
    return c
