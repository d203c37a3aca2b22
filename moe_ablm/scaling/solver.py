"""One minimiser for all fits: quasi-Newton on the summed Huber loss, batched over problems.

Starts, bootstrap draws, profile points, folds and simulated data sets are all rows of one batch,
so that a thousand fits cost a few matrix operations an iteration instead of a thousand calls.
The objective is a *sum* over runs and is scaled to O(1) by its own size: a mean with default
tolerances stops early, the fault of several published fits.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.scaling.inputs import Inputs
from moe_ablm.scaling.laws import SmoothLaw, WithGradient, log_sum

CHUNK = 256  # rows of the batch per chunk: keeps [chunk, n] arrays in cache
LARGEST_ARRAY = 2**22  # most entries of a [chunk, n] array: chunks shrink where runs are many
FTOL = 1e-14  # relative decrease predicted by the quadratic model at which a row stops
STALLS = 5  # iterations in a row that gain less than FTOL: rounding, or a flat direction
DAMPING = 1e-7  # of the largest curvature, added to every one
RIDGE = 1e-13  # of a diagonal, against rounding
LONGEST = 1.0  # a log or an exponent never usefully moves by more at once
EXACT = 1e-19  # an objective below n times this (residuals of some 4e-10) is an exact fit


@dataclass(frozen=True)
class Tilt:
    """Adds stiffness/2 (g(theta) - target)^2, to walk along the profile of a quantity g.

    Any minimiser of F + h(g) minimises F among parameters with its own value of g, so it lies on
    g's profile whatever the target was. `functions[i](theta [B, K])` gives a quantity `[B]` and
    its gradient `[B, K]`; row b of the batch is tilted by quantity `which[b]`.
    """

    functions: tuple[WithGradient, ...]
    which: np.ndarray
    target: np.ndarray
    stiffness: np.ndarray

    def rows(self, index: np.ndarray) -> "Tilt":
        return Tilt(self.functions, self.which[index], self.target[index], self.stiffness[index])

    def evaluate(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row's quantity `[B]` and its gradient `[B, K]`."""
        value, gradient = np.empty(theta.shape[0]), np.empty_like(theta)
        for i in np.unique(self.which):
            mine = self.which == i
            value[mine], gradient[mine] = self.functions[i](theta[mine])
        return value, gradient


