"""The inputs of a law: centred logarithms, one entry per run.

Axis legend of this package: `B` batch of parameter vectors (starts, bootstrap draws, profile
points), `n` runs, `K` parameters of a law, `J` additive terms of a law.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypedDict, cast

import numpy as np

from moe_ablm.errors import UserError

# A prediction depends on these; other columns of a table (seed, step, ...) describe a run.
INPUTS = (
    "params",
    "total_params",
    "tokens",
    "unique_tokens",
    "flops",
    "experts",
    "router",
    "granularity",
    "sparsity",
    "lr_area",
    "lr_recent",
    "lr_history",
    "weight_decay",
    "dropout",
)
FROM_ZERO = ("sparsity", "weight_decay", "dropout")  # these may be 0
BELOW_ONE = ("sparsity", "dropout")


class Target(TypedDict, total=False):
    """Inputs, in natural units, at which derived quantities are wanted."""

    params: float
    total_params: float
    tokens: float
    unique_tokens: float
    flops: float
    experts: float
    router: str
    granularity: float
    sparsity: float
    lr_area: float
    lr_recent: float
    weight_decay: float
    dropout: float


def make_target(where: str, values: Mapping[str, object]) -> Target:
    """The values as a target; raises UserError as `check_inputs` does."""
    check_inputs(where, values)
    return cast(Target, dict(values))


def check_inputs(where: str, values: Mapping[str, object]) -> None:
    """Checks inputs of a prediction, in natural units; `where` begins the message.

    Raises:
      UserError: a name is no input, or a value is no positive finite number.
    """
    for name, value in values.items():
        if name not in INPUTS:
            raise UserError(f"{where}: unknown input {name}; expected one of {', '.join(INPUTS)}")
        if name == "router":
            continue
        if name == "lr_history":
            if np.ndim(np.asarray(value)) != 3:
                raise UserError(f"{where}: {name}: expected the array of schedules.history")
            continue
        try:
            numbers = np.atleast_1d(np.asarray(value, float))
        except (TypeError, ValueError):
            raise UserError(f"{where}: {name}={value}: expected a number") from None
        outside = numbers < 0.0 if name in FROM_ZERO else numbers <= 0.0
        outside |= (name in BELOW_ONE) & (numbers >= 1.0)
        bad = numbers[~np.isfinite(numbers) | outside]
        if bad.size:
            raise UserError(f"{where}: {name}={bad[0]:g}: expected positive finite numbers")


@dataclass(frozen=True)
class Centre:
    """Natural logs of the parameters N0, tokens D0 and FLOPs C0 that inputs are divided by."""

    log_params: float = 0.0
    log_tokens: float = 0.0
    log_flops: float = 0.0
    log_rate: float = 0.0  # of the learning rates of `lr_history`

    def back(self) -> "Centre":
        """The centre that undoes this one."""
        return Centre(*(-v for v in vars(self).values()))


ABSENT = np.empty(0)


def routed(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which runs `[n]` have experts: more than one, or more parameters than active ones."""
    if "experts" in columns:
        return np.asarray(columns["experts"], float) > 1
    if {"params", "total_params"} <= columns.keys():
        active = np.asarray(columns["params"], float)
        return np.asarray(columns["total_params"], float) > active * (1 + 1e-6)
    return np.zeros(max(np.size(v) for v in columns.values()), bool)


@dataclass(frozen=True)
class Inputs:
    """Logs of the inputs of `n` runs, each `[n]`; empty where the runs lack the input.

    `n` active parameters / N0, `n_total` all parameters / N0, `d` tokens / D0, `u` unique tokens
    / D0, `c` training FLOPs / C0, `repeats` R = max(D/U - 1, 0) (not a log), `experts` E (not a
    log), `router` index into the law's routers (-1 dense), `granularity` ln G, `density` ln(1 - S),
    `lr_area` and `lr_recent` the logs of the sum of learning rates and of the recent one,
    `weight_decay` and `dropout` as they are; `lr_history` `[n, nodes, 3]` is of
    `schedules.history`, ln of rates / their mean.
    """

    size: int
    n: np.ndarray
    n_total: np.ndarray
    d: np.ndarray
    u: np.ndarray
    c: np.ndarray
    repeats: np.ndarray
    experts: np.ndarray
    router: np.ndarray
    granularity: np.ndarray
    density: np.ndarray
    lr_area: np.ndarray
    lr_recent: np.ndarray
    lr_history: np.ndarray
    weight_decay: np.ndarray
    dropout: np.ndarray

    def take(self, index: np.ndarray) -> "Inputs":
        """The runs at `index`."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "size"}
        return Inputs(index.size, **{k: v[index] if v.size else v for k, v in arrays.items()})


def make_inputs(
    columns: Mapping[str, np.ndarray],
    centre: Centre,
    routers: tuple[str, ...] = (),
    dense_pool: bool = False,
) -> Inputs:
    """Columns in natural units (`params`, `tokens`, ..., each `[n]`) to centred logs.

    A router that is not in `routers` (dense, or new to the fit) gets index -1: no effect. With
    `dense_pool` a run without experts has none either, whatever it is called, and one with experts
    and no name is of the only router. `total_params` defaults to `params`, `experts` to 1.
    """
    size = max(len(np.atleast_1d(v)) for v in columns.values())
    get = {
        k: np.broadcast_to(np.asarray(v), (size,)) for k, v in columns.items() if k != "lr_history"
    }
    history = np.asarray(columns.get("lr_history", ABSENT))
    if history.size:
        used = np.any(history[:, :, 0] != 0.0, axis=0)
        history = history[:, used] - np.array([0.0, centre.log_rate, 0.0])

    def log(name: str, shift: float) -> np.ndarray:
        return np.log(get[name].astype(float)) - shift if name in get else ABSENT

    def plain(name: str) -> np.ndarray:
        return get[name].astype(float) if name in get else ABSENT

    repeats = ABSENT
    if "tokens" in get and "unique_tokens" in get:
        ratio = get["tokens"].astype(float) / get["unique_tokens"].astype(float)
        repeats = np.maximum(ratio - 1.0, 0.0)
    index = {name: i for i, name in enumerate(routers)}
    if "router" in get:
        router = np.array([index.get(str(r), -1) for r in get["router"]])
    else:
        router = np.full(size, 0 if dense_pool and len(routers) == 1 else -1)
    if dense_pool:
        router = np.where(routed(get), router, -1)
    density = ABSENT
    if "sparsity" in get:
        density = np.log1p(-get["sparsity"].astype(float))
    n = log("params", centre.log_params)
    return Inputs(
        size=size,
        n=n,
        n_total=log("total_params", centre.log_params) if "total_params" in get else n,
        d=log("tokens", centre.log_tokens),
        u=log("unique_tokens", centre.log_tokens),
        c=log("flops", centre.log_flops),
        repeats=repeats,
        experts=get["experts"].astype(float) if "experts" in get else np.ones(size),
        router=router,
        granularity=log("granularity", 0.0),
        density=density,
        lr_area=log("lr_area", 0.0),
        lr_recent=log("lr_recent", 0.0),
        lr_history=history,
        weight_decay=plain("weight_decay"),
        dropout=plain("dropout"),
    )
