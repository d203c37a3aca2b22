"""Small ladders of encoders, dense or with experts of equal compute: a scaling study in an hour.

    python -m sweeps.nested_data --input data/pairs --out data/nested
    python -m moe_ablm.train --workdir=runs/s128 \
        --config=configs/small_ladder.py:size=s128,router=top2 --config.data.path=data/nested/512
    python sweeps/scaling.py --ladder=micro --launcher=local

Arguments:
  size: micro (0.06 to 1.3 M parameters, two cores): s48, s64, s96, s128, s160; mini (1 to 40 M, one
    GPU): m160, m224, m320, m448, m640. The number is d_model.
  router: dense; top2, two of 8 experts; soft, 8 experts with 32 slots each, one slot per position.
  data: quarter, half, full.

Experts are half as wide as the dense FFN, so two of them spend its FLOPs. A slot spends half of
them; mixing tokens into slots and back spends as much again at a width of 192 (more at smaller
widths, less at larger ones). Learning rates fall with the root of d_model and are not tuned.
"""

from configs.base import get_config as base
from moe_ablm.config import parse_argument

# layers, d_model, heads
SIZES = {
    "s48": (2, 48, 2),
    "s64": (3, 64, 2),
    "s96": (4, 96, 3),
    "s128": (4, 128, 4),
    "s160": (4, 160, 5),
    "m160": (4, 160, 5),
    "m224": (5, 224, 7),
    "m320": (6, 320, 10),
    "m448": (7, 448, 14),
    "m640": (8, 640, 20),
}
ROUTERS = {
    "dense": {"router": "none"},
    "top2": {"router": "topk", "k": 2},
    "soft": {"router": "soft", "slots": 32, "z_loss": 0.0, "load_balance": 0.0},
}


def get_config(arg: str | None = None):
    """One size and router."""
    defaults = {"size": "s128", "router": "dense", "data": "full"}
    a = parse_argument(arg, defaults, {"size": SIZES, "router": ROUTERS})
    c = base()
    c.data.path = "data/pairs"
    c.data.fraction = a["data"]
    layers, d_model, heads = SIZES[a["size"]]
    c.model.size = a["size"]
    c.model.layers, c.model.d_model, c.model.heads = layers, d_model, heads
    c.model.ffn = 4 * d_model
    c.model.moe.ffn = 2 * d_model
    c.model.moe.update(ROUTERS[a["router"]])
    micro = a["size"].startswith("s")
    c.train.batch = 4 if micro else 64
    c.train.steps = 1280 if micro else 20_000
    c.train.warmup = c.train.steps // 10
    c.train.lr = 3e-3 * (48 / d_model) ** 0.5
    c.eval.every = c.checkpoint.every = c.train.steps // (2 if micro else 8)
    c.log.every = 20
    c.eval.pairs = 512 if micro else 2048
    return c
