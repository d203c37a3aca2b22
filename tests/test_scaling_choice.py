"""Model choice, designs and advice: do they say what is known to be true of simulated runs?"""

import numpy as np
import pytest
from scipy import stats

from moe_ablm.errors import UserError
from moe_ablm.scaling.advice import Limits, advise, worth_of_data
from moe_ablm.scaling.catalogue import SMOOTH
from moe_ablm.scaling.design import check_design
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.laws_joint import Joint
from moe_ablm.scaling.quantities import quantities
from moe_ablm.scaling.ranking import next_runs, noise_of, pick_quantity
from moe_ablm.scaling.resampling import bootstrap
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.selection import (
    Question,
    aicc,
    analyse,
    compare,
    negative_log_likelihood,
    verdict,
)

DENSE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
REPEATED = DENSE | {"P": 0.03, "delta": 0.8, "kappa": 0.6}
JOINT = REPEATED | {"mu": 0.3, "E_max": 200.0, "tau": 0.5}


def repeated_grid():
    n, u, epochs = np.meshgrid(
        np.geomspace(1e7, 3e9, 6), np.geomspace(1e9, 3e10, 3), [1.0, 5.0, 25.0, 80.0]
    )
    table = {"params": n.ravel(), "unique_tokens": u.ravel()}
    return table | {"tokens": (u * epochs).ravel()}


def simulate(name="data_constrained_b2", truth=REPEATED, table=None, sd=2e-3, seed=0):
    table = repeated_grid() if table is None else table
    law = Joint(("topk",)) if name == "joint" else SMOOTH[name]()
    loss = law.predict(truth, table)
    loss = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(loss.size))
    return Runs(table | {"loss": loss}, tuple(f"row {i}" for i in range(loss.size)))


def joint_runs():
    dense = repeated_grid()
    size = dense["params"].size
    table = {k: np.tile(v, 3) for k, v in dense.items()}
    table["experts"] = np.repeat([1.0, 8.0, 64.0], size)
    table["router"] = np.where(table["experts"] > 1, "topk", "dense")
    table["total_params"] = table["params"] * (1 + 0.5 * (table["experts"] - 1))
    return simulate("joint", JOINT, table)


def joint_two_routers():
    dense = repeated_grid()
    size = dense["params"].size
    table = {k: np.tile(v, 5) for k, v in dense.items()}
    table["experts"] = np.repeat([1.0, 8.0, 64.0, 8.0, 64.0], size)
    table["router"] = np.repeat(["dense", "soft", "soft", "topk", "topk"], size)
    table["total_params"] = table["params"] * (1 + 0.5 * (table["experts"] - 1))
    return table


def test_the_implied_density_of_least_squares_is_the_normal_one():
    r = np.random.default_rng(0).normal(0, 0.02, 50)
    scale = np.sqrt(np.mean(r**2))
    expected = -stats.norm(0, scale).logpdf(r).sum()
    assert negative_log_likelihood(r, np.inf) == pytest.approx(expected)
    assert negative_log_likelihood(r, 1e3) == pytest.approx(expected, rel=1e-6)
    tiny = negative_log_likelihood(r, 1e-7)  # Laplace
    assert tiny == pytest.approx(-stats.laplace(0, np.abs(r).mean()).logpdf(r).sum(), rel=1e-4)
    assert aicc(r[:5], np.inf, 4) == np.inf


def test_the_law_that_made_the_runs_is_chosen():
    scores = compare(simulate(), ["chinchilla", "data_constrained_b1", "data_constrained_b2"])
    assert scores[0].law == "data_constrained_b2"
    assert scores[0].cv == min(s.cv for s in scores)
    assert scores[0].largest_error == min(s.largest_error for s in scores)
    sentence = verdict(scores)
    assert sentence.startswith("The data support data_constrained_b2")
    assert "less supported" in sentence and "cannot tell" not in sentence


