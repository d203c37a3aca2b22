"""Bootstrap, profiles, noise: against exact statistics where they exist, else simulation."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from moe_ablm.errors import UserError
from moe_ablm.scaling.fit import fit_law, prepare
from moe_ablm.scaling.identify import scores
from moe_ablm.scaling.inputs import Centre
from moe_ablm.scaling.laws import with_gradient
from moe_ablm.scaling.laws_dense import Chinchilla
from moe_ablm.scaling.noise import delta_sensitivity, lack_of_fit, pure_error
from moe_ablm.scaling.profile_likelihood import Walk, critical_root, likelihood_scale, profiles
from moe_ablm.scaling.quantities import quantities
from moe_ablm.scaling.resampling import bootstrap, bootstrap_intervals, resample, resample_rows
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Question, analyse
from moe_ablm.scaling.solver import minimise

TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
FLOPS = 1e22


def grid(side=8):
    n, d = np.meshgrid(np.geomspace(4e7, 1e10, side), np.geomspace(5e8, 3e11, side))
    return {"params": n.ravel(), "tokens": d.ravel()}


def simulate(sd=2e-3, seed=0, side=8, copies=1):
    table = {k: np.repeat(v, copies) for k, v in grid(side).items()}
    loss = Chinchilla().predict(TRUTH, table)
    loss = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(loss.size))
    return Runs(table | {"loss": loss}, tuple(f"row {i}" for i in range(loss.size)))


def test_the_bootstrap_depends_on_its_seed_only():
    made = fit_law(simulate())
    one, again, other = bootstrap(made, 300, 7), bootstrap(made, 300, 7), bootstrap(made, 300, 8)
    np.testing.assert_array_equal(one.theta, again.theta)
    assert not np.array_equal(one.theta, other.theta)
    assert one.converged.all()


def test_the_number_of_threads_changes_nothing():
    made = fit_law(simulate(side=5))
    weights, _ = resample(np.arange(25), 600, seed=0)  # three chunks
    problem = replace(made.problem, weights=weights)
    start = np.repeat(made.theta[None], 600, axis=0)
    one, three = (minimise(problem, start, workers=w) for w in (1, 3))
    np.testing.assert_array_equal(one.theta, three.theta)


def test_every_draw_is_the_fit_of_its_resampled_runs():
    """The batched refit equals an ordinary fit of a table with the drawn rows repeated."""
    runs = simulate(side=5)
    made = fit_law(runs, huber_delta=2e-3)
    weights, _ = resample(runs.cells(), 3, seed=5)
    boot = bootstrap(made, 3, seed=5)
    for theta, weight in zip(boot.theta, weights, strict=True):
        again = fit_law(runs.take(np.repeat(np.arange(25), weight.astype(int))), huber_delta=2e-3)
        natural = made.law.shift(theta, made.centre)
        assert natural[3] == pytest.approx(again.coefficients["alpha"], rel=1e-5)
        assert np.exp(natural[1]) == pytest.approx(again.coefficients["A"], rel=1e-4)


def test_resampling_draws_whole_runs_and_keeps_replicated_cells():
    weights, scheme = resample(np.arange(10), 200, seed=0)
    assert scheme == "runs" and np.all(weights.sum(axis=1) == 10)
    assert weights.max() > 1 and (weights == 0).any()
    cells = np.repeat(np.arange(5), 12)
    weights, scheme = resample(cells, 200, seed=0)
    assert scheme == "runs within cells"
    for cell in range(5):
        assert np.all(weights[:, cells == cell].sum(axis=1) == 12)


@pytest.mark.parametrize("copies", [1, 2, 3, 12])
def test_the_mean_of_resampled_runs_varies_as_the_mean_of_runs(copies):
    """The textbook variance of a mean of 60 values, whatever cells they are in."""
    values = np.random.default_rng(0).standard_normal(60)
    weights, _ = resample(np.repeat(np.arange(60 // copies), copies), 4000, seed=0)
    spread = (weights @ values / 60).std()
    assert spread == pytest.approx(values.std() / np.sqrt(60), rel=0.12)


def linear_runs(seed=0):
    """Clark's law with E_start and E_max fixed is a linear model of ln L."""
    rng = np.random.default_rng(seed)
    n = np.tile(np.geomspace(1e7, 1e9, 5), 4)
    experts = np.repeat([1.0, 4.0, 16.0, 64.0], 5)
    fixed = {"E_start[x]": 2.0, "E_max_over_E_start[x]": 100.0}
    e_hat = 1 / (1 / (experts - 1 + 1 / (1 / 2 - 1 / 200)) + 1 / 200)
    z, w = np.log10(n), np.log10(e_hat)
    design = np.stack([z, w, z * w, np.ones(20)], axis=1)
    y = design @ [-0.08, -0.12, 0.011, 1.1] + 2e-3 * rng.standard_normal(20)
    columns = {
        "params": n,
        "experts": experts,
        "router": np.where(experts > 1, "x", "dense"),
        "loss": 10**y,
    }
    return Runs(columns, tuple(map(str, range(20)))), fixed, design, y


