"""Laws: values against formulas written out here, exact gradients, and changes of units."""

import numpy as np
import pytest

from moe_ablm.errors import UserError
from moe_ablm.scaling.catalogue import NAMES, applicable, law_for, resolve
from moe_ablm.scaling.inputs import Centre
from moe_ablm.scaling.laws_joint import Joint
from moe_ablm.scaling.laws_moe import MoeClark, effective_experts

SMOOTH = (
    "chinchilla",
    "data_constrained_b1",
    "data_constrained_b2",
    "moe_clark",
    "moe_granularity",
    "moe_sparsity",
    "moe_experts",
    "joint",
    "annealing",
    "annealing_sizes",
    "multi_power",
    "compute",
    "compute_slopes",
    "gap",
    "gap_active",
    "gap_total",
)


def columns(size=40, seed=0):
    rng = np.random.default_rng(seed)
    experts = rng.choice([1.0, 2.0, 8.0, 64.0], size)
    params = np.exp(rng.normal(18, 1.5, size))
    tokens = np.exp(rng.normal(23, 1, size))
    return {
        "params": params,
        "total_params": params * np.where(experts > 1, rng.uniform(1, 4, size), 1),
        "tokens": tokens,
        "unique_tokens": tokens / rng.choice([1, 2, 5, 50], size),
        "experts": experts,
        "router": np.where(experts > 1, rng.choice(["soft", "topk"], size), "dense"),
        "granularity": rng.choice([1.0, 2.0, 4.0], size),
        "sparsity": rng.choice([0.0, 0.5, 0.9], size),
        "flops": 6 * params * tokens,
        "lr_area": np.exp(rng.normal(0, 1, size)),
        "lr_recent": np.exp(rng.normal(-8, 1, size)),
        "lr_history": np.stack(
            [np.exp(rng.normal(-9, 1, (size, 9))), *rng.normal(-2, 1, (2, size, 9))], axis=-1
        ),
    }


