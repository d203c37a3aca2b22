"""Routers: plans and statistics written out by hand, gradients in float64, padding."""

import math
from dataclasses import replace as dataclass_replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from moe_blocks import gate_table, in_float64, jit

from moe_ablm.model import routers
from moe_ablm.model.families import ExpertChoice, Router, Soft, TopK, TopP
from moe_ablm.model.moe import RouterWeights, router_logits
from moe_ablm.model.routers import Tokens
from moe_ablm.model.routing import summarise
from moe_ablm.training.stability import DEFAULTS

E = 4
# probabilities of four tokens and two pads; the logits of token i are log p + SHIFT[i], so that
# their logsumexp is SHIFT[i]
PROBABILITIES = np.array(
    [
        [[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]],
        [[0.05, 0.15, 0.7, 0.1], [0.01, 0.01, 0.97, 0.01], [0.25, 0.25, 0.25, 0.25]],
    ]
)
SHIFT = np.array([[1.0, -2.0, 3.0], [0.5, 50.0, -50.0]])
VALID = np.array([[True, True, True], [True, False, False]])
LOGITS = (np.log(PROBABILITIES) + SHIFT[..., None]).astype(np.float32)


def plan_and_statistics(logits, tokens, spec, balance, training):
    plan, sums = routers.plan(spec, logits, tokens, balance, training)
    return plan, summarise(sums, spec.token_choice)


jitted = jit(plan_and_statistics, static_argnums=(2, 4))


def route(spec, logits=LOGITS, valid=VALID, training=False, antibody=None, balance=None):
    """Plan and statistics; `spec` may be the K of top-k."""
    if isinstance(spec, int):
        spec = TopK(experts=E, k=spec)
    tokens = Tokens(jnp.asarray(valid), None if antibody is None else jnp.asarray(antibody))
    balance = None if balance is None else jnp.asarray(balance)
    return jitted(jnp.asarray(logits), tokens, spec, balance, training)


def table(plan, experts: int) -> np.ndarray:
    """Gates of every expert for every token, `[B, L, E]`."""
    shape = (*plan.experts.shape, experts + 1)
    one_hot = np.eye(experts + 1)[np.asarray(plan.experts)].reshape(shape)
    return (one_hot * np.asarray(plan.gates)[..., None]).sum(-2)[..., :experts]


# top-k


def test_plan_of_top1_has_plain_gates():
    """Ties go to the lowest expert; the third token of the first row is one."""
    plan, _ = route(1)
    assert plan.experts.dtype == jnp.int32 and plan.gates.dtype == jnp.float32
    np.testing.assert_array_equal(plan.experts[..., 0], [[0, 3, 0], [2, E, E]])
    np.testing.assert_allclose(plan.gates[..., 0], [[0.4, 0.7, 0.25], [0.7, 0, 0]], rtol=1e-5)


def test_plan_of_top2_has_renormalised_gates():
    plan, _ = route(2)
    np.testing.assert_array_equal(
        plan.experts, [[[0, 1], [3, 0], [0, 1]], [[2, 1], [E, E], [E, E]]]
    )
    gates = [
        [[4 / 7, 3 / 7], [7 / 8, 1 / 8], [1 / 2, 1 / 2]],
        [[70 / 85, 15 / 85], [0, 0], [0, 0]],
    ]
    np.testing.assert_allclose(plan.gates, gates, rtol=1e-5)


def test_plan_of_all_experts_is_the_softmax():
    plan, _ = route(E)
    order = np.asarray(plan.experts)[VALID]
    np.testing.assert_array_equal(np.sort(order, axis=-1), np.tile(np.arange(E), (4, 1)))
    expected = np.take_along_axis(PROBABILITIES[VALID], order, axis=-1)
    np.testing.assert_allclose(np.asarray(plan.gates)[VALID], expected, rtol=1e-5)


