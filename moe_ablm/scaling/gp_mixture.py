"""Clusters of curves: Gaussian-process experts behind a Dirichlet-process gate.

A curve i of cluster k is y_i(x) = m(x) + f_k(x) + g_i(x) + noise: a mean m of all curves, the mean
of its cluster, a smooth deviation of its own (seeds of one cell never agree to the noise) and white
noise. f_k and g_i are Gaussian processes with squared-exponential kernels; g_i has besides a level,
and a line that ends at 0, since runs differ in level, and more at their start. The share of
clusters is a Dirichlet process, so that their number is inferred. Hensman, Rattray & Lawrence 2015,
Fast nonparametric clustering of structured time-series, has the hierarchy; Blei & Jordan 2006,
Variational inference for Dirichlet process mixtures, the truncated sticks and their concentration.

The cluster means are summed out, so that the bound depends on the probabilities of assignments,
sticks and concentration alone. Starts have 1, 2, 3 ... clusters; the best bound is kept. Letters:
`N` curves, `P` points of a curve (padded), `M` knots of a cluster mean, `K` clusters at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize
from scipy.special import betaln, digamma, gammaln, softmax

KNOTS = 20
MOST_POINTS = 32  # of a curve; where there are more, neighbours are averaged
MOST_CLUSTERS = 20  # sticks
PATIENCE = 3  # numbers of clusters tried without a better bound
SEEDS = 8  # draws of k-means for each number of clusters
SPACING = 1.0 / (KNOTS - 1)
JITTER = 1e-6
GAMMA_SHAPE = GAMMA_RATE = 1.0  # prior of the concentration
# ln of the hyperparameters: sd and length of cluster means, sd and length of deviations, noise sd,
# sd of the line at the start, sd of the level; in units of the range of x and of the curves' spread
START = np.log([1.0, 0.3, 0.3, 0.4, 0.1, 0.1, 0.1])
BOUNDS = np.log(
    [
        (0.05, 20.0),
        (1.5 * SPACING, 2.0),
        (1e-3, 5.0),
        (SPACING, 4.0),
        (1e-3, 3.0),
        (1e-3, 5.0),
        (1e-3, 5.0),
    ]
)
SETTLED = 0.3  # nats; a start whose bound rises by less is at its optimum
PRIOR_SD = 1.5  # of the ln of each hyperparameter, around its start
AXES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"linear": np.asarray, "log": np.log1p}


@dataclass(frozen=True)
class Curves:
    """Curves on one axis, padded.

    Attributes:
      x: `[N, P]`, 0 to 1.
      y: `[N, P]`, centred and of unit spread; 0 where padded.
      count: `[N, P]`, how many values a point averages; 0 where padded.
      grid: `[N]`, which curves have equal x and count: what does not depend on y is shared.
      first: `[G]`, a curve of each grid.
    """

    x: np.ndarray
    y: np.ndarray
    count: np.ndarray
    grid: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """What the curves say of the knots of their cluster's mean.

    Attributes:
      precision: `[G, M, M]`, of curves on a grid.
      grid: `[N, G]`, 1 where a curve is on a grid.
      pull: `[N, M]`, precision times the knots that a curve itself would have.
      constant: `[N]`, ln likelihood of a curve whose cluster has the mean m.
      prior: `[M, M]`, covariance of the knots.
    """

    precision: np.ndarray
    grid: np.ndarray
    pull: np.ndarray
    constant: np.ndarray
    prior: np.ndarray


@dataclass(frozen=True)
class State:
    """A local optimum of the bound: `theta [7]`, `probability [N, K]`."""

    bound: float
    theta: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True)
class Clusters:
    """Clusters of curves, the largest first.

    Attributes:
      probability: `[N, C]`, of each curve and cluster; rows add up to 1.
      labels: `[N]`, the most probable cluster of each curve.
      steps: `[S]`, where the means are given.
      mean: `[C, S]`.
      mean_sd: `[C, S]`, of the mean.
      run_sd: `[C, S]`, of a further run of the cluster, without the noise of single values.
      axis: "linear" or "log": the axis of steps on which curves are smoother, by the bound.
      bound: lower bound of the ln evidence.
      single: the same with one cluster only.
      noise_sd: of single values.
      deviation_sd: of a curve from the mean of its cluster, averaged over its course.
    """

    probability: np.ndarray
    labels: np.ndarray
    steps: np.ndarray
    mean: np.ndarray
    mean_sd: np.ndarray
    run_sd: np.ndarray
    axis: str
    bound: float
    single: float
    noise_sd: float
    deviation_sd: float

    @property
    def count(self) -> int:
        return self.probability.shape[1]


def cluster(steps: Sequence[np.ndarray], values: Sequence[np.ndarray], seed: int = 0) -> Clusters:
    """Clusters curves; the same input and seed give the same clusters.

    Args:
      steps: of each of N >= 2 curves, its increasing steps (0 or more); grids may differ.
      values: of each curve, its finite values.
      seed: of the starts.
    """
    random = np.random.default_rng(seed)
    alone = np.ones((len(steps), 1))
    placed = [_placed(axis, steps, values) for axis in AXES]
    single = [_optimum(p.curves, START, alone) for p in placed]
    first = max(range(len(placed)), key=lambda i: single[i].bound - placed[i].in_own_unit)
    found = _search(placed[first].curves, single[first], random)
    # the same clusters on the other axis: where they are likelier there, search there
    other = 1 - first
    again = _optimum(placed[other].curves, START, found.probability)
    if again.bound - placed[other].in_own_unit > found.bound - placed[first].in_own_unit:
        found = max(
            again, _search(placed[other].curves, single[other], random), key=lambda s: s.bound
        )
        first = other
    return _clusters(placed[first], found, single[first].bound - placed[first].in_own_unit)


@dataclass(frozen=True)
class _Placed:
    """Curves on an axis, and the way back to steps and values: `common [M]` is m at the knots."""

    curves: Curves
    axis: str
    low: float
    width: float
    common: np.ndarray
    spread: float

    @property
    def in_own_unit(self) -> float:
        return float((self.curves.count > 0).sum() * np.log(self.spread))


def _placed(axis: str, steps: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> _Placed:
    warped = [AXES[axis](np.asarray(s, float)) for s in steps]
    low = min(w[0] for w in warped)
    width = max(max(w[-1] for w in warped) - low, 1e-12)
    raw = _padded([(w - low) / width for w in warped], values)
    return _Placed(**_centred(raw), axis=axis, low=low, width=width)


def _clusters(placed: _Placed, found: State, single: float) -> Clusters:
    """The optimum in steps and values; clusters that are no curve's most probable are left out."""
    labels = found.probability.argmax(1)
    order = np.argsort(-np.bincount(labels, minlength=found.probability.shape[1]), kind="stable")
    probability = found.probability[:, order[: np.unique(labels).size]]
    probability = probability / probability.sum(1, keepdims=True)
    mean, covariance = posterior(evidence_of(found.theta, placed.curves), probability)
    fine = np.linspace(0.0, 1.0, 4 * KNOTS)
    projection = _project(found.theta, fine)
    sd_f, _, sd_g, _, noise, sd_line, sd_level = np.exp(found.theta)
    deviation = sd_g**2 + (sd_line * (1.0 - fine)) ** 2 + sd_level**2
    variance = np.einsum("sm,kmn,sn->ks", projection, covariance, projection).clip(0.0, sd_f**2)
    at = placed.low + placed.width * fine
    common = _through(placed.common)(fine)
    return Clusters(
        probability=probability,
        labels=probability.argmax(1),
        steps=np.expm1(at) if placed.axis == "log" else at,
        mean=common + placed.spread * (mean @ projection.T),
        mean_sd=placed.spread * np.sqrt(variance),
        run_sd=placed.spread * np.sqrt(variance + deviation),
        axis=placed.axis,
        bound=found.bound - placed.in_own_unit,
        single=single,
        noise_sd=float(placed.spread * noise),
        deviation_sd=float(placed.spread * np.sqrt(deviation.mean())),
    )


