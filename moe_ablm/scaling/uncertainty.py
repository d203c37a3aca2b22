"""Intervals of a fit: a bootstrap over runs, and profile likelihoods."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.identify import Scores, degrees_of_freedom, scores
from moe_ablm.scaling.laws import Derived
from moe_ablm.scaling.result import Interval, SmoothFit
from moe_ablm.scaling.solver import Problem, Tilt, WithGradient, minimise

FEWEST_DRAWS = 20  # of an interval
MOST_WEIGHTS = 10**8  # draws times runs; more weights than these take gigabytes
ROUNDS = 16
ITERATIONS = 100  # of the minimiser in a round; a well-behaved profile needs some ten
ENDLESS = 1e5  # standard errors; a profile that needs a longer pull never closes
CLOSE = 0.003  # relative error of the signed root at which an end is accepted
NOISELESS = 1e-18  # residual variance of ln L that is rounding, not noise
FAR = 30.0  # a log quantity that moves by more than this has no end


@dataclass(frozen=True)
class Bootstrap:
    """Refits to resampled runs: `theta [draws, K]` in the fit's centred units."""

    theta: np.ndarray
    converged: np.ndarray
    at_low: Mapping[str, float]  # share of draws in which a parameter ended at its lower bound
    at_high: Mapping[str, float]
    scheme: str

    @property
    def usable(self) -> np.ndarray:
        return self.theta[self.converged]


