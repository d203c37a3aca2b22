"""Clusters of curves: planted families, the algebra against dense Gaussians, the bound."""

import itertools

import numpy as np
import pytest
from curve_families import families, family_mean, right_share
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from moe_ablm.scaling import gp_mixture
from moe_ablm.scaling.gp_mixture import JITTER, KNOTS, cluster, evidence_of, kernel

THETA = np.log([1.2, 0.3, 0.4, 0.5, 0.1, 0.3, 0.2])


@pytest.mark.parametrize(
    ("seed", "irregular"),
    [
        (0, False),
        pytest.param(0, True, marks=pytest.mark.slow),
        *(pytest.param(s, i, marks=pytest.mark.slow) for s in (1, 2, 3, 4) for i in (False, True)),
    ],
)
def test_three_families_are_found(irregular, seed):
    steps, values, truth = families(seed, (0, 1, 2), 7, irregular)
    found = cluster(steps, values, seed)
    assert found.count == 3
    assert right_share(found.labels, truth) >= 0.95
    np.testing.assert_allclose(found.probability.sum(1), 1.0)
    kinds = [np.bincount(truth[found.labels == k]).argmax() for k in range(3)]
    for k, kind in enumerate(kinds):
        inside = (found.steps >= 60) & (found.steps <= 600)  # where every curve has values
        error = found.mean[k] - family_mean(kind, found.steps)
        # four times the sd of an average of seven curves
        assert np.abs(error[inside]).max() < 4 * 0.04 / 7**0.5
    assert found.noise_sd == pytest.approx(0.02, rel=0.25)
    assert found.deviation_sd == pytest.approx(0.04, rel=0.35)


@pytest.mark.slow
def test_the_band_of_runs_holds_runs_that_were_not_seen():
    """On average over sets: the sd of deviations is estimated from 21 curves."""
    shares = []
    for seed in range(5):
        steps, values, truth = families(seed, (0, 1, 2), 7, False)
        found = cluster(steps, values, seed)
        kinds = [np.bincount(truth[found.labels == k]).argmax() for k in range(3)]
        steps, values, truth = families(seed + 50, (0, 1, 2), 30, False)
        labels = [kinds.index(kind) for kind in truth]
        shares.append(share_in_band(found, steps, values, labels))
    assert 0.92 < np.mean(shares) < 0.98


def share_in_band(found, steps, values, labels):
    """Share of single values within 95 % of what a run of their cluster has, noise included."""
    inside = []
    for s, v, label in zip(steps, values, labels, strict=True):
        sd = np.hypot(np.interp(s, found.steps, found.run_sd[label]), found.noise_sd)
        inside.append(np.abs(v - np.interp(s, found.steps, found.mean[label])) < 1.96 * sd)
    return np.concatenate(inside).mean()