def _padded(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> Curves:
    """Curves of at most `MOST_POINTS` points each: neighbours are averaged where there are more.

    Which ones does not depend on the axis, so that bounds on both are of the same values.
    """
    parts = []
    for x, y in zip(xs, ys, strict=True):
        y = np.asarray(y, float)
        bins = np.arange(x.size)
        if x.size > MOST_POINTS:
            bins = np.arange(x.size) * MOST_POINTS // x.size
        count = np.bincount(bins).astype(float)
        parts.append((np.bincount(bins, x) / count, np.bincount(bins, y) / count, count))
    longest = max(p[0].size for p in parts)
    x, y, count = (
        np.stack([np.pad(p[j], (0, longest - p[0].size)) for p in parts]) for j in range(3)
    )
    _, first, grid = np.unique(
        np.concatenate([x, count], axis=1), axis=0, return_index=True, return_inverse=True
    )
    return Curves(x, y, count, grid.reshape(-1), first)


def _centred(raw: Curves) -> dict[str, Any]:
    """Curves without the mean of all, in units of their spread; that mean; that unit."""
    used = raw.count > 0
    level = raw.y[used].mean()
    size = max(float(raw.y[used].std()), 1e-12)
    scaled = replace(raw, y=np.where(used, (raw.y - level) / size, 0.0))
    wide = START + np.log([3.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    knots = posterior(evidence_of(wide, scaled), np.ones((len(raw.x), 1)))[0][0]
    common = level + size * knots
    rest = np.where(used, raw.y - _through(common)(raw.x), 0.0)
    spread = max(float(np.sqrt((rest[used] ** 2).mean())), 1e-9 * size)
    return {"curves": replace(raw, y=rest / spread), "common": common, "spread": spread}


def _through(knots: np.ndarray) -> CubicSpline:
    return CubicSpline(np.linspace(0.0, 1.0, KNOTS), knots)


def kernel(a: np.ndarray, b: np.ndarray, sd: float, length: float) -> np.ndarray:
    """Squared-exponential covariance `[..., A, B]` of points `[..., A]` and `[..., B]`."""
    return sd**2 * np.exp(-0.5 * ((a[..., :, None] - b[..., None, :]) / length) ** 2)


def _project(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A cluster mean at x `[..., P]` from its knots: `[..., P, M]`, unit sd cancels."""
    length = float(np.exp(theta[1]))
    knots = np.linspace(0.0, 1.0, KNOTS)
    prior = kernel(knots, knots, 1.0, length) + JITTER * np.eye(KNOTS)
    return np.linalg.solve(prior, kernel(knots, x, 1.0, length)).swapaxes(-1, -2)


def evidence_of(theta: np.ndarray, curves: Curves) -> Evidence:
    """The likelihood of every curve, a Gaussian in the knots of its cluster's mean."""
    sd_f, length_f, sd_g, length_g, noise, sd_line, sd_level = np.exp(theta)
    x, count = curves.x[curves.first], curves.count[curves.first]
    used = count > 0
    both = used[:, :, None] & used[:, None, :]
    line = sd_line * (1.0 - x)
    smooth = kernel(x, x, sd_g, length_g) + line[:, :, None] * line[:, None, :] + sd_level**2
    covariance = np.where(both, smooth, 0.0)
    points = np.arange(x.shape[1])
    # a padded point is one of unit variance and no covariance: it adds nothing
    covariance[:, points, points] += np.where(used, noise**2 / np.maximum(count, 1.0), 1.0)
    root = np.linalg.cholesky(covariance)
    white = np.linalg.inv(root)
    design = white @ np.where(used[:, :, None], _project(theta, x), 0.0)
    y = np.einsum("npq,nq->np", white[curves.grid], curves.y)
    fixed = 2.0 * np.log(np.einsum("gpp->gp", root)).sum(1) + used.sum(1) * np.log(2.0 * np.pi)
    constant = -0.5 * ((y**2).sum(1) + fixed[curves.grid])
    pull = np.einsum("npm,np->nm", design[curves.grid], y)
    knots = np.linspace(0.0, 1.0, KNOTS)
    prior = kernel(knots, knots, sd_f, length_f) + JITTER * sd_f**2 * np.eye(KNOTS)
    on_grid = np.eye(len(x))[curves.grid]
    return Evidence(design.swapaxes(1, 2) @ design, on_grid, pull, constant, prior)


def posterior(evidence: Evidence, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[K, M]` and covariance `[K, M, M]` of the knots of each cluster."""
    inner, root, pull = _solved(evidence, probability)
    covariance = root @ np.linalg.solve(inner, root.T[None])
    return np.einsum("kmn,kn->km", covariance, pull), covariance


def _solved(
    evidence: Evidence, probability: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """I + R^T (sum of precisions) R `[K, M, M]`, R with R R^T the prior, the sum of pulls."""
    root = np.linalg.cholesky(evidence.prior)
    g, m, _ = evidence.precision.shape
    weight = probability.T @ evidence.grid
    total = (weight @ evidence.precision.reshape(g, m * m)).reshape(-1, m, m)
    inner = np.eye(m) + root.T @ total @ root
    return inner, root, probability.T @ evidence.pull


def log_likelihood(evidence: Evidence, probability: np.ndarray) -> float:
    """ln of the likelihood to the power of the probabilities, cluster means summed out."""
    inner, root, pull = _solved(evidence, probability)
    whitened = pull @ root
    solved = np.linalg.solve(inner, whitened[:, :, None])[:, :, 0]
    quadratic = 0.5 * (whitened * solved).sum()
    return float(
        quadratic - 0.5 * np.linalg.slogdet(inner)[1].sum() + probability.sum(1) @ evidence.constant
    )


def _gate(probability: np.ndarray, concentration: float) -> tuple[np.ndarray, float, float]:
    """E ln of the shares `[K]`, the gate's part of the bound, and E of the concentration.

    Sticks are beta, the concentration gamma; the factor of the concentration is updated once.
    """
    size = probability.sum(0)
    k = size.size
    first = 1.0 + size[:-1]
    second = concentration + np.cumsum(size[::-1])[::-1][1:]
    both = digamma(first + second)
    log_v, log_rest = digamma(first) - both, digamma(second) - both
    shape, rate = GAMMA_SHAPE + k - 1, GAMMA_RATE - log_rest.sum()
    shares = np.append(log_v, 0.0) + np.concatenate([[0.0], np.cumsum(log_rest)])
    mean, log_mean = shape / rate, digamma(shape) - np.log(rate)
    entropy_v = betaln(first, second) - (first - 1) * log_v - (second - 1) * log_rest
    bound = (size @ shares) + ((k - 1) * log_mean + (mean - 1.0) * log_rest.sum()) + entropy_v.sum()
    bound += GAMMA_SHAPE * np.log(GAMMA_RATE) - gammaln(GAMMA_SHAPE)
    bound += (GAMMA_SHAPE - 1) * log_mean - GAMMA_RATE * mean
    bound += shape - np.log(rate) + gammaln(shape) + (1 - shape) * digamma(shape)
    used = np.clip(probability, 1e-300, None)
    return shares, float(bound - (probability * np.log(used)).sum()), float(mean)


def _assign(
    evidence: Evidence, probability: np.ndarray, rounds: int = 100
) -> tuple[np.ndarray, float]:
    """Updates assignments, sticks and concentration in turn until the bound stands still."""
    concentration, before = 1.0, -np.inf
    bound = before
    g, m, _ = evidence.precision.shape
    flat = evidence.precision.reshape(g, m * m)
    for _ in range(rounds):
        order = np.argsort(-probability.sum(0), kind="stable")
        probability = probability[:, order]
        for _ in range(3):
            shares, gate, concentration = _gate(probability, concentration)
        bound = log_likelihood(evidence, probability) + gate
        if bound - before < 1e-5 * len(probability):
            break
        before = bound
        mean, covariance = posterior(evidence, probability)
        second = covariance + mean[:, :, None] * mean[:, None, :]
        fit = evidence.pull @ mean.T
        fit -= 0.5 * evidence.grid @ (flat @ second.reshape(-1, m * m).T)
        probability = softmax(fit + shares, axis=1)
    return probability, bound


def _log_prior(theta: np.ndarray) -> float:
    return float(-0.5 * (((theta - START) / PRIOR_SD) ** 2).sum())


def _refine(curves: Curves, theta: np.ndarray, probability: np.ndarray, steps: int) -> np.ndarray:
    """Hyperparameters that raise the bound, assignments held."""
    size = probability.sum(0)
    kept = probability[:, size > 1e-3]  # the others have their prior for mean and add nothing

    def loss(t: np.ndarray) -> float:
        return -log_likelihood(evidence_of(t, curves), kept) - _log_prior(t)

    found = minimize(
        loss, theta, method="L-BFGS-B", bounds=BOUNDS, options={"maxiter": steps, "ftol": 1e-7}
    )
    return np.asarray(found.x if found.fun < loss(theta) else theta)


def _optimum(curves: Curves, theta: np.ndarray, probability: np.ndarray) -> State:
    """Assignments and hyperparameters in turn, from a start."""
    bound = -np.inf
    for steps in (8, 10, 15, 20):
        theta = _refine(curves, theta, probability, steps)
        probability, now = _assign(evidence_of(theta, curves), probability)
        now += _log_prior(theta)
        if now - bound < SETTLED:
            break
        bound = now
    return State(now, theta, probability)


def _search(curves: Curves, single: State, random: np.random.Generator) -> State:
    """The best optimum of starts with 2, 3, ... clusters, and of that with one."""
    n = len(curves.x)
    best = single
    shapes = _shapes(curves, single.theta)
    poor = 0
    for k in range(2, min(n, MOST_CLUSTERS - 1) + 1):
        found = _optimum(curves, START, _start(_groups(shapes, k, random), n))
        poor = 0 if found.bound > best.bound + SETTLED else poor + 1
        best = max(best, found, key=lambda s: s.bound)
        if poor == PATIENCE:
            break
    return _merged(curves, best)


def _start(labels: np.ndarray, n: int) -> np.ndarray:
    """Assignments `[N, K]`, nearly certain."""
    k = min(n, MOST_CLUSTERS)
    probability = np.full((n, k), 1e-3 / k)
    probability[np.arange(n), labels] += 1.0 - 1e-3
    return probability


def _shapes(curves: Curves, theta: np.ndarray) -> np.ndarray:
    """Every curve's own smooth course at the knots `[N, M]`, 0 where it has no values."""
    alone = theta.copy()
    alone[[2, 5, 6]] = np.log(1e-3)
    alone[0] = max(theta[0], theta[2], np.log(0.3))
    alone[1] = min(theta[1], np.log(0.3))
    evidence = evidence_of(alone, curves)
    return posterior(evidence, np.eye(len(curves.x)))[0]


def _groups(shapes: np.ndarray, k: int, random: np.random.Generator) -> np.ndarray:
    """Labels `[N]` of k-means++ with a few rounds of Lloyd, the tightest of several draws."""
    best, tightest = np.zeros(len(shapes), int), np.inf
    for _ in range(SEEDS):
        centres = shapes[[random.integers(len(shapes))]]
        while len(centres) < k:
            nearest = _squares(shapes, centres).min(1)
            total = nearest.sum()
            share = nearest / total if total > 0 else np.full(len(shapes), 1 / len(shapes))
            centres = np.vstack([centres, shapes[random.choice(len(shapes), p=share)]])
        for _ in range(20):
            labels = _squares(shapes, centres).argmin(1)
            for j in np.unique(labels):
                centres[j] = shapes[labels == j].mean(0)
        spread = _squares(shapes, centres).min(1).sum()
        if spread < tightest:
            best, tightest = labels, spread
    return best


def _squares(shapes: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances `[N, K]`."""
    return ((shapes[:, None] - centres[None]) ** 2).sum(2)


def _merged(curves: Curves, state: State) -> State:
    """Pairs of clusters made one, as long as the bound rises."""
    while True:
        labels = state.probability.argmax(1)
        names = np.unique(labels)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        if not pairs:
            return state
        evidence = evidence_of(state.theta, curves)
        joined = []
        for a, b in pairs:
            probability = state.probability.copy()
            probability[:, a] += probability[:, b]
            probability[:, b] = 0.0
            joined.append((log_likelihood(evidence, probability), probability))
        start = max(joined, key=lambda pair: pair[0])[1]
        found = _optimum(curves, state.theta, start)
        if found.bound <= state.bound:
            return state
        state = found
