"""Means over antibodies and their intervals: against scipy's bootstrap and analytic errors."""

import math

import numpy as np
import pytest
from scipy import stats

from moe_ablm.evaluation.estimates import (
    Sample,
    blurred,
    draw_counts,
    interval,
    merged,
    quotient,
    ratio,
    redrawn,
    scaled,
    spearman_number,
    spearman_of_folds,
    welch,
    why_undefined,
)

RNG = np.random.default_rng(0)
N = 400
WEIGHT = RNG.integers(1, 20, N).astype(float)
TOTAL = WEIGHT * (2 + 0.3 * RNG.standard_normal(N)) + RNG.standard_normal(N)
UNITS = [f"u{i:03}" for i in range(N)]


def test_the_interval_of_a_ratio_is_that_of_scipy():
    found = Sample("loss", UNITS, TOTAL, WEIGHT).number(draws=4000)
    expected = stats.bootstrap(
        (TOTAL, WEIGHT),
        lambda t, w, axis=-1: t.sum(axis) / w.sum(axis),
        paired=True, n_resamples=4000, method="percentile", rng=1, vectorized=True,
    )  # fmt: skip
    low, high = expected.confidence_interval
    assert found.value == pytest.approx(TOTAL.sum() / WEIGHT.sum(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.n == round(WEIGHT.sum())


def test_the_spread_of_draws_is_the_analytic_error_of_a_ratio():
    """Delta method: sd of the residuals t - r w, over the mean weight, over the root of n."""
    table = merged(UNITS, TOTAL, WEIGHT)
    r = TOTAL.sum() / WEIGHT.sum()
    error = (TOTAL - r * WEIGHT).std(ddof=1) / WEIGHT.mean() / np.sqrt(N)
    assert redrawn(table, 4000).std() == pytest.approx(error, rel=0.05)


def test_perplexity_is_exp_of_the_mean_and_of_its_ends():
    loss = Sample("loss", UNITS, TOTAL, WEIGHT).number()
    perplexity = Sample("perplexity", UNITS, TOTAL, WEIGHT, scale="exp").number()
    assert perplexity.value == pytest.approx(math.exp(loss.value), rel=1e-12)
    # exp bends between neighbouring draws, of which an end is a mean
    ends = (math.exp(loss.low), math.exp(loss.high))
    assert (perplexity.low, perplexity.high) == pytest.approx(ends, rel=1e-4)
    assert scaled(0.0, "exp") == 1


def test_entries_of_a_unit_are_added_up_and_drawn_together():
    units = ["b", "a", "b", "c"]
    table = merged(units, np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 2, 0]))
    assert table.units == ("a", "b")
    assert table.total.tolist() == [2, 4] and table.weight.tolist() == [1, 3]
    copies = Sample("x", UNITS * 2, np.tile(TOTAL, 2), np.tile(WEIGHT, 2)).number()
    once = Sample("x", UNITS, TOTAL, WEIGHT).number()
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), rel=1e-12)


