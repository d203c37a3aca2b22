"""Blocked experts: the table of blocks by hand, then values and gradients against every expert
applied to every row, masked, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_ablm.model.ffn import ACTIVATE, HIDDEN
from moe_ablm.model.grouped import BLOCK, MANY, block_rows, block_size, grouped_ffn, take_rows

from moe_ablm.model import grouped
from moe_ablm.model.experts import ExpertWeights

D, F, E = 6, 10, 3


# the table of blocks


def test_blocks_by_hand(monkeypatch):
    """Blocks of 2 rows, 3 experts, 2 choices; the fourth token is not routed."""
    monkeypatch.setattr(grouped, "BLOCK", 2)
    chosen = jnp.asarray([[0, 2], [0, 1], [2, 0], [3, 3], [0, 2]])
    blocks = jax.jit(lambda chosen: block_rows(chosen, 3))(chosen)
    # expert 0: assignments 0 2 5 8 in blocks 0, 1; expert 1: 3 in block 2; expert 2: 1 4 9 in 3, 4
    np.testing.assert_array_equal(blocks.slot, [[0, 6], [1, 4], [7, 2], [16, 16], [3, 8]])
    np.testing.assert_array_equal(blocks.assignment, [0, 2, 5, 8, 3, 10, 1, 4, 9] + [10] * 7)
    np.testing.assert_array_equal(blocks.expert[:5], [0, 0, 1, 2, 2])
    assert blocks.expert.shape == (8,) and int(blocks.used) == 5
    assert {x.dtype for x in blocks} == {jnp.dtype("int32")}


def test_idle_experts_have_no_blocks(monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", 2)
    blocks = jax.jit(lambda chosen: block_rows(chosen, 5))(jnp.asarray([[3], [1], [3], [3]]))
    np.testing.assert_array_equal(blocks.expert[:3], [1, 3, 3])
    np.testing.assert_array_equal(blocks.slot, [[2], [0], [3], [4]])
    assert int(blocks.used) == 3


T, K = 300, 2
plan_blocks = jax.jit(lambda chosen: block_rows(chosen, E))


def test_experts_with_many_rows_have_larger_blocks():
    assert block_size(MANY * E - 1, E) == BLOCK and block_size(MANY * E, E) == 2 * BLOCK
    chosen = np.random.default_rng(0).integers(0, E, (MANY * E, 1), np.int32)
    assert_sound(chosen, block_rows(jnp.asarray(chosen), E))


def assert_sound(chosen: np.ndarray, blocks) -> None:
    """What every table must hold, whatever the choices."""
    chosen, slot, assignment, expert, used = (np.asarray(x) for x in (chosen, *blocks))
    flat, rows = chosen.reshape(-1), len(assignment)
    counts = np.bincount(flat[flat < E], minlength=E)
    size = block_size(flat.size, E)
    assert used == (-(-counts // size)).sum() <= len(expert) == rows / size
    routed = np.flatnonzero(flat < E)
    places = slot.reshape(-1)[routed]
    np.testing.assert_array_equal(assignment[places], routed)  # slot and assignment agree
    assert (slot.reshape(-1)[flat == E] == rows).all()
    assert (assignment < flat.size).sum() == len(routed)  # and nothing else is anywhere
    np.testing.assert_array_equal(expert[places // size], flat[routed])
    assert (places < used * size).all()
    assert ((expert >= 0) & (expert < E)).all()
    for e in range(E):  # an expert's rows keep the order of the tokens
        assert (np.diff(places[flat[routed] == e]) == 1).all()


def filled(*counts: int) -> np.ndarray:
    """Choices `[T, K]` that give each expert so many assignments, unrouted at the end."""
    flat = np.full(T * K, E, np.int32)
    flat[: sum(counts)] = np.repeat(np.arange(len(counts)), counts)
    return flat.reshape(T, K)


FILLS = {
    "nothing": (),
    "one": (1,),
    "127": (127,),
    "128": (128,),
    "129": (129,),
    "all to the first": (600,),
    "all to the last": (0, 0, 600),
    "an idle one between": (200, 0, 300),
    "most blocks": (129, 129, 257),
    "each one row over": (129, 129, 129),
    "full": (256, 128, 216),
}


@pytest.mark.parametrize("name", FILLS)
def test_blocks_at_the_boundaries(name):
    chosen = filled(*FILLS[name])
    assert_sound(chosen, plan_blocks(jnp.asarray(chosen)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.01, 1), min_size=E + 1, max_size=E + 1))
def test_blocks_of_any_choice(seed, odds):
    odds = np.array(odds) / sum(odds)
    chosen = np.random.default_rng(seed).choice(E + 1, (T, K), p=odds).astype(np.int32)
    assert_sound(chosen, plan_blocks(jnp.asarray(chosen)))


# moving rows


def test_take_rows_by_hand():
    """Row 1 is read twice, row 0 once, row 2 never; index 3 reads zeros."""
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    index = jnp.asarray([1, 3, 0, 1])
    inverse = jnp.asarray([[2, 4], [0, 3], [4, 4]])
    out, vjp = jax.vjp(lambda x: take_rows(x, index, inverse), x)
    np.testing.assert_array_equal(out, [[3, 4], [0, 0], [1, 2], [3, 4]])
    (gradient,) = vjp(jnp.asarray([[1.0, 10.0], [7.0, 7.0], [2.0, 20.0], [4.0, 40.0]]))
    np.testing.assert_array_equal(gradient, [[2, 20], [5, 50], [0, 0]])


@pytest.mark.parametrize("name", ["nothing", "129", "an idle one between"])
def test_both_ways_of_a_dispatch_have_the_gradients_of_indexing(name):
    """Tokens to rows and rows to tokens, as `moe.dropless` does it, against autodiff of x[i]."""
    chosen = jnp.asarray(filled(*FILLS[name]))
    blocks = plan_blocks(chosen)
    rng = np.random.default_rng(0)
    rows = blocks.assignment.shape[0]

    def compare(x, index, inverse):
        padded = jnp.concatenate([x, jnp.zeros((1, D))])
        expected, plain = jax.vjp(lambda p: p[index], padded)
        out, vjp = jax.vjp(lambda x: take_rows(x, index, inverse), x)
        np.testing.assert_array_equal(out, expected)
        g = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)
        np.testing.assert_allclose(vjp(g)[0], plain(g)[0][:-1], atol=1e-6)

    x, y = (jnp.asarray(rng.standard_normal((n, D)), jnp.float32) for n in (T, rows))
    compare(x, blocks.assignment // K, blocks.slot)
    compare(y, blocks.slot, blocks.assignment[:, None])


# the experts


@pytest.fixture(scope="module", params=ACTIVATE)
def of_activation(request):
    """An activation, and weights for it."""
    rng, h = np.random.default_rng(1), HIDDEN[request.param] * F
    shapes = (E, D, h), (E, h), (E, F, D), (E, D)
    draws = (rng.standard_normal(s).astype(np.float32) / 2 for s in shapes)
    return request.param, ExpertWeights(*draws)


def activated(h, activation):
    """The definitions of GELU and SwiGLU, written anew."""
    if activation == "gelu":
        return h * jax.scipy.special.erfc(-h / 2**0.5) / 2
    gate, value = h[:, :F], h[:, F:]
    return gate / (1 + jnp.exp(-gate)) * value


def masked_ffn(x, weights, expert_of_row, compute, activation):
    """Every expert on every row, then the right one's result; nothing for rows of none."""
    total = jnp.zeros_like(x)
    for e in range(E):
        h = activated(x @ weights.up[e] + weights.up_bias[e], activation)
        out = h @ weights.down[e] + weights.down_bias[e]
        total += out * (compute & (expert_of_row == e))[:, None]
    return total


