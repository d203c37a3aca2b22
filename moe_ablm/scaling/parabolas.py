"""Laws of parabolas in log10 N, one per data size (the AbLM study) or per compute budget (isoFLOP).

The law is a straight line through the minima on log axes. How the parabolas are fitted is in
`minima.py`.
"""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.compute import Cost, cost_of
from moe_ablm.scaling.inputs import Target
from moe_ablm.scaling.laws import Law
from moe_ablm.scaling.minima import line, warp
from moe_ablm.scaling.runs import Runs

SAME_BUDGET = 0.1  # runs whose FLOPs lie within this (natural log) of the smallest share a budget


class Quadratic(Law):
    """Shafiei Neyestanak and Briney 2025: the best size for each number of unique sequences."""

    name = "quadratic"
    equation = "L = a (log10 N)^2 + b log10 N + c per data size; N* = 10^(-b/2a); ln U on ln N*"
    source = "Shafiei Neyestanak and Briney 2025, Data-optimal scaling laws for paired AbLMs"
    needs = ("params", "unique_tokens", "loss")
    group = "unique_tokens"  # the column whose values have a parabola each
    # only sizes near the minimum count, parabolas share a skew, a minimum outside the sizes is none
    local = False

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "Quadratic":
        """The law for runs of these columns."""
        return cls()

    def require(self, runs: Runs) -> None:
        """Raises UserError where the runs lack a column."""
        runs.require(self.needs, self.name)

    def groups(self, runs: Runs) -> np.ndarray:
        """The data size of each run, `[n]`."""
        return runs["unique_tokens"]

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Losses at sizes of a data size (or budget) that was fitted."""
        params, size = np.broadcast_arrays(
            np.asarray(columns["params"], float), np.asarray(columns[self.group], float)
        )
        known = {float(k[2:-1]): k[2:-1] for k in coefficients if k.startswith("a[")}
        out = np.empty(params.shape)
        for i in np.ndindex(params.shape):
            near = [key for value, key in known.items() if abs(np.log(size[i] / value)) < 0.05]
            if not near:
                raise UserError(
                    f"predict: law {self.name} has no parabola at {self.group}={size[i]:g}; it has "
                    f"{', '.join(known.values())}"
                )
            a, b, c = (coefficients[f"{x}[{near[0]}]"] for x in "abc")
            middle = np.log10(coefficients.get("N0", 1.0))
            z = warp(np.log10(params[i]), coefficients.get("skew", 0.0), middle)
            out[i] = (a * z + b) * z + c
        return out

    def through_minima(
        self, log_n: np.ndarray, log_size: np.ndarray, target: Target
    ) -> dict[str, np.ndarray]:
        """The line of ln U on ln N* `[..., G]`, and the logs of what it gives at the target."""
        intercept, slope = line(log_n, log_size)
        out = {"slope": slope, "intercept": intercept}
        if "params" in target:
            out["data_needed"] = intercept + slope * np.log(target["params"])
        if "unique_tokens" in target:
            out["N_star"] = (np.log(target["unique_tokens"]) - intercept) / slope
        return out

    def through_tokens(
        self, log_d: np.ndarray, log_size: np.ndarray, target: Target
    ) -> dict[str, np.ndarray]:
        """The line through minima in D; none, because a data size is not a budget."""
        return {}


class IsoFlop(Quadratic):
    """Hoffmann et al. 2022, approach 2: the best size for each compute budget.

    A loss is steeper toward small models, and how much so hardly depends on the budget: on
    E + A N^-alpha + B D^-beta its third derivative by ln N is (beta - alpha) times the second at
    every minimum. So parabolas are in x, a power of N with an exponent `skew` that they share.
    """

    name = "isoflop"
    equation = (
        "L = a x^2 + b x + c per budget C, x = log10 N0 + ((N/N0)^skew - 1) / (skew ln 10); "
        "N_opt = k C^slope"
    )
    source = "Hoffmann et al. 2022, Training compute-optimal large language models, section 3.2"
    needs = ("params", "flops", "loss")
    group = "flops"
    local = True

    def __init__(self, cost: Cost | None = None) -> None:
        self.cost = cost or Cost()

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "IsoFlop":
        return cls(cost_of(columns))

    def require(self, runs: Runs) -> None:
        runs.require(("params", "loss"), self.name)
        if "flops" not in runs:
            runs.require(("tokens",), self.name)

    def groups(self, runs: Runs) -> np.ndarray:
        """The geometric mean of each run's budget: within 10 % of the smallest of the budget."""
        log_flops = np.log(runs.flops())
        order = np.argsort(log_flops, kind="stable")
        out = np.empty(len(runs))
        first = 0
        for i in range(1, len(runs) + 1):
            if i == len(runs) or log_flops[order[i]] - log_flops[order[first]] > SAME_BUDGET:
                members = order[first:i]
                out[members] = float(f"{np.exp(log_flops[members].mean()):.6g}")
                first = i
        return out

    def through_minima(
        self, log_n: np.ndarray, log_size: np.ndarray, target: Target
    ) -> dict[str, np.ndarray]:
        """The line of ln N_opt on ln C, and the logs of what it gives at the target."""
        intercept, slope = line(log_size, log_n)
        out = {"slope": slope, "intercept": intercept}
        if "flops" in target:
            out["N_opt"] = intercept + slope * np.log(target["flops"])
            out["D_opt"] = self.cost.log_tokens(target["flops"], out["N_opt"])
        return out

    def through_tokens(
        self, log_d: np.ndarray, log_size: np.ndarray, target: Target
    ) -> dict[str, np.ndarray]:
        """The line of ln D_opt on ln C, and the log of what it gives at the target."""
        intercept, slope = line(log_size, log_d)
        out = {"slope_tokens": slope, "intercept_tokens": intercept}
        if "flops" in target:
            out["D_opt"] = intercept + slope * np.log(target["flops"])
        return out


class Envelope(IsoFlop):
    """Hoffmann et al. 2022, approach 1: see `envelope.py`."""

    name = "envelope"
    equation = (
        "lowest loss over all training curves at each C, L_inf + A C^-alpha; N_opt = k C^slope"
    )
    source = "Hoffmann et al. 2022, Training compute-optimal large language models, section 3.1"
    needs_curves = True
    figure = "envelope"

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The loss on the envelope at `flops`; fits without L_inf have a power law alone."""
        log_c = np.log(np.asarray(columns["flops"], float))
        if "L_inf" in coefficients:
            excess = coefficients["A"] * np.exp(-coefficients["alpha"] * log_c)
            return coefficients["L_inf"] + excess
        return np.exp(coefficients["loss_intercept"] + coefficients["loss_slope"] * log_c)