def test_clones_widen_an_interval():
    """Ten identical antibodies of each of 40 clones are 40 observations, no 400."""
    values = np.repeat(RNG.standard_normal(40), 10)
    alone, clones = (
        Sample("x", units, values, np.ones(N)).number()
        for units in (UNITS, [str(i // 10) for i in range(N)])
    )
    widths = [number.high - number.low for number in (clones, alone)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.15)


def test_draws_depend_on_units_alone():
    a, b = ("x", "y", "z"), ("x", "y", "w")
    draw_counts.cache_clear()
    first = draw_counts(a, 50).copy()
    draw_counts.cache_clear()
    np.testing.assert_array_equal(draw_counts(a, 50), first)
    assert not np.array_equal(draw_counts(b, 50), first)
    assert (first.sum(1) == 3).all() and first.mean() == 1
    order = RNG.permutation(N)
    shuffled = Sample("x", [UNITS[i] for i in order], TOTAL[order], WEIGHT[order]).number()
    assert shuffled == Sample("x", UNITS, TOTAL, WEIGHT).number()


def test_units_are_drawn_as_often_as_chance_has_it():
    counts = draw_counts(tuple(UNITS), 2000)
    assert counts.mean(0) == pytest.approx(np.ones(N), abs=5 / math.sqrt(2000))
    assert counts.var() == pytest.approx(1 - 1 / N, rel=0.02)


def test_a_quotient_is_paired():
    noise = 0.01 * RNG.standard_normal(N) * WEIGHT
    a = Sample("loss", UNITS, 1.5 * TOTAL + noise, WEIGHT)
    b = Sample("loss", UNITS, TOTAL, WEIGHT)
    found = quotient(a, b)
    assert found.value == pytest.approx(1.5 + noise.sum() / TOTAL.sum(), rel=1e-9)
    assert found.low < 1.5 < found.high and found.high - found.low < 0.005
    same = quotient(b, b)
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_what_is_not_defined_is_nan():
    nothing = Sample("x", [], np.zeros(0), np.zeros(0)).number()
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and nothing.n == 0
    single = Sample("x", ["u"], np.array([3.0]), np.array([2.0])).number()
    assert single.value == 1.5 and math.isnan(single.low) and math.isnan(single.high)
    assert math.isnan(ratio(1.0, 0.0)) and all(map(math.isnan, interval(np.array([np.nan]))))


def test_an_interval_is_of_the_finite_draws():
    values = np.array([np.nan, *np.arange(101.0)])
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(values, level=0.5) == pytest.approx((25, 75))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 samples of 80 antibodies of unequal weight around a mean of 1."""
    rng, held = np.random.default_rng(8), 0
    units = [str(i) for i in range(80)]
    for _ in range(300):
        weight = rng.integers(1, 10, 80).astype(float)
        number = Sample(
            "x", units, weight * (1 + 0.5 * rng.standard_normal(80)), weight
        ).number(400)  # fmt: skip
        held += number.low <= 1 <= number.high
    assert 0.90 <= held / 300 <= 0.98


def test_the_welch_interval_is_that_of_scipy():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0, 0.1, 3), rng.normal(1, 3.0, 4)
    error, degrees = welch([b.std(ddof=1), a.std(ddof=1)], [4, 3])
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert (b.mean() - a.mean()) / error == pytest.approx(expected.statistic)
    assert degrees == pytest.approx(expected.df)
    assert np.isnan(welch([math.nan, 0.1], [1, 3])[0])


@pytest.mark.parametrize("apart", [1e-17, 1e-15, 1e-12])
def test_seeds_that_differ_by_rounding_alone_have_an_interval(apart):
    """Antibodies that are all alike: draws do not vary, and the ends are the value."""
    low, high = blurred(np.full(1000, 0.3), apart, 3)
    assert (low, high) == pytest.approx((0.3, 0.3), abs=1e-11)
    assert low <= 0.3 <= high


def test_a_correlation_of_several_heads_has_their_error():
    """Heads that learn more or less: the interval covers what the mean of many heads would be."""
    rng = np.random.default_rng(7)

    def heads(n, count):
        y = rng.standard_normal(n)
        learned = np.exp(0.3 * rng.standard_normal((count, 1)))
        return learned * y + rng.standard_normal((count, n)), y

    x, y = heads(4000, 400)
    truth = np.mean([stats.spearmanr(each, y)[0] for each in x])
    units = [str(i) for i in range(80)]
    inside = {"heads": 0, "proteins alone": 0}
    for _ in range(100):
        x, y = heads(80, 3)
        found = spearman_number(x, y, units, {}, 100)
        assert found.value == pytest.approx(np.mean([stats.spearmanr(each, y)[0] for each in x]))
        inside["heads"] += found.low <= truth <= found.high
        alone = spearman_number(x[0], y, units, {}, 100)
        inside["proteins alone"] += alone.low <= truth <= alone.high
    assert inside["heads"] >= 92 and inside["proteins alone"] < 80


def test_a_mean_of_the_correlations_of_folds():
    rng = np.random.default_rng(0)
    x, folds = rng.standard_normal(60), np.repeat(np.arange(3), 20)
    y = x + rng.standard_normal(60) + 10 * folds  # between folds, where nobody asks, is most of it
    units = [str(i) for i in range(60)]
    found = spearman_of_folds(x, y, units, folds, {"predictor": "a"})
    each = [stats.spearmanr(x[folds == f], y[folds == f])[0] for f in range(3)]
    assert found.value == pytest.approx(np.mean(each)) and found.n == 60
    assert found.metric == "spearman, mean of folds" and found.low < found.value < found.high
    # a fold of one value has no correlation, and no part in the mean
    y[folds == 1] = 3.0
    assert spearman_of_folds(x, y, units, folds, {}, 10).value == pytest.approx(
        np.mean([each[0], each[2]])
    )


def test_a_correlation_with_a_constant_is_told():
    x, y, units = np.arange(6.0), np.array([1.0, 3, 2, 5, 4, 6]), list("abcdef")
    found = [
        spearman_number(values, y, units, {"predictor": name}, 20)
        for name, values in (("model", x), ("mean", np.ones(6)))
    ]
    assert found[0].value == pytest.approx(stats.spearmanr(x, y).statistic)
    (note,) = why_undefined(found)
    assert note.startswith("spearman of mean is not defined: all predictions, or all of what")
