"""Laws of the train-valid gap: over-fitting by active parameters, by all of them, or between."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.scaling.inputs import Centre, Inputs, Target
from moe_ablm.scaling.laws import (
    Derived,
    Parameter,
    SmoothLaw,
    Term,
    coefficient,
    exponent,
    routers_of,
)
from moe_ablm.scaling.laws_dense import penalty_term
from moe_ablm.scaling.router_effects import (
    FACTOR,
    FACTOR_SD,
    RouterEffects,
    effect_parameters,
    only_factor,
)

OFFSET = 1.0  # nats added to a gap, which may be negative
FRESH, P, DELTA, KAPPA, TAU = range(5)


class Gap(SmoothLaw):
    """The over-fitting term of law joint, seen in the gap alone.

    What size and tokens do to both losses alike is not in the gap, so that it tells whose
    parameters over-fit (tau) without their exponents. `fresh` is one plus the gap of a run that
    repeats nothing, which need not be 0: training losses are of dropout, and of other chains.
    Where runs have experts each router has a factor exp(v_r) on P, shrunk toward 1: what it does
    by itself is not taken for its number of parameters.
    """

    name = "gap"
    equation = (
        "1 + gap = fresh + P exp(v_r) R^delta (N_mem/U)^kappa, gap = validation - training loss, "
        "N_mem = N_active^(1-tau) N_total^tau, R = max(D/U - 1, 0)"
    )
    source = "this project; the over-fitting term of law joint"
    needs = ("params", "total_params", "tokens", "unique_tokens", "loss")
    of_gap = True
    dense_pool = True
    offset = OFFSET
    overfitting = P
    figure = "gap_against_repeats"
    own: tuple[Parameter, ...] = (
        coefficient("fresh", "one plus the gap of a run that repeats nothing"),
        coefficient("P", "size of the over-fitting term"),
        exponent("delta", "exponent of repeats", 1e-3, 4.0, (0.2, 2.0)),
        exponent("kappa", "exponent of parameters per unique token", 1e-3, 4.0, (0.2, 2.0)),
        Parameter("tau", "over-fit active (0) or total (1) parameters", -1.0, 2.0, search=(0, 1)),
    )

    def __init__(self, routers: tuple[str, ...] = ()) -> None:
        super().__init__(routers)
        self.v = RouterEffects(len(self.own), len(routers), FACTOR_SD)
        self.parameters = (*self.own, *effect_parameters("v", routers, FACTOR))

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "Gap":
        """With a factor of each router: of a single one, too, and of one without a name.

        With one number of experts nothing tells it from tau. Without dense runs P has it.
        """
        law = cls(routers_of(columns))
        law.defaults = {**law.defaults, **only_factor(columns, law.routers)}
        return law

    @classmethod
    def applies(cls, columns: Mapping[str, np.ndarray]) -> bool:
        """Asked for by name only: what it is of is not the loss."""
        return False

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        fresh, p, delta, kappa, tau = (theta[:, k, None] for k in range(5))
        extra = x.n_total - x.n
        ratio = x.n + tau * extra - x.u
        v, by_v = self.v.of(theta, x)
        value, log_repeats = penalty_term(p + v, delta, kappa, x.repeats, ratio)
        by_value = [(P, 1.0), (DELTA, log_repeats), (KAPPA, ratio), (TAU, kappa * extra), *by_v]
        return [(np.broadcast_to(fresh, ratio.shape), [(FRESH, 1.0)]), (value, by_value)]

    def penalty(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        return self.v.penalty(theta) if self.routers else None

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., P] -= out[..., KAPPA] * (centre.log_params - centre.log_tokens)
        return out

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        out = [
            Derived(
                "gap_fresh",
                "gap of a run that repeats nothing",
                lambda t: np.exp(t[:, FRESH]) - OFFSET,
            )
        ]
        if all(name in target for name in self.needs if name != "loss"):
            x = self.inputs({k: np.array([v]) for k, v in target.items()}, centre)

            def gap(t: np.ndarray) -> np.ndarray:
                return np.exp(self.log_loss(t, x)[:, 0]) - OFFSET

            out.append(Derived("gap", "gap at the target", gap))
        return out


class GapActive(Gap):
    """Over-fitting by active parameters, as of a dense model of the same compute."""

    name = "gap_active"
    equation = (
        "1 + gap = fresh + P exp(v_r) R^delta (N_active/U)^kappa, gap = validation - training loss"
    )
    defaults = {"tau": 0.0}


class GapTotal(Gap):
    """Over-fitting by all parameters."""

    name = "gap_total"
    equation = (
        "1 + gap = fresh + P exp(v_r) R^delta (N_total/U)^kappa, gap = validation - training loss"
    )
    defaults = {"tau": 1.0}
