"""What a law sees of the runs: centred logarithms, one entry a run.

Axis legend of this package: `B` batch of parameter vectors (starts, bootstrap draws, profile
points), `n` runs, `K` parameters of a law, `J` additive terms of a law.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_ablm.errors import UserError

# What a prediction may depend on; other columns of a table (seed, step, ...) only describe a run.
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
)


def check_inputs(where: str, values: Mapping[str, object]) -> None:
    """Inputs of a prediction, in natural units; `where` begins the message.

    Raises:
      UserError: a name is no input, or a value is no positive finite number.
    """
    for name, value in values.items():
        if name not in INPUTS:
            raise UserError(f"{where}: unknown input {name}; expected one of {', '.join(INPUTS)}")
        if name == "router":
            continue
        try:
            value = np.asarray(value, float)
        except (TypeError, ValueError):
            raise UserError(f"{where}: {name}={value}: expected a number") from None
        outside = (value < 0.0) | (value >= 1.0) if name == "sparsity" else value <= 0.0
        bad = ~np.isfinite(value) | outside
        if bad.any():
            found = np.atleast_1d(value)[np.atleast_1d(bad)][0]
            raise UserError(f"{where}: {name}={found:g}: expected positive finite numbers")


@dataclass(frozen=True)
class Centre:
    """Natural logs of the parameter count N0 and the token count D0 that inputs are divided by."""

    log_params: float = 0.0
    log_tokens: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Logs of the inputs of `n` runs, each `[n]`; an input that the law does not need is None.

    `n` active parameters / N0, `n_total` all parameters / N0, `d` tokens / D0, `u` unique tokens
    / D0, `repeats` R = max(D/U - 1, 0) (not a log), `experts` E (not a log), `router` index
    into the law's routers (-1 dense), `granularity` ln G, `density` ln(1 - S).
    """

    size: int
    n: np.ndarray | None = None
    n_total: np.ndarray | None = None
    d: np.ndarray | None = None
    u: np.ndarray | None = None
    repeats: np.ndarray | None = None
    experts: np.ndarray | None = None
    router: np.ndarray | None = None
    granularity: np.ndarray | None = None
    density: np.ndarray | None = None


def make_inputs(
    columns: Mapping[str, np.ndarray], centre: Centre, routers: tuple[str, ...] = ()
) -> Inputs:
    """Columns in natural units (`params`, `tokens`, ..., each `[n]`) to centred logs.

    A router that is not in `routers` gets index -1, that is no effect: dense, or new to the fit.
    `total_params` defaults to `params`, `experts` to 1.
    """
    size = max(np.asarray(v).size for v in columns.values())
    get = {k: np.broadcast_to(np.asarray(v), (size,)) for k, v in columns.items()}

    def log(name: str, shift: float) -> np.ndarray | None:
        return np.log(get[name].astype(float)) - shift if name in get else None

    repeats = None
    if "tokens" in get and "unique_tokens" in get:
        ratio = get["tokens"].astype(float) / get["unique_tokens"].astype(float)
        repeats = np.maximum(ratio - 1.0, 0.0)
    index = {name: i for i, name in enumerate(routers)}
    names = get.get("router", np.full(size, "dense"))
    density = None
    if "sparsity" in get:
        density = np.log1p(-get["sparsity"].astype(float))
    n = log("params", centre.log_params)
    return Inputs(
        size=size,
        n=n,
        n_total=log("total_params", centre.log_params) if "total_params" in get else n,
        d=log("tokens", centre.log_tokens),
        u=log("unique_tokens", centre.log_tokens),
        repeats=repeats,
        experts=get["experts"].astype(float) if "experts" in get else np.ones(size),
        router=np.array([index.get(str(r), -1) for r in names]),
        granularity=log("granularity", 0.0),
        density=density,
    )
