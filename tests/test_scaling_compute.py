"""Laws of compute: the floor, gains between kinds, the minima they stand on, forecasts, figure."""

import json

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import stdtrit

from moe_ablm.__main__ import main
from moe_ablm.errors import UserError
from moe_ablm.scaling import load
from moe_ablm.scaling.catalogue import applicable
from moe_ablm.scaling.envelope import fit_envelope
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.forecast import forecasts
from moe_ablm.scaling.optima import optima
from moe_ablm.scaling.plots import draw_all
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Question, analyse, compare
from moe_ablm.scaling.tables import delta_table

BUDGETS = 3e18 * 2.5 ** np.arange(8)
EXPONENT = 0.35 * 0.37 / 0.72  # of L - E at the best sizes of E + A N^-.35 + B D^-.37
GAIN = 1.8


def table(columns):
    return Runs(columns, tuple(map(str, range(len(columns["loss"])))))


def ladder(seed=0, sd=1e-3, gain=(1.0, GAIN), slope=0.0, budgets=BUDGETS):
    """The best loss of each budget: dense, and top2 with a gain (C / 1e20)^slope in compute."""
    flops = np.tile(budgets, 2)
    kind = np.repeat(["dense", "top2"], budgets.size)
    worth = np.repeat(gain, budgets.size) * np.where(kind == "top2", (flops / 1e20) ** slope, 1.0)
    noise = np.exp(sd * np.random.default_rng(seed).standard_normal(flops.size))
    loss = (1.8 + 2700 * (worth * flops) ** -0.18) * noise
    return table({"flops": flops, "loss": loss, "router": kind})


def grid(sd=1e-3):
    """Seven sizes a budget around the best one, dense and top-2 of 8, tokens worth 1.8 times."""
    parts = []
    for kind, worth in (("dense", 1.0), ("top2", GAIN)):
        best = (0.35 * 480 / (0.37 * 2100) * (BUDGETS * worth / 6) ** 0.37) ** (1 / 0.72)
        n = np.concatenate([b * 1.8 ** np.arange(-3.0, 4.0) for b in best])
        flops = np.repeat(BUDGETS, 7)
        loss = 1.8 + 480 * n**-0.35 + 2100 * (worth * flops / 6 / n) ** -0.37
        router = np.full(n.size, kind)
        experts = np.full(n.size, 8.0 if kind == "top2" else 1.0)
        parts.append((n, flops / 6 / n, flops, loss, router, experts))
    names = ("params", "tokens", "flops", "loss", "router", "experts")
    columns = {k: np.concatenate(v) for k, v in zip(names, zip(*parts, strict=True), strict=True)}
    rng = np.random.default_rng(0)
    columns["loss"] = columns["loss"] * np.exp(sd * rng.standard_normal(columns["loss"].size))
    return table(columns)


def test_fit_and_interval_are_those_of_scipy():
    runs = ladder()
    made = analyse(runs, Question("compute", huber_delta=np.inf, draws=0)).fit
    log_c, routed = np.log(runs["flops"] / 1e20), runs["router"] == "top2"

    def residual(p):
        floor, log_a, alpha, log_gain = p
        excess = np.exp(log_a - alpha * (log_c + log_gain * routed))
        return np.log(floor + excess) - np.log(runs["loss"])

    other = least_squares(residual, [1.5, 0.0, 0.3, 0.0], xtol=1e-14, ftol=1e-14, gtol=1e-14)
    assert made.objective == pytest.approx(other.cost, rel=1e-8)
    found = [made.coefficients[k] for k in ("L_inf", "alpha", "gain[top2]")]
    np.testing.assert_allclose(found, [other.x[0], other.x[2], np.exp(other.x[3])], rtol=1e-5)
    errors = np.sqrt(np.diag(np.linalg.inv(other.jac.T @ other.jac)) * 2 * other.cost / 12)
    half = stdtrit(12, 0.975) * errors
    for name, estimate, reach in (("L_inf", other.x[0], half[0]), ("alpha", other.x[2], half[2])):
        (interval,) = made.intervals[name]  # the sandwich lets every budget have its own noise
        assert interval.low == pytest.approx(estimate - reach, abs=0.35 * reach)
        assert interval.high == pytest.approx(estimate + reach, abs=0.35 * reach)


