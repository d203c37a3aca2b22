"""The table of studies: what each varies, and how a point of its grid becomes a config.

`python sweeps/NAME.py` runs the study NAME. Three have files of their own beside this table:
`sweeps/scaling.py` (a scaling law), `sweeps/compare_routers.py` (a table of routers) and
`sweeps/repeated.py` (a table of remedies where data are repeated).
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from sweeps import study
from sweeps.device import CORE
from sweeps.grid import Point, Recipe, product
from sweeps.study import Study, data_path


def _size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="8m", help="of the ladder; default %(default)s")


def _one_key(name: str, about: str, key: str, values: Sequence[str]) -> Study:
    """A study of one config key on configs/ladder.py."""
    axis = key.rpartition(".")[2]

    def recipe(point: Point, options: argparse.Namespace) -> Recipe:
        path = data_path(options.data or "data/pairs")
        overrides = {"seed": point["seed"], "data.path": path, key: point[axis]}
        return Recipe("configs/ladder.py", f"size={options.size}", overrides)

    return Study(name, about, seeded(product(**{axis: values})), recipe, _size)


def seeded(points: list[Point]) -> Callable[[argparse.Namespace], list[Point]]:
    """A grid of the points, seed after seed."""
    return lambda options: product(product(seed=range(options.seeds)), points)


def recipe_of(
    config: str, data: str, argument: Callable[[Point], str], **overrides: object
) -> Callable[[Point, argparse.Namespace], Recipe]:
    """A recipe: a config file with an argument made of the point.

    Args:
      config: file, relative to the repository.
      data: default of `--data`.
      argument: point -> what stands after the colon.
      overrides: value by config key with "." as "__", the same for all points.
    """
    same = {key.replace("__", "."): value for key, value in overrides.items()}

    def recipe(point: Point, options: argparse.Namespace) -> Recipe:
        own = {"seed": point["seed"], "data.path": data_path(options.data or data)}
        return Recipe(config, argument(point), own | same)

    return recipe


MASKING = _one_key(
    "masking",
    """Which residues are masked: uniform, CDRH3 or mutated ones preferred, spans; 15 % on average.

    python sweeps/masking.py --data=data/pairs --size=35m --launcher=slurm

Configs of configs/ladder.py. Validation masks are uniform, the same for all.
""",
    "data.mask",
    ("uniform", "cdr3:0.25", "cdr3:0.5", "nongermline:0.25", "nongermline:0.5", "span"),
)
PAIRING = _one_key(
    "pairing",
    """What native pairs are worth: paired, shuffled, unpaired (also doubled), mixed, curriculum.

    python sweeps/pairing.py --data=data/pairs --size=35m --launcher=slurm

Configs of configs/ladder.py. A regime without pairs is validated on single chains, all others on
native pairs, so their losses are of different sequences; "unpaired:doubled" shows as many residues
an update as "paired".
""",
    "data.regime",
    ("paired", "shuffled", "unpaired", "unpaired:doubled", "mixed:0.625", "curriculum:sigmoid"),
)

_PLACEMENTS = ("interleaved", "consecutive", "every")
PLACEMENT = Study(
    "placement",
    r"""Where experts stand: interleaved, consecutive, every layer; soft-MoE and expert choice.

    python sweeps/placement.py --data=data/proteins --launcher=slurm
    python sweeps/placement.py --data=data/pairs --config.data.length=256 \
        --config.model.moe.slots=32

Configs of configs/soft_moe_protein.py: 150,000 updates of 512 rows of 512 tokens.
""",
    seeded(product(router=("soft", "expert_choice"), placement=_PLACEMENTS)),
    recipe_of(
        "configs/soft_moe_protein.py",
        "data/proteins",
        lambda p: f"router={p['router']},placement={p['placement']},size=8m",
    ),
)
SOFT_L2 = Study(
    "soft_l2",
    r"""Soft-MoE with and without router inputs and weights of unit length, by placement.

    python sweeps/soft_l2.py --data=data/proteins --launcher=slurm
    python sweeps/soft_l2.py --data=data/pairs --config.data.length=256 \
        --config.model.moe.slots=32

Configs of configs/soft_moe_protein.py: 150,000 updates of 512 rows of 512 tokens.
""",
    seeded(product(l2=("0", "1"), placement=_PLACEMENTS)),
    recipe_of(
        "configs/soft_moe_protein.py",
        "data/proteins",
        lambda p: f"router=soft,l2={p['l2']},placement={p['placement']},size=8m",
    ),
)

# BALM-MoE's name by (padding is last in the queues, padding is left out of the losses)
_PADS = {
    (False, False): "none",
    (True, False): "probabilities",
    (False, True): "aux",
    (True, True): "probabilities+aux",
}
PADDING = Study(
    "padding",
    """BALM-MoE's ablation of padding, 2 x 2: last in the queues, in the router losses.

    python sweeps/padding.py --data=data/pairs --launcher=slurm

Configs of configs/balm_moe.py:model=pads, 250,000 updates of 512 single chains.
""",
    seeded(product(last=(False, True), left_out=(False, True))),
    recipe_of(
        "configs/balm_moe.py",
        "data/pairs",
        lambda p: f"model=pads,pads={_PADS[bool(p['last']), bool(p['left_out'])]}",
    ),
)


def _pilot(point: Point) -> str:
    if point["router"] == "dense":
        return "model=dense_45m"
    chosen = (f"{name}={point[name]}" for name in ("router", "capacity", "shared"))
    return ",".join(("model=pilot", *chosen))


ROUTERS = Study(
    "routers",
    """BALM-MoE's pilot: routers x capacity x shared experts, and the dense encoder.

    python sweeps/routers.py --data=data/pairs --launcher=slurm

Configs of configs/balm_moe.py: 250,000 updates of 512 single chains; experts of smaller
capacity are wider. `sweeps/compare_routers.py` compares all routers in minutes.
""",
    seeded(
        [
            {"router": "dense"},
            *product(
                router=("topk", "topp", "expert_choice"),
                capacity=("1", "0.5", "0.25"),
                shared=("0", "1"),
            ),
        ]
    ),
    recipe_of("configs/balm_moe.py", "data/pairs", _pilot),
    seeds=1,
)

_STEPS = 2000
SPECIALISATION = Study(
    "specialisation",
    """Encoders of equal tokens to dissect: dense, top-2, expert choice, soft-MoE.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python sweeps/specialisation.py --data=data/pairs --jobs=2
    python -m moe_ablm evaluate --run runs/specialisation/CELL --input data/pairs --out DIR

Configs of configs/compare_routers.py, five times as long. Active parameters are equal but for
soft-MoE, where all experts compute.
""",
    seeded(product(router=("dense", "top2", "expert-choice", "soft"))),
    recipe_of(
        "configs/compare_routers.py",
        "data/pairs",
        lambda p: f"router={p['router']}",
        train__steps=_STEPS,
        train__warmup=_STEPS // 10,
        eval__every=_STEPS // 4,
        checkpoint__every=_STEPS // 4,
        log__every=10,
    ),
    device=lambda _: CORE,
    mfu=0.15,
    seeds=3,
)
STUDIES = {
    s.name: s for s in (MASKING, PAIRING, PLACEMENT, SOFT_L2, PADDING, ROUTERS, SPECIALISATION)
}


def main(name: str) -> None:
    """Runs a study of the table on this process's command line, and exits."""
    sys.exit(study.main(STUDIES[name]))
