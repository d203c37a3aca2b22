"""The laws by name, as `--law` accepts them."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.covariates import WithCovariates, spread
from moe_ablm.scaling.laws import Law, SmoothLaw
from moe_ablm.scaling.laws_compute import Compute, ComputeSlopes
from moe_ablm.scaling.laws_dense import (
    Chinchilla,
    DataConstrainedB1,
    DataConstrainedB2,
    DataConstrainedB3,
)
from moe_ablm.scaling.laws_experts import MoeExperts
from moe_ablm.scaling.laws_gap import Gap, GapActive, GapTotal
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
        Gap,
        GapActive,
        GapTotal,
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


def overfits(name: str) -> bool:
    """Whether a law has a term of over-fitting, which covariates may change."""
    name = resolve(name)
    return name in SMOOTH and SMOOTH[name].overfitting is not None


def law_for(
    name: str, columns: Mapping[str, np.ndarray], covariates: tuple[str, ...] = ()
) -> SmoothLaw:
    """A smooth law, with its router effects, for these runs.

    The covariates are factors on its over-fitting term; a law without one does not know them.
    """
    law = SMOOTH[resolve(name)].for_runs(columns)
    if not covariates or law.overfitting is None:
        return law
    return WithCovariates(law, {c: spread(columns, c) for c in covariates})


def saved_law(name: str, routers: tuple[str, ...], covariates: tuple[str, ...] = ()) -> Law:
    """The law that a `fit.json` names."""
    name = resolve(name)
    if name not in SMOOTH:
        return LAWS[name]()
    law = SMOOTH[name](routers) if routers else SMOOTH[name]()
    return WithCovariates(law, dict.fromkeys(covariates, 1.0)) if covariates else law


def applicable(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Laws whose columns are all there and vary enough to be worth a fit."""
    return [name for name, law in LAWS.items() if law.applies(columns)]
