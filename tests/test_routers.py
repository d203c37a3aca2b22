"""Routers: plans and statistics written out by hand, gradients in float64, padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe_ablm.model.routers import assignment_share, load_entropy, router_z_loss, top_k
from moe_ablm.model.spec import MoESpec

E = 4
# probabilities of four tokens and one pad; the logits of token i are log p + SHIFT[i], so that
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


route_jitted = jax.jit(top_k, static_argnums=2)


def route(k: int, logits=LOGITS, valid=VALID):
    return route_jitted(jnp.asarray(logits), jnp.asarray(valid), MoESpec("topk", experts=E, k=k))


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
    spec = MoESpec("topk", experts=7, k=3)
    plan, stats = top_k(jnp.asarray(logits), jnp.asarray(valid), spec)
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


def test_parts_by_hand():
    chosen = jnp.asarray([[[0, 2], [3, 3]]])  # 3: not routed
    np.testing.assert_array_equal(assignment_share(chosen, 3), [0.5, 0, 0.5])
    np.testing.assert_array_equal(assignment_share(jnp.full((1, 2, 2), 3), 3), [0, 0, 0])
    np.testing.assert_allclose(load_entropy(jnp.asarray([0.5, 0.5, 0, 0])), 0.5, rtol=1e-5)
    assert float(load_entropy(jnp.ones(1))) == 0.0
    z_loss = router_z_loss(jnp.zeros((1, 2, 8)), jnp.asarray([[True, False]]))
    np.testing.assert_allclose(z_loss, math.log(8) ** 2, rtol=1e-5)


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


# gradients


def losses(k: int, valid):
    """A scalar of everything that a router's gradient flows through, with fixed weights."""
    weights = np.random.default_rng(2).standard_normal((*valid.shape, k))

    def objective(logits):
        plan, stats = top_k(logits, valid, MoESpec("topk", experts=logits.shape[-1], k=k))
        return (plan.gates * weights).sum() + stats.load_balance + 0.1 * stats.z_loss

    return objective


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_numerically_in_float64(k):
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, E)), jnp.float64)
        objective = jax.jit(losses(k, jnp.asarray(VALID)))
        assert objective(logits).dtype == jnp.float64
        check_grads(objective, (logits,), order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("k", [1, 2])
def test_padding_has_no_gradient_and_tokens_do(k):
    gradient = jax.jit(jax.grad(losses(k, jnp.asarray(VALID))))(jnp.asarray(LOGITS))
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and not gradient[~VALID].any()
    assert (np.abs(gradient[VALID]).max(-1) > 1e-3).all()


def test_the_gate_of_top1_teaches_the_router():
    """A gate renormalised to 1 would have no gradient (Switch, section 2.1)."""
    gradient = jax.grad(lambda logits: route(1, logits)[0].gates.sum())(jnp.asarray(LOGITS))
    p = PROBABILITIES[0, 0]
    expected = p[0] * (np.eye(E)[0] - p)  # of softmax
    np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-5)
