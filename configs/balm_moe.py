"""BALM-MoE, brineylab's antibody language models: pilots, padding ablation, final models.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python -m moe_ablm.train --workdir=runs/pilot \
        --config=configs/balm_moe.py:model=pilot,router=topk,capacity=1,shared=0
    python -m moe_ablm.train --config=configs/balm_moe.py:model=dense_45m --workdir=runs/dense_45m
    python -m moe_ablm.train --workdir=runs/pads \
        --config=configs/balm_moe.py:model=pads,pads=probabilities+aux
    python -m moe_ablm.train --config=configs/balm_moe.py:model=final --workdir=runs/final
    python -m moe_ablm.train --config=configs/balm_moe.py:model=dense_200m --workdir=runs/dense_200m
    python -m moe_ablm.train --config=configs/balm_moe.py:model=dense_710m --workdir=runs/dense_710m
    python -m moe_ablm.train --config=configs/balm_moe.py:model=older --workdir=runs/older

Arguments:
  model: pilot, pads (padding ablation), final, dense_45m, dense_200m, dense_710m (dense models to
    compare with), older (the 305 M model of July 2024).
  router (pilot): topk, topp, expert_choice.
  capacity (pilot): 1, 0.5, 0.25, in BALM's unit; experts are wider with a smaller capacity.
  shared (pilot): 0 or 1 of the 8 experts.
  pads (pads): none, probabilities, aux, probabilities+aux; the final model has the last.

The settings are from github.com/brineylab/MoE-paper (commit e20cc79) and BALM (36a8001; for the
older model cf201d8, the last commit before its run). BALM's units differ and are converted:
  capacity: BALM's is a multiple of tokens / experts whatever k is, so it is k times ours.
  experts: BALM counts the shared experts; here they are additional.
  losses: BALM takes means over layers and counts each of a token's k choices as 1; here shares of
    the choices are summed over layers.
  competition: in BALM the 64 rows of each of 8 GPUs compete; here the 64 rows of each of 8
    micro-batches.

These differences remain:
  vocabulary: 33 tokens (ESM-2's) against 32, which is 2 d_model + 1 parameters: 1,281 of the final
    model's 714,167,073. The older model had 33.
  top-p: BALM's load-balance loss counts first choices only; here all choices count.
  z-loss: BALM counts padding.
  places: BALM rounds down, here they are rounded up; with shared experts that is one place in
    thousands.
  older: its experts have no biases, ours have 230,400 (3 layers x 16 x (2 x 1920 + 960)) in
    addition to its 305,221,473 parameters. Its activation is sigmoid(a) b, ours silu(a) b. Its
    rotary embedding is applied before the projections. The number of GPUs is not published; the
    batch is that of one.
  data: BALM's unpaired sequences are a separate collection. Here both come from `data.path`, which
    takes several datasets. BALM's separator of paired chains is in its data, not in its code; it is
    assumed to be <eos>.
"""

from configs.base import get_config as base
from moe_ablm.config import parse_argument

# layers, d_model, ffn, heads
SIZES = {
    "pilot": (12, 480, 1920, 20),
    "pads": (12, 480, 1920, 20),
    "final": (30, 640, 2560, 20),
    "dense_45m": (12, 480, 1920, 20),
    "dense_200m": (30, 640, 2560, 20),
    "dense_710m": (27, 1280, 5120, 20),
    "older": (6, 960, 1920, 20),
}
# arguments of each model and their values; the first value is the default
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "pilot": {
        "router": ("topk", "topp", "expert_choice"),
        "capacity": ("1", "0.5", "0.25"),
        "shared": ("0", "1"),
    },
    "pads": {"pads": ("none", "probabilities", "aux", "probabilities+aux")},
}
# width of a pilot's experts, by capacity and shared experts
PILOT_FFN = {
    ("0.25", "0"): 7680,
    ("0.5", "0"): 3840,
    ("1", "0"): 1920,
    ("0.25", "1"): 1920,
    ("0.5", "1"): 1440,
    ("1", "1"): 960,
}


def get_config(arg: str | None = None):
    """One of BALM's models."""
    known = [name for choices in CHOICES.values() for name in choices]
    named = {"model": "pilot"} | dict.fromkeys(known, "")
    model = parse_argument(arg, named, {"model": SIZES})["model"]
    choices = CHOICES.get(model, {})
    a = parse_argument(arg, {"model": model} | {name: c[0] for name, c in choices.items()}, choices)
    c = base()
    c.data.path = "data/pairs"
    c.model.size = f"balm_{model}"
    c.model.layers, c.model.d_model, c.model.ffn, c.model.heads = SIZES[model]
    c.model.token_dropout = False
    c.model.activation = "swiglu"
    c.model.tied = False
    c.model.attention_dropout = c.model.hidden_dropout = c.model.embedding_dropout = 0.1
    if model == "older":
        _older(c)
    else:
        _schedule(c, long=model in ("final", "dense_200m", "dense_710m"))
    if model == "pilot":
        _experts(c, a["router"], float(a["capacity"]), int(a["shared"]))
        c.model.moe.ffn = PILOT_FFN[a["capacity"], a["shared"]]
        c.model.moe.pads = "none"
    elif model == "pads":
        _experts(c)
        c.model.moe.pads = a["pads"].replace("+", ",")
    elif model == "final":
        _experts(c)
        c.model.moe.pads = "probabilities,aux"
    return c


def _schedule(c, long: bool) -> None:
    """8 x 64 rows: single chains of 160 tokens for pilots, a mixture of 256 for final models."""
    c.data.layout = "balm"
    c.data.length = 256 if long else 160
    c.data.regime = "mixed:0.625" if long else "unpaired"
    c.train.steps = 500_000 if long else 250_000
    c.train.warmup = 30_000 if long else 15_000
    c.train.batch = 512
    c.train.lr = 1e-4
    c.eval.every = c.checkpoint.every = 10_000 if long else 5_000


def _experts(c, router: str = "topk", capacity: float = 1.0, shared: int = 0) -> None:
    """8 experts, of which `shared` are shared, in every other layer; `capacity` in BALM's unit."""
    moe, sparse = c.model.moe, c.model.layers // 2
    moe.router = router
    moe.experts = 8 - shared
    moe.shared = shared
    # BALM's top-p has no limit; expert choice has no k
    moe.k = {"topk": 2, "topp": moe.experts, "expert_choice": 1}[router]
    moe.exceed = router != "topp"
    moe.gate = "tokens" if router == "expert_choice" else "softmax"
    moe.capacity = capacity / moe.k
    moe.group = "batch"
    counted = moe.k if router == "topk" else 1  # choices of a token in the loss
    moe.load_balance = 0.0 if router == "expert_choice" else 0.01 * counted / sparse
    moe.z_loss = 0.0 if router == "topp" else 0.001 / sparse
    moe.entropy_loss = 1e-4 / sparse if router == "topp" else 0.0
    c.train.accumulate = 8


def _older(c) -> None:
    """Expert choice within a row: 15 experts take 128 of its 320 tokens each; a 16th is shared."""
    c.data.length = 320
    c.train.steps = 500_000
    c.train.warmup = 30_000
    c.train.lr = 1.6e-3
    c.train.beta2, c.train.eps, c.train.clip = 0.999, 1e-8, 0.0
    c.eval.every = c.checkpoint.every = 25_000
    moe = c.model.moe
    moe.router = "expert_choice"
    moe.experts = 15
    moe.shared = 1
    moe.k = 6  # 15 x 128 / 320
    moe.gate = "tokens"
    moe.pads = "none"
    moe.load_balance = 0.0
    moe.z_loss = 0.01 / 3
