"""Train-valid gaps: planted truths, verdicts that are no false alarms, covariates, bad input."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from moe_ablm.__main__ import main
from moe_ablm.config_schema import DROPOUTS
from moe_ablm.errors import UserError
from moe_ablm.scaling import advise, bootstrap, check_design, fit_law, load, read_runs
from moe_ablm.scaling.advice import Limits
from moe_ablm.scaling.catalogue import law_for
from moe_ablm.scaling.inputs import Centre
from moe_ablm.scaling.reading import Reading
from moe_ablm.scaling.run_directories import DROPOUTS as READ
from moe_ablm.scaling.run_directories import settings_of
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import compare, verdict

BOTH = ("weight_decay", "dropout")
TRUTH = {"fresh": 0.97, "P": 0.004, "delta": 0.6, "kappa": 0.5}


def grid(settings=False):
    """Dense runs and mixtures of 8 and 64 experts, 1 to 60 epochs, two data sizes."""
    n, u, k, e = (
        a.ravel()
        for a in np.meshgrid([1e6, 4e6, 1.6e7], [1e6, 8e6], [1.0, 5.0, 60.0], [1.0, 8.0, 64.0])
    )
    out = {"params": n, "total_params": n * (1 + 0.5 * (e - 1)), "experts": e,
           "tokens": u * k, "unique_tokens": u}  # fmt: skip
    if not settings:
        return out
    decay, rate = np.repeat([0.0, 0.1, 0.1], n.size), np.repeat([0.0, 0.0, 0.2], n.size)
    return {c: np.tile(v, 3) for c, v in out.items()} | {"weight_decay": decay, "dropout": rate}


def gap_of(c, tau, by_weight_decay=0.0, by_dropout=0.0, fresh_by_dropout=0.0):
    """The law written out: nats."""
    memory = c["params"] ** (1 - tau) * c["total_params"] ** tau
    repeats = c["tokens"] / c["unique_tokens"] - 1
    over = TRUTH["P"] * repeats ** TRUTH["delta"] * (memory / c["unique_tokens"]) ** TRUTH["kappa"]
    decay, rate = c.get("weight_decay", 0.0), c.get("dropout", 0.0)
    over = over * np.exp(by_weight_decay * decay + by_dropout * rate)
    return TRUTH["fresh"] * np.exp(fresh_by_dropout * rate) - 1 + over


def table(tau, seed=0, sd=0.01, covariates=(), **effects):
    columns = grid(bool(covariates))
    rng = np.random.default_rng(seed)
    size = columns["params"].size
    train = rng.uniform(1.0, 2.5, size)  # whatever the runs have in common is not in the gap
    gap = gap_of(columns, tau, **effects) + sd * rng.standard_normal(size)
    columns |= {"train_loss": train, "loss": train + gap}
    return Runs(columns, tuple(map(str, range(size))), covariates=covariates)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_what_over_fits_comes_back(tau):
    made = fit_law(table(tau), "gap", huber_delta=np.inf)
    assert made.status == "converged"
    for name, value in (TRUTH | {"tau": tau}).items():
        error = made.standard_errors[name]
        assert made.coefficients[name] == pytest.approx(value, abs=3 * error), name
    assert made.standard_errors["tau"] < 0.1
    c = grid()
    error = np.abs(made.predict(**c) - gap_of(c, tau))
    assert np.all(error < 0.02 * (1 + gap_of(c, tau)))  # twice the noise


def test_covariates_are_factors_on_over_fitting_and_dropout_moves_the_training_loss():
    effects = {"by_weight_decay": -5.0, "by_dropout": -4.0, "fresh_by_dropout": -0.3}
    runs = table(0.0, sd=0.003, covariates=BOTH, **effects)
    target = {"params": 4e6, "total_params": 6e6, "tokens": 4e7, "unique_tokens": 1e6}
    target |= {"weight_decay": 0.05, "dropout": 0.1}
    made = fit_law(runs, "gap", np.inf, target=target)
    for name, value in (TRUTH | effects).items():
        error = made.standard_errors[name]
        assert made.coefficients[name] == pytest.approx(value, abs=3 * error), name
    assert made.standard_errors["by_weight_decay"] < 0.5
    truth = gap_of({k: np.array(v) for k, v in target.items()}, 0.0, **effects)
    assert made.derived["gap"] == pytest.approx(truth, abs=0.01)
    assert made.derived["gap"] == pytest.approx(made.predict(**target).item(), rel=1e-9)
    # 1 + c at the target's dropout
    fresh = TRUTH["fresh"] * np.exp(-0.03) - 1
    assert made.derived["gap_fresh"] == pytest.approx(fresh, abs=0.005)
    without = {k: v for k, v in target.items() if k not in BOTH}
    assert "gap" not in fit_law(runs, "gap", np.inf, target=without).derived


@pytest.mark.parametrize("name", ["data_constrained_b2", "joint", "gap"])
def test_gradients_with_covariates_are_exact_and_units_change_nothing(name):
    columns = grid(settings=True) | {"router": np.where(np.arange(162) % 3, "top2", "soft")}
    law = law_for(name, columns, BOTH)
    centre = Centre(15.0, 15.5)
    x = law.inputs(columns, centre)
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.1, 0.9, (3, len(law.parameters)))
    exact, step = law.jacobian(theta, x), 1e-6
    for k in range(theta.shape[1]):
        move = step * np.eye(theta.shape[1])[k]
        slope = (law.log_loss(theta + move, x) - law.log_loss(theta - move, x)) / (2 * step)
        np.testing.assert_allclose(exact[:, :, k], slope, rtol=1e-6, atol=2e-8)
    natural = law.inputs(columns, Centre())
    np.testing.assert_allclose(law.log_loss(law.shift(theta, centre), natural),
                               law.log_loss(theta, x), rtol=1e-9)  # fmt: skip


def test_covariates_of_a_law_of_the_loss():
    """A factor of the term, by hand; the optimum moves with it."""
    columns = grid(settings=True)
    law = law_for("data_constrained_b2", columns, ("dropout",))
    values = {"E": 1.0, "A": 40.0, "B": 30.0, "alpha": 0.3, "beta": 0.3, "P": 0.01,
              "delta": 0.5, "kappa": 0.6, "by_dropout": -6.0}  # fmt: skip
    c, repeats = columns, columns["tokens"] / columns["unique_tokens"] - 1
    over = 0.01 * repeats**0.5 * (c["params"] / c["unique_tokens"]) ** 0.6
    expected = 1 + 40 * c["params"] ** -0.3 + 30 * c["tokens"] ** -0.3
    expected += over * np.exp(-6 * c["dropout"])
    np.testing.assert_allclose(law.predict(values, columns), expected)
    runs = Runs(columns | {"loss": expected}, tuple(map(str, c["params"])), covariates=("dropout",))
    target = {"tokens": 5e7, "unique_tokens": 1e6}
    made = fit_law(runs, "data_constrained_b2", 1e-3, target=target | {"dropout": 0.2})
    assert made.coefficients["by_dropout"] == pytest.approx(-6.0, rel=1e-3)
    # alpha A N^-alpha = kappa P' R^delta (N/U)^kappa
    factor = 0.01 * np.exp(-1.2) * 49**0.5 * 1e6**-0.6
    best = (0.3 * 40 / (0.6 * factor)) ** (1 / 0.9)
    assert made.derived["N_star"] == pytest.approx(best, rel=1e-3)
    assert "N_star" not in fit_law(runs, "data_constrained_b2", 1e-3, target=target).derived


def test_dense_runs_do_not_tell_active_from_total():
    runs = table(0.0)
    dense = runs.take(runs["experts"] == 1)
    said = verdict(compare(dense, ["gap_active", "gap_total"], np.inf))
    assert "cannot tell it from" in said and "less supported" not in said
    made = fit_law(dense, "gap", np.inf)
    assert made.verdicts["tau"].startswith("not identified")


FACTORS = {"top2": 0.5, "choice": -0.5}  # v of each router


def routed(tau, seed=0, sd=0.02, experts=(8.0, 64.0), factors=None):
    """The table with the mixtures of two routers, which over-fit by themselves as well."""
    plain = table(tau, seed, 0.0)
    kept = np.isin(plain["experts"], (1.0, *experts))
    parts = [plain.take(plain["experts"] == 1), *([plain.take(kept & (plain["experts"] > 1))] * 2)]
    columns = {c: np.concatenate([p[c] for p in parts]) for c in plain.columns}
    names = np.repeat(["dense", "top2", "choice"], [len(p) for p in parts])
    factor = np.exp([(factors or FACTORS).get(name, 0.0) for name in names])
    over = gap_of(columns, tau) - (TRUTH["fresh"] - 1)
    noise = sd * np.random.default_rng(seed).standard_normal(names.size)
    gap = TRUTH["fresh"] - 1 + factor * over + noise
    columns |= {"router": names, "loss": columns["train_loss"] + gap}
    return Runs(columns, tuple(map(str, range(names.size))))


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_what_a_router_does_by_itself_is_no_number_of_parameters(tau, tmp_path):
    """tau and the factors come back, and a saved fit knows them."""
    made = fit_law(routed(tau, sd=0.01), "gap", np.inf)
    truth = TRUTH | {"tau": tau} | {f"v[{name}]": v for name, v in FACTORS.items()}
    assert made.status == "converged"
    for name, value in truth.items():
        error = made.standard_errors[name]
        assert made.coefficients[name] == pytest.approx(value, abs=3 * error), name
    assert made.standard_errors["tau"] < 0.1 and made.standard_errors["v[top2]"] < 0.2
    made.save(tmp_path)
    at = {"params": 4e6, "total_params": 1.8e7, "tokens": 6e7, "unique_tokens": 1e6}
    expected = gap_of({k: np.array(v) for k, v in at.items()}, tau) - (TRUTH["fresh"] - 1)
    saved = load(tmp_path)
    for name, v in FACTORS.items():
        gap = saved.predict(**at, router=name) - saved.coefficients["fresh"] + 1
        assert gap.item() == pytest.approx(np.exp(v) * expected, rel=0.1)


def test_routers_of_one_number_of_experts_do_not_tell_active_from_total():
    """Their factor e^.5 is as good an explanation as their parameters: no false alarm."""
    both = {"top2": 0.5, "choice": 0.5}
    for tau in (0.0, 1.0):
        runs = routed(tau, experts=(8.0,), factors=both)
        said = verdict(compare(runs, ["gap_active", "gap_total"], np.inf))
        assert "less supported" not in said
        for missing in ({"router"}, {"router", "experts"}):  # one router that has no name
            unnamed = {k: v for k, v in runs.columns.items() if k not in missing}
            said = verdict(compare(Runs(unnamed, runs.source), ["gap_active", "gap_total"], np.inf))
            assert "less supported" not in said


def alarms(tables, sd, made=table):
    """Verdicts that count the truth as less supported, and those that find it, of 2 x tables."""
    false = found = 0
    for tau, true in ((0.0, "gap_active"), (1.0, "gap_total")):
        for seed in range(tables):
            said = verdict(compare(made(tau, seed, sd), ["gap_active", "gap_total"], np.inf))
            false += f"{true} (" in said.partition("less supported")[2]
            found += said.startswith(f"The data support {true};")
    return false, found


def test_the_verdict_names_what_over_fits():
    assert alarms(1, 0.02) == (0, 2)


@pytest.mark.slow
def test_the_verdict_raises_no_false_alarm():
    """The noise is as large as nearly all gaps: the verdict may be open, not wrong."""
    assert alarms(3, 0.02) == (0, 6)
    false, found = alarms(30, 0.3)
    assert false <= 3 and found < 30  # of 60


@pytest.mark.slow
def test_the_verdict_raises_no_false_alarm_between_routers():
    assert alarms(6, 0.02, routed) == (0, 12)
    false, _ = alarms(15, 0.1, routed)
    assert false <= 2  # of 30
    alike = partial(routed, experts=(8.0,), factors={"top2": 0.5, "choice": 0.5})
    assert alarms(15, 0.02, alike) == (0, 0)


def write_csv(path, runs, **more):
    columns = runs.columns | more
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, r)) for r in rows)]) + "\n")
    return path


def fit(*flags):
    return main(["moe_ablm", "fit", "--bootstrap", "30", *map(str, flags)])


def test_the_command_line(tmp_path, capsys):
    runs = table(1.0, covariates=BOTH, by_weight_decay=-5.0)
    columns = dict(runs.columns)
    columns["train_loss_final"] = columns.pop("train_loss")  # as sweeps.collect calls it
    source = write_csv(tmp_path / "runs.csv", Runs(columns, runs.source))
    out = tmp_path / "out"
    flags = ("--input", source, "--law", "gap_total", "--covariates", "weight_decay,dropout")
    assert fit(*flags, "--out", out) == 0
    assert "by_weight_decay" in capsys.readouterr().out
    assert (out / "figures" / "gap_against_repeats.svg").exists()
    saved, c = load(out), grid(settings=True)
    expected = gap_of(c, 1.0, by_weight_decay=-5.0)
    assert np.abs(saved.predict(**c) - expected).max() < 0.1 * np.ptp(expected)
    with pytest.raises(UserError, match=r"needs weight_decay="):
        saved.predict(**grid())
    assert json.loads((out / "fit.json").read_text())["covariates"] == list(BOTH)


@pytest.mark.slow
def test_a_comparison_names_the_laws_that_covariates_leave_out(tmp_path, capsys):
    source = write_csv(tmp_path / "runs.csv", table(0.0, covariates=BOTH))
    flags = ("--input", source, "--law", "compare", "--covariates", "dropout")
    assert fit(*flags, "--out", tmp_path / "out") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Left out")]
    assert "dropout: quadratic, chinchilla" in line and "joint" not in line


def test_settings_that_laws_know_are_no_choice_of_the_best(tmp_path):
    source = write_csv(tmp_path / "runs.csv", table(0.0, covariates=BOTH))
    assert len(read_runs([source])) == 54  # the best setting of each cell
    both = read_runs([source], Reading(covariates=BOTH, gaps=True))
    assert len(both) == 162 and np.unique(both.cells()).size == 162
    assert len(read_runs([source], Reading(covariates=("dropout",)))) == 108


def test_bad_input_is_one_line(tmp_path, capsys):
    runs = table(0.0)
    source = write_csv(tmp_path / "runs.csv", runs)
    swapped = {"train_loss": runs["loss"], "loss": runs["train_loss"] / 10}
    wrong = write_csv(tmp_path / "wrong.csv", Runs(runs.columns | swapped, runs.source))
    lacking = {k: v for k, v in runs.columns.items() if k != "train_loss"}
    none = write_csv(tmp_path / "none.csv", Runs(lacking, runs.source))
    one = write_csv(tmp_path / "one.csv", runs, dropout=np.full(54, 0.1))
    gap = ("--law", "gap", "--input")
    for flags, said in (
        ((*gap, wrong), "are the columns swapped"),
        ((*gap, none), "needs the column 'train_loss'"),
        ((*gap, source, "--covariates", "lr"), "--covariates lr: expected some of weight_decay"),
        ((*gap, source, "--covariates", "dropout"), "needs the column 'dropout'"),
        ((*gap, one, "--covariates", "dropout"), "every run has 0.1"),
        (("--law", "chinchilla", "--input", source, "--covariates", "dropout"), "no over-fitting"),
        ((*gap, source, "--law", "chinchilla"), "gap is of the train-valid gap"),
        ((*gap, source, "--advise", "--max-flops", "1e15"), "least gap is not the best one"),
    ):
        assert fit(*flags, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_runs_without_a_training_loss_have_no_gap(tmp_path):
    """And count in every other law."""
    loss = table(0.0)["train_loss"].astype(object)
    loss[0] = ""
    source = write_csv(tmp_path / "runs.csv", table(0.0), train_loss=loss)
    assert len(read_runs([source])) == 54
    runs = read_runs([source], Reading(gaps=True))
    assert len(runs) == 53 and runs.dropped == ((f"{source}, row 2", "column 'train_loss': empty"),)


def test_folders_of_runs_know_dropout_and_training_loss(tmp_path):
    assert READ == DROPOUTS
    for i, rate in enumerate((0.0, 0.3)):
        folder = tmp_path / f"r{i}"
        folder.mkdir()
        record = {"status": "complete", "params_active": 1e6, "params_total": 1e6, "seed": 0,
                  "tokens_seen": 1e7, "unique_tokens": 1e6, "valid_loss_final": 2.0 + i,
                  "train_loss_final": 1.5}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record))
        model = dict.fromkeys(DROPOUTS, rate)
        config = {"config": {"train": {"lr": 1e-3, "weight_decay": 0.01}, "model": model}}
        (folder / "config.json").write_text(json.dumps(config))
    runs = read_runs([tmp_path], Reading(gaps=True, covariates=("dropout",)))
    np.testing.assert_allclose(runs["dropout"], [0.0, 0.3])
    assert runs["train_loss"].tolist() == [1.5, 1.5]
    assert read_runs([tmp_path])["loss"].tolist() == [2.0]  # they are no seeds


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.05, 0.7])
def test_equal_rates_of_dropout_are_that_rate(tmp_path, rate):
    path = tmp_path / "config.json"
    model = dict.fromkeys(DROPOUTS, rate)
    path.write_text(json.dumps({"config": {"train": {}, "model": model}}))
    assert settings_of(path) == {"dropout": rate}


@pytest.mark.parametrize("given", [{}, {"hidden_dropout": 0.3}], ids=["none", "one"])
def test_configs_of_before_dropout_had_none(tmp_path, given):
    """Beside newer runs they would take the column off all, and make seeds of other settings."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"train": {"lr": 1e-3}, "model": given}}))
    expected = {"lr": 1e-3, "dropout": pytest.approx(sum(given.values()) / 3)}
    assert settings_of(path) == expected


