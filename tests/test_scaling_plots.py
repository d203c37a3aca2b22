"""Figures of scaling laws: their artists against the runs and the fit that they show."""

import io
from dataclasses import replace

import numpy as np
import pytest

from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.optimum_plots import optimum_of_surface
from moe_ablm.scaling.plots import draw_all
from moe_ablm.scaling.resampling import Bootstrap
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Analysis, Question, analyse

BUDGETS = 3e18 * 2.5 ** np.arange(8)


def grid(budgets=BUDGETS, sd=3e-3):
    """Seven sizes a budget around the best one of E + A N^-.35 + B D^-.37."""
    best = ((0.35 * 480) / (0.37 * 2100) * (budgets / 6) ** 0.37) ** (1 / 0.72)
    n = np.concatenate([b * 1.8 ** np.arange(-3.0, 4.0) for b in best])
    flops = np.repeat(budgets, 7)
    d = flops / 6 / n
    noise = np.exp(sd * np.random.default_rng(0).standard_normal(n.size))
    loss = (1.8 + 480 * n**-0.35 + 2100 * d**-0.37) * noise
    return table({"params": n, "tokens": d, "flops": flops, "loss": loss})


def table(columns):
    return Runs(columns, tuple(map(str, range(len(columns["loss"])))))


@pytest.fixture(scope="module")
def isoflop():
    analysis = analyse(grid(), Question("isoflop", draws=200))
    return analysis.fit, draw_all(analysis)


@pytest.fixture(scope="module")
def surface():
    analysis = analyse(grid(), Question("chinchilla", draws=40))
    return analysis.fit, draw_all(analysis)


def dots(axes):
    return [(x.get_xdata()[0], x.get_ydata()[0]) for x in axes.lines if x.get_marker() == "o"]


def test_the_optimum_of_every_budget_stands_in_its_figure_with_its_bar(isoflop):
    fit, figures = isoflop
    for axes, star in zip(figures["optimum"].axes, ("N_star", "D_star"), strict=True):
        named = {f"{star}[{budget:.15g}]": value for budget, value in dots(axes)}
        assert len(named) == BUDGETS.size
        for name, value in named.items():
            assert value == fit.derived[name]
        bars = [x.get_ydata() for x in axes.lines if len(x.get_xdata()) == 2]
        ends = [(i.low, i.high) for k, (i,) in fit.intervals.items() if k.startswith(star)]
        np.testing.assert_allclose(bars, ends)
        line = next(x for x in axes.lines if len(x.get_xdata()) == 50)
        slope = np.polyfit(np.log(line.get_xdata()), np.log(line.get_ydata()), 1)[0]
        assert slope == pytest.approx({"N_star": 0.37, "D_star": 0.35}[star] / 0.72, abs=0.05)


def test_the_optimum_of_a_surface_has_its_band_and_solves_the_surface(surface):
    fit, figures = surface
    left, right = figures["optimum"].axes
    flops, n_opt = left.lines[0].get_data()
    sizes = np.geomspace(n_opt[0] / 3, n_opt[0] * 3, 4001)
    lowest = sizes[np.argmin(fit.predict(params=sizes, tokens=flops[0] / 6 / sizes))]
    assert n_opt[0] == pytest.approx(lowest, rel=2e-3)
    np.testing.assert_allclose(n_opt * right.lines[0].get_ydata() * 6, flops, rtol=1e-9)
    for axes in (left, right):
        low, high = np.ptp(axes.collections[0].get_paths()[0].vertices, axis=0)
        assert low > 0 and high > 0


def test_every_budget_of_the_runs_is_drawn_and_none_is_invented(surface):
    (axes,) = surface[1]["isoflop"].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"{budget:.1e}" for budget in BUDGETS]
    sizes, tokens = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), [1e9, 7e9, 5e10]))
    loss = 1.8 + 480 * sizes**-0.35 + 2100 * tokens**-0.37
    noise = np.exp(1e-3 * np.random.default_rng(0).standard_normal(15))
    runs = table({"params": sizes, "tokens": tokens, "loss": loss * noise})
    assert "isoflop" not in draw_all(analyse(runs, Question("chinchilla", draws=0)))


