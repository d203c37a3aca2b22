"""The laws by name, as `--law` accepts them."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.laws import Law, SmoothLaw
from moe_ablm.scaling.laws_compute import Compute, ComputeSlopes
from moe_ablm.scaling.laws_dense import (
    Chinchilla,
    DataConstrainedB1,
    DataConstrainedB2,
    DataConstrainedB3,
)
from moe_ablm.scaling.laws_experts import MoeExperts
from moe_ablm.scaling.laws_joint import Joint
from moe_ablm.scaling.laws_moe import MoeClark, MoeGranularity, MoeSparsity
from moe_ablm.scaling.laws_schedule import Annealing, AnnealingSizes
from moe_ablm.scaling.laws_settings import BatchSize, BestSetting, LearningRate
from moe_ablm.scaling.parabolas import Envelope, IsoFlop, Quadratic

SMOOTH: dict[str, type[SmoothLaw]] = {
    law.name: law
    for law in (
        Chinchilla,
        DataConstrainedB1,
        DataConstrainedB2,
        DataConstrainedB3,
        MoeClark,
        MoeGranularity,
        MoeSparsity,
        MoeExperts,
        Joint,
        Annealing,
        AnnealingSizes,
        Compute,
        ComputeSlopes,
    )
}
PARABOLIC: dict[str, type[Quadratic]] = {law.name: law for law in (Quadratic, IsoFlop, Envelope)}
SETTINGS: dict[str, type[BestSetting]] = {law.name: law for law in (LearningRate, BatchSize)}
LAWS: dict[str, type[Law]] = {**PARABOLIC, **SMOOTH, **SETTINGS}
ALIASES = {"data_constrained": "data_constrained_b1"}  # the published form
NAMES = (*LAWS, *ALIASES)


def resolve(name: str) -> str:
    """The full name of a law or an alias; raises UserError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in LAWS:
        raise UserError(f"--law {name}: unknown; expected one of {', '.join(NAMES)}")
    return name


def law_for(name: str, columns: Mapping[str, np.ndarray]) -> SmoothLaw:
    """A smooth law, with its router effects, for these runs."""
    return SMOOTH[resolve(name)].for_runs(columns)


def saved_law(name: str, routers: tuple[str, ...]) -> Law:
    """The law that a `fit.json` names."""
    name = resolve(name)
    if name in SMOOTH and routers:
        return SMOOTH[name](routers)
    return LAWS[name]()


def applicable(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Laws whose columns are all there and vary enough to be worth a fit."""
    return [name for name, law in LAWS.items() if law.applies(columns)]
