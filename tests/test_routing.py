"""Statistics of routing by hand: of tables, of rows that add up, and of nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_ablm.model.routing import Plan, RowSums, SoftPlan, load_entropy, token_sums
from moe_ablm.model.routing import summarise as summarise_eagerly

summarise = jax.jit(summarise_eagerly, static_argnames="balanced")

# two rows of two tokens; the last is padding. Three experts.
LOGITS = jnp.asarray([[[0.0, 0, 0], [1, 2, 2]], [[3, 3, 0], [9, 9, 9]]])
DISTRIBUTION = jnp.asarray([[[0.5, 0.5, 0], [1, 0, 0]], [[0.25, 0.25, 0.5], [0, 0, 1]]])
CHOSEN = jnp.asarray([[[1.0, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 1]]])
LOAD = jnp.asarray([[[1.0, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 1]]])
VALID = jnp.asarray([[True, True], [True, False]])


@jax.jit
def sums(counted=VALID) -> RowSums:
    return token_sums(LOGITS, DISTRIBUTION, CHOSEN, LOAD, counted, VALID)


def test_assigned_counts_each_choice():
    experts = jnp.asarray([[[0, 2], [3, 3]]])
    plan = Plan(experts, jnp.zeros((1, 2, 2)), None)
    np.testing.assert_array_equal(plan.assigned(3), [[[1, 0, 1], [0, 0, 0]]])


def test_assigned_of_soft_is_the_share_of_the_output():
    combine = jnp.asarray([[[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.0], [0.0, 0.0]]]])
    plan = SoftPlan(jnp.zeros_like(combine), combine)
    np.testing.assert_allclose(plan.assigned(2), [[[0.3, 0.7], [0, 0]]], rtol=1e-6)


def test_sums_of_rows_by_hand():
    found = sums()
    half, quarters = math.log(2), 1.5 * math.log(2)  # entropies of (1/2, 1/2), (1/4, 1/4, 1/2)
    z = [math.log(3) ** 2 + math.log(math.e + 2 * math.e**2) ** 2, math.log(2 * math.e**3 + 1) ** 2]
    expected = {
        "tokens": [2, 1],
        "real": [2, 1],
        "load": [[2, 0, 0], [0, 0, 1]],
        "chosen": [[2, 1, 0], [0, 0, 1]],
        "probability": [[1.5, 0.5, 0], [0.25, 0.25, 0.5]],
        "lost": [1, 0],
        "asked": [3, 1],
        "z": z,
        "entropy": [half, quarters],
        "spread": [half / math.log(3), quarters / math.log(3)],
        "decisions": [2, 1],
        "squared": [9 / 3, 18 / 3],
    }
    assert tuple(expected) == RowSums._fields
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, err_msg=name)


def test_padding_that_counts_never_counts_for_the_logits():
    """BALM-MoE's policies may leave padding in the losses; its logits mean nothing."""
    all_of_them = sums(jnp.ones((2, 2), bool))
    np.testing.assert_array_equal(all_of_them.tokens, [2, 2])
    np.testing.assert_array_equal(all_of_them.real, [2, 1])
    np.testing.assert_allclose(all_of_them.probability[1], [0.25, 0.25, 1.5])
    np.testing.assert_array_equal(all_of_them.load[1], [0, 0, 2])
    for name in ("z", "squared"):
        np.testing.assert_array_equal(getattr(all_of_them, name), getattr(sums(), name))


def test_statistics_by_hand():
    stats = summarise(sums(), balanced=True)
    np.testing.assert_allclose(stats.load, [2 / 3, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(stats.asked, [2 / 4, 1 / 4, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(stats.choices, 3 / 3, rtol=1e-6)
    by_hand = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    np.testing.assert_allclose(stats.entropy, by_hand, rtol=1e-6)
    np.testing.assert_allclose(stats.dropped, 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(stats.spread, 2.5 * math.log(2) / math.log(3) / 3, rtol=1e-6)
    np.testing.assert_allclose(stats.logit_rms, math.sqrt((3 + 6) / 3), rtol=1e-6)
    # E sum_e f_e P_e, f = (2, 1, 1) / 4 before the drop, P = (1.75, 0.75, 0.5) / 3
    np.testing.assert_allclose(stats.load_balance, 3 * (3.5 + 0.75 + 0.5) / 12, rtol=1e-6)
    np.testing.assert_allclose(stats.z_loss, np.sum(sums().z) / 3, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy_loss, 2.5 * math.log(2) / 3, rtol=1e-6)
    assert float(summarise(sums(), balanced=False).load_balance) == 0.0


def test_rows_add_up_in_any_order_and_grouping():
    """What several devices or the antibodies of a row contribute is the same in the end."""
    rows = sums()
    for other in (
        RowSums(*(a[::-1] for a in rows)),
        RowSums(*(a.sum(0, keepdims=True) for a in rows)),
        RowSums(*(jnp.concatenate([a, jnp.zeros_like(a)]) for a in rows)),  # rows of padding
    ):
        found, expected = summarise(other, balanced=True), summarise(rows, balanced=True)
        for name, a, b in zip(found._fields, found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


def test_statistics_of_nothing_are_zero():
    for balanced in (True, False):
        for value in summarise(RowSums(*(jnp.zeros_like(a) for a in sums())), balanced=balanced):
            assert not value.any()  # and so it is no NaN


def test_load_entropy():
    np.testing.assert_allclose(load_entropy(jnp.asarray([0.5, 0.5, 0, 0])), 0.5, rtol=1e-5)
    np.testing.assert_allclose(load_entropy(jnp.full(8, 1 / 8)), 1.0, rtol=1e-6)
    assert float(load_entropy(jnp.asarray([0.0, 1, 0]))) == 0.0
    assert float(load_entropy(jnp.ones(1))) == 0.0
