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
