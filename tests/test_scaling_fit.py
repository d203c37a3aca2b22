"""Fits: known coefficients come back, faults of the design are named, files reload exactly."""

import json

import numpy as np
import pytest

from moe_ablm.errors import UserError
from moe_ablm.scaling import load
from moe_ablm.scaling.catalogue import SMOOTH
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.identify import scores
from moe_ablm.scaling.profile_likelihood import critical_root, profiles
from moe_ablm.scaling.resampling import bootstrap, resample
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Question, analyse
from moe_ablm.scaling.solver import _conditional

DENSE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
TRUTH = {
    "chinchilla": DENSE,
    "data_constrained_b1": DENSE | {"R_D": 12.0, "R_N": 4.0},
    "data_constrained_b2": DENSE | {"P": 0.05, "delta": 0.6, "kappa": 0.7},
    "data_constrained_b3": DENSE | {"P": 0.002},
    "moe_clark": {
        **{"a[x]": -0.08, "b[x]": -0.12, "c[x]": 0.011, "d[x]": 1.1},
        **{"E_start[x]": 2.0, "E_max_over_E_start[x]": 150.0},
    },
    "moe_granularity": {
        **{"c": 0.5, "g": 20.0, "a": 18.0, "b": 30.0},
        **{"gamma": 0.6, "alpha": 0.12, "beta": 0.15},
    },
    "moe_sparsity": {
        **{"a": 200.0, "b": 900.0, "c": 0.3, "d": 40.0, "e": 1.2},
        **{"alpha": 0.30, "beta": 0.32, "lambda": -0.7, "delta": 0.3, "gamma": 0.25},
    },
    "joint": DENSE
    | {"P": 0.02, "delta": 0.8, "kappa": 0.5, "mu": 0.25, "E_max": 100.0, "tau": 0.4}
    | {"v[x]": 0.3},
}