def test_laws_that_agree_on_the_runs_cannot_be_told_apart():
    """b3 is b2 with both exponents 1: where they are 1, the runs cannot tell."""
    runs = simulate(truth=DENSE | {"P": 2e-3, "delta": 1.0, "kappa": 1.0})
    scores = compare(runs, ["data_constrained_b2", "data_constrained_b3"])
    assert "cannot tell it from" in verdict(scores)


def test_cross_validation_leaves_whole_cells_out():
    """Two exact copies of each run: leaving out rows would leave the answer in."""
    runs = simulate(sd=5e-3)
    loss = np.concatenate([runs["loss"], runs["loss"] * (1 + 1e-9)])
    columns = {k: np.tile(v, 2) for k, v in runs.columns.items()} | {"loss": loss}
    twice = Runs(columns, runs.source * 2)
    (once,) = compare(runs, ["data_constrained_b2"], huber_delta=1e-3)
    (double,) = compare(twice, ["data_constrained_b2"], huber_delta=1e-3)
    assert double.cv == pytest.approx(once.cv, rel=0.02)


def test_quadratics_join_the_comparison():
    table = {k: v[repeated_grid()["tokens"] > 0] for k, v in repeated_grid().items()}
    one = table["tokens"] / table["unique_tokens"] > 70
    scores = compare(
        simulate(table={k: v[one] for k, v in table.items()}),
        ["quadratic", "data_constrained_b3"],
    )
    assert {s.law for s in scores} == {"quadratic", "data_constrained_b3"}
    assert next(s for s in scores if s.law == "quadratic").parameters == 9


def ladder(tokens):
    n, u = (a.ravel() for a in np.meshgrid(np.geomspace(8e6, 6.5e8, 5), [1e8, 2e8, 4e8]))
    if tokens == "equal":
        d = np.full(15, 2e10)
    else:
        n, u, d = np.tile(n, 3), np.tile(u, 3), np.repeat([6e8, 4e9, 2e10], 15)
    return Runs({"params": n, "unique_tokens": u, "tokens": d}, tuple(map(str, range(n.size))))


@pytest.mark.parametrize("law", ["chinchilla", "data_constrained_b2"])
def test_an_equal_token_grid_is_caught_before_it_is_run(law):
    design = check_design(ladder("equal"), law)
    assert not design.identifiable["beta"]
    assert any("same total tokens" in warning for warning in design.warnings)
    branched = check_design(ladder("branches"), law)
    assert branched.identifiable["beta"]
    assert not any("same total tokens" in warning for warning in branched.warnings)


def test_a_design_predicts_the_errors_of_the_fit_that_follows():
    table = repeated_grid()
    planned = Runs(table, tuple(map(str, range(72))))
    design = check_design(planned, "data_constrained_b2", seed_sd=2e-3, coefficients=REPEATED)
    found = [
        fit_law(simulate(seed=s), "data_constrained_b2", huber_delta=np.inf).coefficients["beta"]
        for s in range(24)
    ]
    assert np.std(found, ddof=1) == pytest.approx(design.expected_errors["beta"], rel=0.35)


def test_a_design_says_what_only_a_prior_tells():
    table = joint_two_routers()
    design = check_design(Runs(table, tuple(map(str, range(table["params"].size)))), "joint")
    assert design.verdicts["u[soft]"] == "not identified: mostly its prior"
    assert design.identifiable["v[soft]"] and design.identifiable["mu"]


def test_one_number_of_experts_does_not_identify_how_their_worth_grows():
    table = joint_two_routers()
    few = table["experts"] <= 8
    runs = Runs({k: v[few] for k, v in table.items()}, tuple(map(str, range(int(few.sum())))))
    design = check_design(runs, "joint")
    assert design.verdicts["E_max"] == "fixed"
    many = check_design(Runs(table, tuple(map(str, range(table["params"].size)))), "joint")
    assert many.verdicts["E_max"] == "identified"


def test_designs_name_their_other_gaps():
    n = np.array([1e7, 1e8, 1e7, 1e8])
    runs = Runs({"params": n, "tokens": n * 20}, tuple("abcd"))
    text = " ".join(check_design(runs, "chinchilla").warnings)
    assert "three model sizes" in text and "leave nothing to estimate the error" in text
    with pytest.raises(UserError, match="unique_tokens"):
        check_design(runs, "data_constrained_b2")


