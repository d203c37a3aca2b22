"""Which parameters the runs identify: rank, bounds, standard errors, and verdicts in words."""

import math
from dataclasses import dataclass

import numpy as np

from moe_ablm.scaling.laws import Parameter
from moe_ablm.scaling.solver import Problem

SINGULAR = 1e-6  # singular value of the scaled Jacobian, over the largest, that counts as zero
UNMOVED = "the design does not move the loss with it"
STANDS_ON = "it stands on"
LOADING = 0.1  # share of a parameter in a null direction that makes it part of it


def at_bound(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Which free parameters `[K]` ended at a bound, and have a meaning there."""
    width = 1e-6 * (problem.high - problem.low)
    hit = (theta <= problem.low + width) | (theta >= problem.high - width)
    idle = np.isin(problem.law.names, list(meaningless(problem, theta)))
    return problem.free & hit & ~idle


def at_bounds(problem: Problem, theta: np.ndarray) -> list[str]:
    """Names of free parameters that ended at a bound."""
    return [n for n, hit in zip(problem.law.names, at_bound(problem, theta), strict=True) if hit]


def meaningless(problem: Problem, theta: np.ndarray) -> dict[str, str]:
    """Free parameters that stand only in terms whose coefficient ended at zero, and which it is."""
    law = problem.law
    linear = [k for k, p in enumerate(law.parameters) if p.linear]
    gone: dict[int, set[int]] = {}
    if linear:
        width = 1e-6 * (problem.high - problem.low)
        zero = problem.free & (theta <= problem.low + width)
        terms = law.terms(theta[None], problem.x)
        for k, (_, derivatives) in zip(linear, terms, strict=True):
            for j, _ in derivatives:
                gone.setdefault(j, set()).add(k if zero[k] else -1)
    return {
        law.names[j]: ", ".join(law.names[k] for k in sorted(where))
        for j, where in gone.items()
        if j not in linear and problem.free[j] and -1 not in where
    }


def degrees_of_freedom(problem: Problem) -> int:
    """Observations minus free parameters; runs minus one where that is less.

    Checkpoints of one run are not independent: what the spread between runs tells has no more
    degrees of freedom than there are runs, less one (Cameron and Miller 2015, section VI.D).
    """
    spare = problem.x.size - int(problem.free.sum())
    if problem.clusters is None:
        return spare
    return min(spare, int(problem.clusters.max()))


def within_delta(residuals: np.ndarray, delta: float) -> np.ndarray:
    """E psi' of each run `[n]`: the probability that its residual is within delta of zero.

    Where delta is far below the spread of the residuals only a few are within it, so a Gaussian
    kernel smooths each of them (width of Silverman 1986, eq. 3.31).
    """
    if not math.isfinite(delta):
        return np.ones_like(residuals)
    from scipy.special import ndtr

    spread = min(float(np.std(residuals)), 1.4826 * float(np.median(np.abs(residuals))))
    width = max(0.9 * spread * residuals.size**-0.2, 1e-12)
    return ndtr((delta - residuals) / width) - ndtr((-delta - residuals) / width)


@dataclass(frozen=True)
class Scores:
    """The sandwich covariance of the free parameters and its parts."""

    inverse_hessian: np.ndarray  # (J' diag(E psi') J + prior)^-1
    covariance: np.ndarray  # inverse_hessian (sum psi_i^2 J_i J_i') inverse_hessian n / (n - K)
    scale: float  # E psi^2 / E psi', if all runs were equally noisy
    floor: float  # of the scale of a likelihood ratio: that, or 0 for checkpoints of runs


def scores(problem: Problem, theta: np.ndarray, held: np.ndarray | None = None) -> Scores:
    """Huber 1981, section 7.6, with heteroscedastic noise (White 1980).

    With clusters their sums take the place of runs, so that checkpoints of one run may be
    correlated in any way; each sum is that of the fit without the run (Bell and McCaffrey 2002,
    the jackknife, CR3), because a run of an extreme size draws the fit to itself. Parameters that
    have no meaning, and those that are `held [K]`, are known. Directions in the null space get a
    pseudo-inverse: see `judge` first.
    """
    jacobian = problem.law.jacobian(theta[None], problem.x)[0][:, problem.free]
    known = np.isin(problem.law.names, list(meaningless(problem, theta)))
    known = (known if held is None else known | held)[problem.free]
    jacobian[:, known] = 0.0
    residuals = problem.residuals(theta[None])[0]
    spare = max(residuals.size - int(problem.free.sum()), 1)
    inside = within_delta(residuals, problem.delta)
    psi = np.clip(residuals, -problem.delta, problem.delta)
    hessian = (jacobian * inside[:, None]).T @ jacobian
    prior = prior_precision(problem)[np.ix_(problem.free, problem.free)]
    hessian = hessian + problem.prior_scale * prior
    root = 1.0 / np.sqrt(np.maximum(np.diag(hessian), 1e-300))
    scaled = hessian * np.outer(root, root)
    inverse = np.linalg.pinv(scaled, rcond=1e-13, hermitian=True) * np.outer(root, root)
    score = jacobian * psi[:, None]
    if problem.clusters is None:
        meat = score.T @ score * (residuals.size / spare)
    else:
        weighted = jacobian * inside[:, None]
        meat = _clustered_meat(score, jacobian, weighted, inverse, problem.clusters)
    scale = float(np.sum(psi**2)) / spare / max(float(inside.mean()), 1.0 / residuals.size)
    # The prior is information too: it adds its share to the variance of the score.
    meat = meat + problem.prior_scale * scale * prior
    # What differs within runs only is known better than independent rows would tell.
    floor = scale if problem.clusters is None else 0.0
    return Scores(inverse, inverse @ meat @ inverse, scale, floor)


def _clustered_meat(
    score: np.ndarray,
    jacobian: np.ndarray,
    weighted: np.ndarray,
    inverse: np.ndarray,
    clusters: np.ndarray,
) -> np.ndarray:
    """Sum of outer products of the clusters' scores, each as if the fit had left it out, `[K, K]`.

    Without cluster g the Hessian is H - H_g: the fit moves by (H - H_g)^-1 s_g, which is H^-1 times
    (1 - H_g H^-1)^-1 s_g. `score`, `jacobian` and `weighted` (by psi') are `[n, K]`.
    """
    size = inverse.shape[0]
    unit = np.sqrt(np.maximum(np.diag(inverse), 1e-300))  # parameters differ by orders of magnitude
    count = int(clusters.max()) + 1
    out = np.zeros((size, size))
    for g in range(count):
        mine = clusters == g
        own = jacobian[mine].T @ weighted[mine] * np.outer(unit, unit)
        share = own @ (inverse / np.outer(unit, unit))
        moved = np.linalg.pinv(np.eye(size) - share) @ (score[mine].sum(axis=0) * unit) / unit
        out += np.outer(moved, moved)
    return out * ((count - 1) / count)


def variances(problem: Problem, theta: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Asymptotic variances `[Q]` of quantities with these derivatives `[Q, K]` by the parameters.

    The larger of two: that of the sandwich, and that of equally noisy runs. Few runs that tell a
    parameter alone, as of over-fitting, may fit so well by chance that the first is too small. Of
    checkpoints the second does not count. Parameters that are fixed or at a bound are known.
    """
    found = scores(problem, theta, at_bound(problem, theta))
    of_free = slopes[:, problem.free]
    both = [
        np.einsum("qj,jk,qk->q", of_free, each, of_free)
        for each in (found.covariance, found.floor * found.inverse_hessian)
    ]
    return np.maximum(np.maximum(*both), 0.0)


def prior_precision(problem: Problem) -> np.ndarray:
    """Curvature of minus the log prior, `[K, K]`; zero where the law has none."""
    size = problem.free.size
    prior = problem.law.penalty(np.eye(size))
    return np.zeros((size, size)) if prior is None else np.diag(np.diag(prior[1]))


def judge(problem: Problem, theta: np.ndarray, runs: int) -> tuple[float, dict[str, str]]:
    """Condition number of the scaled Jacobian, and a verdict in words on each parameter.

    A verdict is "identified", or says why not: fixed, at a bound, a direction in which the loss
    does not change, or an error larger than the parameter.
    """
    law = problem.law
    names = law.names
    free = np.flatnonzero(problem.free)
    if free.size == 0:
        return 1.0, dict.fromkeys(names, "fixed")
    jacobian = law.jacobian(theta[None], problem.x)[0][:, free]
    prior = np.sqrt(np.diag(prior_precision(problem))[free]) * math.sqrt(problem.prior_scale)
    # the information of the runs on each parameter if all others were known: an upper bound
    weak = prior > np.linalg.norm(jacobian, axis=0)
    jacobian = np.concatenate([jacobian, np.diag(prior)])
    verdicts = {name: "fixed" for k, name in enumerate(names) if not problem.free[k]}
    bounded = set(at_bounds(problem, theta))
    idle = meaningless(problem, theta)
    # What is at its bound stays there, and what has no meaning moves nothing. A coefficient of
    # zero counts all the same: another may take its place without a change of the loss.
    kept = np.array(
        [
            (names[k] not in bounded or law.parameters[k].linear) and names[k] not in idle
            for k in free
        ]
    )
    null = np.zeros(free.size, bool)
    condition, null[kept] = null_space(jacobian[:, kept]) if kept.any() else (1.0, null[kept])
    errors = None
    if runs > free.size and not null.any():
        errors = np.sqrt(variances(problem, theta, np.eye(theta.size)))
    for j, k in enumerate(free):
        name = names[k]
        if name in idle:
            verdicts[name] = f"no meaning: {idle[name]} is 0"
        elif null[j]:
            verdicts[name] = f"not identified: {UNMOVED}"
        elif name in bounded:
            side = "lower" if theta[k] < 0.5 * (problem.low[k] + problem.high[k]) else "upper"
            verdicts[name] = f"at its {side} bound"
        else:
            error = 0.0 if errors is None else errors[k]
            # prior is the noise over the prior's sd, so this is the error in prior sds
            share = 1.0 if weak[j] else error * prior[j] / math.sqrt(problem.prior_scale)
            verdicts[name] = by_error(law.parameters[k], theta[k], error, share)
    return condition, {name: verdicts[name] for name in names}


def null_space(jacobian: np.ndarray) -> tuple[float, np.ndarray]:
    """Condition number of the column-scaled Jacobian `[n, K]`; columns in its null space `[K]`."""
    norms = np.linalg.norm(jacobian, axis=0)
    dead = norms <= 1e-10 * max(norms.max(), 1e-300)
    scaled = jacobian / np.where(dead, 1.0, norms)
    scaled[:, dead] = 0.0
    # R has the singular values of the whole matrix, and K rows whatever the number of runs.
    _, singular, vectors = np.linalg.svd(np.linalg.qr(scaled, mode="r"), full_matrices=True)
    singular = np.concatenate([singular, np.zeros(jacobian.shape[1] - singular.size)])
    zero = singular <= SINGULAR * singular.max()
    null = (
        np.any(np.abs(vectors[zero]) > LOADING, axis=0)
        if zero.any()
        else np.zeros(norms.size, bool)
    )
    smallest = singular.min()
    condition = float(singular.max() / smallest) if smallest > 0 else math.inf
    return condition, null | dead


def judge_derived(problem: Problem, theta: np.ndarray, slope: np.ndarray, log: bool) -> str:
    """A verdict in words on a quantity with gradient `slope [K]` by the internal parameters.

    It stands on a coefficient at its bound where that moves it; it is not identified where it
    moves along a direction in which the loss does not, or where its error is too large.
    """
    law, free = problem.law, problem.free
    bounded = at_bound(problem, theta)
    if not np.isfinite(slope).all():
        return "not identified: it has no derivative here"
    stands = [n for n, b, s in zip(law.names, bounded, slope, strict=True) if b and abs(s) > 1e-6]
    if stands:
        return f"not identified: {STANDS_ON} {', '.join(stands)}, at a bound"
    idle = np.isin(law.names, list(meaningless(problem, theta)))
    used = [n for n, b, s in zip(law.names, idle, slope, strict=True) if b and abs(s) > 1e-6]
    if used:
        return f"not identified: {STANDS_ON} {', '.join(used)}, without meaning here"
    kept = free & (~bounded | np.array([p.linear for p in law.parameters])) & ~idle
    if not kept.any():  # of fixed coefficients only
        return "identified"
    jacobian = law.jacobian(theta[None], problem.x)[0][:, kept]
    prior = np.sqrt(problem.prior_scale * np.diag(prior_precision(problem))[kept])
    rows = np.concatenate([jacobian, np.diag(prior)])
    norms = np.maximum(np.linalg.norm(rows, axis=0), 1e-10 * max(np.abs(rows).max(), 1e-300))
    _, singular, vectors = np.linalg.svd(np.linalg.qr(rows / norms, mode="r"))
    seen = np.zeros(norms.size)
    seen[: singular.size] = singular
    scaled = slope[kept] / norms
    lost = np.linalg.norm((vectors @ scaled)[seen <= SINGULAR * seen.max(initial=0.0)])
    if lost > LOADING * max(float(np.linalg.norm(scaled)), 1e-300):
        return f"not identified: {UNMOVED}"
    error = math.sqrt(float(variances(problem, theta, slope[None])[0]))
    if log and 1.96 * error > math.log(10.0):
        factor = math.exp(min(1.96 * error, 40.0))
        return f"not identified: known only to a factor of {factor:.3g} either way"
    return "identified"


def by_error(parameter: Parameter, value: float, error: float, prior_share: float = 0.0) -> str:
    """A verdict from the standard error of the internal value, also over its prior's sd."""
    if prior_share > 0.5:
        return "not identified: mostly its prior"
    half = 1.96 * error
    if parameter.log and half > math.log(10.0):
        return (
            f"not identified: known only to a factor of {math.exp(min(half, 40.0)):.3g} either way"
        )
    if not parameter.log and parameter.low >= 0.0 and half >= value:
        return f"not identified: {value:.3g} +- {half:.2g} reaches zero"
    if half > 0.5 * (parameter.high - parameter.low):
        return f"not identified: {value * parameter.unit:.3g} +- {half * parameter.unit:.2g}"
    return "identified"