def test_profiles_of_a_linear_law_are_students_intervals():
    runs, fixed, design, y = linear_runs()
    made = fit_law(runs, "moe_clark", huber_delta=np.inf, fixed=fixed)
    solution, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = rss[0] / 16
    inverse = np.linalg.inv(design.T @ design)
    robust = inverse @ (design.T * ((y - design @ solution) ** 2) @ design) @ inverse * 20 / 16
    t = stats.t.ppf(0.975, 16)
    found = {p.quantity.name: p for p in profiles(made)}
    for k, name in enumerate("abcd"):
        p = found[f"{name}[x]"]
        # the wider of the classical and the heteroscedasticity-consistent error
        half = t * np.sqrt(max(variance * inverse[k, k], robust[k, k]))
        assert p.estimate == pytest.approx(solution[k], rel=1e-6)
        assert p.high - p.estimate == pytest.approx(half, rel=2e-3)
        assert p.estimate - p.low == pytest.approx(half, rel=2e-3)


def test_bootstrap_errors_of_a_linear_law_are_near_the_classical_ones():
    runs, fixed, design, y = linear_runs()
    made = fit_law(runs, "moe_clark", huber_delta=np.inf, fixed=fixed)
    boot = bootstrap(made, 1500, seed=0)
    solution, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
    expected = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * rss[0] / 16)
    found = boot.theta.std(axis=0)[:4]
    # theta is centred, so only the slopes a and c are the same numbers
    assert found[0] == pytest.approx(expected[0], rel=0.5)
    assert found[2] == pytest.approx(expected[2], rel=0.5)


def batch(data_sets, sd, delta, side=6, seed=0):
    """Fits to many simulated data sets at once: everything that coverage studies need."""
    law, table = Chinchilla(), grid(side)
    clean = law.predict(TRUTH, table)
    noise = np.random.default_rng(seed).standard_normal((data_sets, clean.size))
    log_loss = np.log(clean) + sd * noise
    runs = Runs(table | {"loss": clean}, tuple(map(str, range(clean.size))))
    setup = prepare(law, runs, delta, {})
    natural = np.array([p.internal(TRUTH[p.name]) for p in law.parameters])
    truth = law.shift(natural, Centre(-setup.centre.log_params, -setup.centre.log_tokens))
    problem = replace(setup.problem, log_loss=log_loss)
    ends = minimise(problem, np.repeat(truth[None], data_sets, axis=0))
    assert ends.converged.all()
    made = fit_law(runs, huber_delta=delta, target={"flops": FLOPS})
    return setup, problem, ends, truth, quantities(made)


