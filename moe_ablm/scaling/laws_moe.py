"""Laws of mixtures of experts: experts (Clark), granularity (Krajewski), sparsity (Abnar)."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.compute import SIX_N_D, Cost, cost_of
from moe_ablm.scaling.inputs import Centre, Inputs, Target
from moe_ablm.scaling.laws import (
    Derivative,
    Derived,
    Parameter,
    SmoothLaw,
    Term,
    coefficient,
    exponent,
    routers_of,
)

LN10 = np.log(10.0)
CLARK_BLOCK = 6  # parameters a router: a, b, c, d, E_start, E_max / E_start


def e_max_of_one(experts: np.ndarray, e_max: Parameter) -> dict[str, float]:
    """E_max held at its upper bound where runs have one number of experts only; else nothing.

    Then nothing tells where more stop helping, and E^ is E.
    """
    several = np.asarray(experts, float)
    if np.unique(several[several > 1]).size != 1:
        return {}
    return {e_max.name: float(e_max.report(e_max.high))}


def effective_experts(
    experts: np.ndarray, log_start: np.ndarray, log_ratio: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln E^ of Clark et al. 2022, eq. 7, and its derivatives by both logs.

    1/E^ = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max, with log_start = ln E_start and
    log_ratio = ln(E_max / E_start) > 0. E = 1 gives E_start; many experts give E_max.
    """
    start, inverse = np.exp(log_start), np.exp(-log_ratio)
    offset = start / -np.expm1(-log_ratio)  # (1/E_start - 1/E_max)^-1
    shifted = experts - 1.0 + offset
    reciprocal = 1.0 / shifted + inverse / start
    by_start = (offset / shifted**2 + inverse / start) / reciprocal
    offset_by_ratio = -offset * inverse / -np.expm1(-log_ratio)
    by_ratio = (offset_by_ratio / shifted**2 + inverse / start) / reciprocal
    return -np.log(reciprocal), by_start, by_ratio


