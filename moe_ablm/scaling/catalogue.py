"""The laws by name: what `--law` accepts."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.laws import Law
from moe_ablm.scaling.laws_dense import (
    Chinchilla,
    DataConstrainedB1,
    DataConstrainedB2,
    DataConstrainedB3,
)
from moe_ablm.scaling.laws_joint import Joint
from moe_ablm.scaling.laws_moe import MoeClark, MoeGranularity, MoeSparsity
from moe_ablm.scaling.parabolas import Envelope, IsoFlop, Quadratic

SMOOTH: dict[str, type[Law]] = {
    law.name: law
    for law in (
        Chinchilla,
        DataConstrainedB1,
        DataConstrainedB2,
        DataConstrainedB3,
        MoeClark,
        MoeGranularity,
        MoeSparsity,
        Joint,
    )
}
PARABOLIC = {law.name: law for law in (Quadratic, IsoFlop, Envelope)}
ALIASES = {"data_constrained": "data_constrained_b1"}  # the published form
NAMES = (*PARABOLIC, *SMOOTH, *ALIASES)


def resolve(name: str) -> str:
    """The law's own name; raises UserError for a name that is no law."""
    name = ALIASES.get(name, name)
    if name not in SMOOTH and name not in PARABOLIC:
        raise UserError(f"--law {name}: unknown; expected one of {', '.join(NAMES)}")
    return name


def law_for(name: str, columns: Mapping[str, np.ndarray]) -> Law:
    """A smooth law, with its router effects, for these runs."""
    return SMOOTH[resolve(name)].for_runs(columns)


def saved_law(name: str, routers: tuple[str, ...]):
    """The law that a `fit.json` names."""
    name = resolve(name)
    if name in PARABOLIC:
        return PARABOLIC[name]()
    return SMOOTH[name](routers) if routers else SMOOTH[name]()


def applicable(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Laws whose columns are all there and vary enough to be worth a fit."""
    out = []
    for name, law in {**PARABOLIC, **SMOOTH}.items():
        if name == "envelope" or any(need not in columns for need in law.needs):
            continue
        moe = "experts" in columns and np.any(columns["experts"] > 1)
        if name in ("moe_clark", "joint") and not moe:
            continue
        repeats = "tokens" in columns and "unique_tokens" in columns
        if name.startswith("data_") and not (
            repeats and np.any(columns["tokens"] > columns["unique_tokens"] * (1 + 1e-6))
        ):
            continue
        out.append(name)
    return out
