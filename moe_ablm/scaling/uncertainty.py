"""Intervals of a fit: a bootstrap over runs, and profile likelihoods."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.identify import (
    STANDS_ON,
    UNMOVED,
    Scores,
    degrees_of_freedom,
    meaningless,
    scores,
)
from moe_ablm.scaling.laws import Derived, WithGradient, with_gradient
from moe_ablm.scaling.result import Interval, SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import Minimum, Problem, Tilt, Units, minimise

FEWEST_DRAWS = 20  # of an interval
FEWEST_IN_CELL = 10  # runs of each cell where draws are made within cells
MOST_WEIGHTS = 10**8  # draws times runs; more weights than these take gigabytes
REFITTED = 30  # iterations from each start; the best one then goes on to the end
ROUND, MORE = 100, 8  # iterations until the Hessian is made anew, and how often
ROUNDS = 16
ITERATIONS = 60  # of the minimiser in a round; a well-behaved profile needs some ten
ENDLESS = 1e5  # standard errors; a profile that needs a longer pull never closes
CLOSE = 0.003  # relative error of the signed root at which an end is accepted
NOISELESS = 1e-18  # residual variance of ln L that is rounding, not noise
STIFFER = 4.0  # growth of the pull in each round of false position
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


def resample_rows(runs: Runs, draws: int, seed: int) -> tuple[np.ndarray, str]:
    """How often each row is drawn, `[draws, rows]`: a run is drawn with all its checkpoints."""
    run = runs.clusters()
    if run is None:
        return resample(runs.cells(), draws, seed)
    first = np.unique(run, return_index=True)[1]
    weights, scheme = resample(_alike(run, runs.cells())[first], draws, seed)
    return weights[:, run], f"whole {scheme} ({first.size} with {run.size} checkpoints)"


def _alike(run: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """An integer per row, equal for runs with the same set of cells, `[rows]`."""
    sets = [tuple(np.unique(cells[run == r])) for r in range(run.max() + 1)]
    number = {s: i for i, s in enumerate(dict.fromkeys(sets))}
    return np.array([number[s] for s in sets])[run]


def resample(cells: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, str]:
    """How often each run is drawn, `[draws, runs]`, and the scheme in words.

    Whole runs are drawn with replacement. Where every cell has many, runs are drawn within their
    cell, so that each draw keeps the design. Otherwise they are drawn from all runs: a cell of one
    run would never change, and draws within cells of m have a variance of (m - 1) / m.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    runs = cells.size
    counts = np.bincount(cells)
    out = np.zeros((draws, runs))
    rows = np.arange(draws)[:, None]
    if counts.min() < FEWEST_IN_CELL:
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
    weights, scheme = resample_rows(fit.runs, draws, seed)
    problem = replace(fit.problem, weights=weights[:, fit.index])
    ends = refit(fit, problem, draws)
    width = 1e-6 * (problem.high - problem.low)

    def share(hit: np.ndarray) -> dict[str, float]:
        hit = (hit & problem.free).mean(axis=0)
        return {n: float(s) for n, s in zip(fit.law.names, hit, strict=True) if s > 0}

    low, high = ends.theta <= problem.low + width, ends.theta >= problem.high - width
    return Bootstrap(ends.theta, ends.converged, share(low), share(high), scheme)


def refit(fit: SmoothFit, problem: Problem, size: int) -> Minimum:
    """The minimum of each row of a batch of `size` problems, the best of the fit's starts.

    What has not converged goes on from a new Hessian: the valley of a badly known direction bends.
    """
    if len(fit.starts) == 1:
        return _go_on(problem, minimise(problem, np.repeat(fit.theta[None], size, axis=0)))
    theta, value = np.empty((size, fit.theta.size)), np.full(size, np.inf)
    for start in fit.starts:
        ends = minimise(problem, np.repeat(start[None], size, axis=0), REFITTED)
        better = ends.value < value
        theta[better], value[better] = ends.theta[better], ends.value[better]
    return _go_on(problem, minimise(problem, theta, ROUND))


def _go_on(problem: Problem, ends: Minimum) -> Minimum:
    parts = {f.name: getattr(ends, f.name).copy() for f in fields(ends)}
    for _ in range(MORE):
        rows = np.flatnonzero(~parts["converged"])
        if rows.size == 0:
            break
        again = minimise(problem.rows(rows), parts["theta"][rows], ROUND)
        for f in fields(again):
            parts[f.name][rows] = getattr(again, f.name)
    return Minimum(**parts)


def quantities(fit: SmoothFit) -> list[Derived]:
    """Free coefficients that have a meaning, and derived quantities.

    A linear coefficient that is zero, or whose term is a constant, is in a unit that makes its
    term as large as the loss, so that it may be zero; the others are their internal values in
    natural units: with its exponent a coefficient moves by orders of magnitude.
    """
    share = Units.at(fit.problem, fit.theta[None]).scale[0]
    # what the coefficient is in natural units where its term is as large as the loss
    unit = fit.law.shift(fit.theta, fit.centre) - fit.theta - share

    def natural(k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda theta: fit.law.shift(theta, fit.centre)[:, k]

    def linear(k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda theta: np.exp(natural(k)(theta) - unit[k])

    idle = meaningless(fit.problem, fit.theta)
    coupled = np.abs(unit + share) > 1e-9  # natural and centred units differ
    zero = np.isin(fit.law.names, fit.at_bounds)
    out = [
        Derived(p.name, p.meaning, linear(k), unit=float(np.exp(unit[k])))
        if p.linear and (zero[k] or not coupled[k])
        else Derived(p.name, p.meaning, natural(k), p.log)
        for k, p in enumerate(fit.law.parameters)
        if fit.problem.free[k] and p.name not in idle
    ]
    return out + fit.law.derived(fit.centre, fit.target)


def bootstrap_intervals(
    fit: SmoothFit, boot: Bootstrap, level: float = 0.95
) -> dict[str, tuple[Interval, ...]]:
    """Percentile intervals and standard errors of coefficients and derived quantities."""
    out: dict[str, tuple[Interval, ...]] = {}
    positive = {p.name for p in fit.law.parameters if p.log}
    said = {**fit.verdicts, **fit.derived_verdicts}
    unmoved = {n for n, v in said.items() if UNMOVED in v or STANDS_ON in v}
    for q in quantities(fit):
        if q.name in unmoved:  # where it ends is where it began
            continue
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
        spread_log = float(np.log(values).std(ddof=1)) if spread and values.min() > 0 else None
        if q.name not in positive:
            spread_log = None
        out[q.name] = (
            Interval("bootstrap", level, ends[0], ends[1], spread, note, se_log=spread_log),
        )
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