def test_a_floor_that_is_held_gives_the_line_of_logs():
    """Where L - L_inf is a power law, the exponent is the slope of a regression of logs."""
    flops = np.array([1e18, 3e18, 1e19, 3e19, 1e20, 3e20])
    runs = table({"flops": flops, "loss": 1.6 + 95.18 * flops**-0.0941})
    held = fit_law(runs, "compute", fixed={"L_inf": 1.6}).coefficients
    assert held["alpha"] == pytest.approx(0.0941, rel=1e-6)
    assert held["A"] == pytest.approx(95.18, rel=1e-5)
    free = fit_law(runs, "compute").coefficients
    assert free["L_inf"] == pytest.approx(1.6, rel=1e-4)


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """95 % of 120 sets of two coefficients: a binomial error of 1.4 %."""
    inside = []
    for seed in range(60):
        fit = analyse(ladder(seed), Question("compute", draws=0)).fit
        for name, true in (("gain[top2]", GAIN), ("L_inf", 1.8)):
            (interval,) = fit.intervals[name]
            inside.append((interval.low or 0.0) <= true <= (interval.high or np.inf))
    assert 0.90 <= np.mean(inside) <= 0.99


def test_a_gain_that_grows_with_compute_is_told_from_one_that_does_not():
    growing = ladder(slope=0.1)
    scores = compare(growing, ["compute", "compute_slopes"])
    assert scores[0].law == "compute_slopes"
    for flops in (1e19, 1e21):
        fit = fit_law(growing, "compute_slopes", target={"flops": flops})
        assert fit.derived["gain[top2]"] == pytest.approx(GAIN * (flops / 1e20) ** 0.1, rel=0.08)
    assert compare(ladder(), ["compute", "compute_slopes"])[0].law == "compute"


