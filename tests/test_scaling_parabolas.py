"""Parabolas, isoFLOP and envelope: against polyfit and known minima, and their refusals."""

from dataclasses import replace

import numpy as np
import pytest

from moe_ablm.errors import UserError
from moe_ablm.scaling import load
from moe_ablm.scaling.approaches import approaches, disagreement
from moe_ablm.scaling.envelope import fit_envelope
from moe_ablm.scaling.minima import line
from moe_ablm.scaling.parabola_fit import fit_parabolas
from moe_ablm.scaling.parabolas import IsoFlop, Quadratic
from moe_ablm.scaling.plots import draw_all
from moe_ablm.scaling.result import Interval
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Question, analyse

SIZES = np.array([8e6, 35e6, 150e6, 350e6, 650e6])
DATA = (4e5, 8e5, 1.6e6)
OPTIMA = (3e7, 7e7, 1.5e8)


def simulate(sd=0.0, seed=0, data=DATA, optima=OPTIMA, curvature=0.003, sizes=SIZES):
    rng = np.random.default_rng(seed)
    n = np.tile(sizes, len(data))
    u = np.repeat(data, len(sizes))
    best = np.repeat(optima, len(sizes))
    floor = 0.25 - 0.01 * np.log10(u / 4e5)
    loss = floor + curvature * np.log10(n / best) ** 2 + sd * rng.standard_normal(n.size)
    columns = {"params": n, "unique_tokens": u, "loss": loss}
    return Runs(columns, tuple(f"row {i + 2}" for i in range(n.size)))


def test_minima_and_coefficients_are_those_of_polyfit():
    runs = simulate(sd=2e-4)
    made = fit_parabolas(runs, Quadratic(), draws=0)
    for size in DATA:
        mine = runs["unique_tokens"] == size
        a, b, c = np.polyfit(np.log10(runs["params"][mine]), runs["loss"][mine], 2)
        assert made.coefficients[f"a[{size:.15g}]"] == pytest.approx(a, rel=1e-8)
        assert made.coefficients[f"c[{size:.15g}]"] == pytest.approx(c, rel=1e-8)
        assert made.derived[f"N_star[{size:.15g}]"] == pytest.approx(10 ** (-b / 2 / a), rel=1e-8)


def test_the_line_through_minima_and_its_projection():
    made = fit_parabolas(simulate(), Quadratic(), draws=0, target={"params": 650e6})
    slope, intercept = np.polyfit(np.log(OPTIMA), np.log(DATA), 1)
    assert made.coefficients["slope"] == pytest.approx(slope, rel=1e-6)
    expected = np.exp(intercept + slope * np.log(650e6))
    assert made.derived["data_needed"] == pytest.approx(expected, rel=1e-6)


def test_the_published_optima_of_the_ablm_study_project_to_the_published_data_size():
    """Shafiei Neyestanak and Briney 2025: three optima and 5,523,212 pairs for 650M."""
    optima = (29_020_563, 68_099_905, 152_000_061)
    intercept, slope = line(np.log(optima), np.log((412_182, 824_363, 1_648_726)))
    assert np.exp(intercept + slope * np.log(650e6)) == pytest.approx(5_523_212, abs=1)


def test_intervals_cover_the_truth_with_estimated_noise():
    inside = []
    for seed in range(200):
        runs = simulate(sd=1e-4, seed=seed)
        made = fit_parabolas(runs, Quadratic(), draws=300, seed=seed)
        for size, best in zip(DATA, OPTIMA, strict=True):
            (interval,) = made.intervals[f"N_star[{size:.15g}]"]
            inside.append(interval.low <= best <= interval.high)
    assert 0.92 <= np.mean(inside) <= 0.98


def test_three_points_are_an_exact_fit_without_interval():
    made = fit_parabolas(simulate(sd=2e-4, sizes=SIZES[:3]), Quadratic())
    assert made.status == "exact" and not made.intervals
    assert sum("exact" in note for note in made.notes) == 3
    known = fit_parabolas(simulate(sd=2e-4, sizes=SIZES[:3]), Quadratic(), seed_sd=2e-4)
    assert known.status == "exact" and known.intervals