@pytest.mark.parametrize("irregular", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_family_is_one(irregular):
    steps, values, _ = families(2, (0,), 12, irregular)
    found = cluster(steps, values)
    assert found.count == 1 and found.bound >= found.single - 0.5
    assert found.deviation_sd == pytest.approx(0.04, rel=0.35)


def test_clusters_are_the_same_in_any_unit():
    steps, values, _ = families(3, (0, 2), 3)
    one = cluster(steps, values, 7)
    scaled = cluster(steps, [100.0 + 1e3 * v for v in values], 7)
    np.testing.assert_array_equal(one.labels, scaled.labels)
    np.testing.assert_allclose(scaled.mean, 100.0 + 1e3 * one.mean, rtol=1e-3)


def test_curves_that_are_equal_or_constant_are_one_cluster():
    found = cluster([np.arange(5.0)] * 3, [np.full(5, 2.0)] * 3)
    assert found.count == 1 and np.allclose(found.mean, 2.0)


def small_curves(seed=0, n=3):
    random = np.random.default_rng(seed)
    xs = [np.sort(random.random(4 + i)) for i in range(n - 1)]
    xs.append(xs[0])  # two on one grid
    return gp_mixture._padded(xs, [random.standard_normal(x.size) for x in xs])


def dense_log_likelihood(curves, members, theta):
    """ln density of the members of one cluster, their values as one Gaussian without knots."""
    sd_f, length_f, sd_g, length_g, noise, sd_line, sd_level = np.exp(theta)
    used = [curves.count[i] > 0 for i in members]
    x = np.concatenate([curves.x[i][u] for i, u in zip(members, used, strict=True)])
    y = np.concatenate([curves.y[i][u] for i, u in zip(members, used, strict=True)])
    count = np.concatenate([curves.count[i][u] for i, u in zip(members, used, strict=True)])
    owner = np.concatenate([np.full(u.sum(), i) for i, u in zip(members, used, strict=True)])
    covariance = kernel(x, x, sd_f, length_f) + np.diag(noise**2 / count)
    own = kernel(x, x, sd_g, length_g) + sd_line**2 * np.outer(1 - x, 1 - x)
    own += sd_level**2
    covariance += own * (owner[:, None] == owner)
    return multivariate_normal(np.zeros(x.size), covariance).logpdf(y)


def test_knots_and_shared_grids_change_nothing():
    curves = small_curves()
    assert len(curves.first) == 2
    evidence = evidence_of(THETA, curves)
    for members in ([0], [0, 1], [0, 1, 2]):
        probability = np.zeros((3, 1))
        probability[members] = 1.0
        ours = gp_mixture.log_likelihood(evidence, probability)
        assert ours == pytest.approx(dense_log_likelihood(curves, members, THETA), abs=2e-3)


def test_the_mean_of_a_cluster_is_that_of_scikit_learn():
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    curves = small_curves(1)
    theta = THETA.copy()
    theta[[2, 5, 6]] = np.log(1e-3)  # no deviations: a cluster is a plain Gaussian process
    mean, covariance = gp_mixture.posterior(evidence_of(theta, curves), np.ones((3, 1)))
    used = curves.count > 0
    k = gaussian_process.kernels
    sd, length, _, _, noise, _, _ = np.exp(theta)
    model = gaussian_process.GaussianProcessRegressor(
        k.ConstantKernel(sd**2) * k.RBF(length), alpha=noise**2 + 1e-6, optimizer=None
    ).fit(curves.x[used][:, None], curves.y[used])
    knots = np.linspace(0, 1, KNOTS)[:, None]
    expected, expected_sd = model.predict(knots, return_std=True)
    np.testing.assert_allclose(mean[0], expected, atol=5e-3)
    np.testing.assert_allclose(
        np.sqrt(np.diag(covariance[0])), expected_sd, atol=5e-3 + JITTER**0.5
    )


def test_the_bound_is_below_the_evidence_and_near_it():
    """The evidence of three curves by all 27 assignments and draws of sticks and concentration."""
    curves = small_curves(2)
    every = list(itertools.product(range(3), repeat=3))
    fit = {}
    for members in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        fit[tuple(members)] = dense_log_likelihood(curves, members, THETA)
    random = np.random.default_rng(0)
    concentration = random.gamma(1.0, 1.0, 40_000)
    v = random.beta(1.0, concentration[:, None], (40_000, 2))
    shares = np.stack([v[:, 0], v[:, 1] * (1 - v[:, 0]), (1 - v[:, 0]) * (1 - v[:, 1])], axis=1)
    terms = []
    for labels in every:
        groups = [tuple(np.flatnonzero(np.array(labels) == k)) for k in set(labels)]
        prior = np.log(np.mean(np.prod(shares[:, labels], axis=1)))
        terms.append(prior + sum(fit[g] for g in groups))
    exact = logsumexp(terms)
    evidence = evidence_of(THETA, curves)
    bounds = []
    for labels in ([0, 0, 0], [0, 1, 2], [0, 0, 1], [0, 1, 0], [0, 1, 1]):
        start = gp_mixture._start(np.array(labels), 3)
        one = gp_mixture._assign(evidence, start, rounds=2)[1]
        bounds.append(gp_mixture._assign(evidence, start)[1])
        assert bounds[-1] >= one - 1e-9
    assert exact - 3.0 < max(bounds) < exact + 0.02


def test_many_values_are_averaged_and_counted():
    x = np.linspace(0, 1, 1000)
    curves = gp_mixture._padded([x, x[:5]], [x, x[:5]])
    assert curves.x.shape == (2, gp_mixture.MOST_POINTS)
    assert curves.count[0].sum() == 1000 and curves.count[1].sum() == 5
    np.testing.assert_allclose(curves.x[0], curves.y[0])
