"""Dense laws: Chinchilla, and three ways to pay for repeating data."""

import numpy as np

from moe_ablm.scaling.compute import Cost
from moe_ablm.scaling.inputs import Centre, Inputs, Target
from moe_ablm.scaling.laws import Derived, Parameter, SmoothLaw, Term, coefficient, exponent

E, A, B, ALPHA, BETA = range(5)
CHINCHILLA_PARAMETERS = (
    coefficient("E", "loss that neither parameters nor tokens remove"),
    coefficient("A", "size of the term in parameters"),
    coefficient("B", "size of the term in tokens"),
    exponent("alpha", "exponent of parameters"),
    exponent("beta", "exponent of tokens"),
)


class Chinchilla(SmoothLaw):
    """Hoffmann et al. 2022, equation 2 (approach 3)."""

    name = "chinchilla"
    equation = "L = E + A N^-alpha + B D^-beta"
    source = "Hoffmann et al. 2022, Training compute-optimal large language models, eq. 2"
    needs: tuple[str, ...] = ("params", "tokens", "loss")
    parameters: tuple[Parameter, ...] = CHINCHILLA_PARAMETERS

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        e, a, b, alpha, beta = (theta[:, k, None] for k in range(5))
        return [
            (np.broadcast_to(e, (theta.shape[0], x.size)), [(E, 1.0)]),
            (a - alpha * x.n, [(A, 1.0), (ALPHA, -x.n)]),
            (b - beta * x.d, [(B, 1.0), (BETA, -x.d)]),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., A] += out[..., ALPHA] * centre.log_params
        out[..., B] += out[..., BETA] * centre.log_tokens
        return out

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        return frontier(centre, target, self.cost) + self.loss_at(centre, target)


def frontier(centre: Centre, target: Target, cost: Cost) -> list[Derived]:
    """The compute-optimal frontier of A N^-alpha + B D^-beta at C = 6 N D c, c as N^s.

    With s = 0 that is Hoffmann et al. 2022, eq. 4: alpha A N^-alpha = (1 + s) beta B D^-beta.
    """
    grows = 1.0 + cost.slope
    out = [
        Derived(
            "exponent_ratio",
            "beta / (alpha + beta): N_opt grows as compute to this power"
            if cost.slope == 0.0
            else f"beta / (alpha + {grows:.4g} beta): N_opt grows as compute to this power, {cost}",
            lambda t: t[:, BETA] / (t[:, ALPHA] + grows * t[:, BETA]),
        )
    ]
    if "flops" in target:
        at_centre = np.asarray(centre.log_params)
        log_d = float(cost.log_tokens(target["flops"], at_centre)) - centre.log_tokens

        def log_n_opt(t: np.ndarray) -> np.ndarray:
            alpha, beta = t[:, ALPHA], t[:, BETA]
            gain = np.log(alpha) + t[:, A] - np.log(grows * beta) - t[:, B]
            return (gain + beta * log_d) / (alpha + grows * beta) + centre.log_params

        out.append(
            Derived("N_opt", "parameters that are best for the target FLOPs", log_n_opt, True)
        )
        out.append(
            Derived(
                "D_opt",
                "tokens that are best for the target FLOPs",
                lambda t: cost.log_tokens(target["flops"], log_n_opt(t)),
                True,
            )
        )
    return out


R_D, R_N = 5, 6


class DataConstrainedB1(Chinchilla):
    """Muennighoff et al. 2023, equations 5, 6 and 11: each repeat is worth less than the last."""

    name = "data_constrained_b1"
    equation = (
        "L = E + A N'^-alpha + B D'^-beta, D' = U + U R_D (1 - exp(-R/R_D)), "
        "N' = U_N + U_N R_N (1 - exp(-R_N*/R_N)), U_N = min(N, N_opt(U))"
    )
    source = "Muennighoff et al. 2023, Scaling data-constrained language models, eq. 5, 6, 11"
    needs = ("params", "tokens", "unique_tokens", "loss")
    parameters = (
        *CHINCHILLA_PARAMETERS,
        Parameter(
            "R_D", "repeats after which data are worth little", -4.6, 9.2, True, search=(0.0, 5.0)
        ),
        Parameter("R_N", "the same of excess parameters", -4.6, 9.2, True, search=(0.0, 5.0)),
    )
    needs_repeats = True
    linear_rounds = 3  # A and B also sit inside N_opt(U)

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        e, a, b, alpha, beta, r_d, r_n = (theta[:, k, None] for k in range(7))
        log_d, d_r_d, _ = saturate(x.u, x.repeats, r_d)
        # N_opt(U): parameters of the compute-optimal frontier at U tokens.
        gain = np.log(alpha) + a - np.log(beta) - b
        log_n_opt = (gain + beta * x.u) / alpha
        capped = log_n_opt < x.n
        u_n = np.where(capped, log_n_opt, x.n)
        excess = np.expm1(np.minimum(x.n - u_n, 60.0))  # saturated long before 60
        log_n, d_r_n, d_excess = saturate(u_n, excess, r_n)
        d_u_n = np.where(capped, 1.0 - d_excess * (excess + 1.0), 0.0)
        by_alpha = d_u_n * (1.0 - gain - beta * x.u) / alpha**2
        by_beta = d_u_n * (x.u / alpha - 1.0 / (alpha * beta))
        return [
            (np.broadcast_to(e, log_n.shape), [(E, 1.0)]),
            (
                a - alpha * log_n,
                [
                    (A, 1.0 - d_u_n),
                    (B, d_u_n),
                    (ALPHA, -log_n - alpha * by_alpha),
                    (BETA, -alpha * by_beta),
                    (R_N, -alpha * d_r_n),
                ],
            ),
            (b - beta * log_d, [(B, 1.0), (BETA, -log_d), (R_D, -beta * d_r_d)]),
        ]