def profile_coverage(data_sets, sd, delta):
    setup, problem, ends, truth, wanted = batch(data_sets, sd, delta)
    functions = tuple(with_gradient(q.function) for q in wanted)
    values = [f(ends.theta) for f in functions]
    estimate = np.stack([v for v, _ in values], axis=1)
    scale, error = np.empty_like(estimate), np.empty_like(estimate)
    for i in range(data_sets):
        found = scores(replace(problem, log_loss=problem.log_loss[i]), ends.theta[i])
        for j, (_, gradient) in enumerate(values):
            scale[i, j] = likelihood_scale(found, gradient[i])
            error[i, j] = np.sqrt(gradient[i] @ found.covariance @ gradient[i])
    rows = 2 * len(wanted)
    walk = Walk(
        problem=replace(problem, log_loss=np.repeat(problem.log_loss, rows, axis=0)),
        functions=functions,
        which=np.tile(np.repeat(np.arange(len(wanted)), 2), data_sets),
        side=np.tile([-1.0, 1.0], data_sets * len(wanted)),
        theta=np.repeat(ends.theta, rows, axis=0),
        value=np.repeat(ends.value, rows),
        estimate=np.repeat(estimate.ravel(), 2),
        error=np.repeat(error.ravel(), 2),
        scale=np.repeat(scale.ravel(), 2),
        goal=critical_root(setup.problem, 0.95),
    )
    ends_found = walk.ends()[0].reshape(data_sets, len(wanted), 2)
    low = np.where(np.isnan(ends_found[..., 0]), -np.inf, ends_found[..., 0])
    high = np.where(np.isnan(ends_found[..., 1]), np.inf, ends_found[..., 1])
    true = np.array([q.function(truth[None])[0] for q in wanted])
    inside = ((low <= true) & (true <= high)).mean(axis=0)
    return dict(zip([q.name for q in wanted], inside, strict=True))


def test_profile_intervals_cover_the_truth_in_200_data_sets():
    covered = profile_coverage(200, sd=2e-3, delta=2e-3)
    assert set(covered) >= {"E", "A", "B", "alpha", "beta", "N_opt", "exponent_ratio"}
    for name, share in covered.items():
        assert 0.92 <= share <= 0.98, (name, share)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [5e-4, 2e-3, np.inf])
def test_profile_intervals_cover_the_truth_in_1000_data_sets(delta):
    for name, share in profile_coverage(1000, sd=2e-3, delta=delta).items():
        assert 0.92 <= share <= 0.98, (name, share)


def bootstrap_coverage(data_sets, draws):
    _, problem, ends, truth, wanted = batch(data_sets, sd=2e-3, delta=2e-3, side=8)
    cells = np.arange(problem.log_loss.shape[1])
    weights, _ = resample(cells, data_sets * draws, seed=1)
    refits = minimise(
        replace(problem, log_loss=np.repeat(problem.log_loss, draws, axis=0), weights=weights),
        np.repeat(ends.theta, draws, axis=0),
    )
    out = {}
    for q in wanted:
        values = q.function(refits.theta).reshape(data_sets, draws)
        low, high = np.percentile(values, [2.5, 97.5], axis=1)
        true = q.function(truth[None])[0]
        out[q.name] = float(np.mean((low <= true) & (true <= high)))
    return out


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_truth_in_200_data_sets():
    for name, share in bootstrap_coverage(200, 300).items():
        assert 0.92 <= share <= 0.98, (name, share)


def test_profile_of_a_derived_quantity_meets_that_of_the_coefficient_it_is():
    """alpha and a derived quantity that equals alpha have one profile."""
    made = fit_law(simulate(), target={"flops": FLOPS})
    found = {p.quantity.name: p for p in profiles(made)}
    n, d = found["N_opt"], found["D_opt"]
    # N D = C / 6, so the ends of one are those of the other
    assert n.low + d.high == pytest.approx(np.log(FLOPS / 6), abs=0.02)
    assert n.high + d.low == pytest.approx(np.log(FLOPS / 6), abs=0.02)