def fitted(runs, law="data_constrained_b2", **target):
    made = fit_law(runs, law, huber_delta=2e-3, target=target)
    return made, bootstrap(made, 120, seed=0)


def test_advice_meets_the_known_optimum_under_compute():
    made, boot = fitted(simulate("chinchilla", DENSE), "chinchilla", flops=1e21)
    best = advise(made, boot, Limits(flops=1e21))
    assert np.median(best.params) == pytest.approx(made.derived["N_opt"], rel=0.1)
    np.testing.assert_allclose(6 * best.params * best.tokens, 1e21, rtol=1e-9)
    assert not best.at_bound.any()


def test_advice_keeps_within_memory_and_says_when_it_binds():
    made, boot = fitted(simulate("chinchilla", DENSE), "chinchilla")
    best = advise(made, boot, Limits(flops=1e21, total_params=2e8))
    assert best.params.max() <= 2e8 and best.memory_binds.all()
    with pytest.raises(UserError, match="not even the smallest"):
        advise(made, boot, Limits(flops=1e21, total_params=1e3))


def test_little_data_call_for_fewer_tokens_and_smaller_models():
    made, boot = fitted(simulate())
    rich = advise(made, boot, Limits(flops=1e21, unique_tokens=1e11))
    poor = advise(made, boot, Limits(flops=1e21, unique_tokens=1e9))
    assert np.median(poor.loss) > np.median(rich.loss)
    spent = 6 * poor.params * poor.tokens
    assert np.median(poor.repeats) > 1 and np.median(spent) < 1e21  # stopping early is better


def test_advice_weighs_experts_by_total_parameters():
    made, boot = fitted(joint_runs(), "joint")
    free = advise(made, boot, Limits(flops=1e20, unique_tokens=1e12))
    assert {free.kinds[k] for k in free.kind} == {"experts 64, topk"}
    tight = advise(made, boot, Limits(flops=1e20, total_params=3e7, unique_tokens=1e12))
    assert {tight.kinds[k] for k in tight.kind} != {"experts 64, topk"}
    ratio = {"experts 1, dense": 1.0, "experts 8, topk": 4.5, "experts 64, topk": 32.5}
    total = tight.params * np.array([ratio[tight.kinds[k]] for k in tight.kind])
    assert total.max() <= 3e7 * (1 + 1e-9)


def test_more_data_are_worth_less_and_less():
    made, boot = fitted(simulate())
    values, sentence = worth_of_data(made, boot, Limits(1e21, None, 1e9), noise_of(made))
    gains = [v.gain[0] for v in values[1:]]
    assert gains[0] > 0.01 and gains == sorted(gains, reverse=True)
    assert "times the unique data" in sentence
    assert noise_of(made) == pytest.approx(2e-3, rel=0.35)
    _, in_pairs = worth_of_data(made, boot, Limits(1e21, None, 1e9), noise_of(made), 250.0)
    assert "pairs" in in_pairs
    nothing, sentence = worth_of_data(made, boot, Limits(1e21), 1e-3)
    assert not nothing and "--max-unique" in sentence


def test_advice_refuses_what_it_cannot_answer():
    made, boot = fitted(simulate("chinchilla", DENSE), "chinchilla")
    with pytest.raises(UserError, match="positive"):
        advise(made, boot, Limits(flops=-1.0))
    clark = fit_law(joint_runs(), "moe_clark")
    with pytest.raises(UserError, match="says nothing about tokens"):
        advise(clark, boot, Limits(flops=1e21))