def test_two_points_are_left_out_and_said():
    runs = simulate()
    few = runs.take(np.r_[0:2, 5:15])
    made = fit_parabolas(few, Quadratic(), draws=0)
    assert any("needs three" in note for note in made.notes)
    assert "a[400000]" not in made.coefficients
    with pytest.raises(UserError, match="three model sizes"):
        fit_parabolas(runs.take(np.arange(2)), Quadratic())


def test_a_parabola_that_is_not_convex_is_said_and_left_out_of_the_line():
    runs = simulate()
    loss = runs["loss"].copy()
    loss[:5] = 0.25 - 0.002 * np.log10(SIZES / 3e7) ** 2
    made = fit_parabolas(Runs(dict(runs.columns) | {"loss": loss}, runs.source), Quadratic())
    assert made.status == "not_convex"
    assert not made.identifiable["a[400000]"]
    assert "no minimum" in made.verdicts["a[400000]"]
    slope = np.polyfit(np.log(OPTIMA[1:]), np.log(DATA[1:]), 1)[0]
    assert made.coefficients["slope"] == pytest.approx(slope, rel=1e-6)


def test_curvature_below_the_noise_is_not_identified():
    made = fit_parabolas(simulate(sd=2e-3, seed=1), Quadratic())
    assert made.status in ("not_identifiable", "not_convex")
    notes = " ".join(i.note for items in made.intervals.values() for i in items)
    assert "no minimum" in notes and "open" in notes


def test_one_data_size_has_no_line():
    made = fit_parabolas(simulate(data=DATA[:1], optima=OPTIMA[:1]), Quadratic(), draws=0)
    assert "slope" not in made.coefficients
    assert any("no line" in note for note in made.notes)


def test_noise_that_is_said_too_small_is_contradicted():
    made = fit_parabolas(simulate(sd=1e-3), Quadratic(), seed_sd=1e-5)
    assert any("miss by more than the noise" in note for note in made.notes)


def test_the_same_seed_gives_the_same_intervals_and_files(tmp_path):
    runs = simulate(sd=2e-4)
    texts = []
    for name in ("a", "b"):
        path = fit_parabolas(runs, Quadratic(), seed=4).save(tmp_path / name)
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]
    made, again = fit_parabolas(runs, Quadratic(), seed=4), load(tmp_path / "a")
    inputs = {"params": SIZES, "unique_tokens": np.full(5, 8e5)}
    np.testing.assert_array_equal(again.predict(**inputs), made.predict(**inputs))
    with pytest.raises(UserError, match="no parabola at"):
        again.predict(params=1e8, unique_tokens=1e9)


def test_isoflop_recovers_the_exponents_of_a_known_law():
    budgets = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
    best = 0.6 * np.sqrt(budgets / 6)
    n = best * np.tile(np.geomspace(0.3, 3, 7), 4)
    loss = 2 + 0.05 * np.log10(n / best) ** 2 - 0.1 * np.log10(budgets / 1e18)
    jitter = 1 + 0.01 * np.sin(np.arange(28))
    columns = {"params": n, "tokens": budgets / 6 / n, "flops": budgets * jitter, "loss": loss}
    runs = Runs(columns, tuple(map(str, range(28))))
    made = fit_parabolas(runs, IsoFlop(), draws=200, target={"flops": 1e22})
    assert made.coefficients["slope"] == pytest.approx(0.5, abs=5e-3)
    assert made.derived["N_opt"] == pytest.approx(0.6 * np.sqrt(1e22 / 6), rel=0.05)
    assert sum(name.startswith("a[") for name in made.coefficients) == 4


def curves(sizes=5):
    n = np.repeat(np.geomspace(1e7, 1e9, sizes), 60)
    d = np.tile(np.geomspace(2e7, 1e12, 60), sizes)
    loss = 1.7 + 300 * n**-0.34 + 400 * d**-0.34
    columns = {"params": n, "tokens": d, "loss": loss, "run": np.char.mod("%.6g", n)}
    return Runs(columns, tuple(map(str, range(n.size))))


def test_the_envelope_of_curves_finds_the_frontier():
    """For L = E + A/N^a + B/D^a with equal exponents, N_opt grows as the root of compute."""
    made = fit_envelope(curves(sizes=15), draws=50, target={"flops": 1e19})
    assert made.coefficients["slope"] == pytest.approx(0.5, abs=0.06)
    best = (300 / 400) ** (1 / 0.68) * np.sqrt(1e19 / 6)
    assert made.derived["N_opt"] == pytest.approx(best, rel=0.25)
    assert made.intervals["slope"][0].low <= 0.5 <= made.intervals["slope"][0].high + 0.05