@dataclass(frozen=True)
class Problem:
    """Runs and an objective: sum over runs of w * huber(ln L_model - ln L), plus a prior.

    `log_loss` and `weights` are `[n]`, or `[B, n]` where they differ between rows of the batch.
    `delta` may be inf: least squares. `prior_scale` is the squared noise that turns minus a log
    prior into the units of the objective.
    """

    law: SmoothLaw
    x: Inputs
    log_loss: np.ndarray
    weights: np.ndarray
    delta: float
    low: np.ndarray
    high: np.ndarray
    free: np.ndarray
    prior_scale: float = 1e-6
    clusters: np.ndarray | None = None  # [n], counted from 0; None: observations are independent
    tilt: Tilt | None = None

    def rows(self, index: np.ndarray) -> "Problem":
        """The same problem for some rows of the batch."""

        def pick(a: np.ndarray) -> np.ndarray:
            return a[index] if a.ndim == 2 else a

        tilt = None if self.tilt is None else self.tilt.rows(index)
        return replace(self, log_loss=pick(self.log_loss), weights=pick(self.weights), tilt=tilt)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """ln L_model - ln L, `[B, n]`."""
        return self.law.log_loss(theta, self.x) - self.log_loss

    def huber(self, residuals: np.ndarray) -> np.ndarray:
        """Weighted Huber loss summed over runs, `[B]`, without prior or tilt."""
        size = np.abs(residuals)
        inner = np.minimum(size, self.delta)
        return np.sum(self.weights * inner * (size - 0.5 * inner), axis=1)

    def value_and_gradient(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Objective `[B]` and its exact gradient `[B, K]`."""
        terms = self.law.terms(theta, self.x)
        f, shares = log_sum([t for t, _ in terms])
        r = f - self.log_loss
        value = self.huber(r)
        psi = self.weights * np.clip(r, -self.delta, self.delta)
        gradient = np.zeros_like(theta)
        for (_, derivatives), share in zip(terms, shares, strict=True):
            pull = psi * share
            for k, d in derivatives:
                gradient[:, k] += _contract(pull, d)
        prior = self.law.penalty(theta)
        if prior is not None:
            value = value + self.prior_scale * prior[0]
            gradient += self.prior_scale * prior[1]
        if self.tilt is not None:
            g, by_theta = self.tilt.evaluate(theta)
            gap = g - self.tilt.target
            value = value + 0.5 * self.tilt.stiffness * gap**2
            gradient += (self.tilt.stiffness * gap)[:, None] * by_theta
        return value, gradient

    def curvature(self, theta: np.ndarray) -> np.ndarray:
        """Gauss-Newton Hessian with the weights of re-weighted least squares, `[B, K, K]`."""
        jacobian = self.law.jacobian(theta, self.x)
        size = np.abs(self.residuals(theta))
        robust = self.delta / np.maximum(size, self.delta) if np.isfinite(self.delta) else 1.0
        weights = np.broadcast_to(self.weights * robust, size.shape)
        out = np.swapaxes(jacobian * weights[:, :, None], 1, 2) @ jacobian
        # the priors are quadratic: their gradient is linear in theta
        prior = self.law.penalty(np.eye(theta.shape[1]))
        if prior is not None:
            diagonal = np.arange(theta.shape[1])
            out[:, diagonal, diagonal] += self.prior_scale * np.diag(prior[1])
        if self.tilt is not None:
            by_theta = self.tilt.evaluate(theta)[1]
            outer = by_theta[:, :, None] * by_theta[:, None, :]
            out = out + self.tilt.stiffness[:, None, None] * outer
        return out


def _contract(pull: np.ndarray, derivative: float | np.ndarray) -> np.ndarray:
    """Sum over runs of pull [B, n] times a scalar, [n] or [B, n] derivative."""
    if np.ndim(derivative) == 0:
        return derivative * pull.sum(axis=1)
    if np.ndim(derivative) == 1:
        return pull @ derivative
    return np.einsum("bn,bn->b", pull, derivative)


@dataclass(frozen=True)
class Minimum:
    """Where each row of the batch ended: `theta [B, K]`, objective `value [B]`."""

    theta: np.ndarray
    value: np.ndarray
    converged: np.ndarray
    decrement: np.ndarray  # relative decrease that the quadratic model still predicts
    iterations: np.ndarray


def minimise(
    problem: Problem, theta: np.ndarray, max_iterations: int = 400, workers: int | None = None
) -> Minimum:
    """Projected BFGS from `theta [B, K]`, started from the Gauss-Newton Hessian of each row.

    Chunks of the batch run on `workers` threads (default: one per core; numpy releases the GIL).
    Rows are independent, so the result does not depend on the number of threads.
    """
    size = max(1, min(CHUNK, LARGEST_ARRAY // max(problem.x.size, 1)))
    chunks = [
        np.arange(first, min(first + size, theta.shape[0]))
        for first in range(0, theta.shape[0], size)
    ]

    def work(index: np.ndarray) -> tuple:
        # The line search tries steps that overflow and rejects them: no warning for each.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return _minimise_chunk(problem.rows(index), theta[index], max_iterations)

    if len(chunks) == 1:
        parts = [work(chunks[0])]
    else:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            parts = list(pool.map(work, chunks))
    return Minimum(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _minimise_chunk(problem: Problem, start: np.ndarray, max_iterations: int) -> tuple:
    theta = np.clip(start, problem.low, problem.high)
    theta = np.where(problem.free, theta, start)
    units = Units.at(problem, theta)
    value, gradient = units.value_and_gradient(problem, theta)
    inverse = units.inverse(problem, theta)
    size = theta.shape[0]
    decrement = np.full(size, np.inf)
    iterations = np.zeros(size, int)
    failures = np.zeros(size, int)
    stalls = np.zeros(size, int)
    live = np.ones(size, bool)
    exact = EXACT * problem.x.size
    for _ in range(max_iterations):
        rows = np.flatnonzero(live)
        if rows.size == 0:
            break
        step, slope = _direction(units.rows(rows), theta[rows], gradient[rows], inverse[rows])
        decrement[rows] = -0.5 * slope / np.maximum(value[rows], 1e-300)
        done = (decrement[rows] <= FTOL) | (value[rows] <= exact)
        live[rows[done]] = False
        keep = ~done
        rows, step, slope = rows[keep], step[keep], slope[keep]
        if rows.size == 0:
            continue
        part, here = problem.rows(rows), units.rows(rows)
        new, new_value, new_gradient, ok = _line_search(
            part, here, theta[rows], value[rows], step, slope
        )
        moved = here.of(new) - here.of(theta[rows])
        turned = new_gradient - gradient[rows]
        inverse[rows] = _bfgs(inverse[rows], moved, turned, ok)
        stalled = value[rows] - new_value <= FTOL * value[rows]
        stalls[rows] = np.where(stalled, stalls[rows] + 1, 0)
        theta[rows], value[rows], gradient[rows] = new, new_value, new_gradient
        iterations[rows] += 1
        failures[rows] = np.where(ok, 0, failures[rows] + 1)
        stuck = rows[failures[rows] == 1]
        if stuck.size:  # the quadratic model is wrong here: restart it
            inverse[stuck] = units.rows(stuck).inverse(problem.rows(stuck), theta[stuck])
        live[rows[(failures[rows] > 1) | (stalls[rows] >= STALLS)]] = False
    converged = (decrement <= 1e-9) | (value <= exact)
    return theta, value, converged, decrement, iterations


@dataclass(frozen=True)
class Units:
    """The coordinates that steps are made in, `[B, K]`, and their box.

    A linear coefficient is its largest share of an observed loss, at the exponents of the start:
    in these units a term that vanishes has an ordinary derivative and a bound at (nearly) zero,
    whereas its log would run away. All others are the internal parameters themselves.
    """

    linear: np.ndarray  # [K]
    scale: np.ndarray  # [B, K] ln of the share at an internal value of 0
    low: np.ndarray  # [B, K]
    high: np.ndarray  # [B, K]
    free: np.ndarray  # [K]

    @staticmethod
    def at(problem: Problem, theta: np.ndarray) -> "Units":
        linear = np.array([p.linear for p in problem.law.parameters]) & problem.free
        scale = np.zeros_like(theta)
        if linear.any():
            columns = [k for k, p in enumerate(problem.law.parameters) if p.linear]
            terms = problem.law.terms(theta, problem.x)
            for k, (value, _) in zip(columns, terms, strict=True):
                share = np.max(value - problem.log_loss, axis=1) - theta[:, k]
                scale[:, k] = np.where(np.isfinite(share) & linear[k], share, 0.0)
        units = Units(linear, scale, theta, theta, problem.free)
        low, high = (units.of(np.broadcast_to(b, theta.shape)) for b in (problem.low, problem.high))
        return Units(linear, scale, low, high, problem.free)

    def rows(self, index: np.ndarray) -> "Units":
        """The units of some rows of the batch."""
        return Units(self.linear, self.scale[index], self.low[index], self.high[index], self.free)

    def of(self, theta: np.ndarray) -> np.ndarray:
        """Internal parameters in these units."""
        return np.where(self.linear, np.exp(np.where(self.linear, theta + self.scale, 0.0)), theta)

    def back(self, here: np.ndarray) -> np.ndarray:
        """Internal parameters from these units."""
        return np.where(self.linear, np.log(np.where(self.linear, here, 1.0)) - self.scale, here)

    def by_unit(self, theta: np.ndarray) -> np.ndarray:
        """Derivative of these coordinates by the internal parameters, `[B, K]`."""
        return np.where(self.linear, self.of(theta), 1.0)

    def value_and_gradient(
        self, problem: Problem, theta: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Objective `[B]` and its gradient `[B, K]` by these units."""
        value, gradient = problem.value_and_gradient(theta)
        return value, gradient / self.by_unit(theta)

    def inverse(self, problem: Problem, theta: np.ndarray) -> np.ndarray:
        """Inverse Gauss-Newton Hessian in these units, `[B, K, K]`; zero for fixed parameters.

        What the runs do not move is damped by a share of the largest curvature: scaled to one
        first, it would look like everything else.
        """
        by_unit = self.by_unit(theta)
        hessian = problem.curvature(theta) / by_unit[:, :, None] / by_unit[:, None, :]
        diagonal = np.einsum("bkk->bk", hessian)
        top = np.maximum(np.where(self.free, diagonal, 0.0).max(axis=1, keepdims=True), 1e-300)
        damped = diagonal + DAMPING * top
        scale = 1.0 / np.sqrt(damped)
        both = self.free[:, None] & self.free[None, :]
        eye = np.eye(self.free.size)
        scaled = hessian * scale[:, :, None] * scale[:, None, :]
        scaled = np.where(both & (eye == 0), scaled, eye * (1.0 + 1e-12))
        inverse = np.linalg.inv(scaled)
        return np.where(both, inverse * scale[:, :, None] * scale[:, None, :], 0.0)


def _direction(
    units: Units, theta: np.ndarray, gradient: np.ndarray, inverse: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The minimum of the quadratic model within the box and a step of `LONGEST`, `[B, K]`.

    A coordinate whose step leaves the box is set to the face that it meets and the others are
    solved for again: scaling or clipping the whole step would let one flat direction stop all.
    Where the faces met are not those of the minimum that may lead uphill: then the whole step
    is shrunk until it is in the box.
    """
    here = units.of(theta)
    longest = np.where(units.linear, np.maximum(LONGEST, here), LONGEST)
    least = np.maximum(units.low - here, -longest)
    most = np.minimum(units.high - here, longest)
    pushed = ((here <= units.low) & (gradient > 0)) | ((here >= units.high) & (gradient < 0))
    held = pushed | ~units.free
    at = np.zeros_like(theta)
    downhill = np.where(units.free, -gradient, 0.0)
    newton = np.einsum("bij,bj->bi", inverse, downhill)
    for _ in range(theta.shape[1]):  # what stands at a face and would leave through it is held
        whole = _conditional(newton, inverse, held, at)
        out = ~held & (((least >= 0.0) & (whole < 0.0)) | ((most <= 0.0) & (whole > 0.0)))
        if not out.any():
            break
        held = held | out
    step, met = whole, held
    for _ in range(theta.shape[1]):
        out = ~met & ((step < least) | (step > most))
        if not out.any():
            break
        at = np.where(out, np.clip(step, least, most), at)
        met = met | out
        step = _conditional(newton, inverse, met, at)
    if met is held:
        return whole, -np.einsum("bi,bi->b", whole, downhill)
    limit = np.where(whole < 0.0, least, most)
    ratio = np.where(np.abs(whole) > np.abs(limit), limit / np.where(whole == 0.0, 1.0, whole), 1.0)
    shrunk = whole * ratio.min(axis=1, keepdims=True)
    step = np.clip(step, least, most)
    gain, sure = (np.einsum("bi,bi->b", s, downhill) for s in (step, shrunk))
    uphill = gain < 0.1 * sure
    return np.where(uphill[:, None], shrunk, step), -np.where(uphill, sure, gain)


def _conditional(
    newton: np.ndarray, inverse: np.ndarray, held: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """The minimum of a quadratic model where `held [B, K]` coordinates step by `at [B, K]`.

    `newton` is its free minimum. A normal variable of this covariance, conditioned, has its mean
    there, so that the inverse Hessian is all that is needed.
    """
    if not held.any():
        return newton
    inside = held[:, :, None] & held[:, None, :]
    block = np.where(inside, inverse, 0.0)
    # fixed parameters have no row of their own
    empty = ~held | (np.einsum("bkk->bk", block) <= 0.0)
    ridge = np.where(empty, 1.0, RIDGE * np.einsum("bkk->bk", block))
    block = block + np.eye(held.shape[1]) * ridge[:, None, :]
    gap = np.where(held, at - newton, 0.0)
    pull = np.linalg.solve(block, gap[:, :, None])[:, :, 0]
    step = newton + np.einsum("bij,bj->bi", inverse, np.where(held, pull, 0.0))
    return np.where(held, at, step)


def _line_search(
    problem: Problem,
    units: Units,
    theta: np.ndarray,
    value: np.ndarray,
    step: np.ndarray,
    slope: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Backtracking along a step within the box to a sufficient decrease; failed rows stay."""
    length = np.ones(theta.shape[0])
    here = units.of(theta)
    new, new_value = theta.copy(), value.copy()
    new_gradient = np.zeros_like(theta)
    waiting = np.ones(theta.shape[0], bool)
    for _ in range(30):
        rows = np.flatnonzero(waiting)
        if rows.size == 0:
            break
        part, mine = problem.rows(rows), units.rows(rows)
        trial = mine.back(
            np.clip(here[rows] + length[rows, None] * step[rows], mine.low, mine.high)
        )
        trial = np.where(problem.free, np.clip(trial, problem.low, problem.high), theta[rows])
        f, g = mine.value_and_gradient(part, trial)
        bar = value[rows] + 1e-4 * length[rows] * slope[rows]
        good = np.isfinite(f) & (f <= bar + 4e-16 * value[rows])
        hit = rows[good]
        new[hit], new_value[hit], new_gradient[hit] = trial[good], f[good], g[good]
        waiting[hit] = False
        length[rows] *= 0.4
    if waiting.any():
        rows = np.flatnonzero(waiting)
        mine = units.rows(rows)
        new_gradient[rows] = mine.value_and_gradient(problem.rows(rows), theta[rows])[1]
    return new, new_value, new_gradient, ~waiting


def _bfgs(inverse: np.ndarray, s: np.ndarray, y: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """The BFGS update of inverse Hessians `[B, K, K]`; none without positive curvature."""
    sy = np.einsum("bi,bi->b", s, y)
    norm = np.linalg.norm(s, axis=1) * np.linalg.norm(y, axis=1)
    good = ok & (sy > 1e-8 * norm) & (norm > 0)
    rho = np.where(good, 1.0 / np.where(good, sy, 1.0), 0.0)
    hy = np.einsum("bij,bj->bi", inverse, y)
    yhy = np.einsum("bi,bi->b", y, hy)
    cross = hy[:, :, None] * s[:, None, :]
    outer = s[:, :, None] * s[:, None, :]
    update = (rho * (1.0 + rho * yhy))[:, None, None] * outer
    update -= rho[:, None, None] * (cross + np.swapaxes(cross, 1, 2))
    return inverse + update
