"""The law of active parameters, tokens and experts: its value, dense runs, recovery."""

import numpy as np
import pytest

from moe_ablm.scaling import fit_law
from moe_ablm.scaling.catalogue import applicable, law_for
from moe_ablm.scaling.runs import Runs

TRUTH = {"E": 1.6, "A": 300.0, "B": 1500.0, "alpha": 0.32, "beta": 0.36, "delta": -0.35,
         "gamma": -0.01, "omega": 0.3, "zeta": 0.012, "E_max": 250.0}  # fmt: skip


def grid(sd, seed=0):
    n, d, e = np.meshgrid(
        np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 3e11, 5), [1.0, 4.0, 16.0, 64.0]
    )
    columns = {"params": n.ravel(), "tokens": d.ravel(), "experts": e.ravel()}
    loss = by_hand(**columns) * np.exp(sd * np.random.default_rng(seed).standard_normal(n.size))
    return Runs(columns | {"loss": loss}, tuple(map(str, range(n.size))))


def by_hand(params, tokens, experts):
    t = TRUTH
    offset = 1 / (1 - 1 / t["E_max"])
    effective = 1 / (1 / (experts - 1 + offset) + 1 / t["E_max"])
    log = np.log(effective)
    return (
        t["E"]
        + t["A"] * effective ** t["delta"] * params ** -(t["alpha"] + t["gamma"] * log)
        + t["B"] * effective ** t["omega"] * tokens ** -(t["beta"] + t["zeta"] * log)
    )


def test_the_value_is_that_of_the_formula_and_dense_runs_are_chinchilla():
    runs = grid(0.0)
    law = law_for("moe_experts", runs.columns)
    np.testing.assert_allclose(law.predict(TRUTH, runs.columns), runs["loss"], rtol=1e-12)
    dense = {k: v[runs["experts"] == 1] for k, v in runs.columns.items()}
    plain = law_for("chinchilla", {}).predict(TRUTH, dense)
    np.testing.assert_allclose(law.predict(TRUTH, dense), plain, rtol=1e-12)


def test_coefficients_come_back():
    made = fit_law(grid(5e-4), "moe_experts")
    assert made.status == "converged"
    for name in ("E", "alpha", "beta"):
        assert made.coefficients[name] == pytest.approx(TRUTH[name], rel=0.03), name
    for name in ("gamma", "zeta"):
        assert made.coefficients[name] == pytest.approx(TRUTH[name], abs=0.01), name
    # sizes not seen, and a number of experts between those seen
    there = {"params": np.array([3e10, 3e8]), "tokens": np.array([1e12, 1e10]),
             "experts": np.array([32.0, 8.0])}  # fmt: skip
    np.testing.assert_allclose(made.predict(**there), by_hand(**there), rtol=2e-3)


def test_one_number_of_experts_holds_e_max_and_dense_runs_alone_are_not_its_business():
    runs = grid(5e-4)
    made = fit_law(runs.take(runs["experts"] <= 4), "moe_experts")
    assert made.verdicts["E_max"] == "fixed"
    dense = runs.take(runs["experts"] == 1)
    assert "moe_experts" in applicable(runs.columns)
    assert "moe_experts" not in applicable(dense.columns)