def test_an_envelope_needs_three_sizes():
    with pytest.raises(UserError, match="2 sizes"):
        fit_envelope(curves(sizes=2))


def test_an_envelope_of_two_passages_is_called_exact():
    made = fit_envelope(curves(sizes=3), draws=20)
    assert made.status == "exact" and "exact" in " ".join(made.notes)
    assert "passages" not in made.coefficients
    assert fit_envelope(curves(sizes=6), draws=0).status == "converged"


def test_every_coefficient_of_the_parabolas_has_a_verdict():
    made = fit_parabolas(simulate(sd=2e-4), Quadratic(), draws=0)
    assert set(made.identifiable) == set(made.coefficients)
    flat = fit_parabolas(simulate(), Quadratic(), seed_sd=0.01, draws=50)
    assert not flat.identifiable["slope"] and "minimum of" in flat.verdicts["slope"]


@pytest.mark.parametrize("sd", [float("inf"), float("nan"), -1.0])
def test_noise_that_is_no_number_is_refused(sd):
    with pytest.raises(UserError, match="--seed-sd"):
        fit_parabolas(simulate(), Quadratic(), seed_sd=sd)


SURFACE = {"E": 1.6, "A": 400.0, "B": 3000.0, "alpha": 0.42, "beta": 0.255}


def wide_grid(budgets=(3e18, 3e19, 6e19, 3e20), below=0, sd=0.0, seed=0):
    """Nine sizes a budget, each twice the one before, around the known minimum."""
    share = SURFACE["alpha"] * SURFACE["A"] / (SURFACE["beta"] * SURFACE["B"])
    total = SURFACE["alpha"] + SURFACE["beta"]
    best = (share * (np.array(budgets) / 6) ** SURFACE["beta"]) ** (1 / total)
    n = np.concatenate([b * 2.0 ** (np.arange(-4, 5) - below) for b in best])
    flops = np.repeat(budgets, 9)
    d = flops / 6 / n
    loss = SURFACE["E"] + SURFACE["A"] * n**-0.42 + SURFACE["B"] * d**-0.255
    loss = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(n.size))
    columns = {"params": n, "tokens": d, "flops": flops, "loss": loss}
    return Runs(columns, tuple(map(str, range(n.size)))), dict(zip(budgets, best, strict=True))


def test_a_wide_grid_gives_the_minima_of_its_surface_and_says_where_it_cannot():
    """A parabola in log N through all sizes, as published, is 20 % off here."""
    runs, best = wide_grid(below=0.5)
    made = analyse(runs, Question("isoflop", target={"flops": 1e22}, draws=50)).fit
    for budget, true in best.items():
        mine = runs["flops"] == budget
        a, b, _ = np.polyfit(np.log10(runs["params"][mine]), runs["loss"][mine], 2)
        assert abs(10 ** (-b / 2 / a) / true - 1) > 0.15
        assert made.derived[f"N_star[{budget:.15g}]"] == pytest.approx(true, rel=0.03)
        tokens = budget / 6 / true
        assert made.derived[f"D_star[{budget:.15g}]"] == pytest.approx(tokens, rel=0.03)
    assert made.coefficients["slope"] == pytest.approx(0.255 / 0.675, abs=2e-3)
    assert made.coefficients["slope_tokens"] == pytest.approx(0.42 / 0.675, abs=2e-3)
    assert not any("biased" in note for note in made.notes)
    sparse, best = wide_grid(budgets=(3e18, 3e19, 3e20))
    sparse = sparse.take(np.tile(np.arange(9) % 2 == 1, 3))  # four sizes: no skew can be seen
    coarse = analyse(sparse, Question("isoflop", draws=50)).fit
    assert "skew" not in coarse.coefficients
    assert any("the parabolas are biased" in note for note in coarse.notes)


def test_a_shared_skew_halves_the_error_of_minima_under_noise():
    """Twenty noisy tables: the root mean square error against that of published parabolas."""
    errors = []
    for seed in range(20):
        runs, best = wide_grid(below=0.5, sd=3e-3, seed=seed)
        made = fit_parabolas(runs, IsoFlop(), draws=0)
        for budget, true in best.items():
            mine = runs["flops"] == budget
            a, b, _ = np.polyfit(np.log10(runs["params"][mine]), runs["loss"][mine], 2)
            n_star = made.derived[f"N_star[{budget:.15g}]"]
            errors.append(np.log([n_star / true, 10 ** (-b / 2 / a) / true]))
    ours, published = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours < 0.5 * published