def resample(cells: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, str]:
    """How often each run is drawn, `[draws, runs]`, and the scheme in words.

    Whole runs are drawn with replacement. Where every cell has replicates, runs are drawn within
    their cell, so that each draw keeps the design. Otherwise they are drawn from all runs: a cell
    of one run would never change.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    runs = cells.size
    counts = np.bincount(cells)
    out = np.zeros((draws, runs))
    rows = np.arange(draws)[:, None]
    if counts.min() < 2:
        np.add.at(out, (rows, rng.integers(0, runs, (draws, runs))), 1.0)
        return out, "runs"
    for cell, count in enumerate(counts):
        members = np.flatnonzero(cells == cell)
        np.add.at(out, (rows, members[rng.integers(0, count, (draws, count))]), 1.0)
    return out, "runs within cells"


def bootstrap(fit: SmoothFit, draws: int = 4000, seed: int = 0) -> Bootstrap:
    """Refits the law to resampled runs, all draws as one batch, from the fit's own minimum.

    The same seed gives the same draws whatever the machine. A draw that loses a coefficient's
    runs may end at a bound; the share of such draws is reported.
    """
    if draws * len(fit.runs) > MOST_WEIGHTS:
        raise UserError(
            f"--bootstrap {draws}: {draws} draws of {len(fit.runs)} runs do not fit in memory; use "
            f"at most {MOST_WEIGHTS // len(fit.runs)}"
        )
    weights, scheme = resample(fit.runs.cells(), draws, seed)
    problem = replace(fit.problem, weights=weights[:, fit.index])
    ends = minimise(problem, np.repeat(fit.theta[None], draws, axis=0))
    width = 1e-6 * (problem.high - problem.low)

    def share(hit: np.ndarray) -> dict[str, float]:
        hit = (hit & problem.free).mean(axis=0)
        return {n: float(s) for n, s in zip(fit.law.names, hit, strict=True) if s > 0}

    low, high = ends.theta <= problem.low + width, ends.theta >= problem.high - width
    return Bootstrap(ends.theta, ends.converged, share(low), share(high), scheme)


def quantities(fit: SmoothFit) -> list[Derived]:
    """Free coefficients (their internal, natural-unit values) and derived quantities."""

    def natural(k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda theta: fit.law.shift(theta, fit.centre)[:, k]

    out = [
        Derived(p.name, p.meaning, natural(k), p.log)
        for k, p in enumerate(fit.law.parameters)
        if fit.problem.free[k]
    ]
    return out + fit.law.derived(fit.centre, fit.target)


def bootstrap_intervals(
    fit: SmoothFit, boot: Bootstrap, level: float = 0.95
) -> dict[str, tuple[Interval, ...]]:
    """Percentile intervals and standard errors of coefficients and derived quantities."""
    out: dict[str, tuple[Interval, ...]] = {}
    for q in quantities(fit):
        with np.errstate(all="ignore"):
            values = q.report(q.function(boot.usable))
        values = values[np.isfinite(values)]
        if values.size < FEWEST_DRAWS:
            continue
        if np.ptp(values) <= 1e-12 * np.abs(values[0]):  # depends on fixed coefficients only
            continue
        tail = 50 * (1 - level)
        ends: list[float | None] = [float(v) for v in np.percentile(values, [tail, 100 - tail])]
        spread: float | None = float(values.std(ddof=1))
        note = f"{values.size} draws of {boot.scheme}"
        for end, (side, shares) in enumerate((("lower", boot.at_low), ("upper", boot.at_high))):
            if shares.get(q.name, 0.0) > 0.5 * (1 - level):  # the bound's end, not the data's
                note += f"; {shares[q.name]:.1%} at the {side} bound: open on that side"
                ends[end], spread = None, None
        out[q.name] = (Interval("bootstrap", level, ends[0], ends[1], spread, note),)
    return out


@dataclass(frozen=True)
class Profile:
    """The profile of one quantity; `values` are internal (logs where `quantity.log`).

    `roots` are signed square roots of the scaled likelihood ratio, about N(0, 1) at the truth.
    `low` or `high` is None where the profile never closes: the runs do not bound the quantity.
    """

    quantity: Derived
    estimate: float
    values: np.ndarray
    roots: np.ndarray
    low: float | None
    high: float | None

    def interval(self, level: float) -> Interval:
        low, high = (
            None if end is None else float(self.quantity.report(np.float64(end)))
            for end in (self.low, self.high)
        )
        note = "" if None not in (low, high) else "the profile never closes on the open side"
        return Interval("profile", level, low, high, None, note)


def with_gradient(function: Callable[[np.ndarray], np.ndarray]) -> WithGradient:
    """A quantity and its gradient, by central differences."""

    def both(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = 1e-5
        gradient = np.empty_like(theta)
        for k in range(theta.shape[1]):
            up, down = theta.copy(), theta.copy()
            up[:, k] += step
            down[:, k] -= step
            gradient[:, k] = (function(up) - function(down)) / (2 * step)
        return function(theta), gradient

    return both


def likelihood_scale(sandwich: Scores, by_theta: np.ndarray) -> float:
    """Scale s for which 2 (increase of the objective) / s is about chi-square(1).

    The robust likelihood ratio of Heritier and Ronchetti 1994, for the direction `by_theta` of
    the quantity: sandwich variance over inverse curvature. With equally noisy runs that is
    E psi^2 / E psi' (least squares: the residual variance), which is also its floor.
    """
    curvature = float(by_theta @ sandwich.inverse_hessian @ by_theta)
    if not curvature > 0.0:  # a direction in the null space of the design
        return sandwich.scale
    return max(float(by_theta @ sandwich.covariance @ by_theta) / curvature, sandwich.scale)


def profiles(fit: SmoothFit, level: float = 0.95, names: list[str] | None = None) -> list[Profile]:
    """Profiles of coefficients and derived quantities; none for an exact fit."""
    wanted = [q for q in quantities(fit) if names is None or q.name in names]
    if fit.status == "exact" or not wanted:
        return []
    sandwich = scores(fit.problem, fit.theta)
    if sandwich.scale < NOISELESS:
        return []
    value = fit.problem.value_and_gradient(fit.theta[None])[0][0]
    functions = tuple(with_gradient(q.function) for q in wanted)
    estimates, errors, scales, usable = [], [], [], []
    for i, function in enumerate(functions):
        g, by_theta = function(fit.theta[None])
        slope = by_theta[0, fit.problem.free]
        if np.isfinite(g[0]) and np.all(np.isfinite(slope)) and np.any(np.abs(slope) > 1e-9):
            usable.append(i)
            estimates.append(g[0])
            variance = float(slope @ sandwich.covariance @ slope)
            errors.append(math.sqrt(variance) if variance > 0.0 else 1.0)
            scales.append(likelihood_scale(sandwich, slope))
    count = len(usable)
    walk = Walk(
        problem=fit.problem,
        functions=functions,
        which=np.repeat(usable, 2),
        side=np.tile([-1.0, 1.0], count),
        theta=np.repeat(fit.theta[None], 2 * count, axis=0),
        value=np.full(2 * count, value),
        estimate=np.repeat(estimates, 2),
        error=np.clip(np.nan_to_num(np.repeat(errors, 2), nan=1.0), 1e-9, 2.0),
        scale=np.repeat(scales, 2),
        goal=critical_root(fit.problem, level),
    )
    ends, history = walk.ends()
    history = [*history, *walk.trace()]
    out = []
    for j, i in enumerate(usable):
        pair = slice(2 * j, 2 * j + 2)
        values = np.concatenate([h[0][pair] for h in history] + [[estimates[j]]])
        roots = np.concatenate([h[1][pair] * np.array([-1.0, 1.0]) for h in history] + [[0.0]])
        order = np.argsort(values)
        low, high = (None if not np.isfinite(e) else float(e) for e in ends[pair])
        out.append(Profile(wanted[i], estimates[j], values[order], roots[order], low, high))
    return out


def critical_root(problem: Problem, level: float) -> float:
    """Student's t quantile, because the residual variance is estimated."""
    from scipy.special import stdtrit

    return float(stdtrit(max(degrees_of_freedom(problem), 1), 0.5 * (1 + level)))


