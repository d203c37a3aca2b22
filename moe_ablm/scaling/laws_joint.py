"""The joint law: one fit of dense and mixture-of-experts runs under limited unique data."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.scaling.compute import SIX_N_D, Cost, cost_of
from moe_ablm.scaling.inputs import Centre, Inputs, Target
from moe_ablm.scaling.laws import (
    Derived,
    Parameter,
    Term,
    coefficient,
    exponent,
    routers_of,
)
from moe_ablm.scaling.laws_dense import (
    ALPHA,
    BETA,
    DELTA,
    KAPPA,
    A,
    B,
    DataConstrainedB2,
    E,
    P,
    penalty_term,
)
from moe_ablm.scaling.laws_moe import e_max_of_one, effective_experts
from moe_ablm.scaling.router_effects import (
    FACTOR,
    FACTOR_SD,
    RouterEffects,
    effect_parameters,
    only_factor,
)

MU, E_MAX, TAU = 8, 9, 10  # after the parameters of b2
SHARED = (
    coefficient("E", "loss that neither parameters nor tokens remove"),
    coefficient("A", "size of the term in effective parameters"),
    coefficient("B", "size of the term in tokens"),
    exponent("alpha", "exponent of effective parameters"),
    exponent("beta", "exponent of tokens"),
    coefficient("P", "size of the over-fitting penalty"),
    exponent("delta", "exponent of repeats", 1e-3, 4.0, (0.2, 2.0)),
    exponent("kappa", "exponent of memorising parameters per unique token", 1e-3, 4.0, (0.2, 2.0)),
    exponent("mu", "effective parameters grow as experts to this power", -1.0, 2.0, (0.0, 0.8)),
    Parameter("E_max", "where more experts stop helping", 0.7, 13.8, True, search=(2.0, 7.0)),
    exponent("tau", "memory follows active (0) or total (1) parameters", -1.0, 2.0, (0.0, 1.0)),
)
EXPONENT_SD = 0.1  # prior of a router's difference in mu


class Joint(DataConstrainedB2):
    """Chinchilla in effective parameters plus an over-fitting penalty, with router effects.

    L = E + A N_eff^-alpha + B D^-beta + P exp(v_r) R^delta (N_mem/U)^kappa,
    N_eff = N_active E^^(mu + u_r), N_mem = N_active^(1-tau) N_total^tau. Router effects u_r (of
    several routers) and v_r are shrunk toward 0 by normal priors. E^ is that of Clark et al. 2022
    with E_start = 1, so that a dense run has E^ = 1 and N_total = N_active and pools exactly: for
    dense runs this is law data_constrained_b2.
    """

    name = "joint"
    equation = (
        "L = E + A N_eff^-alpha + B D^-beta + P exp(v_r) R^delta (N_mem/U)^kappa, "
        "N_eff = N_active E^^(mu+u_r), N_mem = N_active^(1-tau) N_total^tau"
    )
    source = "this project; E^ of Clark et al. 2022, eq. 7, with E_start = 1"
    needs = ("params", "total_params", "tokens", "unique_tokens", "experts", "loss")
    needs_experts = True
    needs_repeats = False
    dense_pool = True

    def __init__(self, routers: tuple[str, ...] = (), cost: Cost = SIX_N_D) -> None:
        super().__init__(routers, cost)
        self.defaults: Mapping[str, float] = {}
        # mu is of routers alone, and a single one's; P is of dense runs as well
        self.effects = routers if len(routers) > 1 else ()
        count = len(self.effects)
        self.u = RouterEffects(len(SHARED), count, EXPONENT_SD)
        self.v = RouterEffects(len(SHARED) + count, len(routers), FACTOR_SD)
        self.parameters = (
            *SHARED,
            *effect_parameters("u", self.effects, "this router's difference in mu"),
            *effect_parameters("v", routers, FACTOR),
        )

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "Joint":
        """With one number of experts only, nothing tells where more stop helping: E^ is E.

        Without dense runs P has the factor of a single router.
        """
        law = cls(routers_of(columns), cost_of(columns))
        held = e_max_of_one(columns["experts"], law.parameters[E_MAX])
        law.defaults = held | only_factor(columns, law.routers)
        return law

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        e, a, b, alpha, beta, p, delta, kappa, mu, e_max, tau = (
            theta[:, k, None] for k in range(11)
        )
        log_e, _, by_e_max = effective_experts(x.experts, np.zeros_like(e_max), e_max)
        u, u_derivatives = self.u.of(theta, x)
        v, v_derivatives = self.v.of(theta, x)
        log_n = x.n + (mu + u) * log_e
        extra = x.n_total - x.n
        ratio = x.n + tau * extra - x.u
        value, log_repeats = penalty_term(p + v, delta, kappa, x.repeats, ratio)
        gain = -alpha * log_e
        return [
            (np.broadcast_to(e, log_n.shape), [(E, 1.0)]),
            (
                a - alpha * log_n,
                [(A, 1.0), (ALPHA, -log_n), (MU, gain), (E_MAX, -alpha * (mu + u) * by_e_max)]
                + [(k, gain * here) for k, here in u_derivatives],
            ),
            (b - beta * x.d, [(B, 1.0), (BETA, -x.d)]),
            (
                value,
                [(P, 1.0), (DELTA, log_repeats), (KAPPA, ratio), (TAU, kappa * extra)]
                + v_derivatives,
            ),
        ]

    def penalty(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if not self.routers:
            return None
        (u, by_u), (v, by_v) = self.u.penalty(theta), self.v.penalty(theta)
        return u + v, by_u + by_v

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        out = super().derived(centre, target)
        for i, router in enumerate(self.effects):

            def mu(t: np.ndarray, k: int = self.u.first + i) -> np.ndarray:
                return t[:, MU] + t[:, k]

            meaning = "mu + u of this router, which the data know better than its parts"
            out.append(Derived(f"mu[{router}]", meaning, mu))
        return out