def test_plan_against_a_full_sort():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 40, 7)).astype(np.float32)
    valid = rng.random((5, 40)) < 0.7
    spec = TopK(experts=7, k=3)
    plan, stats = route(spec, logits, valid)
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :3]
    np.testing.assert_array_equal(plan.experts, np.where(valid[..., None], best, 7))
    chosen = np.exp(np.take_along_axis(logits, best, axis=-1).astype("f8"))
    gates = chosen / chosen.sum(-1, keepdims=True) * valid[..., None]
    np.testing.assert_allclose(plan.gates, gates, atol=1e-6)
    counts = np.bincount(best[valid].reshape(-1), minlength=7)
    np.testing.assert_allclose(stats.load, counts / counts.sum(), rtol=1e-5)


def test_statistics_of_top1_by_hand():
    _, stats = route(1)
    np.testing.assert_allclose(stats.load, [2 / 4, 0, 1 / 4, 1 / 4], rtol=1e-5)
    # -(1/2 ln 1/2 + 2 * 1/4 ln 1/4) / ln 4 = 1.5 ln 2 / (2 ln 2)
    np.testing.assert_allclose(stats.entropy, 0.75, rtol=1e-5)
    # E sum_e f_e P_e, P = (.8, .8, 1.25, 1.15) / 4
    np.testing.assert_allclose(stats.load_balance, 0.4 + (1.25 + 1.15) / 4, rtol=1e-5)
    np.testing.assert_allclose(stats.z_loss, (1 + 4 + 9 + 0.25) / 4, rtol=1e-5)
    assert float(stats.dropped) == 0.0