def test_intervals_of_local_minima_hold_the_truth():
    inside = []
    for seed in range(100):
        runs, best = wide_grid(sd=3e-3, seed=seed)
        made = fit_parabolas(runs, IsoFlop(), draws=200, seed=seed)
        for budget, true in best.items():
            (interval,) = made.intervals[f"N_star[{budget:.15g}]"]
            inside.append(interval.low <= true <= interval.high)
    assert 0.92 <= np.mean(inside) <= 0.98


def test_skewed_parabolas_are_reloaded_and_predict(tmp_path):
    runs, _ = wide_grid(sd=1e-3)
    made = fit_parabolas(runs, IsoFlop(), draws=0)
    assert made.coefficients["skew"] != 0.0
    made.save(tmp_path)
    inputs = {"params": runs["params"], "flops": runs["flops"]}
    near = np.isin(np.arange(36) % 9, [3, 4, 5])
    predicted = load(tmp_path).predict(**inputs)
    np.testing.assert_allclose(predicted[near], runs["loss"][near], rtol=5e-3)
    np.testing.assert_array_equal(predicted, made.predict(**inputs))


def test_budgets_are_not_chained_and_a_minimum_outside_the_sizes_is_none():
    """3e19 and 6e19 with runs at every 9 % between them are eight budgets and not one."""
    runs, _ = wide_grid()
    between = 3e19 * 1.09 ** np.arange(9)
    columns = {k: np.concatenate([v, v[9:18]]) for k, v in runs.columns.items()}
    columns["flops"] = np.concatenate([runs["flops"], between])
    chained = Runs(columns, tuple(map(str, range(45))))
    groups = IsoFlop().groups(chained)
    for budget in np.unique(groups):
        assert np.ptp(np.log(columns["flops"][groups == budget])) <= 0.1
    outside, _ = wide_grid(budgets=(1e21,), below=-6)  # all sizes are too large
    columns = {k: np.concatenate([v, outside[k]]) for k, v in runs.columns.items()}
    made = fit_parabolas(Runs(columns, tuple(map(str, range(45)))), IsoFlop(), draws=0)
    assert "outside" in made.verdicts["a[1e+21]"] or "no minimum" in made.verdicts["a[1e+21]"]
    alone = fit_parabolas(runs, IsoFlop(), draws=0)
    assert made.coefficients["slope"] == pytest.approx(alone.coefficients["slope"], rel=1e-9)


def test_approaches_stand_beside_each_other_and_their_disagreement_is_said():
    runs, _ = wide_grid(sd=1e-3)
    made = approaches(runs, {"flops": 1e22}, draws=60, seed=0)
    assert [a.name[0] for a in made] == ["2", "3"]
    for a in made:
        assert a.values["exponent of N_opt in C"] == pytest.approx(0.378, abs=0.03)
    assert disagreement(made) == ""
    shifted = [made[0], replace(made[1], intervals={"N_opt": Interval("x", 0.95, 1.0, 2.0)})]
    assert "disagree on N_opt" in disagreement(shifted)


@pytest.mark.parametrize("count", [3, 10])
def test_every_parabola_is_drawn_however_many(count):
    runs, best = wide_grid(budgets=tuple(3e18 * 2.5 ** np.arange(count)))
    analysis = analyse(runs, Question("isoflop", draws=20))
    (axes,) = draw_all(analysis)["loss_against_params"].axes
    curves = [x for x in axes.lines if len(x.get_xdata()) == 120]
    assert len(curves) == count
    minima = [x.get_xdata()[0] for x in axes.lines if len(x.get_xdata()) == 2]
    np.testing.assert_allclose(sorted(minima), sorted(best.values()), rtol=0.1)


def test_isoflop_curves_of_a_surface_are_at_the_budgets_of_the_runs():
    runs, _ = wide_grid(sd=1e-3)
    (axes,) = draw_all(analyse(runs, Question("chinchilla", draws=20)))["isoflop"].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["3.0e+18", "3.0e+19", "6.0e+19", "3.0e+20"]
