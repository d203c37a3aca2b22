"""Laws of whole curves: schedules against optax, areas against the paper's sums, recovery."""

import json

import numpy as np
import pytest

from moe_ablm.errors import UserError
from moe_ablm.scaling import fit_law, read_runs
from moe_ablm.scaling.reading import Reading
from moe_ablm.scaling.resampling import bootstrap
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.schedules import MEMORY, path_of, rates
from moe_ablm.training.spec import SCHEDULES

TRUTH = {"E": 1.2, "A": 0.9, "alpha": 0.45, "C": 250.0}


def train(schedule="cosine", steps=3000, lr=1e-3, warmup=100, decay_share=0.2):
    return {"schedule": schedule, "steps": steps, "lr": lr, "warmup": warmup,
            "decay_share": decay_share}  # fmt: skip


@pytest.mark.parametrize("restarts", [(), (21,)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_the_optimizer_after_the_warm_up(schedule, restarts):
    from moe_ablm.training.optimizer import make_schedule
    from moe_ablm.training.spec import OptimizerSpec

    given = train(schedule, steps=50, warmup=7) | {"restarts": restarts}
    spec = OptimizerSpec(**given, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.0, clip=1.0)
    expected = np.array([make_schedule(spec)(i) for i in range(50)])
    ours = rates(given)
    np.testing.assert_allclose(ours[7:], expected[7:], atol=1e-9)
    np.testing.assert_array_equal(ours[:7], 1e-3)


def test_the_recent_rate_is_what_annealing_has_left():
    """S2 by the double sum of the paper, equation 1."""
    eta = rates(train("linear", steps=40, warmup=3))
    area, recent = path_of(eta)
    before = np.concatenate([eta[:1], eta[:-1]])
    for t in (1, 10, 40):
        drops = before[:t] - eta[:t]
        s2 = sum(drops[k] * MEMORY ** (i - k) for i in range(t) for k in range(i + 1))
        assert recent[t - 1] == pytest.approx(eta[0] - (1 - MEMORY) * s2, rel=1e-9)
        assert area[t - 1] == pytest.approx(eta[:t].sum())


def curve(name, settings, params=1e7, every=150, truth=TRUTH, sd=2e-3, seed=0):
    """Columns of a simulated run: a loss at every `every` updates."""
    area, recent = path_of(rates(settings))
    at = np.arange(every, settings["steps"] + 1, every) - 1
    loss = truth["E"] + truth["A"] * area[at] ** -truth["alpha"] + truth["C"] * recent[at]
    if "B" in truth:
        loss = loss + truth["B"] * params ** -truth["beta"]
    loss = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(at.size))
    return {"run": np.full(at.size, name), "params": np.full(at.size, params),
            "tokens": 1e4 * (at + 1.0), "lr_area": area[at], "lr_recent": recent[at],
            "loss": loss}  # fmt: skip


def runs_of(curves):
    columns = {k: np.concatenate([c[k] for c in curves]) for k in curves[0]}
    return Runs(columns, tuple(map(str, columns["run"])))


def test_coefficients_come_back_and_a_schedule_not_seen_is_predicted():
    """Better than Chinchilla on the ends of runs, which knows no schedule."""
    seen = [train("cosine", s) for s in (1500, 3000, 6000)] + [train("wsd", 3000)]
    curves = [curve(f"r{i}", s, seed=i) for i, s in enumerate(seen)]
    made = fit_law(runs_of(curves), "annealing")
    assert made.status == "converged"
    for name, value in TRUTH.items():
        assert made.coefficients[name] == pytest.approx(value, rel=0.06), name
    held = curve("held", train("wsd", 5000, decay_share=0.5), sd=0.0)
    error = np.abs(np.log(made.predict(**{k: held[k] for k in made.law.needs[:-1]}) / held["loss"]))
    ends = [{k: v[-1:] for k, v in c.items()} for c in curves]
    plain = fit_law(runs_of(ends), "chinchilla", fixed={"A": 1e-6, "alpha": 0.3})
    missed = np.abs(np.log(plain.predict(params=1e7, tokens=held["tokens"]) / held["loss"]))
    assert error.max() < 0.004 < 0.02 < missed.max()
    assert error.mean() < 0.2 * missed.mean()


def test_draws_are_of_whole_runs():
    curves = [curve(f"r{i}", train("cosine", 1500 + 500 * i), seed=i) for i in range(6)]
    made = fit_law(runs_of(curves), "annealing")
    drawn = bootstrap(made, 100, seed=0)
    assert "run" in drawn.scheme and len(drawn.usable) >= 95


def test_sizes_share_the_schedule():
    truth = TRUTH | {"E": 0.9, "B": 60.0, "beta": 0.32}
    curves = [
        curve(f"r{i}{j}", train(schedule, 2000), n, truth=truth, sd=1e-3, seed=10 * i + j)
        for i, n in enumerate((2e6, 8e6, 3e7, 1e8))
        for j, schedule in enumerate(("cosine", "wsd"))
    ]
    made = fit_law(runs_of(curves), "annealing_sizes")
    assert made.status == "converged"
    for name in ("alpha", "C", "beta"):
        assert made.coefficients[name] == pytest.approx(truth[name], rel=0.15), name


def write_run(directory, settings):
    directory.mkdir()
    simulated = curve("x", settings)
    lines = [
        {"kind": "eval", "step": 150 * (i + 1), "loss": float(v), "tokens_seen": 1e4 * (i + 1)}
        for i, v in enumerate(simulated["loss"])
    ]
    (directory / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    record = {"status": "complete", "params_active": 1e7, "tokens_seen": 2e5,
              "unique_tokens": 2e5, "valid_loss_final": 1.0}  # fmt: skip
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "config.json").write_text(json.dumps({"config": {"train": settings}}))
    return simulated


def test_run_directories_know_their_schedules(tmp_path):
    expected = write_run(tmp_path / "a", train("wsd"))
    runs = read_runs([tmp_path], Reading(curves=True))
    np.testing.assert_allclose(runs["lr_area"], expected["lr_area"])
    np.testing.assert_allclose(runs["lr_recent"], expected["lr_recent"])
    (tmp_path / "a" / "config.json").write_text('{"config": {"train": {"steps": 3}}}')
    with pytest.raises(UserError, match=r"config.json: the schedule is not readable"):
        read_runs([tmp_path], Reading(curves=True))


def test_the_command_line(tmp_path, capsys):
    from moe_ablm.__main__ import main

    (tmp_path / "runs").mkdir()
    for i, steps in enumerate((1500, 3000, 4500)):
        write_run(tmp_path / "runs" / f"r{i}", train("cosine", steps))
    out = tmp_path / "out"
    assert main(["moe_ablm", "fit", "--input", str(tmp_path / "runs"), "--law", "annealing",
                 "--bootstrap", "40", "--out", str(out)]) == 0  # fmt: skip
    assert "alpha" in capsys.readouterr().out
    assert (out / "figures" / "loss_against_area.svg").exists()


def test_a_schedule_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'rsqrt' is not known"):
        rates(train("rsqrt"))