def grid(name):
    """A design that identifies the law: inputs in natural units."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1e10, 6), np.geomspace(1e9, 3e11, 6)))
    table = {"params": n, "tokens": d}
    if name.startswith("data") or name == "joint":
        table = {k: np.tile(v, 3) for k, v in table.items()}
        table["unique_tokens"] = table["tokens"] / np.repeat([1.0, 6.0, 40.0], n.size)
    if name == "moe_granularity":
        table = {k: np.tile(v, 4) for k, v in table.items()}
        table["granularity"] = np.repeat([1.0, 2.0, 4.0, 16.0], n.size)
    if name == "moe_sparsity":
        table = {k: np.tile(v, 4) for k, v in table.items()}
        table["sparsity"] = np.repeat([0.0, 0.5, 0.9, 0.97], n.size)
    if name in ("moe_clark", "joint"):
        size = table["params"].size
        experts = np.repeat([1.0, 4.0, 16.0, 64.0, 256.0], size)
        table = {k: np.tile(v, 5) for k, v in table.items()} | {"experts": experts}
        table["router"] = np.where(experts > 1, "x", "dense")
        table["total_params"] = table["params"] * (1 + 0.5 * (experts - 1))
    return table


def simulate(name, sd=0.0, seed=0, table=None):
    table = grid(name) if table is None else table
    law = SMOOTH[name](("x",)) if name in ("moe_clark", "joint") else SMOOTH[name]()
    values = TRUTH[name] | dict(law.defaults)
    inputs = dict(table)
    if name == "moe_clark":
        inputs["router"] = np.full(table["params"].size, "x")
    loss = law.predict(values, inputs)
    loss = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(loss.size))
    return Runs(table | {"loss": loss}, tuple(f"row {i + 2}" for i in range(loss.size)))


def test_held_parameters_that_runs_cannot_tell_apart_do_not_stop_the_others():
    """Of two inverse Hessians the first has two held parameters that are one: a singular block."""
    inverse = np.array([[[2.0, 1, 1], [1, 1, 1], [1, 1, 1]], [[2, 1, 0], [1, 1, 0], [0, 0, 4]]])
    newton, at = np.array([[1.0, 2, 2], [1, 2, 3]]), np.array([[0.0, 0.5, 0.5], [0, 0.5, 1]])
    found = _conditional(newton, inverse, np.array([[False, True, True]] * 2), at)
    expected = [
        n[0] + m[0, 1:] @ np.linalg.pinv(m[1:, 1:]) @ (a - n)[1:]
        for m, n, a in zip(inverse, newton, at, strict=True)
    ]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 1:], at[:, 1:])


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_known_coefficients_come_back_without_noise(name):
    made = fit_law(simulate(name), name)
    assert made.objective < 1e-12
    for key, value in TRUTH[name].items():
        assert made.coefficients[key] == pytest.approx(value, rel=1e-3), key


@pytest.mark.parametrize("name", ["chinchilla", "data_constrained_b2", "joint"])
def test_noise_moves_coefficients_by_their_standard_errors(name):
    made = fit_law(simulate(name, sd=2e-3), name, huber_delta=2e-3)
    assert made.status == "converged"
    for key, value in TRUTH[name].items():
        assert abs(made.coefficients[key] - value) < 4 * made.standard_errors[key], key


def test_every_start_ends_in_the_same_minimum():
    runs = simulate("chinchilla", sd=5e-3)
    best = fit_law(runs).objective
    rng = np.random.default_rng(0)
    for alpha, beta in rng.uniform(0.02, 2.0, (12, 2)):
        again = fit_law(runs, start={"alpha": alpha, "beta": beta})
        assert again.objective == pytest.approx(best, rel=1e-9)


def test_the_objective_is_a_sum():
    runs = simulate("chinchilla", sd=5e-3)
    twice = Runs(
        {k: np.concatenate([v, v]) for k, v in runs.columns.items()}, runs.source + runs.source
    )
    once, double = fit_law(runs, huber_delta=1e-3), fit_law(twice, huber_delta=1e-3)
    assert double.objective == pytest.approx(2 * once.objective, rel=1e-9)
    residual = np.log(runs["loss"]) - np.log(once.predict(**runs.inputs()))
    size = np.abs(residual)
    huber = np.where(size < 1e-3, 0.5 * size**2, 1e-3 * (size - 5e-4)).sum()
    assert once.objective == pytest.approx(huber, rel=1e-9)


def test_least_squares_agrees_with_scipy():
    from scipy.optimize import least_squares

    runs = simulate("chinchilla", sd=5e-3)
    made = fit_law(runs, huber_delta=np.inf)
    n, d, y = runs["params"], runs["tokens"], np.log(runs["loss"])

    def residual(p):
        e, a, b, alpha, beta = p
        return np.log(np.exp(e) + np.exp(a) * n**-alpha + np.exp(b) * d**-beta) - y

    start = [np.log(1.5), np.log(300.0), np.log(900.0), 0.3, 0.3]
    other = least_squares(residual, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, x_scale="jac")
    assert made.objective == pytest.approx(other.cost, rel=1e-8)
    assert made.coefficients["beta"] == pytest.approx(other.x[4], rel=1e-4)


def test_equal_total_tokens_are_called_unidentifiable():
    table = {"params": np.geomspace(8e6, 6.5e8, 8), "tokens": np.full(8, 2e10)}
    made = fit_law(simulate("chinchilla", sd=1e-3, table=table))
    assert made.status == "not_identifiable"
    assert not made.identifiable["beta"]
    assert not made.identifiable["B"] and not made.identifiable["E"]
    assert "design does not move" in made.verdicts["beta"]
    assert made.condition > 1e6


def test_one_model_size_does_not_identify_its_exponent():
    table = {"params": np.full(8, 1e8), "tokens": np.geomspace(1e9, 3e11, 8)}
    made = fit_law(simulate("chinchilla", sd=1e-3, table=table))
    assert not made.identifiable["alpha"] and made.identifiable["beta"]


def test_as_many_runs_as_coefficients_is_called_exact():
    table = {k: v[[0, 5, 14, 30, 35]] for k, v in grid("chinchilla").items()}
    made = fit_law(simulate("chinchilla", sd=1e-3, table=table))
    assert made.status == "exact"
    assert not made.standard_errors and not made.intervals
    assert any("exact" in note for note in made.notes)


def test_fewer_runs_than_coefficients_is_an_error():
    table = {k: v[:4] for k, v in grid("chinchilla").items()}
    with pytest.raises(UserError, match="5 coefficients .* only 4 runs"):
        fit_law(simulate("chinchilla", table=table))


def test_a_coefficient_that_wants_to_leave_its_range_is_reported():
    """Repeats as good as new data: R_D has no upper end."""
    runs = simulate("data_constrained_b1")
    n, d = runs["params"], runs["tokens"]
    loss = 1.8 + 480 * n**-0.35 + 2100 * d**-0.37
    made = fit_law(Runs(dict(runs.columns) | {"loss": loss}, runs.source), "data_constrained_b1")
    assert "R_D" in made.at_bounds or "R_N" in made.at_bounds
    assert made.status == "at_bound"
    assert not made.identifiable["R_D"]


@pytest.mark.parametrize("kind", ["constant", "random", "replicates", "rising"])
def test_hopeless_tables_end_in_a_verdict_and_not_in_a_crash(kind, tmp_path):
    rng = np.random.default_rng(0)
    table = grid("chinchilla")
    if kind == "replicates":
        table = {"params": np.full(10, 1e8), "tokens": np.full(10, 1e10)}
    n = table["params"]
    loss = {
        "constant": np.full(n.size, 2.5),
        "random": np.exp(rng.normal(0, 1, n.size)),
        "replicates": rng.normal(2, 0.01, n.size),
        "rising": 2 + 0.1 * np.log(n),
    }[kind]
    runs = Runs(table | {"loss": loss}, tuple(map(str, range(n.size))))
    made = analyse(runs, Question("chinchilla", draws=30)).fit
    assert made.status in ("at_bound", "not_identifiable", "not_converged")
    assert not all(made.identifiable.values())
    json.loads(made.save(tmp_path).read_text())


def test_fixed_coefficients_stay_and_the_others_adapt():
    runs = simulate("chinchilla", sd=2e-3)
    made = fit_law(runs, fixed={"A": 480.0, "alpha": 0.35})
    assert made.coefficients["A"] == 480.0 and made.coefficients["alpha"] == 0.35
    assert made.verdicts["A"] == "fixed" and "A" not in made.identifiable
    assert made.coefficients["B"] == pytest.approx(2100, rel=0.2)
    with pytest.raises(UserError, match="no such coefficient"):
        fit_law(runs, fixed={"gamma": 1.0})
    with pytest.raises(UserError, match="positive"):
        fit_law(runs, fixed={"A": -1.0})


def test_delta_is_the_seed_noise_where_it_is_measured():
    one = simulate("chinchilla", sd=4e-3, seed=1)
    two = simulate("chinchilla", sd=4e-3, seed=2)
    both = Runs(
        {k: np.concatenate([v, two[k]]) for k, v in one.columns.items()}, one.source + two.source
    )
    made = fit_law(both)
    log_loss = np.log(np.stack([one["loss"], two["loss"]]))
    expected = np.sqrt(np.mean((log_loss[0] - log_loss[1]) ** 2 / 2))
    assert made.huber_delta == pytest.approx(expected)
    assert "replicates" in made.delta_source
    assert fit_law(one).huber_delta == 1e-3 and "convention" in fit_law(one).delta_source


def test_mixed_units_are_found_with_the_law_too():
    runs = simulate("data_constrained_b2")
    loss = runs["loss"].copy()
    loss[40] /= np.log(2)
    with pytest.raises(UserError, match="row 42.*bits"):
        fit_law(Runs(dict(runs.columns) | {"loss": loss}, runs.source), "data_constrained_b2")


def test_a_missing_column_is_named():
    runs = simulate("chinchilla")
    with pytest.raises(UserError, match="needs the column 'unique_tokens'.*--columns"):
        fit_law(runs, "data_constrained_b2")


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_a_saved_fit_predicts_exactly_what_it_did(name, tmp_path):
    made = fit_law(simulate(name, sd=2e-3), name, huber_delta=2e-3)
    made.save(tmp_path)
    again = load(tmp_path)
    table = grid(name)
    inputs = {k: v for k, v in table.items() if k != "router"}
    if name == "moe_clark":
        inputs["router"] = np.full(table["params"].size, "x")
    assert dict(again.coefficients) == dict(made.coefficients)
    np.testing.assert_array_equal(again.predict(**inputs), made.predict(**inputs))


def test_fit_json_holds_the_contract(tmp_path):
    made = fit_law(simulate("chinchilla", sd=2e-3), huber_delta=np.inf)
    path = made.save(tmp_path / "deep" / "er")
    saved = json.loads(path.read_text())
    assert saved["schema"] == "moe_ablm.fit/1" and saved["law"] == "chinchilla"
    assert saved["n"] == 36 and saved["huber_delta"] == "inf"
    for key in ("coefficients", "objective", "status", "at_bounds", "identifiable", "intervals"):
        assert key in saved
    assert saved["coefficients"]["A"] == made.coefficients["A"]
    assert [p.name for p in path.parent.iterdir()] == ["fit.json"]  # nothing half-written


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "not a readable fit"),
        ("[1]", "schema"),
        ('{"schema": "moe_ablm.fit/9"}', "schema is 'moe_ablm.fit/9'"),
        ('{"schema": "moe_ablm.fit/1", "law": "chinchilla"}', "damaged"),
    ],
)
def test_a_damaged_fit_is_a_user_error(tmp_path, text, word):
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(UserError, match=word):
        load(tmp_path)


def test_predict_checks_its_inputs():
    made = fit_law(simulate("chinchilla"))
    assert made.predict(params=1e9, tokens=1e10).shape == (1,)
    with pytest.raises(UserError, match="needs tokens"):
        made.predict(params=1e9)
    with pytest.raises(UserError, match="positive"):
        made.predict(params=-1.0, tokens=1e9)
    with pytest.raises(UserError, match="unknown input"):
        made.predict(params=1e9, tokens=1e9, width=3)


def test_frontier_is_the_minimum_at_constant_compute():
    made = fit_law(simulate("chinchilla"), target={"flops": 1e22})
    n = np.geomspace(1e8, 1e12, 40001)
    best = n[np.argmin(made.predict(params=n, tokens=1e22 / 6 / n))]
    assert made.derived["N_opt"] == pytest.approx(best, rel=1e-3)
    assert 6 * made.derived["N_opt"] * made.derived["D_opt"] == pytest.approx(1e22)


def test_best_size_under_repeats_is_the_minimum():
    target = {"tokens": 5e10, "unique_tokens": 1e9}
    made = fit_law(simulate("data_constrained_b2"), "data_constrained_b2", target=target)
    n = np.geomspace(1e6, 1e12, 60001)
    best = n[np.argmin(made.predict(params=n, **target))]
    assert made.derived["N_star"] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.0])
def test_a_coefficient_is_held_only_within_its_range(value):
    with pytest.raises(UserError, match="--fix alpha=.*from 0.001 to 4"):
        fit_law(simulate("chinchilla", sd=1e-3), fixed={"alpha": value})


@pytest.mark.parametrize("target", [{"flops": -1.0}, {"flops": float("nan")}, {"compute": 1e21}])
def test_a_target_is_checked(target):
    with pytest.raises(UserError, match="--target"):
        fit_law(simulate("chinchilla", sd=1e-3), target=target)


def test_a_target_that_gives_nothing_or_an_extrapolation_is_said():
    runs = simulate("chinchilla", sd=1e-3)
    assert "derives nothing" in " ".join(fit_law(runs, target={"params": 1e8}).notes)
    inside = float(np.median(runs.flops()))
    assert not fit_law(runs, target={"flops": inside}).notes
    assert "extrapolation" in " ".join(fit_law(runs, target={"flops": 1e30}).notes)


def test_a_loss_of_the_clark_law_needs_a_router():
    one, other = simulate("moe_clark"), simulate("moe_clark", seed=1)
    columns = {k: np.concatenate([v, other[k]]) for k, v in one.columns.items()}
    columns["router"] = np.repeat(["hash", "topk"], len(one))
    runs = Runs(columns, one.source + other.source)
    at = {"params": 1e8, "experts": 16.0}
    made = fit_law(runs, "moe_clark", target=at)
    assert "loss" not in made.derived
    made = fit_law(runs, "moe_clark", target={**at, "router": "topk"})
    assert made.derived["loss"] == pytest.approx(made.predict(**at, router="topk").item())
    with pytest.raises(UserError, match="hash, topk"):
        fit_law(runs, "moe_clark", target={**at, "router": "soft"})


def test_very_many_runs_take_little_memory():
    import tracemalloc

    n, d = np.meshgrid(np.geomspace(4e7, 1e10, 100), np.geomspace(5e8, 3e11, 80))
    runs = simulate("chinchilla", 2e-3, table={"params": n.ravel(), "tokens": d.ravel()})
    tracemalloc.start()
    made = fit_law(runs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.status == "converged"
    assert made.coefficients["alpha"] == pytest.approx(0.35, abs=0.01)
    assert peak < 300e6  # a square array of 8,000 runs is 512 MB


def without_a_floor(sd=5e-3, seed=0):
    """24 runs of a law with E = 0: half of all resampled tables want less than nothing."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e8, 1e11, 6)))
    loss = 300 * n**-0.30 + 200 * d**-0.26
    loss = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(24))
    return Runs({"params": n, "tokens": d, "loss": loss}, tuple(map(str, range(24))))