def test_the_next_run_is_the_one_that_shrinks_the_variance_most():
    """Check the linear prediction against refits with the candidate's run added."""
    runs = simulate(sd=2e-3)
    made, boot = fitted(runs, tokens=5e10, unique_tokens=1e9)
    quantity = pick_quantity(quantities(made))
    assert quantity.name == "N_star"
    cells = {"params": [3e9, 1e8], "tokens": [2e11, 2e9], "unique_tokens": [1e9, 2e9]}
    grid = Runs({k: np.array(v) for k, v in cells.items()}, ("large", "small"))
    ranked = next_runs(made, boot, grid, quantity, noise=2e-3)
    left = {c.source: c.variance_left for c in ranked}
    assert left["large"] < left["small"] <= 1.0
    assert ranked[0].per_flops >= ranked[1].per_flops
    for c in ranked:
        assert c.flops == pytest.approx(6 * c.inputs["params"] * c.inputs["tokens"])


def test_a_law_without_a_best_size_has_no_next_run():
    made = fit_law(joint_runs(), "moe_clark")
    with pytest.raises(UserError, match="no best size"):
        pick_quantity(quantities(made))


def test_a_design_says_what_its_errors_assume():
    table = {"params": np.tile([1e7, 1e8, 1e9], 2), "tokens": np.repeat([1e9, 1e10], 3)}
    planned = Runs(table, tuple(map(str, range(6))))
    said = " ".join(check_design(planned, "chinchilla", 2e-3).warnings)
    assert "fewer than three token counts" in said
    assert "seed sd of 0.002" in said and "equal part of the loss" in said


def test_a_fit_says_what_only_a_prior_tells_where_there_is_no_penalty():
    table = joint_two_routers()
    table["loss"] = 1.0 + 400.0 * table["params"] ** -0.35 + 900.0 * table["tokens"] ** -0.3
    fit = fit_law(Runs(table, tuple(map(str, range(table["params"].size)))), "joint")
    assert "P" in fit.at_bounds or fit.coefficients["P"] < 1e-3
    for name in ("v[soft]", "delta", "kappa", "tau"):
        assert fit.verdicts[name] == "no meaning: P is 0"


SOFT = {"E": 0.2, "A": 60.0, "B": 40.0, "alpha": 0.30, "beta": 0.30} | {
    **{"P": 1e-3, "delta": 0.8, "kappa": 0.5, "mu": -0.1, "E_max": 1e6, "tau": 0.5}
}


def dense_and_soft(slope=0.0):
    """Soft-MoE with 8 experts: 3.33 times the parameters at 1.11 times the FLOPs of dense."""
    n, k = (a.ravel() for a in np.meshgrid(np.geomspace(7.5e6, 5e8, 6), [1.0, 4.0, 20.0]))
    u = np.full(n.size, 4e8)
    dense = {"params": n, "total_params": n, "unique_tokens": u, "tokens": u * k}
    dense["flops"] = 6 * n * dense["tokens"] * (n / 1e7) ** slope
    soft = dense | {"params": 3.33 * n, "total_params": 3.33 * n, "flops": 1.11 * dense["flops"]}
    table = {k: np.concatenate([dense[k], soft[k]]) for k in dense}
    table["experts"] = np.repeat([1.0, 8.0], n.size)
    table["router"] = np.repeat(["dense", "soft"], n.size)
    law = Joint(("soft",))
    loss = law.predict(SOFT, table)
    loss *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(loss.size))
    return Runs(table | {"loss": loss}, tuple(map(str, range(loss.size))))


def best_by_hand(ratio, experts, cost):
    """The lowest loss of a kind at 1e19 FLOPs: a plain grid of sizes and tokens."""
    n = np.geomspace(1e6, 4e9, 1200)
    best = np.inf
    for share in 0.5 ** np.arange(8):
        tokens = 1e19 / (6 * n * cost) * share
        columns = {"params": n * ratio, "total_params": n * ratio, "tokens": tokens}
        columns["unique_tokens"] = np.minimum(tokens, 4e9)
        columns |= {"experts": np.full(n.size, experts), "router": np.full(n.size, "soft")}
        best = min(best, Joint(("soft",)).predict(SOFT, columns).min())
    return best