@dataclass(frozen=True)
class Walk:
    """Both ends of many profiles at once: one row of a batch for each quantity and side.

    Rows may belong to different data sets (`problem.log_loss [B, n]`), as in coverage studies.
    """

    problem: Problem
    functions: tuple[WithGradient, ...]
    which: np.ndarray  # [B] quantity of each row
    side: np.ndarray  # [B] -1 or 1
    theta: np.ndarray  # [B, K] the minimum
    value: np.ndarray  # [B] objective there
    estimate: np.ndarray  # [B] quantity there
    error: np.ndarray  # [B] a first guess of its standard error
    scale: np.ndarray  # [B] see `likelihood_scale`
    goal: float  # signed root at which a profile is cut

    def ends(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Values `[B]` where each profile reaches the goal (nan: never), and points visited.

        Each round pulls the quantity toward a target beyond its estimate; the minimiser lies on
        the profile, and the next target is found by false position on the root.
        """
        size = self.theta.shape[0]
        stiffness = self.scale / self.error**2
        reach = np.full(size, 2.0 * self.goal)  # target's distance in standard errors
        inner = np.zeros((size, 3))  # (root, value, reach) inside the goal
        inner[:, 1] = self.estimate
        outer = np.full((size, 3), np.nan)  # and outside
        theta = self.theta.copy()
        done = np.zeros(size, bool)
        history = []
        for _ in range(ROUNDS):
            live = np.flatnonzero(~done)
            if live.size == 0:
                break
            target = self.estimate + self.side * reach * self.error
            tilt = Tilt(self.functions, self.which, target, stiffness)
            tilted = replace(self.problem, tilt=tilt).rows(live)
            theta[live] = minimise(tilted, theta[live], ITERATIONS).theta
            g, root = self._measure(theta)
            history.append((g, root))
            past = root >= self.goal
            point = np.stack([root, g, reach], axis=1)
            outer = np.where((past & ~done)[:, None], point, outer)
            inner = np.where((~past & ~done)[:, None], point, inner)
            done |= np.abs(root / self.goal - 1.0) < CLOSE
            done |= np.abs(g - self.estimate) > FAR
            done |= reach > ENDLESS
            reach = np.where(done, reach, self._next_reach(inner, outer, reach, root))
        return self._cut(inner, outer), history

    def trace(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Points part of the way to the goal, for figures."""
        out, theta = [], self.theta
        for part in (0.4, 0.8, 1.3):
            target = self.estimate + self.side * part * 2.0 * self.goal * self.error
            tilt = Tilt(self.functions, self.which, target, self.scale / self.error**2)
            theta = minimise(replace(self.problem, tilt=tilt), theta, ITERATIONS).theta
            out.append(self._measure(theta))
        return out

    def _measure(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The quantity and the root at parameters on the profile."""
        plain = replace(self.problem, tilt=None)
        value = plain.value_and_gradient(theta)[0]
        root = np.sqrt(np.maximum(2.0 * (value - self.value) / self.scale, 0.0))
        g = Tilt(self.functions, self.which, self.estimate, self.scale).evaluate(theta)[0]
        return g, root

    def _next_reach(
        self, inner: np.ndarray, outer: np.ndarray, reach: np.ndarray, root: np.ndarray
    ) -> np.ndarray:
        bracketed = np.isfinite(outer[:, 0])
        share = (self.goal - inner[:, 0]) / np.where(bracketed, outer[:, 0] - inner[:, 0], 1.0)
        # Kept off the ends of the bracket, so that it always shrinks.
        within = inner[:, 2] + np.clip(share, 0.05, 0.95) * (outer[:, 2] - inner[:, 2])
        beyond = reach * np.clip(1.05 * self.goal / np.maximum(root, 1e-9), 1.2, 6.0)
        return np.where(bracketed, within, beyond)

    def _cut(self, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
        """The value at the goal, on the line between the two points that bracket it."""
        near = np.abs(inner[:, 0] / self.goal - 1.0) < CLOSE
        share = (self.goal - inner[:, 0]) / (outer[:, 0] - inner[:, 0])
        cut = inner[:, 1] + share * (outer[:, 1] - inner[:, 1])
        return np.where(np.isfinite(cut), cut, np.where(near, inner[:, 1], np.nan))
