"""The joint law of active parameters, tokens and number of experts."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.scaling.compute import cost_of
from moe_ablm.scaling.inputs import Centre, Inputs
from moe_ablm.scaling.laws import Parameter, SmoothLaw, Term, coefficient, exponent
from moe_ablm.scaling.laws_moe import e_max_of_one, effective_experts

E, A, B, ALPHA, BETA, DELTA, GAMMA, OMEGA, ZETA, E_MAX = range(10)


class MoeExperts(SmoothLaw):
    """Ludziejewski et al. 2025: experts change the size and the exponent of both terms.

    E^ is that of Clark et al. 2022 with E_start = 1 (fitted in the paper), so that dense runs have
    E^ = 1 and pool: for them this is law chinchilla. Repeats of data are not in it.
    """

    name = "moe_experts"
    equation = (
        "L = E + A E^^delta N^-(alpha + gamma ln E^) + B E^^omega D^-(beta + zeta ln E^), N active"
    )
    source = "Ludziejewski et al. 2025, Joint MoE scaling laws; E_start = 1"
    needs = ("params", "tokens", "experts", "loss")
    needs_experts = True
    parameters = (
        coefficient("E", "loss that neither parameters nor tokens remove"),
        coefficient("A", "size of the term in active parameters"),
        coefficient("B", "size of the term in tokens"),
        exponent("alpha", "exponent of active parameters"),
        exponent("beta", "exponent of tokens"),
        exponent("delta", "experts change the term in parameters", -8.0, 8.0, (-0.5, 0.5)),
        exponent("gamma", "experts change the exponent of parameters", -1.0, 1.0, (-0.05, 0.05)),
        exponent("omega", "experts change the term in tokens", -8.0, 8.0, (-0.5, 0.5)),
        exponent("zeta", "experts change the exponent of tokens", -1.0, 1.0, (-0.05, 0.05)),
        Parameter("E_max", "where more experts stop helping", 0.7, 13.8, True, search=(2.0, 7.0)),
    )

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "MoeExperts":
        """With one number of experts only, nothing tells where more stop helping: E^ is E."""
        law = cls(cost=cost_of(columns))
        law.defaults = e_max_of_one(columns["experts"], law.parameters[E_MAX])
        return law

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        e, a, b, alpha, beta, delta, gamma, omega, zeta, e_max = (
            theta[:, k, None] for k in range(10)
        )
        log_e, _, by_e_max = effective_experts(x.experts, np.zeros_like(e_max), e_max)
        by_a, by_b = delta - gamma * x.n, omega - zeta * x.d  # of ln of a term, by ln E^
        return [
            (np.broadcast_to(e, log_e.shape), [(E, 1.0)]),
            (
                a - alpha * x.n + by_a * log_e,
                [(A, 1.0), (ALPHA, -x.n), (DELTA, log_e), (GAMMA, -x.n * log_e)]
                + [(E_MAX, by_a * by_e_max)],
            ),
            (
                b - beta * x.d + by_b * log_e,
                [(B, 1.0), (BETA, -x.d), (OMEGA, log_e), (ZETA, -x.d * log_e)]
                + [(E_MAX, by_b * by_e_max)],
            ),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., A] += out[..., ALPHA] * centre.log_params
        out[..., DELTA] += out[..., GAMMA] * centre.log_params
        out[..., B] += out[..., BETA] * centre.log_tokens
        out[..., OMEGA] += out[..., ZETA] * centre.log_tokens
        return out