def test_advice_charges_each_kind_what_its_runs_cost():
    runs = dense_and_soft()
    made = fit_law(runs, "joint", huber_delta=1e-3)
    best = advise(made, bootstrap(made, 60, 0), Limits(1e19, unique_tokens=4e9))
    soft, dense = best_by_hand(3.33, 8.0, 1.11), best_by_hand(1.0, 1.0, 1.0)
    assert soft < dense - 0.005
    assert {best.kinds[k] for k in best.kind} == {"experts 8, soft"}
    assert np.median(best.loss) == pytest.approx(soft, rel=5e-3)
    # a token of a soft model costs a third of what 6 N says
    assert np.median(best.params * best.tokens * 6 / 1e19) > 1.4


def test_caps_on_inference_and_memory_bind():
    runs = dense_and_soft()
    made = fit_law(runs, "joint", huber_delta=1e-3)
    boot = bootstrap(made, 30, 0)
    best = advise(made, boot, Limits(1e19, None, 4e9, inference_flops=1e8))
    per_token = 2 * best.params * np.where(best.kind == 0, 1.0, 1.11 / 3.33)
    assert per_token.max() <= 1e8 * (1 + 1e-9)
    with pytest.raises(UserError, match="--max-inference-flops 10: not even the smallest"):
        advise(made, boot, Limits(1e19, None, 4e9, inference_flops=10.0))


def test_the_frontier_is_the_minimum_at_the_flops_of_the_runs():
    """FLOPs a token grow as N^.9: N_opt against a grid."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 3e9, 6), np.geomspace(1e9, 1e11, 5)))
    columns = {"params": n, "tokens": d, "flops": 8 * n * d * (n / 1e8) ** -0.1}
    loss = SMOOTH["chinchilla"]().predict(DENSE, columns)
    runs = Runs(columns | {"loss": loss}, tuple(map(str, range(30))))
    made = fit_law(runs, target={"flops": 1e20})
    sizes = np.geomspace(1e7, 1e10, 40001)
    tokens = 1e20 / (8 * sizes * (sizes / 1e8) ** -0.1)
    best = int(np.argmin(made.predict(params=sizes, tokens=tokens)))
    assert made.derived["N_opt"] == pytest.approx(sizes[best], rel=1e-3)
    assert made.derived["D_opt"] == pytest.approx(tokens[best], rel=1e-3)
    assert any("those of the runs" in note for note in made.notes)


def test_a_law_that_is_not_identified_is_not_called_supported():
    """Equal tokens: chinchilla has the best AICc and three coefficients that are anything."""
    n = np.geomspace(1e7, 1e9, 12)
    columns = {"params": n, "tokens": np.full(12, 5e9)}
    loss = SMOOTH["chinchilla"]().predict(DENSE, columns)
    loss *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(12))
    runs = Runs(columns | {"loss": loss}, tuple(map(str, range(12))))
    sentence = verdict(compare(runs, ["chinchilla"]))
    assert "No law is supported" in sentence and "not_identifiable" in sentence
    assert "beta" in sentence and "The data support" not in sentence


def test_a_misfit_far_beyond_delta_is_told_with_what_hangs_on_it():
    """Replicates agree to 1e-4 and the law misses by 1e-2."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e11, 5)))
    n, d = np.tile(n, 2), np.tile(d, 2)
    loss = SMOOTH["chinchilla"]().predict(DENSE, {"params": n, "tokens": d})
    loss = loss * (1 + 0.01 * np.sin(3 * np.log(n)))
    loss = loss * np.exp(1e-4 * np.random.default_rng(0).standard_normal(n.size))
    columns = {"params": n, "tokens": d, "loss": loss}
    runs = Runs(columns, tuple(map(str, range(n.size))))
    made = analyse(runs, Question("chinchilla", huber_delta=1e-4, draws=20)).fit
    (note,) = (n for n in made.notes if "times delta" in n)
    least_squares = fit_law(runs, huber_delta=np.inf).coefficients["alpha"]
    assert f"alpha {made.coefficients['alpha']:.3g} -> {least_squares:.3g}" in note
    calm = analyse(simulate(), Question("data_constrained_b2", huber_delta=2e-3, draws=20)).fit
    assert not any("times delta" in note for note in calm.notes)
