"""The power of a planned grid: monotone in seeds, false alarms, what is enough, refusals."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from moe_ablm.__main__ import main
from moe_ablm.errors import UserError
from moe_ablm.scaling import power
from moe_ablm.scaling.runs import Runs


def grid(experts=(4, 16), data=(8e7, 3e8), tokens=6e8):
    cells = [(n, u, e) for n in (1e6, 4e6, 1.6e7) for u in data for e in (1, *experts)]
    n, u, e = (np.array(c, float) for c in zip(*cells, strict=True))
    columns = {
        "params": n,
        "total_params": n * (1 + 0.5 * (e - 1)),
        "tokens": np.full(n.size, tokens),
        "unique_tokens": u,
        "experts": e,
        "router": np.where(e > 1, "top2", "dense"),
    }
    return Runs(columns, tuple(map(str, range(n.size))))


@pytest.fixture(scope="module")
def noisy():
    """A grid too noisy to tell with a seed, and more seeds; with one number of experts, and two."""
    return power.power_table(grid(), 0.15, draws=16, seeds=(1, 64), wanted=1.01)


def test_more_seeds_tell_more(noisy):
    shares = [p.power for p in noisy[2:]]
    assert [p.runs for p in noisy] == [12, 768, 18, 1152]
    assert shares == sorted(shares)
    assert shares[0] < 0.7 and shares[-1] > 0.9


def test_one_number_of_experts_tells_nothing(noisy):
    """A factor of the router explains as much as its parameters, however many seeds there are."""
    assert [p.experts for p in noisy[:2]] == [(16,), (16,)]
    assert all(p.power < 0.3 for p in noisy[:2])


def test_what_is_enough_is_said(noisy):
    assert "1152 runs are enough" in power.needed(noisy)
    assert power.needed(noisy[:1]).startswith("no grid tells tau = 0 from tau = 1 in 90%")


def test_intervals_of_shares_are_those_of_scipy(noisy):
    for p in noisy:
        for share, low, high in (*p.told.values(), *p.false_alarms.values()):
            exact = binomtest(round(16 * share), 16).proportion_ci(method="exact")
            assert (low, high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("draws", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_true_tau_of_0_is_seldom_told_as_1(draws):
    found = power.power_table(grid(), 0.02, draws=draws, seed=5, seeds=(1,))[-1]
    assert found.experts == (4, 16)
    assert found.false_alarms[0][0] <= 0.05
    assert found.power == 1.0


def test_the_command_line(tmp_path, capsys):
    path = tmp_path / "grid.csv"
    columns = grid().columns
    rows = zip(*(c.tolist() for c in columns.values()), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, r)) for r in rows)]) + "\n")
    flags = ["moe_ablm", "fit", "--design", "--input", str(path), "--seed-sd", "0.01"]
    out = tmp_path / "out"
    assert main([*flags, "--law", "joint", "--power", "10", "--out", str(out)]) == 0
    assert "18 runs are enough to tell tau = 0 from tau = 1" in capsys.readouterr().out
    saved = json.loads((out / "power.json").read_text())
    assert saved["rows"][-1]["experts"] == [4, 16] and saved["rows"][0]["draws"] == 10
    no = str(tmp_path / "no")
    assert main([*flags, "--law", "chinchilla", "--power", "10", "--out", no]) == 2
    assert "law chinchilla has no tau" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_grids_that_say_nothing_of_tau():
    with pytest.raises(UserError, match="no planned run with experts sees its data more than once"):
        power.power_table(grid(data=(6e8,)), 1e-2)
    with pytest.raises(UserError, match="expected at least one draw"):
        power.power_table(grid(), 1e-2, draws=0)