def test_axes_stay_near_the_data_and_have_units(isoflop, surface):
    runs = isoflop[0].runs
    limits = {"parameters N": runs["params"], "tokens D": runs["tokens"]}
    labels = set()
    for figures in (isoflop[1], surface[1]):
        for name in set(figures) - {"profiles"}:
            for axes in figures[name].axes:
                labels |= {axes.get_xlabel(), axes.get_ylabel()} - {""}
                if (values := limits.get(axes.get_xlabel())) is not None:
                    low, high = axes.get_xlim()
                    assert low > values.min() / 4 and high < values.max() * 4, name
    assert labels == {
        "parameters N", "tokens D", "loss L (nats)", "training compute C (FLOPs)",
        "N_opt (parameters)", "D_opt (tokens)", "predicted loss", "ln L observed - ln L model",
    }  # fmt: skip


def test_the_envelope_is_the_lowest_of_all_curves():
    n = np.repeat(np.geomspace(1e7, 1e9, 5), 40)
    d = np.tile(np.geomspace(2e8, 1e12, 40), 5)
    loss = 1.7 + 300 * n**-0.34 + 400 * d**-0.34
    runs = table({"params": n, "tokens": d, "loss": loss, "run": np.char.mod("%.6g", n)})
    (axes,) = draw_all(analyse(runs, Question("envelope", draws=0)))["envelope"].axes
    lowest = next(x for x in axes.lines if x.get_label() == "lowest curve")
    curves = [x for x in axes.lines if len(x.get_xdata()) == 40]
    assert len(curves) == 5
    at = np.log(lowest.get_xdata())
    drawn = [
        np.interp(at, np.log(x.get_xdata()), x.get_ydata(), left=np.inf, right=np.inf)
        for x in curves
    ]
    np.testing.assert_allclose(lowest.get_ydata(), np.min(drawn, axis=0))


def test_kinds_differ_in_marker_and_line_style():
    n, u, k = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), [1e9, 1e10], [1.0, 8.0, 40.0])
    )
    columns = {"params": np.tile(n, 3), "unique_tokens": np.tile(u, 3), "tokens": np.tile(u * k, 3)}
    columns["experts"] = np.repeat([1.0, 8.0, 8.0], n.size)
    columns["router"] = np.repeat(["dense", "soft", "top2"], n.size)
    columns["total_params"] = columns["params"] * np.where(columns["experts"] > 1, 3.0, 1.0)
    noise = np.exp(2e-3 * np.random.default_rng(0).standard_normal(3 * n.size))
    columns["loss"] = (
        1.8 + 480 * columns["params"] ** -0.35 + 2100 * columns["tokens"] ** -0.37
    ) * noise
    analysis = Analysis(fit_law(table(columns), "joint"))
    (axes,) = draw_all(analysis)["loss_against_params"].axes
    named = {x.get_label(): x for x in axes.lines}
    kinds = [named[name] for name in ("dense", "soft 8", "top2 8")]
    assert len({x.get_marker() for x in kinds}) == len({x.get_linestyle() for x in kinds}) == 3
    drawn = [x for x in axes.lines if len(x.get_xdata()) > 10 and x.get_marker() == "None"]
    assert {x.get_linestyle() for x in drawn} == {x.get_linestyle() for x in kinds}


@pytest.mark.filterwarnings("error")
def test_optima_that_lie_far_off_leave_the_axes_to_the_runs():
    """Exponents near 0 put N_opt beyond all floats."""
    made = fit_law(grid(), "chinchilla")
    far = made.theta.copy()
    far[[made.law.index("alpha"), made.law.index("beta")]] = 1e-3
    far[made.law.index("A")] += 5.0
    theta = np.concatenate([np.repeat(made.theta[None], 39, axis=0), far[None]])
    boot = Bootstrap(theta, np.ones(40, bool), {}, {}, "runs")
    for fit, drawn in ((made, 1), (replace(made, theta=far), 0)):
        figure = optimum_of_surface(fit, boot)
        figure.savefig(io.BytesIO(), format="svg")
        for axes, role in zip(figure.axes, ("params", "tokens"), strict=True):
            (line,) = axes.lines
            shown = line.get_ydata()[np.isfinite(line.get_ydata())]
            assert (shown.size > 0) == drawn
            low, high = axes.get_ylim()
            assert low > 1e-4 * made.runs[role].min() and high < 1e4 * made.runs[role].max()
    (n_opt,) = [q for q in made.law.derived(made.centre, {"flops": 1e25}) if q.name == "N_opt"]
    assert n_opt.function(far[None])[0] > 1000.0
    assert np.isfinite(n_opt.report(n_opt.function(far[None])))