def test_a_grid_is_checked_without_losses():
    design = check_design(table(0.0, covariates=BOTH), "gap", 0.01)
    assert design.identifiable["by_dropout"] and design.identifiable["tau"]
    dense = grid(settings=True)
    dense["total_params"] = dense["params"]
    planned = Runs(dense, ("",) * 162, covariates=BOTH)
    assert not check_design(planned, "gap", 0.01).identifiable["tau"]


def test_advice_is_at_the_dropout_of_the_target():
    columns = grid(settings=True)
    values = {"E": 1.0, "A": 40.0, "B": 30.0, "alpha": 0.3, "beta": 0.3, "P": 0.01,
              "delta": 0.5, "kappa": 0.6, "by_dropout": -6.0}  # fmt: skip
    loss = law_for("data_constrained_b2", columns, ("dropout",)).predict(values, columns)
    loss = loss * np.exp(1e-3 * np.random.default_rng(0).standard_normal(loss.size))
    runs = Runs(columns | {"loss": loss}, tuple(map(str, loss)), covariates=("dropout",))
    made = fit_law(runs, "data_constrained_b2", np.inf, target={"dropout": 0.0})
    boot, limits = bootstrap(made, 20), Limits(1e16, unique_tokens=1e6)
    n, share = np.meshgrid(np.geomspace(1e5, 1.3e8, 500), 0.5 ** np.arange(8))
    d = 1e16 / (6 * n) * share
    for rate in (0.0, 0.2):
        over = np.maximum(d / 1e6 - 1, 0) ** 0.5 * (n / np.minimum(d, 1e6)) ** 0.6
        truth = 1 + 40 * n**-0.3 + 30 * d**-0.3 + 0.01 * np.exp(-6 * rate) * over
        advice = advise(replace(made, target={"dropout": rate}), boot, limits)
        assert np.median(advice.loss) == pytest.approx(truth.min(), rel=0.01)
        best = n.ravel()[truth.argmin()]
        assert np.median(advice.params) == pytest.approx(best, rel=0.25)
    with pytest.raises(UserError, match=r"depends on dropout; --target dropout="):
        advise(replace(made, target={}), boot, limits)