def test_slopes_of_one_kind_are_no_law_besides_compute():
    """With one kind both are one law, and neither could be preferred."""
    kinds = ladder()
    columns = {**kinds.columns, "experts": np.where(kinds["router"] == "top2", 8.0, 1.0)}
    one = {k: v[kinds["router"] == "top2"] for k, v in columns.items()}
    two = one | {"experts": np.repeat([8.0, 64.0], one["loss"].size // 2)}
    assert applicable(columns) == applicable(two) == ["compute", "compute_slopes"]
    assert applicable(one) == applicable({k: one[k] for k in ("flops", "loss")}) == ["compute"]


def test_a_grid_counts_by_the_minima_of_its_budgets():
    runs = grid(sd=0.0)
    best = optima(runs)
    assert sorted(best.columns) == ["flops", "loss", "router"] and len(best) == 16
    for kind, worth in (("dense", 1.0), ("top2", GAIN)):
        mine = best.take(best["router"] == kind)
        scale = (0.35 * 480 / (0.37 * 2100) * (mine["flops"] * worth / 6) ** 0.37) ** (1 / 0.72)
        lowest = 1.8 + 480 * scale**-0.35 + 2100 * (worth * mine["flops"] / 6 / scale) ** -0.37
        np.testing.assert_allclose(mine["loss"], lowest, rtol=5e-4)  # the surface is no parabola
    again = optima(best)
    np.testing.assert_array_equal(again["loss"], best["loss"])
    assert len(set(best.cells())) == 16  # budgets of one kind are no replicates
    fit = analyse(grid(), Question("compute", draws=0)).fit
    assert fit.coefficients["L_inf"] == pytest.approx(1.8, abs=0.02)
    assert fit.coefficients["alpha"] == pytest.approx(EXPONENT, abs=5e-3)
    (interval,) = fit.intervals["gain[top2]"]
    assert interval.low < GAIN < interval.high < 1.1 * GAIN


def test_a_kind_of_two_sizes_a_budget_counts_by_its_lowest_losses():
    """The best size and one six times as large (1.8^3), whose loss is no best one."""
    runs = grid(sd=0.0)
    place = np.tile(np.arange(7), 16)
    some = runs.take((runs["router"] == "dense") | np.isin(place, (3, 6)))
    best = optima(some)
    mine = best["loss"][best["router"] == "top2"]
    expected = runs["loss"][(runs["router"] == "top2") & (place == 3)]
    np.testing.assert_array_equal(np.sort(mine), np.sort(expected))
    assert any("top2: no budget of 3 sizes" in note for note in best.notes)


def test_a_kind_that_is_not_there_has_no_prediction():
    with pytest.raises(UserError, match="router=top3: the kinds are dense, top2"):
        analyse(ladder(), Question("compute", draws=0, target={"router": "top3", "flops": 1e20}))


def test_numbers_of_experts_are_kinds_of_their_own():
    runs = ladder()
    experts = np.where(runs["router"] == "top2", np.tile([8.0, 64.0], 8), 1.0)
    made = fit_law(optima(table({**runs.columns, "experts": experts})), "compute")
    assert [n for n in made.coefficients if n.startswith("gain")] == [
        "gain[top2 64]",
        "gain[top2 8]",
    ]
    alone = runs.take(
        runs["router"] == "top2"
    )  # without dense runs the first kind is the reference
    assert list(fit_law(optima(alone), "compute").coefficients) == ["L_inf", "A", "alpha"]


def test_the_future_is_left_out_of_its_forecast():
    runs = ladder()
    made = fit_law(runs, "compute")
    future = forecasts(made)
    assert [f.used for f in future] == [3, 4, 5, 6, 7]
    for f in future:
        past, here = runs["flops"] < f.flops * 0.9, np.abs(runs["flops"] / f.flops - 1) < 0.1
        alone = fit_law(runs.take(past), "compute", made.huber_delta)
        told = alone.predict(flops=runs["flops"][here], router=runs["router"][here])
        error = np.log(told) - np.log(runs["loss"][here])
        assert f.error == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-3, abs=1e-7)
        assert f.bias == pytest.approx(error.mean(), rel=1e-3, abs=1e-7)
        assert f.beyond == pytest.approx(2.5, rel=1e-5)
    changed = {**runs.columns, "loss": runs["loss"] * np.where(runs["flops"] > 1e21, 2.0, 1.0)}
    assert forecasts(fit_law(table(changed), "compute"))[-1].bias == pytest.approx(
        future[-1].bias - np.log(2.0), abs=1e-4
    )


def test_checkpoints_and_mixed_laws_are_refused():
    runs = ladder()
    curves = table({**runs.columns, "run": np.repeat(["a", "b", "c", "d"], 4)})
    with pytest.raises(UserError, match="--law envelope"):
        analyse(curves, Question("compute"))
    with pytest.raises(UserError, match="cannot be compared"):
        compare(grid(), ["chinchilla", "compute"])
    with pytest.raises(UserError, match="column 'flops'"):
        analyse(table({"params": runs["flops"], "loss": runs["loss"]}), Question("compute"))


def test_the_envelope_has_the_law_of_its_frontier(tmp_path):
    """E + A N^-.34 + B D^-.34: L - E falls as C^-.17 at the best sizes."""
    n = np.repeat(np.geomspace(1e7, 1e9, 12), 60)
    d = np.tile(np.geomspace(2e7, 1e12, 60), 12)
    loss = 1.7 + 300 * n**-0.34 + 400 * d**-0.34
    runs = table({"params": n, "tokens": d, "loss": loss, "run": np.char.mod("%.6g", n)})
    analysis = analyse(runs, Question("envelope", draws=40))
    fit = analysis.fit
    assert fit.coefficients["L_inf"] == pytest.approx(1.7, abs=3e-3)
    assert fit.coefficients["alpha"] == pytest.approx(0.17, abs=1e-3)
    (interval,) = fit.intervals["L_inf"]
    assert interval.low < 1.7 < interval.high
    flops = np.array([1e18, 1e20])
    best = (300 / 400) ** (1 / 0.68) * np.sqrt(flops / 6)
    frontier = 1.7 + 300 * best**-0.34 + 400 * (flops / 6 / best) ** -0.34
    fit.save(tmp_path)
    np.testing.assert_allclose(load(tmp_path).predict(params=1e8, flops=flops), frontier, rtol=2e-3)
    (axes,) = draw_all(analysis)["envelope"].axes
    red = next(x for x in axes.lines if "L_inf" in str(x.get_label()))
    np.testing.assert_allclose(red.get_ydata(), fit.predict(params=1e8, flops=red.get_xdata()))
    few = fit_envelope(runs.take(np.isin(np.arange(n.size) // 60, [0, 6, 11])), draws=0)
    assert "L_inf" not in few.coefficients and "needs 4" in " ".join(few.notes)


def test_the_figure_shows_every_kind_and_what_is_left_above_the_floor():
    analysis = analyse(ladder(), Question("compute", draws=40))
    fit = analysis.fit
    left, right = draw_all(analysis)["loss_against_compute"].axes
    dots = {x.get_marker(): x for x in left.lines if x.get_linestyle() == "None"}
    assert len(dots) == 2
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    gain = fit.coefficients["gain[top2]"]
    assert labels == ["dense", f"top2: {gain:.3g} x the compute", "L_inf = 1.8"]
    np.testing.assert_array_equal(dots["s"].get_ydata(), fit.runs["loss"][8:])
    straight = [x for x in right.lines if x.get_linestyle() == "-"]
    for x in straight:
        slopes = np.diff(np.log(x.get_ydata())) / np.diff(np.log(x.get_xdata()))
        np.testing.assert_allclose(slopes, -fit.coefficients["alpha"], rtol=1e-6)
    assert len(left.collections) == len(right.collections) == 2
    headers = [str(c.header) for c in delta_table(analysis).columns]
    assert "gain[top2]" in headers


def test_the_command_takes_a_table_of_compute_and_loss_alone(tmp_path, capsys):
    flops = 1e18 * 10 ** (np.arange(6) / 2)
    rows = [
        f"{c:.9g},{1.6 + 95.18 * c**-0.0941 + 1e-3 * (-1) ** i:.9g}" for i, c in enumerate(flops)
    ]
    path = tmp_path / "best.csv"
    path.write_text("\n".join(["budget,loss", *rows]) + "\n")
    out = tmp_path / "o"
    code = main(["moe_ablm", "fit", "--input", str(path), "--columns", "flops=budget",
                 "--fix", "L_inf=1.6", "--target", "flops=1e22", "--bootstrap", "30",
                 "--out", str(out)])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and not said.err
    assert "leaving the future out" in said.out
    made = load(out)
    assert made.law.name == "compute"
    assert made.derived["loss"] == pytest.approx(1.6 + 95.18 * 1e22**-0.0941, rel=2e-3)
    assert any("smaller budgets" in n for n in json.loads((out / "fit.json").read_text())["notes"])
    assert "leaving the future out" in (out / "report.html").read_text()
    assert (out / "figures" / "loss_against_compute.svg").is_file()
    code = main(["moe_ablm", "fit", "--input", str(path), "--columns", "flops=budget", "--law",
                 "compute", "--advise", "--max-flops", "1e21", "--bootstrap", "30",
                 "--out", str(out)])  # fmt: skip
    assert code == 2 and capsys.readouterr().err.count("\n") == 1
