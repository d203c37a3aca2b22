"""What intervals are for: coefficients that have a meaning, and derived quantities."""

from collections.abc import Callable

import numpy as np

from moe_ablm.scaling.identify import meaningless
from moe_ablm.scaling.laws import Derived
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.solver import Units


def quantities(fit: SmoothFit) -> list[Derived]:
    """Free coefficients that have a meaning, and derived quantities.

    A linear coefficient that is zero, or whose term is a constant, is in a unit that makes its
    term as large as the loss, so that it may be zero; the others are their internal values in
    natural units: with its exponent a coefficient moves by orders of magnitude.
    """
    share = Units.at(fit.problem, fit.theta[None]).scale[0]
    # what the coefficient is in natural units where its term is as large as the loss
    unit = fit.law.shift(fit.theta, fit.centre) - fit.theta - share

    def natural(k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda theta: fit.law.shift(theta, fit.centre)[:, k]

    def linear(k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda theta: np.exp(natural(k)(theta) - unit[k])

    idle = meaningless(fit.problem, fit.theta)
    coupled = np.abs(unit + share) > 1e-9  # natural and centred units differ
    zero = np.isin(fit.law.names, fit.at_bounds)
    out = [
        Derived(p.name, p.meaning, linear(k), unit=float(np.exp(unit[k])))
        if p.linear and (zero[k] or not coupled[k])
        else Derived(p.name, p.meaning, natural(k), p.log, 1.0 if p.log else p.unit)
        for k, p in enumerate(fit.law.parameters)
        if fit.problem.free[k] and p.name not in idle
    ]
    return out + fit.law.derived(fit.centre, fit.target)
