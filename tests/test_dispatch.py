"""Ways of tokens to experts and back, each with plans written by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_blocks import ffn

from moe_ablm.model.dispatch import dropless, limited, softly, sum_over_antibodies
from moe_ablm.model.experts import ExpertWeights, expert_ffn
from moe_ablm.model.routing import Plan, SoftPlan
from moe_ablm.model.spec import Execution

D, F, E = 4, 6, 3
RNG = np.random.default_rng(0)
WEIGHTS = ExpertWeights(
    *(
        jnp.asarray(RNG.standard_normal(s), jnp.float32)
        for s in ((E, D, F), (E, F), (E, F, D), (E, D))
    )
)
X = RNG.standard_normal((2, 3, D)).astype("f4")


def expert(e: int, x) -> np.ndarray:
    return ffn(np.asarray(x, "f8"), *(np.asarray(w[e], "f8") for w in WEIGHTS), "gelu")


# unequal numbers of experts, gates that sum to anything, a token without any
EXPERTS = np.array([[[2, 3], [3, 3], [1, 0]], [[2, 1], [2, 0], [2, 3]]])
GATES = np.array([[[0.5, 0], [0, 0], [2, -1]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0]]], "f4")
# places in the queues of rows; of an expert's two at most are taken in the second row
PLACE = np.array([[[0, 5], [6, 7], [0, 0]], [[0, 0], [1, 0], [2, 9]]])


def by_hand(admitted=True) -> np.ndarray:
    out = np.zeros(X.shape)
    for b, t, k in np.ndindex(EXPERTS.shape):
        e = EXPERTS[b, t, k]
        if e < E and np.broadcast_to(admitted, EXPERTS.shape)[b, t, k]:
            out[b, t] += GATES[b, t, k] * expert(e, X[b, t])
    return out


@jax.jit
def run_dropless(x, gates, weights):
    return dropless(x, Plan(jnp.asarray(EXPERTS), gates, None), weights, "gelu", Execution())


@partial(jax.jit, static_argnames=("capacity", "backend"))
def run_limited(x, gates, weights, capacity=3, backend="tpu"):
    chosen = jnp.where(jnp.asarray(PLACE) < capacity, EXPERTS, E)
    plan = Plan(chosen, gates, jnp.asarray(PLACE))
    experts = partial(expert_ffn, weights=weights, activation="gelu", execution=Execution())
    return limited(x, plan, capacity, E, experts, backend)


@pytest.mark.parametrize("run", [run_dropless, run_limited])
def test_a_plan_is_followed_whatever_router_made_it(run):
    out = run(jnp.asarray(X), jnp.asarray(GATES), WEIGHTS)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, by_hand(), atol=1e-5)
    np.testing.assert_array_equal(out[0, 1], np.zeros(D))


def test_limited_leaves_out_who_finds_no_place():
    out = run_limited(jnp.asarray(X), jnp.asarray(GATES), WEIGHTS, capacity=2)
    np.testing.assert_allclose(out, by_hand(PLACE < 2), atol=1e-5)
    np.testing.assert_array_equal(out[1, 2], np.zeros(D))  # its only expert was full


def test_scattered_sums_are_those_that_are_gathered():
    """On CPU, where there are fewer rows than places of tokens; gradients, too."""
    capacity, first = 1, PLACE == 0
    assert E * len(X) * capacity < EXPERTS.size
    weight = np.random.default_rng(1).standard_normal(X.shape).astype("f4")
    arguments = jnp.asarray(X), jnp.asarray(GATES), WEIGHTS

    def run(backend):
        def loss(*a):
            out = run_limited(*a, capacity=capacity, backend=backend)
            return (out * weight).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)

    (found, out), (expected, gathered) = run("cpu"), run("tpu")
    np.testing.assert_allclose(out, by_hand(first), atol=1e-5)
    np.testing.assert_allclose(out, gathered, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_both_ways_have_the_same_gradients():
    weight = np.random.default_rng(1).standard_normal(X.shape).astype("f4")
    arguments = jnp.asarray(X), jnp.asarray(GATES), WEIGHTS
    found, expected = (
        jax.jit(jax.grad(lambda *a, run=run: (run(*a) * weight).sum(), (0, 1, 2)))(*arguments)
        for run in (run_limited, run_dropless)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_softly_by_hand():
    """Two experts of two slots, one antibody of three tokens."""
    rng = np.random.default_rng(2)
    dispatch, combine = (rng.random((1, 3, 2, 2)).astype("f4") for _ in range(2))
    scale = np.array([2.0, -3.0], "f4")  # the experts: multiply by 2, by -3
    plan = SoftPlan(jnp.asarray(dispatch), jnp.asarray(combine))
    found = softly(jnp.asarray(X[:1]), plan, lambda x: x * scale[:, None, None], Execution())
    expected = np.zeros((3, D))
    for e in range(2):
        for s in range(2):
            slot = sum(dispatch[0, t, e, s] * X[0, t] for t in range(3))
            for t in range(3):
                expected[t] += combine[0, t, e, s] * scale[e] * slot
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


# sums over antibodies


def term(a, values, constants):
    """`a x^2 + c y`, as a pytree with two leaves."""
    x, y = values
    return a.astype(jnp.float32) * x**2 + constants * y, y.sum()


def total(most, values, constants):
    terms = [term(jnp.int32(a), values, constants) for a in range(1, most + 1)]
    return jax.tree.map(lambda *parts: sum(parts, jnp.zeros_like(parts[0])), *terms)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_sums_over_antibodies_and_their_gradients(most):
    values, constants = (jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 3.0])), jnp.float32(10)
    cotangent = jnp.asarray([0.3, 0.7]), jnp.float32(2)
    summed, vjp = jax.vjp(
        lambda v: sum_over_antibodies(term, jnp.int32(most), v, constants), values
    )
    expected, plain = jax.vjp(lambda v: total(most, v, constants), values)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), summed, expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), vjp(cotangent), plain(cotangent))


def test_a_batch_of_padding_sums_to_nothing():
    values = jnp.ones(2), jnp.ones(2)
    summed, vjp = jax.vjp(
        lambda v: sum_over_antibodies(term, jnp.int32(0), v, jnp.float32(1)), values
    )
    assert not any(np.asarray(a).any() for a in jax.tree.leaves((summed, vjp(summed))))