class MoeClark(SmoothLaw):
    """Clark et al. 2022, equations 1 and 7: a curve per router; all curves share the dense runs.

    log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d. Coefficients of router `r` are
    called `a[r]` and so on.
    """

    name = "moe_clark"
    equation = (
        "log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d, "
        "1/E^ = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max"
    )
    source = "Clark et al. 2022, Unified scaling laws for routed language models, eq. 1, 7"
    needs = ("params", "experts", "loss")
    needs_experts = True
    figure = "loss_against_experts"
    most_starts = 1  # `linear_start` searches a grid of its own

    def __init__(self, routers: tuple[str, ...] = ("moe",), cost: Cost = SIX_N_D) -> None:
        super().__init__(routers, cost)
        self.parameters = tuple(
            Parameter(f"{p.name}[{r}]", p.meaning, p.low, p.high, p.log, search=p.search)
            for r in routers
            for p in (
                Parameter("a", "slope in log10 N", -2.0, 2.0),
                Parameter("b", "slope in log10 E^", -4.0, 4.0),
                Parameter("c", "interaction: how much less experts help large models", -2.0, 2.0),
                Parameter("d", "log10 L at N = 1, E^ = 1", -60.0, 60.0),
                Parameter("E_start", "effective experts of a dense model", 0.0, 4.6, True),
                Parameter(
                    "E_max_over_E_start",
                    "where more experts stop helping, over E_start",
                    0.01,
                    13.8,
                    True,
                    search=(0.7, 7.0),
                ),
            )
        )

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "MoeClark":
        if np.all(np.asarray(columns["experts"], float) <= 1):
            raise UserError(
                "law moe_clark: every run has experts = 1, and at least one router with more is "
                "needed; map the column with --columns experts=NAME or use --law chinchilla"
            )
        return cls(routers_of(columns), cost_of(columns))

    def observe(
        self, columns: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """Dense runs count once in the curve of every router, as in the paper."""
        experts = np.asarray(columns["experts"], float)
        names = np.asarray(columns.get("router", np.full(experts.size, self.routers[0])))
        rows, labels = [], []
        for router in self.routers:
            chosen = np.flatnonzero((experts <= 1) | (names == router))
            rows.append(chosen)
            labels.append(np.full(chosen.size, router))
        index = np.concatenate(rows)
        out = {k: np.asarray(v)[index] for k, v in columns.items()}
        return {**out, "router": np.concatenate(labels)}, index

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        value = np.zeros((theta.shape[0], x.size))
        derivatives: list[Derivative] = []
        for i in range(len(self.routers)):
            k = i * CLARK_BLOCK
            here = x.router == i
            n = np.where(here, x.n, 0.0) / LN10
            a, b, c, d, start, ratio = (theta[:, k + j, None] for j in range(CLARK_BLOCK))
            log_e, by_start, by_ratio = effective_experts(x.experts, start, ratio)
            e = np.where(here, log_e, 0.0) / LN10
            value += LN10 * (a * n + b * e + c * n * e + d * here)
            slope = np.where(here, b + c * n, 0.0)
            derivatives += [
                (k, LN10 * n),
                (k + 1, LN10 * e),
                (k + 2, LN10 * n * e),
                (k + 3, LN10 * here),
                (k + 4, slope * by_start),
                (k + 5, slope * by_ratio),
            ]
        return [(value, derivatives)]

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """As for every law; a dense run must name the router whose curve predicts it."""
        default = self.routers[0] if len(self.routers) == 1 else "dense"
        names = np.atleast_1d(columns.get("router", default))
        for name in np.unique(names):
            self._known(str(name), "predict")
        return super().predict(coefficients, {**columns, "router": names})

    def _known(self, router: object, where: str) -> None:
        if router not in self.routers:
            raise UserError(
                f"{where}: law moe_clark has a curve for each router; give router= one of "
                f"{', '.join(self.routers)} (dense runs lie on each of them at experts=1)"
            )

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        log10_n0 = centre.log_params / LN10
        for i in range(len(self.routers)):
            k = i * CLARK_BLOCK
            out[..., k + 1] -= out[..., k + 2] * log10_n0
            out[..., k + 3] -= out[..., k] * log10_n0
        return out

    def linear_start(
        self, theta: np.ndarray, x: Inputs, log_loss: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Ordinary least squares for a, b, c, d of every router, on a grid of (E_start, E_max).

        Each router has its own best pair of the grid: the curves share no parameter.
        """
        theta = theta.copy()
        grid = [(s, m) for s in (0.0, 0.4, 1.0, 2.0) for m in np.arange(0.7, 9.0, 0.7)]
        for i in range(len(self.routers)):
            here = (x.router == i) & (weights > 0)
            root = np.sqrt(weights[here])
            best = np.inf
            for start, ratio in grid:
                e = effective_experts(x.experts[here], np.array(start), np.array(ratio))[0] / LN10
                n = x.n[here] / LN10
                matrix = np.stack([n, e, n * e, np.ones_like(n)], axis=1) * root[:, None]
                y = log_loss[here] / LN10 * root
                solution = np.linalg.lstsq(matrix, y, rcond=None)[0]
                error = float(np.sum((matrix @ solution - y) ** 2))
                if error < best:
                    best = error
                    k = i * CLARK_BLOCK
                    theta[k : k + CLARK_BLOCK] = [*solution, start, ratio]
        return theta

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        out = []
        for i, router in enumerate(self.routers):
            k = i * CLARK_BLOCK

            def log_e_max(t: np.ndarray, k: int = k) -> np.ndarray:
                return t[:, k + 4] + t[:, k + 5]

            def log10_n_cut(t: np.ndarray, k: int = k) -> np.ndarray:
                return -t[:, k + 1] / t[:, k + 2] + centre.log_params / LN10

            out += [
                Derived(f"E_max[{router}]", "experts at which the gain ends", log_e_max, True),
                Derived(
                    f"log10_N_cutoff[{router}]",
                    "log10 of the size at which routing stops helping, -b/c (Clark eq. 11)",
                    log10_n_cut,
                ),
            ]
        # The loss needs a curve: the target names its router, or there is only one.
        if "router" in target or len(self.routers) == 1:
            self._known(target.get("router", self.routers[0]), "--target")
            out += self.loss_at(centre, {"router": self.routers[0], **target})
        return out


class MoeGranularity(SmoothLaw):
    """Krajewski et al. 2024, equation 9: finer experts, G = FFN width over expert width."""

    name = "moe_granularity"
    equation = "L = c + (g / G^gamma + a) N^-alpha + b D^-beta"
    source = "Krajewski et al. 2024, Scaling laws for fine-grained mixture of experts, eq. 9"
    needs = ("params", "tokens", "granularity", "loss")
    parameters = (
        coefficient("c", "loss that nothing removes"),
        coefficient("g", "part of the parameter term that granularity removes"),
        coefficient("a", "part of the parameter term that stays"),
        coefficient("b", "size of the term in tokens"),
        exponent("gamma", "exponent of granularity"),
        exponent("alpha", "exponent of parameters"),
        exponent("beta", "exponent of tokens"),
    )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        c, g, a, b, gamma, alpha, beta = (theta[:, k, None] for k in range(7))
        return [
            (np.broadcast_to(c, (theta.shape[0], x.size)), [(0, 1.0)]),
            (g - gamma * x.granularity - alpha * x.n, [(1, 1.0), (4, -x.granularity), (5, -x.n)]),
            (a - alpha * x.n, [(2, 1.0), (5, -x.n)]),
            (b - beta * x.d, [(3, 1.0), (6, -x.d)]),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., 1] += out[..., 5] * centre.log_params
        out[..., 2] += out[..., 5] * centre.log_params
        out[..., 3] += out[..., 6] * centre.log_tokens
        return out


class MoeSparsity(SmoothLaw):
    """Abnar et al. 2025, equation 3: N counts all parameters, S the share of idle experts."""

    name = "moe_sparsity"
    equation = "L = a N^-alpha + b D^-beta + c (1-S)^-lambda + d (1-S)^-delta N^-gamma + e"
    source = "Abnar et al. 2025, Parameters vs FLOPs: scaling laws for optimal sparsity, eq. 3"
    needs = ("params", "tokens", "sparsity", "loss")
    parameters = (
        coefficient("a", "size of the term in parameters"),
        coefficient("b", "size of the term in tokens"),
        coefficient("c", "size of the term in active share"),
        coefficient("d", "size of the interaction of active share and parameters"),
        coefficient("e", "loss that nothing removes"),
        exponent("alpha", "exponent of parameters"),
        exponent("beta", "exponent of tokens"),
        exponent("lambda", "exponent of the active share", -4.0, 4.0, (-1.0, 1.0)),
        exponent(
            "delta", "exponent of the active share in the interaction", -4.0, 4.0, (-1.0, 1.0)
        ),
        exponent("gamma", "exponent of parameters in the interaction"),
    )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        a, b, c, d, e, alpha, beta, lam, delta, gamma = (theta[:, k, None] for k in range(10))
        n, s = x.n_total, x.density
        return [
            (a - alpha * n, [(0, 1.0), (5, -n)]),
            (b - beta * x.d, [(1, 1.0), (6, -x.d)]),
            (c - lam * s, [(2, 1.0), (7, -s)]),
            (d - delta * s - gamma * n, [(3, 1.0), (8, -s), (9, -n)]),
            (np.broadcast_to(e, (theta.shape[0], x.size)), [(4, 1.0)]),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., 0] += out[..., 5] * centre.log_params
        out[..., 1] += out[..., 6] * centre.log_tokens
        out[..., 3] += out[..., 9] * centre.log_params
        return out