def some_parameters(law, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for p in law.parameters:
        low, high = p.search or (max(p.low, -2.0), min(p.high, 2.0))
        out.append(rng.normal(0, 0.5) if p.linear else rng.uniform(low, high) + 0.01)
    return np.array(out)


def setup(name, centre):
    table = columns()
    law = law_for(name, table)
    observed, _ = law.observe(table)
    theta = np.stack([some_parameters(law, seed) for seed in range(4)])
    return law, observed, law.inputs(observed, centre), theta


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_exact(name):
    law, _, x, theta = setup(name, Centre(18.0, 23.0, 42.0))
    exact = law.jacobian(theta, x)
    step = 1e-6
    for k in range(theta.shape[1]):
        move = step * np.eye(theta.shape[1])[k]
        slope = (law.log_loss(theta + move, x) - law.log_loss(theta - move, x)) / (2 * step)
        np.testing.assert_allclose(exact[:, :, k], slope, rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("name", SMOOTH)
def test_natural_units_predict_the_same_loss(name):
    centre = Centre(18.0, 23.0, 42.0)
    law, observed, x, theta = setup(name, centre)
    natural = law.shift(theta, centre)
    plain = law.inputs(observed, Centre())
    np.testing.assert_allclose(law.log_loss(natural, plain), law.log_loss(theta, x), atol=1e-12)


def test_chinchilla_value():
    law = law_for("chinchilla", {})
    values = {"E": 1.8, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37}
    loss = law.predict(values, {"params": np.array([1e8]), "tokens": np.array([1e10])})
    np.testing.assert_allclose(loss, 1.8 + 400 * 1e8**-0.34 + 2000 * 1e10**-0.37, rtol=1e-14)


def test_b1_value_as_in_the_paper():
    n, d, u = 4e9, 8e10, 1e10
    a, b, e, alpha, beta, r_d, r_n = 520.0, 1480.0, 1.87, 0.36, 0.34, 15.0, 5.0
    n_opt = (alpha * a / (beta * b)) ** (1 / alpha) * u ** (beta / alpha)
    u_n = min(n, n_opt)
    d_eff = u + u * r_d * (1 - np.exp(-(d / u - 1) / r_d))
    n_eff = u_n + u_n * r_n * (1 - np.exp(-max(n / u_n - 1, 0) / r_n))
    assert u_n < n  # the cap is at work
    law = law_for("data_constrained_b1", {})
    values = {"E": e, "A": a, "B": b, "alpha": alpha, "beta": beta, "R_D": r_d, "R_N": r_n}
    row = {k: np.array([v]) for k, v in (("params", n), ("tokens", d), ("unique_tokens", u))}
    expected = e + a * n_eff**-alpha + b * d_eff**-beta
    np.testing.assert_allclose(law.predict(values, row), expected, rtol=1e-13)


def test_b2_is_chinchilla_without_repeats_and_adds_its_penalty_with_them():
    values = {"E": 1.8, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37}
    extra = {"P": 0.05, "delta": 0.4, "kappa": 0.7}
    row = {"params": np.array([1e8, 1e8]), "tokens": np.array([1e10, 1e10])}
    dense = law_for("chinchilla", {}).predict(values, row)
    row["unique_tokens"] = np.array([1e10, 1e9])
    law = law_for("data_constrained_b2", {})
    penalty = 0.05 * 9.0**0.4 * (1e8 / 1e9) ** 0.7
    np.testing.assert_allclose(law.predict(values | extra, row) - dense, [0, penalty], atol=1e-12)


def test_clark_effective_experts_at_its_ends():
    one, many = np.array([1.0]), np.array([1e12])
    start, ratio = np.log(4.0), np.log(100.0)
    np.testing.assert_allclose(np.exp(effective_experts(one, start, ratio)[0]), 4.0)
    np.testing.assert_allclose(np.exp(effective_experts(many, start, ratio)[0]), 400.0, rtol=1e-8)
    e, s, m = 16.0, 4.0, 400.0
    expected = 1 / (1 / (e - 1 + 1 / (1 / s - 1 / m)) + 1 / m)
    found = np.exp(effective_experts(np.array([e]), start, ratio)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_clark_counts_dense_runs_in_every_curve():
    table = columns()
    law = MoeClark.for_runs(table)
    observed, index = law.observe(table)
    dense = int((table["experts"] == 1).sum())
    assert law.routers == ("soft", "topk")
    assert index.size == len(table["experts"]) + dense
    assert set(observed["router"]) == {"soft", "topk"}
    values = {p.name: 0.5 for p in law.parameters}
    with pytest.raises(UserError, match="router= one of soft, topk"):
        law.predict(values, {"params": np.array([1e8]), "experts": np.array([8.0])})


def test_joint_pools_dense_runs_exactly():
    """Dense runs see the b2 law whatever mu, tau, E_max and the router effects are."""
    law = Joint(("soft", "topk"))
    theta = some_parameters(law)
    values = {p.name: float(p.report(t)) for p, t in zip(law.parameters, theta, strict=True)}
    row = {k: columns()[k] for k in ("params", "tokens", "unique_tokens")}
    row |= {"experts": np.ones(40), "total_params": row["params"], "router": np.full(40, "dense")}
    b2 = law_for("data_constrained_b2", {})
    np.testing.assert_allclose(law.predict(values, row), b2.predict(values, row), rtol=1e-12)


def test_effects_of_routers_in_joint():
    """mu is a single router's own; P is of dense runs, too, so that it has a factor beside them."""
    assert [n for n in Joint(("topk",)).names if "[" in n] == ["v[topk]"]
    assert {"u[a]", "u[b]", "v[a]", "v[b]"} <= set(Joint(("a", "b")).names)
    mixed = {"experts": np.array([1.0, 8.0, 64.0]), "router": np.array(["dense", "topk", "topk"])}
    assert law_for("joint", mixed).defaults == {}
    alone = {name: values[1:] for name, values in mixed.items()}
    assert law_for("joint", alone).defaults == {"v[topk]": 0.0}


def test_a_fit_of_before_routers_had_factors_predicts_what_it_did():
    law = Joint(("topk",))
    values = {
        p.name: float(p.report(t))
        for p, t in zip(law.parameters, some_parameters(law), strict=True)
    }
    row = columns()
    row["router"] = np.where(row["experts"] > 1, "topk", "dense")
    older = {name: value for name, value in values.items() if name != "v[topk]"}
    now = law.predict(values | {"v[topk]": 0.0}, row)
    np.testing.assert_array_equal(law.predict(older, row), now)
    assert not np.array_equal(law.predict(values, row), now)
    unnamed = {name: v for name, v in row.items() if name != "router"}
    np.testing.assert_array_equal(law.predict(values, unnamed), law.predict(values, row))
    del older["tau"]
    with pytest.raises(KeyError, match="tau"):
        law.predict(older, row)


def test_names_and_aliases():
    assert resolve("data_constrained") == "data_constrained_b1"
    for name in NAMES:
        resolve(name)
    with pytest.raises(UserError, match="expected one of"):
        resolve("kaplan")
    dense = {k: v for k, v in columns().items() if k in ("params", "tokens")} | {"loss": 1}
    assert applicable(dense) == ["chinchilla"]


def test_clark_needs_a_router():
    with pytest.raises(UserError, match="at least one router"):
        MoeClark.for_runs({"experts": np.ones(4)})


def test_dense_rows_pool_whatever_their_router_is_called():
    """Where experts have effects; without names runs with experts are of the only router."""
    law = law_for("joint", columns() | {"router": np.where(columns()["experts"] > 1, "x", "")})
    values = {p.name: float(p.report(t)) for p, t in
              zip(law.parameters, some_parameters(law), strict=True)}  # fmt: skip
    values["v[x]"] = 0.3
    row = columns() | {"experts": np.repeat([1.0, 8.0], 20)}
    row["total_params"] = row["params"] * np.repeat([1, 3], 20)
    unnamed = {name: v for name, v in row.items() if name != "router"}
    expected = law.predict(values, row | {"router": np.repeat(["dense", "x"], 20)})
    for named in (unnamed, row | {"router": np.full(40, "x")}):
        np.testing.assert_array_equal(law.predict(values, named), expected)


def test_kinds_of_compute_are_not_guessed():
    """Its reference may have experts, too."""
    law = law_for("compute", {"router": np.array(["soft", "topk"])})
    values = {"L_inf": 1.8, "A": 2700.0, "alpha": 0.18, "gain[topk]": 1.8}
    at = {"flops": np.array([1e19])}
    plain = law.predict(values, at)
    for more in ({"experts": 8.0}, {"total_params": 1e9}):
        found = law.predict(values, at | {k: np.array([v]) for k, v in more.items()})
        np.testing.assert_array_equal(found, plain)


def test_a_factor_of_all_runs_is_that_of_p():
    alone = {"params": np.ones(2), "total_params": np.full(2, 3.0), "experts": np.array([8.0, 64])}
    for name, more in (("gap", {}), ("gap_total", {"tau": 1.0}), ("joint", {})):
        assert law_for(name, alone).defaults == {"v[moe]": 0.0} | more
