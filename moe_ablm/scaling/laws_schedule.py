"""Laws of whole learning curves: checkpoints in mid-schedule count, and cooled branches."""

import numpy as np

from moe_ablm.scaling.inputs import Centre, Inputs
from moe_ablm.scaling.laws import Parameter, SmoothLaw, Term, coefficient, exponent

E, A, ALPHA, C, B, BETA = range(6)


class Annealing(SmoothLaw):
    """Tissue et al. 2024 for runs of one size.

    Theirs is L = L0 + A S1^-alpha - C2 S2. With r = peak - (1 - m) S2, the recent rate, this is
    L = E + A S1^-alpha + C r, where C = C2 / (1 - m) and E = L0 - C peak: the same law for runs of
    one peak, and a sum of positive terms. E is the loss that is left when the rate is annealed.
    """

    name = "annealing"
    equation = "L = E + A S1^-alpha + C r, S1 = sum of rates, r = rate averaged over 100 updates"
    source = "Tissue et al. 2024, Scaling law with learning rate annealing, arXiv 2408.11029"
    needs: tuple[str, ...] = ("params", "lr_area", "lr_recent", "loss")
    needs_curves = True
    figure = "loss_against_area"
    parameters: tuple[Parameter, ...] = (
        coefficient("E", "loss that neither training nor annealing removes"),
        coefficient("A", "size of the term in the area of rates"),
        exponent("alpha", "exponent of the area of rates"),
        coefficient("C", "loss that a unit of learning rate costs until it is annealed"),
    )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        e, a, alpha, c = (theta[:, k, None] for k in (E, A, ALPHA, C))
        return [
            (np.broadcast_to(e, (theta.shape[0], x.size)), [(E, 1.0)]),
            (a - alpha * x.lr_area, [(A, 1.0), (ALPHA, -x.lr_area)]),
            (c + x.lr_recent, [(C, 1.0)]),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        del centre  # neither input is centred
        return np.array(theta)


MP_B, MP_C, MP_BETA, MP_GAMMA = 3, 4, 5, 6


class MultiPower(SmoothLaw):
    """Luo et al. 2025 for runs of one size: what annealing takes off comes as a power law.

    Theirs is L = L0 + A S1^-alpha - B sum_k (eta_(k-1) - eta_k) (1 - K_k) with
    K_k = (1 + C eta_k^-gamma S_k)^-beta. With r = eta_t + sum_k (eta_(k-1) - eta_k) K_k this is
    L = E + A S1^-alpha + B r, a sum of positive terms, where E = L0 - B eta_0: L0 itself where, as
    in the authors' code, k begins at the warm-up. r is what annealing has left of the rate.
    """

    name = "multi_power"
    equation = (
        "L = E + A S1^-alpha + B r, r = eta_t + sum_k (eta_(k-1) - eta_k) "
        "(1 + C eta_k^-gamma S_k)^-beta, S_k = eta_k + ... + eta_t"
    )
    source = "Luo et al. 2025, A multi-power law for loss curve prediction, arXiv 2503.12811, eq. 2"
    needs = ("params", "lr_area", "lr_history", "loss")
    needs_curves = True
    figure = "loss_against_area"
    parameters = (
        *Annealing.parameters[:3],
        coefficient("B", "loss that a unit of learning rate costs until it is annealed"),
        Parameter("C", "how fast a drop of the rate acts", -10.0, 20.0, True, search=(1.0, 8.0)),
        exponent("beta", "exponent of what a drop has not taken yet", search=(0.2, 1.2)),
        exponent("gamma", "how much faster drops to low rates act", 0.0, 2.0, (0.1, 1.0)),
    )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        e, a, alpha, b = (theta[:, k, None] for k in (E, A, ALPHA, MP_B))
        log_c, beta, gamma = (theta[:, k, None, None] for k in (MP_C, MP_BETA, MP_GAMMA))
        drop, log_rate, log_since = np.moveaxis(x.lr_history, -1, 0)
        z = np.exp(log_c - gamma * log_rate + log_since)
        grown = np.log1p(z)
        left = drop * np.exp(-beta * grown)
        r = np.maximum(left.sum(axis=-1), 1e-12)
        by_log_z = -beta * left * (z / (1.0 + z))
        by_c, by_beta = by_log_z.sum(axis=-1) / r, -(left * grown).sum(axis=-1) / r
        by_gamma = -(by_log_z * log_rate).sum(axis=-1) / r
        return [
            (np.broadcast_to(e, (theta.shape[0], x.size)), [(E, 1.0)]),
            (a - alpha * x.lr_area, [(A, 1.0), (ALPHA, -x.lr_area)]),
            (b + np.log(r), [(MP_B, 1.0), (MP_C, by_c), (MP_BETA, by_beta), (MP_GAMMA, by_gamma)]),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., MP_C] += out[..., MP_GAMMA] * centre.log_rate
        return out


class AnnealingSizes(Annealing):
    """The law of Tissue et al. 2024 with the term of Hoffmann et al. 2022 in parameters."""

    name = "annealing_sizes"
    equation = "L = E + A S1^-alpha + C r + B N^-beta, S1 = sum of rates, r = recent rate"
    source = "Tissue et al. 2024, Scaling law with learning rate annealing, arXiv 2408.11029"
    parameters = (
        *Annealing.parameters,
        coefficient("B", "size of the term in parameters"),
        exponent("beta", "exponent of parameters"),
    )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        b, beta = theta[:, B, None], theta[:, BETA, None]
        return [*super().terms(theta, x), (b - beta * x.n, [(B, 1.0), (BETA, -x.n)])]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., B] += out[..., BETA] * centre.log_params
        return out