def saturate(
    log_unit: np.ndarray, repeats: np.ndarray, log_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln(U + U s (1 - exp(-R/s))), its derivative by ln s, and by R; s = exp(log_scale)."""
    scale = np.exp(log_scale)
    z = repeats / scale
    decay = np.exp(-z)
    grown = -scale * np.expm1(-z)
    value = log_unit + np.log1p(grown)
    return value, (grown - repeats * decay) / (1.0 + grown), decay / (1.0 + grown)


P, DELTA, KAPPA = 5, 6, 7


class DataConstrainedB2(Chinchilla):
    """Chinchilla with an over-fitting penalty: loss may rise with repeats, unlike in b1."""

    name = "data_constrained_b2"
    equation = "L = E + A N^-alpha + B D^-beta + P R^delta (N/U)^kappa, R = max(D/U - 1, 0)"
    source = "this project; the penalty's form follows the rise of masked losses with epochs"
    needs: tuple[str, ...] = ("params", "tokens", "unique_tokens", "loss")
    needs_repeats = True
    overfitting = P
    parameters: tuple[Parameter, ...] = (
        *CHINCHILLA_PARAMETERS,
        coefficient("P", "size of the over-fitting penalty"),
        exponent("delta", "exponent of repeats", 1e-3, 4.0, (0.2, 2.0)),
        exponent("kappa", "exponent of parameters per unique token", 1e-3, 4.0, (0.2, 2.0)),
    )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        p, delta, kappa = (theta[:, k, None] for k in (P, DELTA, KAPPA))
        value, log_repeats = penalty_term(p, delta, kappa, x.repeats, x.n - x.u)
        penalty = (value, [(P, 1.0), (DELTA, log_repeats), (KAPPA, x.n - x.u)])
        return [*super().terms(theta, x), penalty]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = super().shift(theta, centre)
        out[..., P] -= out[..., KAPPA] * (centre.log_params - centre.log_tokens)
        return out

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        return (
            frontier(centre, target, self.cost)
            + best_size(centre, target)
            + self.loss_at(centre, target)
        )


def best_size(centre: Centre, target: Target) -> list[Derived]:
    """N* minimises A N^-alpha + P R^delta (N/U)^kappa at the target's tokens and unique tokens.

    Empty unless the target has repeats.
    """
    if not target.get("tokens", 0.0) > target.get("unique_tokens", np.inf):
        return []
    log_u = np.log(target["unique_tokens"]) - centre.log_tokens
    log_r = np.log(target["tokens"] / target["unique_tokens"] - 1.0)

    def log_n_star(t: np.ndarray) -> np.ndarray:
        gain = np.log(t[:, ALPHA]) + t[:, A] - np.log(t[:, KAPPA]) - t[:, P]
        rise = t[:, DELTA] * log_r - t[:, KAPPA] * log_u
        return (gain - rise) / (t[:, ALPHA] + t[:, KAPPA]) + centre.log_params

    meaning = "dense size with the lowest loss at the target's tokens and unique tokens"
    return [Derived("N_star", meaning, log_n_star, log=True)]


class DataConstrainedB3(DataConstrainedB2):
    """B2 with both exponents of the penalty at 1: one coefficient for over-fitting."""

    name = "data_constrained_b3"
    equation = "L = E + A N^-alpha + B D^-beta + P R N/U, R = max(D/U - 1, 0)"
    defaults = {"delta": 1.0, "kappa": 1.0}


def penalty_term(
    p: np.ndarray, delta: np.ndarray, kappa: np.ndarray, repeats: np.ndarray, ratio: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ln(P R^delta (N/U)^kappa), -inf where R is 0, and ln R with 0 in place of -inf."""
    repeated = repeats > 0
    log_repeats = np.log(np.where(repeated, repeats, 1.0))
    value = np.where(repeated, p + delta * log_repeats + kappa * ratio, -np.inf)
    return value, log_repeats
