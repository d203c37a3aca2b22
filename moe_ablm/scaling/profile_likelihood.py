"""Profile likelihoods: everything else refitted at each value of a quantity."""

import math
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.scaling.identify import Scores, degrees_of_freedom, scores
from moe_ablm.scaling.laws import Derived, WithGradient, with_gradient
from moe_ablm.scaling.quantities import quantities
from moe_ablm.scaling.result import Interval, SmoothFit
from moe_ablm.scaling.solver import Problem, Tilt, Units, minimise

ROUNDS = 16
ITERATIONS = 60  # of the minimiser in a round; a well-behaved profile needs some ten
ENDLESS = 1e5  # standard errors; a profile that needs a longer pull never closes
CLOSE = 0.003  # relative error of the signed root at which an end is accepted
NOISELESS = 1e-18  # residual variance of ln L that is rounding, not noise
STIFFER = 4.0  # growth of the pull in each round of false position
FAR = 30.0  # a log quantity that moves by more than this has no end


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


def likelihood_scale(sandwich: Scores, by_theta: np.ndarray) -> float:
    """Scale s for which 2 (increase of the objective) / s is about chi-square(1).

    The robust likelihood ratio of Heritier and Ronchetti 1994, for the direction `by_theta` of
    the quantity: sandwich variance over inverse curvature. With equally noisy runs that is
    E psi^2 / E psi' (least squares: the residual variance), which is also its floor.
    """
    curvature = float(by_theta @ sandwich.inverse_hessian @ by_theta)
    if not curvature > 0.0:  # a direction in the null space of the design
        return sandwich.scale
    return max(float(by_theta @ sandwich.covariance @ by_theta) / curvature, sandwich.floor)


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
    by_unit = Units.at(fit.problem, fit.theta[None]).by_unit(fit.theta[None])
    estimates, errors, scales, usable = [], [], [], []
    for i, function in enumerate(functions):
        g, by_theta = function(fit.theta[None])
        slope = by_theta[0, fit.problem.free]
        moved = slope / by_unit[0, fit.problem.free]  # a coefficient of zero moves by its own unit
        if np.isfinite(g[0]) and np.all(np.isfinite(slope)) and np.any(np.abs(moved) > 1e-9):
            usable.append(i)
            estimates.append(g[0])
            variance = float(slope @ sandwich.covariance @ slope)
            errors.append(math.sqrt(variance) if variance > 0.0 else 1.0)
            # At a bound the score is not zero, and the sandwich supposes that it is.
            bounded = wanted[i].name in fit.at_bounds
            scales.append(sandwich.scale if bounded else likelihood_scale(sandwich, slope))
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
        starts=fit.starts[1:],
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
    starts: np.ndarray | tuple = ()  # [S, K] other starts than the minimum

    def ends(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Values `[B]` where each profile reaches the goal (nan: never), and points visited.

        Each round pulls the quantity toward a target beyond its estimate; the minimiser lies on
        the profile. Once the goal is bracketed the next target is found by false position on the
        root, and the pull stiffens: a weak one jumps over a stretch where the profile is concave.
        An end counts only where no other start finds a lower point of the profile there.
        """
        size = self.theta.shape[0]
        stiffness = self.scale / self.error**2
        reach = np.full(size, 2.0 * self.goal)  # target's distance in standard errors
        inner = np.zeros((size, 2))  # (root, value) inside the goal
        inner[:, 1] = self.estimate
        outer = np.full((size, 2), np.nan)  # and outside
        theta, near = self.theta.copy(), self.theta.copy()
        target = self.estimate + self.side * reach * self.error
        done, checked = np.zeros(size, bool), np.zeros(size, bool)
        history: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(ROUNDS):
            live = np.flatnonzero(~done)
            if live.size == 0:
                break
            tilt = Tilt(self.functions, self.which, target, stiffness)
            theta[live] = minimise(
                replace(self.problem, tilt=tilt).rows(live), near[live], ITERATIONS
            ).theta
            g, root = self._measure(theta)
            # in its first round, and where it would end, a profile is looked at from elsewhere
            fresh = ~done & ~checked & ((len(history) == 0) | (root >= self.goal))
            if len(self.starts) and fresh.any():
                rows = np.flatnonzero(fresh)
                theta[rows] = self._elsewhere(rows, theta[rows], tilt)
                checked |= fresh & (len(history) > 0)
                g, root = self._measure(theta)
            history.append((g, root))
            past = root >= self.goal
            point = np.stack([root, g], axis=1)
            outer = np.where((past & ~done)[:, None], point, outer)
            inner = np.where((~past & ~done)[:, None], point, inner)
            near = np.where((~past & ~done)[:, None], theta, near)
            done |= np.abs(root / self.goal - 1.0) < CLOSE
            done |= np.abs(g - self.estimate) > FAR
            done |= reach > ENDLESS
            bracketed = np.isfinite(outer[:, 0])
            share = (self.goal - inner[:, 0]) / np.where(bracketed, outer[:, 0] - inner[:, 0], 1.0)
            # Kept off the ends of the bracket, so that it always shrinks.
            within = inner[:, 1] + np.clip(share, 0.05, 0.95) * (outer[:, 1] - inner[:, 1])
            growth = np.clip(1.05 * self.goal / np.maximum(root, 1e-9), 1.2, 6.0)
            reach = np.where(done | bracketed, reach, reach * growth)
            beyond = self.estimate + self.side * reach * self.error
            target = np.where(bracketed, within, beyond)
            stiffness = np.where(bracketed & ~done, stiffness * STIFFER, stiffness)
        return self._cut(inner, outer), history

    def _elsewhere(self, rows: np.ndarray, theta: np.ndarray, tilt: Tilt) -> np.ndarray:
        """The lowest of `theta [rows, K]` and what the other starts end in, `[rows, K]`."""
        problem = replace(self.problem, tilt=tilt).rows(rows)
        value = problem.value_and_gradient(theta)[0]
        for start in self.starts:
            ends = minimise(problem, np.repeat(start[None], rows.size, axis=0), ITERATIONS)
            lower = ends.value < value
            theta = np.where(lower[:, None], ends.theta, theta)
            value = np.where(lower, ends.value, value)
        return theta

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

    def _cut(self, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
        """The value at the goal, on the line between the two points that bracket it."""
        near = np.abs(inner[:, 0] / self.goal - 1.0) < CLOSE
        share = (self.goal - inner[:, 0]) / (outer[:, 0] - inner[:, 0])
        cut = inner[:, 1] + share * (outer[:, 1] - inner[:, 1])
        return np.where(np.isfinite(cut), cut, np.where(near, inner[:, 1], np.nan))
