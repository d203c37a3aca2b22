"""Published coefficients for public tables of runs, to print beside ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moe_ablm.scaling.result import Fit, SmoothFit


@dataclass(frozen=True)
class Study:
    """Published coefficients and derived quantities by our names; `errors` are standard errors."""

    law: str
    source: str
    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""
    decimals: int | None = None  # to which all values were rounded


def _clark() -> dict[str, float]:
    table = {  # a, b, c, d, E_start, E_max
        "S-Base": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
        "RL-R": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
        "Hash": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
    }
    names = ("a", "b", "c", "d", "E_start", "E_max", "E_max_over_E_start")
    return {
        f"{name}[{router}]": value
        for router, row in table.items()
        for name, value in zip(names, (*row, row[5] / row[4]), strict=True)
    }


def published_objective(fit: Fit, study: Study) -> float | None:
    """Our objective at the published point; None where the study lacks a free coefficient."""
    if not isinstance(fit, SmoothFit) or any(name not in study.values for name in fit.identifiable):
        return None
    values = {**fit.coefficients, **{k: study.values[k] for k in fit.identifiable}}
    natural = np.array([p.internal(values[p.name]) for p in fit.law.parameters])
    theta = fit.law.shift(natural, fit.centre.back())[None]
    return float(fit.problem.huber(fit.problem.residuals(theta))[0])


def rounded_objective(fit: Fit, study: Study) -> float | None:
    """Our objective at our minimum rounded like the study's values; None if those are exact."""
    if study.decimals is None:
        return None
    rounded = {k: round(v, study.decimals) for k, v in fit.coefficients.items()}
    return published_objective(fit, replace(study, values=rounded))


STUDIES: dict[str, Study] = {
    "ablm": Study(
        "quadratic",
        "Shafiei Neyestanak and Briney 2025",
        {
            "N_star[412182]": 29_020_563.0,
            "N_star[824363]": 68_099_905.0,
            "N_star[1648726]": 152_000_061.0,
            "data_needed": 5_523_212.0,
        },
        remark="11 of 15 cells; the losses here are digitised from the figure to 1e-5",
    ),
    "chinchilla": Study(
        "chinchilla",
        "Besiroglu et al. 2024, replication of Hoffmann et al. 2022",
        {"A": 482.00572, "B": 2085.4342, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585},
        {"A": 124.5, "B": 1293.0, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206},
        remark=(
            "the published point is the one of least absolute deviations (--huber-delta 1e-7), "
            "not of the Huber loss at 1e-3; its errors are those of 4,000 Huber bootstraps"
        ),
    ),
    "datablations": Study(
        "data_constrained_b1",
        "Muennighoff et al. 2023",
        {"R_D": 15.3878, "R_N": 5.3097},
        remark="the published point is not the minimum of its own objective, .0158259",
    ),
    "clark": Study("moe_clark", "Clark et al. 2022, table 3", _clark(), decimals=3),
}