def bounded_least_squares(runs, weights=None, fixed_e=None):
    """The least-squares objective of chinchilla by scipy's own bounded solver, best of starts."""
    from scipy.optimize import least_squares

    n, d, y = runs["params"], runs["tokens"], np.log(runs["loss"])
    root = np.ones(n.size) if weights is None else np.sqrt(weights)
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())

    def residual(p):
        e, a, b, alpha, beta = p
        e = e if fixed_e is None else fixed_e
        return root * (np.log(e + a * (n / n0) ** -alpha + b * (d / d0) ** -beta) - y)

    box = ([0, 1e-9, 1e-9, 1e-3, 1e-3], [20, 50, 50, 4, 4])
    return min(
        least_squares(residual, [e, 0.8, 0.8, a, b], bounds=box, xtol=1e-14, ftol=1e-14).cost
        for e, a, b in ((0.05, 0.3, 0.3), (0.5, 0.5, 0.5), (0.01, 0.15, 0.4))
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_coefficient_of_zero_is_found_and_no_resampled_table_is_lost(seed):
    runs = without_a_floor(seed=seed)
    made = fit_law(runs, huber_delta=np.inf)
    assert made.status in ("converged", "at_bound", "not_identifiable")
    assert made.objective == pytest.approx(bounded_least_squares(runs), rel=1e-6)
    boot = bootstrap(made, 200, seed)
    assert boot.converged.all()
    assert 0.05 < boot.at_low.get("E", 0.0) < 0.95
    weights, _ = resample(runs.cells(), 200, seed)
    for row in range(6):
        residual = made.problem.residuals(boot.theta[row : row + 1])[0]
        mine = 0.5 * np.sum(weights[row] * residual**2)
        assert mine == pytest.approx(bounded_least_squares(runs, weights[row]), rel=1e-5)


def test_the_profile_of_a_coefficient_of_zero_ends_where_a_grid_of_fits_says():
    runs = next(r for r in map(without_a_floor_of, range(9)) if "E" in fit_of(r).at_bounds)
    made = fit_of(runs)
    (profile,) = profiles(made, names=["E"])
    interval = profile.interval(0.95)
    assert interval.low is None
    variance = made.objective * 2 / (24 - 5)
    rise = 2 * (bounded_least_squares(runs, fixed_e=interval.high) - made.objective) / variance
    assert np.sqrt(rise) == pytest.approx(critical_root(made.problem, 0.95), rel=0.02)


def without_a_floor_of(seed):
    return without_a_floor(seed=seed)


def fit_of(runs):
    return fit_law(runs, huber_delta=np.inf)


def joint_without_a_penalty():
    """Dense and 8 experts, two seeds, no over-fitting: P = 0 and all that multiplies it."""
    n, u, k = (a.ravel() for a in np.meshgrid(np.geomspace(6e4, 1.3e6, 4), [2e4, 2e5], [1.0, 8.0]))
    n, u, experts = (np.tile(v, 2) for v in (n, u, k))
    short = np.geomspace(6e4, 1.3e6, 4)
    columns = {
        "params": np.concatenate([n, short]),
        "tokens": np.concatenate([np.full(n.size, 1.2e6), np.full(4, 3e5)]),
        "unique_tokens": np.concatenate([u, np.full(4, 3e5)]),
        "experts": np.concatenate([experts, np.ones(4)]),
    }
    columns["router"] = np.where(columns["experts"] > 1, "soft", "dense")
    columns["total_params"] = columns["params"] * np.where(columns["experts"] > 1, 2.0, 1.0)
    n_eff = columns["params"] * columns["experts"] ** -0.16
    loss = 60 * n_eff**-0.34 + 9000 * columns["tokens"] ** -0.72
    loss = loss * np.exp(0.03 * np.random.default_rng(4).standard_normal(n_eff.size))
    return Runs(columns | {"loss": loss}, tuple(map(str, range(n_eff.size))))


def test_what_a_vanished_term_multiplies_has_no_meaning_and_stops_nothing():
    made = fit_law(joint_without_a_penalty(), "joint")
    assert "P" in made.at_bounds and made.status == "at_bound"
    for name in ("delta", "kappa", "tau"):
        assert made.verdicts[name] == "no meaning: P is 0" and name not in made.at_bounds
    assert made.verdicts["E_max"] == "fixed"  # one number of experts
    assert bootstrap(made, 100).converged.mean() >= 0.98
    names = [p.quantity.name for p in profiles(made)]
    assert "P" in names and "delta" not in names


@pytest.mark.parametrize("counts", [(16.0,), (4.0, 64.0)], ids=["one", "two"])
def test_a_factor_of_the_only_router_is_no_number_of_parameters(counts):
    """Over-fitting follows active parameters, e^.7 times as much with experts as without.

    Total parameters would explain that, too, where there is one number of experts: tau is open.
    """
    columns = grid("joint")
    kept = np.isin(columns["experts"], (1.0, *counts))
    columns = {name: values[kept] for name, values in columns.items()}
    law = SMOOTH["joint"](("x",))
    loss = law.predict(TRUTH["joint"] | {"tau": 0.0, "v[x]": 0.7}, columns)
    noise = 2e-3 * np.random.default_rng(0).standard_normal(loss.size)
    runs = Runs(columns | {"loss": loss * np.exp(noise)}, tuple(map(str, range(loss.size))))
    made = fit_law(runs, "joint", np.inf)
    if len(counts) == 1:
        assert made.verdicts["tau"].startswith("not identified")
        assert not made.verdicts["v[x]"].startswith("identified")
        return
    assert made.coefficients["tau"] == pytest.approx(0.0, abs=3 * made.standard_errors["tau"])
    assert made.standard_errors["tau"] < 0.2
    assert made.coefficients["v[x]"] == pytest.approx(0.7, abs=3 * made.standard_errors["v[x]"])


def test_runs_that_fit_by_chance_do_not_make_an_error_small():
    """Runs that tell beta happen to have no noise: its error is not below that of equal noise."""
    runs = simulate("chinchilla")
    telling = runs["tokens"] <= np.unique(runs["tokens"])[1]
    noise = 5e-3 * np.random.default_rng(0).standard_normal(len(runs)) * ~telling
    noisy = Runs({**runs.columns, "loss": runs["loss"] * np.exp(noise)}, runs.source)
    made = fit_law(noisy, "chinchilla", np.inf)
    jacobian = made.law.jacobian(made.theta[None], made.problem.x)[0]
    spare = len(runs) - jacobian.shape[1]
    equal = np.linalg.inv(jacobian.T @ jacobian) * np.sum(made.residuals() ** 2) / spare
    k = made.law.index("beta")
    sandwich = scores(made.problem, made.theta).covariance[k, k]
    assert sandwich < 0.8 * equal[k, k]
    assert made.standard_errors["beta"] == pytest.approx(np.sqrt(equal[k, k]), rel=1e-6)
