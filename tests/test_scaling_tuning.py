"""Laws of settings: optima of cells, the line through them, regret, and what cannot be told."""

import json

import numpy as np
import pytest
from scipy.stats import linregress

from moe_ablm.__main__ import main
from moe_ablm.errors import UserError
from moe_ablm.scaling import load
from moe_ablm.scaling.catalogue import applicable
from moe_ablm.scaling.laws_settings import BatchSize, LearningRate
from moe_ablm.scaling.plots import draw_all
from moe_ablm.scaling.reading import Reading, read_runs
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import Question, analyse, compare
from moe_ablm.scaling.tuning import fit_tuning, lowest_at_each

RATES = 1e-3 * 2.0 ** (np.arange(-6, 7) / 2)
SIZES = 1e8 * 2.0 ** np.arange(4)


def best_rate(n, d):
    return 3e-3 * (n / 2e8) ** -0.6 * (d / 1e10) ** 0.25


def table(columns):
    return Runs(columns, tuple(map(str, range(len(columns["loss"])))))


def sweep(sd=0.0, scatter=0.0, seed=0, sizes=SIZES, tokens=(4e9, 1e10, 4e10), rates=RATES):
    """A valley in ln lr in each cell, its minimum off the law by `scatter`."""
    rng = np.random.default_rng(seed)
    n, d, rate = (a.ravel() for a in np.meshgrid(sizes, tokens, rates, indexing="ij"))
    off = np.repeat(scatter * rng.standard_normal(n.size // len(rates)), len(rates))
    gap = np.log(rate / best_rate(n, d)) - off
    loss = 2 + 300 * n**-0.35 + 0.05 * gap**2 + sd * rng.standard_normal(n.size)
    return table({"params": n, "tokens": d, "lr": rate, "loss": loss})


def optima(fit):
    return np.array([c.best for c in fit.cells])


def test_optima_and_exponents_of_a_known_valley():
    fit = fit_tuning(sweep(), LearningRate(), draws=0, target={"params": 1e9, "tokens": 1e11})
    cells = np.array([(c.params, c.tokens) for c in fit.cells])
    np.testing.assert_allclose(optima(fit), best_rate(*cells.T), rtol=1e-6)
    assert fit.coefficients["by_params"] == pytest.approx(-0.6, abs=1e-6)
    assert fit.coefficients["by_tokens"] == pytest.approx(0.25, abs=1e-6)
    assert fit.derived["lr"] == pytest.approx(best_rate(1e9, 1e11), rel=1e-5)


def test_intervals_are_those_of_a_regression_of_the_optima():
    runs = sweep(sd=5e-4, scatter=0.1)
    fit = fit_tuning(runs, LearningRate(), {"by_params": -0.6}, draws=0)
    size, tokens = (np.log([getattr(c, k) for c in fit.cells]) for k in ("params", "tokens"))
    line = linregress(tokens, np.log(optima(fit)) + 0.6 * size)
    assert fit.coefficients["by_tokens"] == pytest.approx(line.slope, rel=1e-9)
    (interval,) = fit.intervals["by_tokens"]
    assert interval.se == pytest.approx(line.stderr, rel=1e-9)
    assert interval.high - line.slope == pytest.approx(2.228139 * line.stderr, rel=1e-6)
    (interval,) = fit.intervals["k"]
    assert interval.se_log == pytest.approx(line.intercept_stderr, rel=1e-9)
    assert fit.fixed == {"by_params": -0.6} and "by_params" not in fit.intervals


def test_intervals_hold_the_truth():
    """Thirty sweeps: 95 % intervals of both exponents and of the rate at a target."""
    inside = []
    target = {"params": 1e9, "tokens": 1e11}
    truth = {"by_params": -0.6, "by_tokens": 0.25, "lr": best_rate(1e9, 1e11)}
    for seed in range(30):
        runs = sweep(sd=5e-4, scatter=0.1, seed=seed, rates=RATES[::2])
        fit = fit_tuning(runs, LearningRate(), draws=0, target=target)
        inside += [fit.intervals[k][0].low <= v <= fit.intervals[k][0].high
                   for k, v in truth.items()]  # fmt: skip
    assert 0.90 <= np.mean(inside) <= 0.99


def test_noise_gives_each_optimum_its_own_interval():
    inside = []
    for seed in range(6):
        fit = fit_tuning(sweep(sd=2e-3, seed=seed), LearningRate(), draws=200, seed=seed)
        for c in fit.cells:
            inside.append(c.ends[0] <= best_rate(c.params, c.tokens) <= c.ends[1])
    assert 0.88 <= np.mean(inside) <= 0.99  # 72 optima: a binomial error of 2.6 %


def test_what_the_cells_cannot_tell_is_held_and_said():
    alike = fit_tuning(sweep(tokens=(1e10,)), LearningRate(), draws=0)
    assert alike.coefficients["by_tokens"] == 0.0 and "same tokens" in " ".join(alike.notes)
    assert alike.coefficients["by_params"] == pytest.approx(-0.6, abs=1e-6)
    runs = sweep(tokens=50 * SIZES)
    together = runs.take(np.isclose(runs["tokens"], 50 * runs["params"]))
    fit = fit_tuning(together, LearningRate(), draws=0)
    assert fit.coefficients["by_params"] == pytest.approx(-0.6 + 0.25, abs=1e-6)
    assert "tokens go with sizes" in " ".join(fit.notes)
    few = fit_tuning(sweep(sizes=SIZES[:2], tokens=(1e10,)), LearningRate(), draws=0)
    assert few.status == "exact" and not few.intervals and "exact" in " ".join(few.notes)


def test_regret_is_the_loss_at_the_rule_less_the_lowest():
    runs = sweep(sd=1e-3)
    rule = {"k": float(RATES[4])}
    fit = fit_tuning(runs, LearningRate(), rule=rule, draws=0)
    for i, c in enumerate(fit.cells):
        mine = (runs["params"] == c.params) & (runs["tokens"] == c.tokens)
        rate, loss = runs["lr"][mine], runs["loss"][mine]
        assert c.regret["rule"] == pytest.approx(loss[4] - loss.min(), abs=1e-12)
        others = np.delete(optima(fit), i)
        one = np.exp(np.mean(np.log(others)))
        between = np.interp(np.log(one), np.log(rate), loss)
        assert c.regret["one value"] == pytest.approx(between - loss.min(), abs=1e-12)
        assert c.regret["law"] >= 0.0
    costs = {name: np.mean([c.regret[name] for c in fit.cells]) for name in fit.cells[0].regret}
    assert costs["law"] < 0.2 * costs["one value"]
    assert sum("regret of" in n for n in fit.notes) == 3


def test_a_cell_is_judged_by_the_law_of_the_others():
    """One optimum below the law by e: a law that knew it would have less regret there."""
    runs = sweep(tokens=(1e10,))
    off = runs["params"] == SIZES[0]
    gap = np.log(runs["lr"] / best_rate(SIZES[0], 1e10)) + 1.0
    loss = np.where(off, 2 + 300 * SIZES[0] ** -0.35 + 0.05 * gap**2, runs["loss"])
    fit = fit_tuning(table({**runs.columns, "loss": loss}), LearningRate(), draws=0)
    assert fit.cells[0].regret["law"] == pytest.approx(0.05, abs=5e-3)


def test_the_best_of_the_other_settings_counts_and_seeds_are_averaged():
    columns = {
        "params": np.full(8, 1e8),
        "tokens": np.full(8, 1e9),
        "lr": np.array([1e-3, 1e-3, 1e-3, 1.001e-3, 2e-3, 2e-3, 4e-3, 4e-3]),
        "batch": np.array([8.0, 8.0, 16.0, 16.0, 8.0, 16.0, 8.0, 16.0]),
        "loss": np.array([3.0, 3.4, 3.1, 3.2, 2.9, 2.8, 3.3, 3.5]),
    }
    tried = lowest_at_each(table(columns), "lr")
    np.testing.assert_allclose(tried.loss, [3.15, 2.8, 3.3])  # means 3.2 and 3.15; 2.8; 3.3
    assert tried.noise.freedom == 2
    assert tried.noise.sd == pytest.approx(np.sqrt((0.2**2 * 2 + 0.05**2 * 2) / 2))
    batch = lowest_at_each(table(columns), "batch")
    np.testing.assert_allclose(batch.loss, [2.9, 2.8])


def test_cells_without_a_minimum_are_named_and_too_few_are_refused():
    runs = sweep()
    slow = runs.take(~((runs["params"] == SIZES[0]) & (runs["lr"] > 1e-3)))
    fit = fit_tuning(slow, LearningRate(), draws=0)
    assert len(fit.cells) < 12
    assert any("no minimum among the values tried" in n and "1e+08" in n for n in fit.notes)
    with pytest.raises(UserError, match="on both sides"):
        fit_tuning(runs.take(runs["lr"] < 6e-4), LearningRate(), draws=0)
    with pytest.raises(UserError, match="three values of 'lr'"):
        fit_tuning(runs.take(np.isin(runs["lr"], RATES[:2])), LearningRate(), draws=0)
    with pytest.raises(UserError, match="column 'batch'"):
        fit_tuning(runs, BatchSize(), draws=0)
    with pytest.raises(UserError, match="--fix k"):
        fit_tuning(runs, LearningRate(), {"k": 1.0}, draws=0)
    with pytest.raises(UserError, match="--rule k=-1: expected a finite number, above 0"):
        fit_tuning(runs, LearningRate(), draws=0, rule={"k": -1.0})
    columns = {name: values for name, values in runs.columns.items() if name != "tokens"}
    with pytest.raises(UserError, match="by_tokens=0.3: the input has no column 'tokens'"):
        fit_tuning(Runs(columns, runs.source), LearningRate(), {"by_tokens": 0.3}, draws=0)
    with pytest.raises(UserError, match="cannot be compared"):
        compare(runs, ["learning_rate", "chinchilla"])
    assert "learning_rate" not in applicable(runs.columns)


def write_run(folder, name, rate=None, loss=2.0):
    (folder / name).mkdir()
    values = {"status": "complete", "params_active": 1e8, "tokens_seen": 1e9, "unique_tokens": 1e9,
              "valid_loss_final": loss}  # fmt: skip
    (folder / name / "run.json").write_text(json.dumps(values))
    if rate is not None:
        train = {"lr": rate, "batch": 32, "weight_decay": 0.01}
        (folder / name / "config.json").write_text(json.dumps({"config": {"train": train}}))


def test_runs_with_other_rates_are_no_seeds_of_each_other(tmp_path):
    for name, rate, loss in (("a", 1e-3, 2.0), ("b", 4e-3, 2.5), ("c", 1e-3, 2.1)):
        write_run(tmp_path, name, rate, loss)
    runs = read_runs([tmp_path])
    assert sorted(runs["loss"]) == [2.0, 2.1] and "not the best" in runs.dropped[0][1]
    every = read_runs([tmp_path], Reading(settings=True))
    assert sorted(every["lr"]) == [1e-3, 1e-3, 4e-3] and set(every["batch"]) == {32.0}
    write_run(tmp_path, "d", loss=2.05)  # of before configs were kept
    assert len(read_runs([tmp_path])) == 4
    (tmp_path / "d" / "config.json").write_text('{"config": null}')  # no config of ours
    assert len(read_runs([tmp_path])) == 4


def test_the_command_writes_the_law_its_cells_and_its_figure(tmp_path, capsys):
    runs = sweep(sd=1e-3)
    names = ("params", "tokens", "lr", "loss")
    rows = [",".join(f"{runs[k][i]:.9g}" for k in names) for i in range(len(runs))]
    path = tmp_path / "rates.csv"
    path.write_text("\n".join([",".join(names), *rows]) + "\n")
    base = ["moe_ablm", "fit", "--input", str(path), "--bootstrap", "50", "--out"]
    out = tmp_path / "o"
    code = main([*base, str(out), "--law", "learning_rate", "--rule", "k=1e-4",
                 "--target", "params=1e9,tokens=1e11"])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and not said.err
    assert "regret of the rule given" in said.out and "best value of each cell" in said.out
    made = load(out)
    assert made.predict(params=1e9, tokens=1e11) == pytest.approx(made.derived["lr"], rel=1e-9)
    with pytest.raises(UserError, match=r"needs tokens="):
        made.predict(params=1e9)
    assert "best value of each cell" in (out / "report.html").read_text()
    assert (out / "figures" / "best_setting.svg").is_file()
    for flags, words in (
        (["--law", "chinchilla", "--rule", "k=1"], "--rule needs --law"),
        (["--law", "learning_rate", "--rule", "rate=1"], "--rule rate"),
        (["--law", "batch_size"], "column 'batch'"),
    ):
        assert main([*base, str(tmp_path / "p"), *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_figure_has_every_cell_and_the_law():
    analysis = analyse(sweep(sd=1e-3, tokens=(1e10, 4e10)), Question("learning_rate", draws=50))
    left, right = draw_all(analysis)["best_setting"].axes
    cells = analysis.fit.cells
    valleys = [x for x in left.lines if x.get_marker() == "o"]
    assert len(valleys) == len(cells) == len(left.get_legend().get_texts())
    for line, cell in zip(valleys, cells, strict=True):
        np.testing.assert_allclose(line.get_ydata(), cell.loss - cell.loss.min())
    dots = sorted(float(x.get_ydata()[0]) for x in right.lines if x.get_marker() == "o")
    np.testing.assert_allclose(dots, sorted(optima(analysis.fit)))
    assert right.get_ylabel() == "best peak learning rate of a cell"