def test_statistics_of_top2_by_hand():
    _, stats = route(2)
    load = np.array([3, 3, 1, 1]) / 8
    np.testing.assert_allclose(stats.load, load, rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, -(load @ np.log(load)) / math.log(4), rtol=1e-5)
    np.testing.assert_allclose(stats.load_balance, (3 * 1.6 + 1.25 + 1.15) / 8, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_lies_between_one_and_e(k):
    """1 when load and probabilities are uniform; E when one expert takes all (Switch, eq. 4)."""
    tokens = np.arange(E)
    uniform = np.full((1, E, E), -1e-3, np.float32)
    for choice in range(k):
        uniform[0, tokens, (tokens + choice) % E] = 0.0
    _, balanced = route(k, uniform, np.ones((1, E), bool))
    np.testing.assert_allclose(balanced.load_balance, 1.0, atol=1e-5)
    np.testing.assert_allclose(balanced.entropy, 1.0, atol=1e-6)
    one = np.zeros((1, E, E), np.float32)
    one[..., 2] = 60.0
    _, collapsed = route(1, one, np.ones((1, E), bool))
    np.testing.assert_allclose(collapsed.load_balance, E, rtol=1e-5)
    assert float(collapsed.entropy) == 0.0


def test_sigmoid_gates_by_hand():
    """Each expert by itself; the distribution of the losses are their shares (DeepSeek-V3)."""
    odds = np.array([[[1.0, 3, 1 / 3, 9]]])  # sigmoids 1/2, 3/4, 1/4, 9/10: their sum is 2.4
    logits = np.log(odds).astype("f4")
    valid = np.ones((1, 1), bool)
    spec = TopK(experts=E, k=2, gate="sigmoid", renormalise=False)
    plan, stats = route(spec, logits, valid)
    np.testing.assert_array_equal(plan.experts, [[[3, 1]]])
    np.testing.assert_allclose(plan.gates, [[[0.9, 0.75]]], rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance, E / 2 * (0.9 + 0.75) / 2.4, rtol=1e-6)
    shares = np.array([0.5, 0.75, 0.25, 0.9]) / 2.4
    np.testing.assert_allclose(stats.entropy_loss, -(shares * np.log(shares)).sum(), rtol=1e-6)
    plan, _ = route(TopK(experts=E, k=2, gate="sigmoid"), logits, valid)
    np.testing.assert_allclose(plan.gates, [[[0.9 / 1.65, 0.75 / 1.65]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("renormalise", "gates"), [(True, [1, 0]), (None, [0.4, 0.3]), (False, [0.4, 0.3])]
)
def test_renormalising_is_asked_for_or_not(renormalise, gates):
    """By default gates of K > 1 choices sum to 1, those of a single one are plain."""
    one, two = (route(TopK(experts=E, k=k, renormalise=renormalise))[0].gates[0, 0] for k in (1, 2))
    np.testing.assert_allclose(one, gates[:1], rtol=1e-5)
    total = 1 if renormalise is not False else 0.7
    np.testing.assert_allclose(two, np.array([0.4, 0.3]) / 0.7 * total, rtol=1e-5)


def test_a_balance_changes_the_choice_and_not_the_gate():
    balance = np.array([-0.25, 0.0, 0.15, 0.0], "f4")
    plan, stats = route(1, balance=balance)
    # (.4 .3 .2 .1) becomes (.15 .3 .35 .1), the uniform token (0 .25 .4 .25)
    np.testing.assert_array_equal(plan.experts[..., 0], [[2, 3, 2], [2, E, E]])
    np.testing.assert_allclose(plan.gates[..., 0], [[0.2, 0.7, 0.25], [0.7, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(stats.load, [0, 0, 3 / 4, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(stats.z_loss, route(1)[1].z_loss, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy_loss, route(1)[1].entropy_loss, rtol=1e-6)


# top-p


def test_top_p_takes_as_few_as_reach_the_threshold():
    # token (.4 .3 .2 .1): .4 < .65 <= .7; (.1 .1 .1 .7): .7; uniform: .25 .5 .75; (... .7): .7
    plan, stats = route(TopP(experts=E, k=4, threshold=0.65))
    np.testing.assert_array_equal(
        plan.experts, [[[0, 1, E, E], [3, E, E, E], [0, 1, 2, E]], [[2, E, E, E], [E] * 4, [E] * 4]]
    )
    gates = [
        [[0.4, 0.3, 0, 0], [0.7, 0, 0, 0], [0.25, 0.25, 0.25, 0]],
        [[0.7, 0, 0, 0], [0] * 4, [0] * 4],
    ]
    np.testing.assert_allclose(plan.gates, gates, rtol=1e-5)
    np.testing.assert_allclose(stats.load, np.array([2, 2, 2, 1]) / 7, rtol=1e-6)
    np.testing.assert_allclose(stats.choices, 7 / 4, rtol=1e-6)
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in PROBABILITIES[VALID]]
    np.testing.assert_allclose(stats.entropy_loss, np.mean(entropies), rtol=1e-5)


def test_top_p_of_balm_stays_within_the_threshold():
    """But for the best expert, which every token has."""
    plan, _ = route(TopP(experts=E, k=4, threshold=0.65, exceed=False))
    np.testing.assert_array_equal(
        plan.experts, [[[0, E, E, E], [3, E, E, E], [0, 1, E, E]], [[2, E, E, E], [E] * 4, [E] * 4]]
    )


def test_expert_choice_of_balm_takes_shares_of_tokens():
    """Softmax over the tokens of an antibody: two places, of three tokens and of one."""
    spec = ExpertChoice(experts=E, k=2, capacity=1.0, gate="tokens")
    plan, _ = route(spec)
    weight = np.exp(LOGITS[0].astype("f8"))
    shares = weight / weight.sum(0)
    kept = shares >= np.sort(shares, 0)[1]
    np.testing.assert_allclose(table(plan, E)[0], shares * kept, rtol=1e-5)
    np.testing.assert_allclose(table(plan, E)[1], [[1] * 4, [0] * 4, [0] * 4], rtol=1e-6)


def test_top_p_takes_at_most_k():
    plan, _ = route(TopP(experts=E, k=2, threshold=1.0))
    np.testing.assert_array_equal(plan.experts[0], [[0, 1], [3, 0], [0, 1]])
    np.testing.assert_allclose(plan.gates[0], [[0.4, 0.3], [0.7, 0.1], [0.25, 0.25]], rtol=1e-5)
    renormalised = route(TopP(experts=E, k=2, threshold=0.65, renormalise=True))[0]
    np.testing.assert_allclose(
        renormalised.gates[0], [[4 / 7, 3 / 7], [1, 0], [0.5, 0.5]], rtol=1e-5
    )


# capacity


# one antibody of six tokens, two experts; places: ceil(.5 * 6 / 2) = 2
FIRST = np.array([0.9, 0.6, 0.8, 0.2, 0.8, 0.4])
TWO = np.log(np.stack([FIRST, 1 - FIRST], -1))[None].astype("f4")
HALF = TopK(experts=2, k=1, capacity=0.5)


def test_the_best_scores_find_a_place_and_ties_go_to_the_first():
    """Expert 0 is asked by tokens 0 1 2 4 (.9 .6 .8 .8), expert 1 by 3 and 5."""
    everyone = np.ones((1, 6), bool)
    plan, stats = route(HALF, TWO, everyone, training=True)
    np.testing.assert_array_equal(plan.experts[0, :, 0], [0, 2, 0, 1, 2, 1])
    np.testing.assert_allclose(plan.gates[0, :, 0], [0.9, 0, 0.8, 0.8, 0, 0.6], rtol=1e-5)
    np.testing.assert_array_equal(plan.place[0, :, 0], [0, 3, 1, 0, 2, 1])
    np.testing.assert_allclose(stats.dropped, 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(stats.load, [1 / 2, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(stats.asked, [4 / 6, 2 / 6], rtol=1e-6)
    np.testing.assert_allclose(stats.choices, 4 / 6, rtol=1e-6)
    # the loss sees what was asked for: f = (4, 2) / 6
    mean = FIRST.mean()
    np.testing.assert_allclose(stats.load_balance, 2 * (4 * mean + 2 * (1 - mean)) / 6, rtol=1e-5)


def test_in_inference_everyone_finds_a_place():
    plan, stats = route(HALF, TWO, np.ones((1, 6), bool))
    np.testing.assert_array_equal(plan.experts[0, :, 0], [0, 0, 0, 1, 0, 1])
    assert plan.place is None and float(stats.dropped) == 0.0


def test_padding_takes_no_place_and_gives_none():
    """Padding of the highest score; the capacity is that of the four tokens: one place."""
    valid = np.array([[False, True, True, True, True, False]])
    plan, stats = route(HALF, TWO, valid, training=True)
    np.testing.assert_array_equal(plan.experts[0, :, 0], [2, 2, 0, 1, 2, 2])
    np.testing.assert_allclose(stats.dropped, 2 / 4, rtol=1e-6)


def test_antibodies_of_a_row_have_places_of_their_own():
    """Tokens 0 1 2 and 3 4: two places, ceil(.75), and one, ceil(.5), as in rows of their own."""
    antibody = np.array([[1, 1, 1, 2, 2, 0]])
    spec = TopK(experts=2, k=1, capacity=0.75)  # ceil(1.125) = 2, ceil(.75) = 1
    logits = np.where(np.arange(6)[:, None] == 3, TWO[0, 4], TWO[0])[None]  # 3 asks for expert 0
    plan, stats = route(spec, logits, antibody > 0, True, antibody)
    np.testing.assert_array_equal(plan.experts[0, :, 0], [0, 2, 0, 0, 2, 2])
    np.testing.assert_allclose(stats.dropped, 2 / 5, rtol=1e-6)


def test_gates_are_renormalised_before_a_choice_is_turned_away():
    """So a token keeps the weight of the expert that took it, as without a capacity."""
    logits = np.log([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]]).astype("f4")
    spec = TopK(experts=3, k=2, capacity=0.5)  # ceil(2 / 3) = 1
    plan, _ = route(spec, logits, np.ones((1, 2), bool), training=True)
    np.testing.assert_array_equal(plan.experts, [[[3, 1], [0, 2]]])
    np.testing.assert_allclose(plan.gates, [[[0, 0.3 / 0.8], [0.6 / 0.9, 0.3 / 0.9]]], rtol=1e-5)


# expert choice


def test_expert_choice_by_hand():
    """Three tokens, four experts, one place each: ceil(.5 * 2 * 3 / 4); two pads take none."""
    spec = ExpertChoice(experts=E, k=2, capacity=0.5)
    plan, stats = route(spec)
    # the best of each column: .4 of token 0; .3 of 0; .25 of 2; .7 of 1. In row 1: one token
    expected = [
        [[0.4, 0.3, 0, 0], [0, 0, 0, 0.7], [0, 0, 0.25, 0]],
        [[0.05, 0.15, 0.7, 0.1], [0] * 4, [0] * 4],
    ]
    np.testing.assert_allclose(table(plan, E), expected, rtol=1e-5)
    np.testing.assert_allclose(stats.load, [1 / 4] * 4, rtol=1e-6)
    assert float(stats.dropped) == 0.0 and float(stats.load_balance) == 0.0
    np.testing.assert_allclose(stats.z_loss, (1 + 4 + 9 + 0.25) / 4, rtol=1e-5)
    # how undecided the experts are: entropy over tokens by log of their number
    columns = PROBABILITIES[0] / PROBABILITIES[0].sum(0)
    by_hand = -(columns * np.log(columns)).sum(0) / math.log(3)  # row 1: a single token, 0
    np.testing.assert_allclose(stats.spread, by_hand.sum() / 8, rtol=1e-5)
    assert plan.place is not None
    trained, _ = route(spec, training=True)
    np.testing.assert_array_equal(trained.experts, plan.experts)


@pytest.mark.parametrize(("capacity", "alone"), [(0.25, 3 / 4), (0.5, 2 / 4), (0.75, 1 / 4)])
def test_expert_choice_counts_the_tokens_that_no_one_chose(capacity, alone):
    """Both experts want the same of four tokens: one, two and three places each."""
    logits = np.log([[[0.9, 0.4], [0.8, 0.3], [0.1, 0.1], [0.1, 0.1]]]).astype("f4")
    spec = ExpertChoice(experts=2, k=2, gate="sigmoid", capacity=capacity)
    _, stats = route(spec, logits, np.ones((1, 4), bool))
    assert float(stats.dropped) == alone


# soft-MoE


def test_soft_weights_by_hand():
    """Two tokens of an antibody beside a pad, two experts of two slots."""
    logits = np.log([[[[1.0, 2], [3, 2]], [[1, 2], [1, 6]], [[9, 9], [9, 9]]]]).astype("f4")
    spec = Soft(experts=2, slots=2)
    plan, sums = routers.plan(spec, jnp.asarray(logits), Tokens(jnp.asarray([[True, True, False]])))
    dispatch = [
        [[[1 / 2, 1 / 2], [3 / 4, 1 / 4]], [[1 / 2, 1 / 2], [1 / 4, 3 / 4]], [[0, 0], [0, 0]]]
    ]
    combine = [
        [[[1 / 8, 2 / 8], [3 / 8, 2 / 8]], [[1 / 10, 2 / 10], [1 / 10, 6 / 10]], [[0, 0], [0, 0]]]
    ]
    np.testing.assert_allclose(plan.dispatch, dispatch, rtol=1e-5)
    np.testing.assert_allclose(plan.combine, combine, rtol=1e-5)
    stats = summarise(sums, balanced=False)
    np.testing.assert_allclose(stats.load, [(3 / 8 + 3 / 10) / 2, (5 / 8 + 7 / 10) / 2], rtol=1e-5)
    np.testing.assert_allclose(stats.z_loss, (math.log(8) ** 2 + math.log(10) ** 2) / 2, rtol=1e-5)
    assert float(stats.dropped) == float(stats.load_balance) == 0.0
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    np.testing.assert_allclose(stats.spread, (2 + 2 * quarter) / 4, rtol=1e-5)


def test_soft_sums_to_one_over_the_tokens_of_an_antibody_and_over_slots():
    rng = np.random.default_rng(5)
    logits = 300 * rng.standard_normal((3, 7, 2, 3)).astype("f4")
    valid = np.arange(7) < np.array([7, 4, 0])[:, None]
    spec = Soft(experts=2, slots=3)
    plan, sums = routers.plan(spec, jnp.asarray(logits), Tokens(jnp.asarray(valid)))
    for rows, total in zip(plan.dispatch.sum(1), (1, 1, 0), strict=True):
        np.testing.assert_allclose(rows, np.full((2, 3), total), atol=1e-6)
    np.testing.assert_allclose(plan.combine.sum((2, 3)), valid, atol=1e-6)
    assert (
        not np.asarray(plan.dispatch)[~valid].any() and not np.asarray(plan.combine)[~valid].any()
    )
    np.testing.assert_array_equal(sums.tokens, [7, 4, 0])
    assert all(np.isfinite(a).all() for a in sums)


# padding


@pytest.mark.parametrize("k", [1, 2])
def test_padding_changes_no_statistic_and_no_plan(k):
    """More padding, other logits at padding, huge ones too: the same answer."""
    plan, stats = route(k)
    rng = np.random.default_rng(1)
    logits = rng.uniform(-300, 300, (3, 6, E)).astype(np.float32)
    logits[:2, :3][VALID] = LOGITS[VALID]
    valid = np.zeros((3, 6), bool)
    valid[:2, :3] = VALID
    wide_plan, wide_stats = route(k, logits, valid)
    np.testing.assert_array_equal(np.asarray(wide_plan.experts)[:2, :3][VALID], plan.experts[VALID])
    np.testing.assert_array_equal(np.asarray(wide_plan.gates)[:2, :3][VALID], plan.gates[VALID])
    assert (np.asarray(wide_plan.experts)[~valid] == E).all()
    assert not np.asarray(wide_plan.gates)[~valid].any()
    for name, a, b in zip(stats._fields, stats, wide_stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("k", [1, 2])
def test_statistics_do_not_depend_on_the_order_of_tokens(k):
    flat = LOGITS.reshape(1, 6, E)[:, ::-1], VALID.reshape(1, 6)[:, ::-1]
    for a, b in zip(route(k)[1], route(k, *flat)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_batch_of_padding_is_routed_nowhere():
    plan, stats = route(2, LOGITS, np.zeros_like(VALID))
    assert (plan.experts == E).all() and not plan.gates.any()
    for value in stats:
        assert not value.any()  # and so it is no NaN


BALM = ("logits", "probabilities", "aux")
POLICIES = [
    "none",
    *BALM,
    "logits,aux",
    "logits,probabilities",
    "probabilities,aux",
    ",".join(BALM),
]
# three rows of eight tokens, three of which are pads with logits like any others
NOISE = 2 * np.random.default_rng(6).standard_normal((3, 8, E)).astype("f4")
SHORT = np.arange(8) < np.array([5, 5, 8])[:, None]


def balm_route(logits, valid, moe: Router, policies: set):
    """BALM-MoE's routing of one row, padding and all: gates `[n, E]` and what the losses count.

    Padding is a token like any other, but for: "logits", its logits are -1e9 before the gates;
    "probabilities", it comes last in the queue of an expert; "aux", the losses leave it out.
    """
    n = len(logits)
    if "logits" in policies:
        logits = np.where(valid[:, None], logits, -1e9)
    asked, unlimited, p = gate_table(logits, dataclass_replace(moe, capacity=None), True)
    if isinstance(moe, ExpertChoice):
        asked = unlimited = p
    queue = np.where(valid[:, None], p, 0) if "probabilities" in policies else p
    places = math.ceil(moe.capacity * moe.k * n / moe.experts)
    kept = np.zeros_like(asked)
    for e in range(moe.experts):
        best = sorted(np.flatnonzero(asked[:, e]), key=lambda t: (-queue[t, e], t))[:places]  # noqa: B023
        kept[best, e] = unlimited[best, e]
    counted = valid if "aux" in policies else np.ones(n, bool)
    return kept, asked[counted] > 0, kept[counted] > 0, p[counted]


def route_noise(spec):
    # op by op: quicker than to compile each of many policies
    return plan_and_statistics(jnp.asarray(NOISE), Tokens(jnp.asarray(SHORT)), spec, None, True)


PADDED = {"topk": TopK, "topp": partial(TopP, threshold=0.6), "expert_choice": ExpertChoice}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("router", PADDED)
def test_partial_policies_of_balm(router, policy):
    spec = PADDED[router](experts=E, k=2, capacity=0.5, pads=policy)
    plan, stats = route_noise(spec)
    policies = set(policy.split(","))
    rows = [balm_route(*row, spec, policies) for row in zip(NOISE.astype("f8"), SHORT, strict=True)]
    gates, asked, kept, p = zip(*rows, strict=True)
    np.testing.assert_allclose(table(plan, E), gates, atol=1e-6)
    asked, kept, p = (np.concatenate(parts) for parts in (asked, kept, p))
    np.testing.assert_allclose(stats.load, kept.sum(0) / kept.sum(), rtol=1e-5)
    entropies = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(stats.entropy_loss, entropies.mean(), rtol=1e-5)
    z = np.log(np.exp(NOISE[SHORT].astype("f8")).sum(-1)) ** 2  # never of padding
    np.testing.assert_allclose(stats.z_loss, z.mean(), rtol=1e-5)
    if router == "expert_choice":
        np.testing.assert_allclose(stats.dropped, (~kept.any(-1)).mean(), atol=1e-6)
        return
    np.testing.assert_allclose(stats.dropped, 1 - kept.sum() / asked.sum(), atol=1e-6)
    share = asked.sum(0) / asked.sum()
    np.testing.assert_allclose(stats.load_balance, E * share @ p.mean(0), rtol=1e-5)


def test_policies_differ_from_each_other_and_from_excluding():
    """Or the tests above would compare one thing eight times."""
    found = {}
    for policy in ["excluded", *POLICIES]:
        spec = TopK(experts=E, k=2, capacity=0.5, pads=policy)
        plan, stats = route_noise(spec)
        found[policy] = (table(plan, E).tobytes(), float(stats.load_balance))
    assert len(set(found.values())) == len(found)


def test_padding_that_comes_last_takes_no_place_from_a_token():
    """Scores .4 .8 .2 .8 .6 .9 for expert 0, padding in between; three places of six tokens."""
    valid = np.array([[True, False, True, False, True, False]])
    # as "probabilities" the token is first, and of the pads the first two
    for pads, expected in (("none", [1, 0, 1, 0, 2, 0]), ("probabilities", [1, 0, 1, 0, 0, 2])):
        spec = dataclass_replace(HALF, capacity=0.75, pads=pads)  # ceil(.75 * 6 / 2) = 3
        plan, _ = route(spec, TWO[:, ::-1], valid, training=True)
        np.testing.assert_array_equal(plan.experts[0, :, 0], expected)


# gradients


def losses(k: int, valid):
    """A scalar of everything that a router's gradient flows through, with fixed weights."""
    weights = np.random.default_rng(2).standard_normal((*valid.shape, k))

    def objective(logits):
        spec = TopK(experts=logits.shape[-1], k=k)
        plan, stats = plan_and_statistics(logits, Tokens(valid), spec, None, False)
        return (plan.gates * weights).sum() + stats.load_balance + 0.1 * stats.z_loss

    return objective


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_numerically_in_float64(k):
    with in_float64():
        logits = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, E)), jnp.float64)
        objective = jax.jit(losses(k, jnp.asarray(VALID)))
        assert objective(logits).dtype == jnp.float64
        check_grads(objective, (logits,), order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("k", [1, 2])
def test_padding_has_no_gradient_and_tokens_do(k):
    gradient = jit(jax.grad(losses(k, jnp.asarray(VALID))))(jnp.asarray(LOGITS))
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and not gradient[~VALID].any()
    assert (np.abs(gradient[VALID]).max(-1) > 1e-3).all()


def test_the_gate_of_top1_teaches_the_router():
    """A gate renormalised to 1 would have no gradient (Switch, section 2.1)."""
    spec, tokens = TopK(experts=E, k=1), Tokens(jnp.asarray(VALID))

    def gate(logits):
        return plan_and_statistics(logits, tokens, spec, None, False)[0].gates.sum()

    gradient = jit(jax.grad(gate))(jnp.asarray(LOGITS))
    p = PROBABILITIES[0, 0]
    expected = p[0] * (np.eye(E)[0] - p)  # of softmax
    np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-5)


# the start of soft-MoE


@pytest.mark.parametrize("d", [128, 1280])
def test_a_normalised_router_starts_with_a_formed_dispatch(d):
    """The table of docs/moe.md: flat at scale 1, not at the default."""
    x = jax.random.normal(jax.random.key(0), (1, 256, d))
    kernel = 0.02 * jax.random.normal(jax.random.key(1), (d, 8, 64))
    spread = {}
    for name, spec in {"one": Soft(l2=True, l2_scale=1.0), "default": Soft(l2=True)}.items():
        scale = jnp.float32(spec.initial_scale(d))
        logits = router_logits(x, RouterWeights(kernel, scale, None))
        _, sums = routers.plan(spec, logits, Tokens(jnp.ones((1, 256), bool)))
        spread[name] = float(summarise(sums, balanced=False).spread)
    assert spread["one"] > DEFAULTS.flat and spread["default"] < 0.93
