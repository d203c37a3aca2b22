"""Cells at the learning rates of a fitted law."""

import numpy as np
import pytest

from launch.cell import config_of
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.laws_settings import LearningRate
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.tuning import fit_tuning
from sweeps import scaling
from sweeps.planned import read_plan
from sweeps.study import main

SMALL = ["--data=simulated", "--config.data.simulated_pairs=400", "--seeds=1", "--launcher=print"]
SIZES = (6e4, 1.5e5, 5e5, 1.3e6)


def best(n):
    return 3e-3 * (np.asarray(n) / 6e4) ** -0.4


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    """A fit of sweeps whose best rate is `best`."""
    rates = 7.5e-4 * 2.0 ** np.arange(5)
    n, lr = (a.ravel() for a in np.meshgrid(SIZES, rates))
    loss = 2.0 + 0.05 * np.log(lr / best(n)) ** 2
    columns = {"params": n, "tokens": np.full(n.size, 1.2e6), "lr": lr, "loss": loss}
    out = tmp_path_factory.mktemp("fit")
    fit_tuning(Runs(columns, tuple(map(str, range(n.size)))), LearningRate(), draws=0).save(out)
    return out


def test_each_size_of_a_ladder_has_the_rate_of_the_law(law, tmp_path, capsys):
    out = tmp_path / "runs"
    flags = [*SMALL, "--ladder=micro", "--routers=dense,top2", f"--out={out}"]
    assert main(scaling.study, [*flags, f"--rate-law={law}"]) == 0
    told = capsys.readouterr().out
    _, cells = read_plan(out)
    assert {p.axes["router"] for p in cells} == {"dense", "top2"}
    rates = {p.params_active: config_of(p.cell.argv).train.lr for p in cells}
    assert len(rates) == 10
    for n, rate in rates.items():
        assert rate == pytest.approx(best(n), rel=0.01) and rate == float(f"{rate:.3g}")
    assert f"learning rates by {law} (active" in told and "lie more than" not in told


def test_sizes_far_from_those_of_the_fit_are_warned_of(law, tmp_path, capsys):
    flags = [*SMALL, "--ladder=mini", "--routers=dense", f"--out={tmp_path}", "--dry-run"]
    assert main(scaling.study, [*flags, f"--rate-law={law}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "12 of 15 cells lie more than 2 times outside the params of the fit, 60,000 to" in told


def test_a_size_of_several_lengths_has_several_rates(tmp_path, capsys):
    """Four times the tokens, half the rate; and tokens that no cell of the fit had are told."""
    rates = 7.5e-4 * 2.0 ** np.arange(5)
    grids = np.meshgrid(SIZES, (1.2e6, 4.8e6, 2e7), rates)
    n, d, lr = (a.ravel() for a in grids)
    loss = 2.0 + 0.05 * np.log(lr / (best(n) * (d / 4.8e6) ** -0.5)) ** 2
    columns = {"params": n, "tokens": d, "lr": lr, "loss": loss}
    out = tmp_path / "fit"
    fit_tuning(Runs(columns, tuple(map(str, range(n.size)))), LearningRate(), draws=0).save(out)
    flags = [*SMALL, "--ladder=micro", "--routers=dense", "--add=branches", "--dry-run"]
    assert main(scaling.study, [*flags, f"--out={tmp_path}", f"--rate-law={out}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    first = told.split("(active parameters): ")[1].split(" (")[0].split(" to ")
    low, high = map(float, first)
    assert high / low == pytest.approx(8**0.5, rel=0.02)  # a branch has an eighth of the updates
    assert "lie more than 2 times outside the tokens of the fit, 1,200,000 to 20,000,000" in told


def test_what_is_no_law_of_rates_is_refused_in_a_line(law, tmp_path, capsys):
    flags = [*SMALL, "--ladder=micro", f"--out={tmp_path / 'runs'}"]
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e8, 1e9, 4)))
    runs = Runs({"params": n, "tokens": d, "loss": 1 + 480 * n**-0.35 + 2100 * d**-0.37},
                tuple(map(str, range(n.size))))  # fmt: skip
    fit_law(runs, "chinchilla").save(tmp_path / "other")
    for given, words in (
        (tmp_path / "other", "a fit of law chinchilla, expected learning_rate"),
        (tmp_path / "nothing", "not a readable fit"),
    ):
        assert main(scaling.study, [*flags, f"--rate-law={given}"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err
    assert main(scaling.study, [*flags, f"--rate-law={law}", "--config.train.lr=1e-3"]) == 2
    assert "--config.train.lr is what this study varies" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
