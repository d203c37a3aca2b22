"""A small encoder for comparing routers on real pairs, minutes a run on two cores.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python -m moe_ablm.train --config=configs/compare_routers.py:router=top2,placement=interleaved \
        --workdir=runs/routers/top2-0 --config.seed=0

`sweeps/compare_routers.py` runs all of them with several seeds and prints the table. Arguments:
router (`ROUTERS` below) and placement: interleaved (layers 1 and 3 of 4) or consecutive (2 and 3).
Every row has two experts of width 512 a token in these two layers; the dense encoder spends the
same FLOPs in all four. Top-p chooses more experts, and soft-MoE mixes tokens besides: both spend
about 1.3 times as much, which the table of the study says.
"""

from configs.base import get_config as base
from moe_ablm.config import parse_argument

PLACEMENTS = {"interleaved": "alternate", "consecutive": "last_2"}
ROUTERS = {
    "dense": {"router": "none"},
    "top2": {"router": "topk"},
    "top2-capacity": {"router": "topk", "capacity": 1.0},
    "top2-biased": {"router": "topk", "gate": "sigmoid", "load_balance": 0.0,
                    "balance_rate": 0.01},
    "top-p": {"router": "topp", "k": 4, "entropy_loss": 1e-4},
    "expert-choice": {"router": "expert_choice"},
    "soft": {"router": "soft", "z_loss": 0.0},
    "soft-l2": {"router": "soft", "z_loss": 0.0, "l2": True},
    "sequence": {"router": "sequence"},
}  # fmt: skip

# learning rates with the lowest validation loss after 200 updates at seed 0 (docs/moe.md), of .002,
# .004 and .008 for dense, of .001, .002, .004 and .008 for top-2 and expert choice; soft-MoE's was
# not tuned
RATES = {"dense": 4e-3, "top2": 2e-3, "expert-choice": 2e-3, "soft": 2e-3}


def rate_of(router: str) -> float:
    """The tuned learning rate of a router of `ROUTERS`."""
    return RATES.get(router, RATES["soft" if router.startswith("soft") else "top2"])


def get_config(arg: str | None = None):
    """One row of the comparison."""
    allowed = {"router": list(ROUTERS), "placement": list(PLACEMENTS)}
    a = parse_argument(arg, {"router": "top2", "placement": "interleaved"}, allowed)
    c = base()
    c.data.path = "data/pairs"
    c.model.size = "small"
    c.model.layers = 4
    c.model.d_model = 128
    c.model.ffn = 768 if a["router"] == "dense" else 512
    c.model.heads = 4
    c.model.moe.update(ROUTERS[a["router"]])
    c.model.moe.placement = PLACEMENTS[a["placement"]]
    c.train.steps = 400
    c.train.batch = 16
    c.train.lr = rate_of(a["router"])
    c.train.warmup = 60
    c.eval.every = 200
    c.eval.pairs = 1024
    c.checkpoint.every = 400
    c.log.every = 1
    return c