def test_a_profile_that_never_closes_is_said_to_be_open():
    """Few repeats cannot tell how fast repeats lose their worth."""
    table = grid(6)
    table["unique_tokens"] = table["tokens"] / np.where(np.arange(36) % 2, 1.0, 1.5)
    loss = Chinchilla().predict(TRUTH, table)
    loss = loss * np.exp(2e-3 * np.random.default_rng(1).standard_normal(36))
    runs = Runs(table | {"loss": loss}, tuple(map(str, range(36))))
    question = Question("data_constrained_b1", fixed=TRUTH, draws=100)
    made = analyse(runs, question).fit
    assert not made.identifiable["R_D"]
    assert made.status in ("not_identifiable", "at_bound")
    ends = {i.method: i for i in made.intervals["R_D"]}
    assert None in (ends["profile"].low, ends["profile"].high)


def test_an_exact_fit_has_no_interval():
    runs = simulate(side=8).take(np.array([0, 7, 30, 56, 63]))
    made = analyse(runs, Question("chinchilla", draws=100)).fit
    assert made.status == "exact" and not made.intervals


def test_intervals_name_their_method_and_order():
    made = fit_law(simulate())
    found = bootstrap_intervals(made, bootstrap(made, 200, 0))
    for name in TRUTH:
        (interval,) = found[name]
        assert interval.method == "bootstrap" and interval.level == 0.95
        assert interval.low < made.coefficients[name] < interval.high
        assert interval.se > 0


def test_seed_noise_is_the_pooled_sd_of_replicates():
    runs = simulate(sd=3e-3, side=4, copies=3)
    groups = np.log(runs["loss"]).reshape(16, 3)
    sd, freedom = pure_error(runs)
    assert freedom == 32
    assert sd == pytest.approx(np.sqrt(groups.var(axis=1, ddof=1).mean()))
    assert pure_error(simulate(side=4))[1] == 0


def test_lack_of_fit_sees_a_wrong_law_and_not_a_right_one():
    right = fit_law(simulate(sd=2e-3, side=5, copies=2), huber_delta=np.inf)
    assert lack_of_fit(right).p_value > 0.01
    runs = simulate(sd=2e-3, side=5, copies=2)
    bent = runs["loss"] * (1 + 0.03 * np.sin(3 * np.log(runs["params"])))
    wrong = fit_law(Runs(dict(runs.columns) | {"loss": bent}, runs.source), huber_delta=np.inf)
    assert lack_of_fit(wrong).p_value < 1e-6
    assert lack_of_fit(fit_law(simulate())) is None


def test_delta_sensitivity_runs_from_absolute_deviations_to_least_squares():
    made = fit_law(simulate(sd=5e-3), huber_delta=1e-3)
    rows = delta_sensitivity(made)
    deltas = [delta for delta, _, _ in rows]
    assert deltas == sorted(deltas) and np.isinf(deltas[-1])
    sums = [total for _, _, total in rows]
    assert sums[0] == min(sums)  # the smallest delta minimises the sum of |residual|
    least_squares = fit_law(made.runs, huber_delta=np.inf)
    assert rows[-1][1]["alpha"] == pytest.approx(least_squares.coefficients["alpha"], rel=1e-6)
    same = next(values for delta, values, _ in rows if delta == 1e-3)
    assert same["alpha"] == pytest.approx(made.coefficients["alpha"], rel=1e-9)


def test_a_bootstrap_end_that_is_a_bound_is_open():
    table = grid(6)
    table["unique_tokens"] = table["tokens"] / np.where(np.arange(36) % 2, 1.0, 1.5)
    loss = Chinchilla().predict(TRUTH, table)
    loss = loss * np.exp(2e-3 * np.random.default_rng(1).standard_normal(36))
    runs = Runs(table | {"loss": loss}, tuple(map(str, range(36))))
    made = fit_law(runs, "data_constrained_b1", fixed=TRUTH)
    boot = bootstrap(made, 200)
    assert boot.at_high["R_D"] > 0.025
    found = bootstrap_intervals(made, boot)["R_D"][0]
    assert found.high is None and found.se is None and "upper bound" in found.note


