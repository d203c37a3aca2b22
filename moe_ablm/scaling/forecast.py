"""Leaving the future out: each budget predicted from the smaller ones alone."""

from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.scaling.parabolas import IsoFlop
from moe_ablm.scaling.resampling import refit
from moe_ablm.scaling.result import SmoothFit


@dataclass(frozen=True)
class Forecast:
    """Losses at one budget as the law of the `used` smaller budgets predicts them."""

    flops: float
    used: int  # budgets fitted
    beyond: float  # times the largest of them
    error: float  # root mean square of ln L_model - ln L over the budget's runs
    bias: float  # mean of the same


def forecasts(fit: SmoothFit) -> list[Forecast]:
    """A forecast for each budget whose smaller ones have more runs than the law coefficients.

    Budgets are those of the runs (within 10 %). The law, its fixed coefficients and Huber's delta
    are those of the fit. What does not converge has no forecast.
    """
    groups = IsoFlop().groups(fit.runs)
    budgets = np.unique(groups)
    free = int(fit.problem.free.sum())
    future = [b for b in budgets if np.sum(groups < b) > free]
    if not future:
        return []
    weights = np.array([groups < b for b in future], float)[:, fit.index]
    ends = refit(fit, replace(fit.problem, weights=weights), len(future))
    residuals = np.stack([fit.by_run(r) for r in fit.problem.residuals(ends.theta)])
    out = []
    for budget, row, converged in zip(future, residuals, ends.converged, strict=True):
        if converged:
            error = row[groups == budget]
            below = budgets[budgets < budget]
            out.append(
                Forecast(
                    float(budget),
                    below.size,
                    float(budget / below[-1]),
                    float(np.sqrt(np.mean(error**2))),
                    float(np.mean(error)),
                )
            )
    return out


def forecast_note(made: list[Forecast]) -> str:
    """The last forecast in words, as it stands in `fit.json`."""
    last = made[-1]
    return (
        f"from the {last.used} smaller budgets the law predicts the loss at {last.flops:.3g} FLOPs "
        f"({last.beyond:.3g} times beyond them) with an error of {last.error:.2g} of ln L "
        f"({last.bias:+.2g} on average)"
    )