@partial(jax.jit, static_argnums=0)
def masked_vjp(activation, x, weights, expert_of_row, compute, g):
    out, vjp = jax.vjp(
        lambda x, w: masked_ffn(x, w, expert_of_row, compute, activation), x, weights
    )
    return out, *vjp(g)


@partial(jax.jit, static_argnums=(0, 1))
def grouped_vjp(activation, operands, x, weights, expert, used, g):
    out, vjp = jax.vjp(
        lambda x, w: grouped_ffn(x, w, expert, used, activation, operands), x, weights
    )
    return out, *vjp(g)


# expert of each of 6 blocks, blocks in use
BLOCK_TABLES = {
    "each expert": ([0, 0, 1, 2, 2, 2], 5),
    "one expert": ([1] * 6, 6),
    "an idle one": ([0, 2, 2, 2, 2, 2], 2),
    "no tokens": ([2] * 6, 0),
}


def both(table, of_activation, operands, dtype):
    """(found, expected) outputs and gradients: `out, dx, dup, dup_bias, ddown, ddown_bias`."""
    (activation, weights), (expert, used) = of_activation, BLOCK_TABLES[table]
    rng = np.random.default_rng(2)
    rows = len(expert) * BLOCK
    x, g = (jnp.asarray(rng.standard_normal((rows, D)), dtype) for _ in range(2))
    blocks = jnp.asarray(expert), jnp.int32(used)
    found = grouped_vjp(activation, operands, x, weights, *blocks, g)
    assert found[0].dtype == found[1].dtype == dtype
    assert all(w.dtype == jnp.float32 for w in found[2])
    with jax.enable_x64(True):
        x, g, w = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (x, g, weights))
        of_row = jnp.asarray(np.repeat(expert, BLOCK))
        expected = masked_vjp(activation, x, w, of_row, jnp.arange(rows) < used * BLOCK, g)
    return (
        [np.asarray(a).astype("f8") for a in jax.tree.leaves(found)],
        [np.asarray(a) for a in jax.tree.leaves(expected)],
    )


@pytest.mark.parametrize("table", BLOCK_TABLES)
def test_values_and_gradients_in_float32(of_activation, table):
    for found, expected in zip(*both(table, of_activation, "float32", jnp.float32), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_with_bfloat16_operands(of_activation, dtype):
    pairs = zip(*both("each expert", of_activation, "bfloat16", dtype), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_unused_blocks_are_never_computed(of_activation):
    """Rows behind the last block in use may hold anything, even NaN."""
    (activation, weights), (expert, used) = of_activation, BLOCK_TABLES["an idle one"]
    x = np.full((6 * BLOCK, D), np.nan, np.float32)
    x[: used * BLOCK] = 1.0
    expert, used = jnp.asarray(expert), jnp.int32(used)
    x, g = jnp.asarray(x), jnp.ones(x.shape)
    out, dx, dw = grouped_vjp(activation, "float32", x, weights, expert, used, g)
    assert np.isfinite(out).all() and np.isfinite(dx).all()
    assert not np.asarray(out)[2 * BLOCK :].any() and not np.asarray(dx)[2 * BLOCK :].any()
    assert all(np.isfinite(d).all() for d in dw)
    assert not any(np.asarray(d)[1].any() for d in dw)  # nothing for the idle expert
