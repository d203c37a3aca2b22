"""Rate sweeps in stages: what a cell lacks, and that stopping early costs nothing."""

import json

import numpy as np
import pytest

from moe_ablm.__main__ import main
from moe_ablm.scaling.laws_settings import LearningRate
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.tuning import fit_tuning
from moe_ablm.scaling.tuning_next import step_of, to_try

RATES = 7.5e-4 * 2.0 ** np.arange(7)  # those of docs/sweeps.md
SIZES = (60_705, 156_513, 460_257, 814_369, 1_268_833)  # the micro ladder, dense


def best_rate(n):
    return 4e-3 * (np.asarray(n) / 4e5) ** -0.35


def losses(sd, seed):
    """Of each size at each rate `[5, 7]`, with one seed."""
    rng = np.random.default_rng(seed)
    x = np.log(RATES / best_rate(SIZES)[:, None])
    clean = (1 + 40 * np.array(SIZES)[:, None] ** -0.3) * (1 + 0.03 * x**2 * np.exp(0.25 * x))
    return clean * np.exp(sd * rng.standard_normal(x.shape))


def sequential(loss):
    """Rates that each size runs: the middle three, then what `to_try` asks for, to the ends."""
    done = [[2, 3, 4] for _ in SIZES]
    for mine, row in zip(done, loss, strict=True):
        while True:
            wanted = to_try(RATES[mine], row[mine], 2.0)
            more = [i for i, r in enumerate(RATES) if np.isclose(wanted, r).any()]
            if not more:
                break
            mine += more
    return done


def law_of(loss, done):
    at = [(i, j) for i, mine in enumerate(done) for j in mine]
    columns = {
        "params": np.array([SIZES[i] for i, _ in at], float),
        "tokens": np.full(len(at), 1.2e6),
        "lr": np.array([RATES[j] for _, j in at]),
        "loss": np.array([loss[i, j] for i, j in at]),
    }
    return fit_tuning(Runs(columns, tuple(map(str, at))), LearningRate(), draws=0)


def test_what_decides_a_cell():
    assert to_try([1, 2, 4], [3.0, 2.0, 3.0], 2.0) == pytest.approx([0.5, 8])
    assert to_try([4, 1, 2], [1.0, 3.0, 2.0], 2.0) == pytest.approx([8, 16])
    assert to_try([1, 2, 4, 8, 16], [3.0, 2.0, 1.0, 2.0, 3.0], 2.0) == []
    # a hole beside the lowest, where there are two values further away
    assert to_try([1, 4, 8, 64, 128], [3.0, 2.0, 1.0, 2.0, 3.0], 2.0) == []
    assert step_of([[1, 2, 4], [8, 4, 2], [1, 4]]) == pytest.approx(2.0)
    assert step_of([[3.0]]) == 2.0


def test_a_sweep_in_stages_ends_with_the_law_of_the_whole_grid():
    """5 of 7 rates a size; errors of the exponent over 25 sweeps are those of all rates."""
    errors = []
    for seed in range(25):
        loss = losses(0.01, seed)
        done = sequential(loss)
        assert sum(map(len, done)) <= 27  # of 35
        whole = law_of(loss, [range(7)] * 5)
        errors.append([law_of(loss, done).coefficients["by_params"] + 0.35,
                       whole.coefficients["by_params"] + 0.35])  # fmt: skip
    early, whole = np.sqrt(np.mean(np.square(errors), axis=0))
    assert early < 1.25 * whole and early < 0.06


def write_runs(folder, loss, done):
    for i, mine in enumerate(done):
        for j in mine:
            run = folder / f"s{i}-{j}"
            run.mkdir(parents=True)
            summary = {"status": "complete", "params_active": SIZES[i], "params_total": SIZES[i],
                       "tokens_seen": 1.2e6, "unique_tokens": 1e6, "valid_loss_final": loss[i, j],
                       "seed": 0}  # fmt: skip
            (run / "run.json").write_text(json.dumps(summary))
            train = {"lr": RATES[j], "batch": 4, "weight_decay": 0.01}
            (run / "config.json").write_text(json.dumps({"config": {"train": train}}))


def test_a_folder_of_runs_says_which_are_left(tmp_path, capsys):
    """Three rates first: the error, or the notes, name what each size lacks."""
    loss = losses(0.0, 0)
    write_runs(tmp_path / "begun", loss, [[0, 1, 2]] * 4)
    fit = ["moe_ablm", "fit", "--law", "learning_rate", "--bootstrap", "0", "--input"]
    assert main([*fit, str(tmp_path / "begun"), "--out", str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert "cell N 6.07e+04, D 1.2e+06: lowest at 0.003; its minimum needs 0.006, 0.012" in told
    done = sequential(loss)
    write_runs(tmp_path / "runs", loss, done)
    assert main([*fit, str(tmp_path / "runs"), "--out", str(tmp_path / "fit")]) == 0
    assert "no others need be run" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "fit" / "fit.json").read_text())["coefficients"]
    assert found["by_params"] == pytest.approx(-0.35, abs=0.02)
    bent = tmp_path / "bent"  # rates enough, of a valley that is none
    write_runs(bent, np.array([[1.0, 1.3, 0.99, 1.3, 1.0]]), [range(5)])
    assert main([*fit, str(bent), "--out", str(tmp_path / "y")]) == 2
    said = capsys.readouterr().err
    assert "0 cells have a minimum" in said and "no others" not in said
