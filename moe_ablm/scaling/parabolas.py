"""Parabolas in log10 N, one per data size (the AbLM study) or per compute budget (isoFLOP).

Each parabola is linear least squares on the loss; the law is then a straight line through the
minima on log axes. A parabola through three points is exact. It need not have a minimum.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.compute import Cost
from moe_ablm.scaling.inputs import Target
from moe_ablm.scaling.laws import Law
from moe_ablm.scaling.runs import Runs

SAME_BUDGET = 0.1  # runs whose FLOPs lie within this (natural log) of the smallest share a budget
WINDOW = np.log10(4.0)  # sizes up to this factor from the minimum count in a local parabola
FEWEST_NEAR = 5  # sizes of a local parabola, where so many were run
RECENTRED = 3  # times that its window moves to the minimum found


class Quadratic(Law):
    """Shafiei Neyestanak and Briney 2025: the best size for each number of unique sequences."""

    name = "quadratic"
    equation = "L = a (log10 N)^2 + b log10 N + c per data size; N* = 10^(-b/2a); ln U on ln N*"
    source = "Shafiei Neyestanak and Briney 2025, Data-optimal scaling laws for paired AbLMs"
    needs = ("params", "unique_tokens", "loss")
    group = "unique_tokens"  # the column whose values have a parabola each
    local = False  # only sizes near the minimum count; a minimum outside them is none

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
            z = np.log10(params[i])
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


class IsoFlop(Quadratic):
    """Hoffmann et al. 2022, approach 2: the best size for each compute budget."""

    name = "isoflop"
    cost = Cost()
    equation = "L = a (log10 N)^2 + b log10 N + c per budget C; N_opt = 10^(-b/2a) = k C^slope"
    source = "Hoffmann et al. 2022, Training compute-optimal large language models, section 3.2"
    needs = ("params", "flops", "loss")
    group = "flops"
    local = True

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


class Envelope(IsoFlop):
    """Hoffmann et al. 2022, approach 1: see `envelope.py`."""

    name = "envelope"
    equation = "lowest loss over all training curves at each C; N_opt = k C^slope"
    source = "Hoffmann et al. 2022, Training compute-optimal large language models, section 3.1"
    needs_curves = True
    figure = "envelope"

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The loss on the envelope at `flops`."""
        log_c = np.log(np.asarray(columns["flops"], float))
        return np.exp(coefficients["loss_intercept"] + coefficients["loss_slope"] * log_c)


@dataclass(frozen=True)
class Parabola:
    """One group: its runs, its least-squares solution and its residual degrees of freedom."""

    size: float
    members: np.ndarray
    solve: np.ndarray  # [3, m]: coefficients = solve @ loss
    freedom: int

    @property
    def key(self) -> str:
        return f"{self.size:.15g}"


def split(law: Quadratic, runs: Runs) -> tuple[list[Parabola], list[str]]:
    """Groups with at least three sizes, and notes on those without."""
    groups = law.groups(runs)
    out: list[Parabola] = []
    notes: list[str] = []
    for size in np.unique(groups):
        members = np.flatnonzero(groups == size)
        z = np.log10(runs["params"][members])
        if np.unique(z).size < 3:
            notes.append(
                f"{law.group} {size:.15g}: {np.unique(z).size} sizes, and a parabola needs three; "
                "left out"
            )
            continue
        near, weights = np.arange(z.size), np.ones(z.size)
        if law.local:
            near, weights = window(z, runs["loss"][members])
            if near.size < z.size:
                notes.append(
                    f"{law.group} {size:.15g}: {near.size} of {z.size} runs near the minimum count"
                )
        solve = _solution(z[near], weights)
        out.append(Parabola(float(size), members[near], solve, near.size - 3))
    if not out:
        raise UserError(
            f"law {law.name}: no {law.group} with three model sizes; a parabola needs three"
        )
    return out, notes


def _solution(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What turns losses at sizes into the coefficients of their weighted parabola, `[3, m]`."""
    root = np.sqrt(weights)
    return np.linalg.pinv(np.stack([z**2, z, np.ones_like(z)], axis=1) * root[:, None]) * root


def window(z: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs near the minimum of loss over log10 N `[m]`, and their tricube weights.

    A loss surface is steeper toward small models: a parabola through a wide grid has its minimum
    elsewhere. Sizes within a factor of 4 of the minimum count, and at least five.
    """
    sizes = np.unique(z)
    middle = np.array([loss[z == s].mean() for s in sizes])
    at = sizes[np.argmin(middle)]
    for _ in range(RECENTRED):
        gap = np.abs(z - at)
        reach = max(WINDOW, np.sort(np.abs(sizes - at))[min(FEWEST_NEAR, sizes.size) - 1])
        near = np.flatnonzero(gap <= reach + 1e-9)
        weights = (1.0 - (gap[near] / (1.5 * reach)) ** 3) ** 3
        a, b, _ = _solution(z[near], weights) @ loss[near]
        if a <= 0.0:
            break
        at = float(np.clip(-b / (2.0 * a), sizes[0], sizes[-1]))
    return near, weights


def interior(law: Quadratic, parabola: Parabola, abc: np.ndarray, runs: Runs) -> bool:
    """Whether the parabola has a minimum, within the sizes that were run where it is local."""
    a, b = abc[0], abc[1]
    if not a > 0:
        return False
    seen = np.log10(runs["params"][parabola.members])
    return not law.local or bool(seen.min() <= -b / (2.0 * a) <= seen.max())


def coefficients_of(parabolas: list[Parabola], loss: np.ndarray) -> np.ndarray:
    """(a, b, c) of each parabola for losses `[..., n]`: `[..., G, 3]`."""
    return np.stack([loss[..., p.members] @ p.solve.T for p in parabolas], axis=-2)


def minima(abc: np.ndarray) -> np.ndarray:
    """ln N* of each parabola `[..., G]`; nan where it is not convex."""
    a, b = abc[..., 0], abc[..., 1]
    return np.where(a > 0, -b / (2.0 * np.where(a > 0, a, 1.0)), np.nan) * np.log(10.0)


def line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope of y on x along the last axis; nan where an entry is nan."""
    mean_x, mean_y = x.mean(axis=-1, keepdims=True), y.mean(axis=-1, keepdims=True)
    slope = ((x - mean_x) * (y - mean_y)).sum(axis=-1) / ((x - mean_x) ** 2).sum(axis=-1)
    return mean_y[..., 0] - slope * mean_x[..., 0], slope


def quantities(
    law: Quadratic,
    parabolas: list[Parabola],
    usable: list[int],
    abc: np.ndarray,
    target: Target,
) -> dict[str, np.ndarray]:
    """Logs of derived quantities for coefficients `[..., G, 3]`, each `[...]`; slopes as they are.

    The line goes through the `usable` parabolas, those that have a minimum in the runs; where one
    of them has none in a draw, the line of that draw is nan.
    """
    log_n = minima(abc)
    out = {f"N_star[{p.key}]": log_n[..., i] for i, p in enumerate(parabolas)}
    if len(usable) < 2:
        return out
    log_size = np.log([parabolas[i].size for i in usable])
    log_n = log_n[..., usable]
    return out | law.through_minima(log_n, np.broadcast_to(log_size, log_n.shape), target)
