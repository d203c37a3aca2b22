"""Cells of a grid ranked by what a run of each tells of a quantity, for its compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.laws import Derived, with_gradient
from moe_ablm.scaling.noise import pure_error
from moe_ablm.scaling.resampling import Bootstrap
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs


@dataclass(frozen=True)
class Candidate:
    """A cell of the grid: its compute, and how far a run of it lowers var(ln quantity)."""

    source: str
    inputs: Mapping[str, object]
    flops: float
    variance_left: float  # share of the variance of the quantity that would remain
    per_flops: float  # expected reduction per FLOP


def next_runs(
    fit: SmoothFit, boot: Bootstrap, grid: Runs, quantity: Derived, noise: float
) -> list[Candidate]:
    """Cells of a grid by expected reduction of var(quantity) per FLOP, best first.

    Linearised at the fit with the covariance C of the bootstrap draws: a run with sensitivity j
    (d ln L / d theta) and noise s lowers var(g) by (g'Cj)^2 / (s^2 + j'Cj).
    """
    needs = [n for n in fit.law.needs if n != "loss"]
    columns = grid.columns
    grid.require(needs, fit.law.name)
    free = fit.problem.free
    cov = np.atleast_2d(np.cov(boot.usable[:, free], rowvar=False))
    slope = with_gradient(quantity.function)(fit.theta[None])[1][0, free]
    x = fit.law.inputs(columns, fit.centre)
    sensitivity = fit.law.jacobian(fit.theta[None], x)[0][:, free]
    before = float(slope @ cov @ slope)
    gain = (sensitivity @ cov @ slope) ** 2
    gain /= noise**2 + np.einsum("ni,ij,nj->n", sensitivity, cov, sensitivity)
    flops = grid.flops()
    out = [
        Candidate(
            grid.source[i],
            {k: v[i].item() for k, v in columns.items() if k in (*needs, "router")},
            float(flops[i]),
            1.0 - float(gain[i]) / before,
            float(gain[i]) / float(flops[i]),
        )
        for i in range(len(grid))
    ]
    return sorted(out, key=lambda c: -c.per_flops)


def noise_of(fit: SmoothFit) -> float:
    """Sd of ln L of one run: between replicates, else the robust spread of the residuals."""
    sd, freedom = pure_error(fit.runs)
    if freedom >= 3:
        return sd
    residuals = fit.residuals()
    return float(1.4826 * np.median(np.abs(residuals)))


def pick_quantity(quantities: Sequence[Derived]) -> Derived:
    """The derived quantity to learn about: N_star, else N_opt, else the exponent ratio."""
    for name in ("N_star", "N_opt", "exponent_ratio"):
        for q in quantities:
            if q.name == name:
                return q
    raise UserError(
        "--next-run: this law has no best size to learn about; give --target flops=... or "
        "params=..., tokens=..., unique_tokens=... to a law that has one"
    )