def test_too_few_draws_are_said_and_give_no_interval():
    made = analyse(simulate(side=5), Question("chinchilla", draws=5))
    assert made.boot is None and "5 of 5 bootstrap draws" in " ".join(made.fit.notes)
    assert (made.fit.draws, made.fit.draws_lost) == (5, 0)
    assert [i.method for i in made.fit.intervals["alpha"]] == ["profile"]


def test_a_bootstrap_that_cannot_fit_in_memory_is_refused():
    with pytest.raises(UserError, match="use at most 4000000"):
        bootstrap(fit_law(simulate(side=5)), 10**9)


def checkpoints(seed=0, runs=20, steps=8, between=0.02, within=1e-3):
    """Runs of one size each, eight checkpoints a run that err alike."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(4e7, 1e10, runs), steps)
    d = np.tile(np.geomspace(1e9, 3e11, steps), runs)
    run = np.repeat([f"r{i:02d}" for i in range(runs)], steps)
    loss = Chinchilla().predict(TRUTH, {"params": n, "tokens": d})
    noise = np.repeat(between * rng.standard_normal(runs), steps)
    loss = loss * np.exp(noise + within * rng.standard_normal(n.size))
    columns = {"params": n, "tokens": d, "loss": loss}
    return columns, run


def test_errors_of_checkpoints_are_those_of_whole_runs():
    """The spread of alpha over simulated tables is what the clustered errors say."""
    estimates, clustered, naive = [], [], []
    for seed in range(40):
        columns, run = checkpoints(seed)
        source = tuple(map(str, range(run.size)))
        made = fit_law(Runs(columns | {"run": run}, source), huber_delta=np.inf)
        estimates.append(made.coefficients["alpha"])
        clustered.append(made.standard_errors["alpha"])
        naive.append(fit_law(Runs(columns, source), huber_delta=np.inf).standard_errors["alpha"])
    true = np.std(estimates, ddof=1)
    assert np.median(clustered) == pytest.approx(true, rel=0.35)
    assert np.median(naive) < 0.6 * true


def test_a_run_is_drawn_held_out_and_counted_with_all_its_checkpoints():
    columns, run = checkpoints(between=0.02)
    runs = Runs(columns | {"run": run}, tuple(map(str, range(run.size))))
    weights, scheme = resample_rows(runs, 50, seed=0)
    assert np.all(weights.reshape(50, 20, 8) == weights.reshape(50, 20, 8)[:, :, :1])
    assert "20 with 160 checkpoints" in scheme
    made = fit_law(runs, huber_delta=np.inf)
    boot, wide = bootstrap(made, 200), fit_law(Runs(columns, runs.source), huber_delta=np.inf)
    spread, alone = boot.theta[:, 3].std(), bootstrap(wide, 200).theta[:, 3].std()
    assert spread > 1.5 * alone
    (profile,) = profiles(made, names=["alpha"])
    assert profile.high - profile.low > 1.5 * np.ptp(profiles_of(wide))


def profiles_of(made):
    (profile,) = profiles(made, names=["alpha"])
    return [profile.low, profile.high]


def test_seed_noise_of_checkpoints_has_the_freedom_of_their_runs():
    """Two seeds of ten sizes, eight checkpoints: ten degrees of freedom and not eighty."""
    columns, run = checkpoints(runs=20)
    columns["params"] = np.repeat(np.geomspace(4e7, 1e10, 10), 16)
    runs = Runs(columns | {"run": run}, tuple(map(str, range(run.size))))
    assert pure_error(runs)[1] == 10
    assert pure_error(Runs(columns, runs.source))[1] == 80


def test_what_is_derived_from_an_unidentified_coefficient_says_so():
    """One number of tokens: beta, B and E are anything, and so is the best size."""
    n = np.geomspace(5e7, 5e8, 7)
    rng = np.random.default_rng(0)
    columns = {"params": n, "tokens": np.full(7, 4.4e9)}
    loss = Chinchilla().predict(TRUTH, columns) * np.exp(1e-3 * rng.standard_normal(7))
    runs = Runs(columns | {"loss": loss}, tuple(map(str, range(7))))
    made = analyse(runs, Question("chinchilla", target={"flops": FLOPS}, draws=60)).fit
    for name in ("exponent_ratio", "N_opt", "D_opt"):
        assert made.derived_verdicts[name].startswith("not identified"), name
    for name in ("beta", "B", "N_opt"):  # an interval of draws would be that of their starts
        assert "bootstrap" not in {i.method for i in made.intervals.get(name, ())}, name
    good = analyse(simulate(), Question("chinchilla", target={"flops": FLOPS}, draws=60)).fit
    assert set(good.derived_verdicts.values()) == {"identified"}


def test_a_positive_coefficient_has_the_error_of_its_log():
    made = fit_law(simulate(sd=5e-3))
    boot = bootstrap(made, 200, 0)
    found = bootstrap_intervals(made, boot)
    natural = made.law.shift(boot.theta, made.centre)[:, 2]
    assert found["B"][0].se_log == pytest.approx(natural.std(ddof=1))
    assert found["alpha"][0].se_log is None


def test_errors_with_checkpoints_are_those_of_the_jackknife_over_runs():
    """Leaving out each run in turn and fitting anew; Efron's variance of the 20 fits."""
    n = np.repeat(np.geomspace(4e7, 1e10, 10), 16)
    d = np.tile(np.geomspace(1e9, 3e11, 8), 20)
    run = np.repeat(np.arange(20), 8)
    rng = np.random.default_rng(3)
    noise = 4e-3 * rng.standard_normal(20)[run] + 5e-4 * rng.standard_normal(160)
    loss = (1.8 + 480 * n**-0.35 + 2100 * d**-0.37) * np.exp(noise)
    columns = {"params": n, "tokens": d, "loss": loss, "run": run.astype(str)}
    runs = Runs(columns, tuple(map(str, range(160))))
    made = fit_law(runs, "chinchilla", huber_delta=np.inf)
    names = ("E", "alpha", "beta")
    left = [
        fit_law(runs.take(run != g), "chinchilla", huber_delta=np.inf, start=made.coefficients)
        for g in range(20)
    ]
    values = np.array([[f.coefficients[name] for name in names] for f in left])
    jackknife = np.sqrt(19 / 20 * np.sum((values - values.mean(axis=0)) ** 2, axis=0))
    ours = [made.standard_errors[name] for name in names]
    np.testing.assert_allclose(ours, jackknife, rtol=0.15)


def test_delta_is_the_misfit_where_that_is_far_above_seed_noise():
    """A law that is wrong by 2 % (a wave in N), seeds that differ by .04 %."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1e10, 7), np.geomspace(1e9, 3e11, 7)))
    wave = 0.02 * np.sin(3 * np.log(n)) + 0.02 * np.cos(2 * np.log(d))
    n, d, wave = np.tile(n, 2), np.tile(d, 2), np.tile(wave, 2)
    noise = 4e-4 * np.random.default_rng(0).standard_normal(n.size)
    loss = (1.8 + 480 * n**-0.35 + 2100 * d**-0.37) * np.exp(wave + noise)
    runs = Runs({"params": n, "tokens": d, "loss": loss}, tuple(map(str, range(n.size))))
    made = analyse(runs, Question("chinchilla", draws=0)).fit
    assert 0.01 < made.huber_delta < 0.04 and made.delta_source == "misfit of the law"
    assert any("times the seed sd" in note for note in made.notes)
    given = analyse(runs, Question("chinchilla", huber_delta=4e-4, draws=0)).fit
    assert given.huber_delta == 4e-4 and any("least absolute" in note for note in given.notes)
