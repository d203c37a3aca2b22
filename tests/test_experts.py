"""Experts at work: on equally many rows each, of unequal width, and on groups of rows.

Groups: their table by hand, then values and gradients of every implementation against every expert
applied to every row, masked, in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_blocks import ffn

from moe_ablm.model import experts
from moe_ablm.model.dispatch import take_rows
from moe_ablm.model.experts import (
    BLOCK,
    IMPLEMENTATIONS,
    SHARE,
    Batched,
    ExpertWeights,
    Groups,
    block_size,
    expert_ffn,
    grouped_ffn,
    grouped_matmul,
    narrow_experts,
    sort_by_expert,
    split_wide,
)
from moe_ablm.model.layers import ACTIVATE, HIDDEN
from moe_ablm.model.routing import Plan
from moe_ablm.model.spec import BACKENDS, PRECISIONS, Execution

BFLOAT16 = Execution("bfloat16", "bfloat16")


@pytest.mark.parametrize(("activation", "halves"), [("gelu", 1), ("swiglu", 2)])
def test_every_expert_computes_its_own_rows(activation, halves):
    rng = np.random.default_rng(0)
    e, d, f = 3, 4, 5
    shapes = (e, d, halves * f), (e, halves * f), (e, f, d), (e, d)
    weights = ExpertWeights(*(rng.standard_normal(s).astype(np.float32) for s in shapes))
    x = rng.standard_normal((e, 7, d)).astype(np.float32)
    found = expert_ffn(jnp.asarray(x), weights, activation, Execution())
    for i in range(e):
        expected = ffn(x[i].astype("f8"), *(w[i].astype("f8") for w in weights), activation)
        np.testing.assert_allclose(found[i], expected, atol=2e-5)


def test_experts_in_bfloat16_keep_the_dtype_of_their_rows():
    weights = ExpertWeights(*(jnp.ones(s) for s in ((1, 2, 3), (1, 3), (1, 3, 2), (1, 2))))
    x = jnp.ones((1, 4, 2), jnp.bfloat16)
    assert expert_ffn(x, weights, "gelu", BFLOAT16).dtype == jnp.bfloat16


def test_narrow_experts_by_hand():
    """Widths 4, 12, 8 in parts of 4: experts 0 | 1 2 3 | 4 5, and 6 for none."""
    expected = [[0, 6, 6], [1, 2, 3], [4, 5, 6], [6, 6, 6]]
    np.testing.assert_array_equal(narrow_experts((4, 12, 8), 4), expected)
    np.testing.assert_array_equal(narrow_experts((8, 8), 8), [[0], [1], [2]])


def test_split_wide_by_hand():
    """Parts of an expert have its gate; what is not routed stays so, without a gate."""
    plan = Plan(jnp.asarray([[[1, 0], [2, 3]]]), jnp.asarray([[[0.7, 0.3], [0.9, 0.5]]]), None)
    split = split_wide(plan, narrow_experts((4, 12, 8), 4))
    np.testing.assert_array_equal(split.experts, [[[1, 2, 3, 0, 6, 6], [4, 5, 6, 6, 6, 6]]])
    gates = [[[0.7, 0.7, 0.7, 0.3, 0, 0], [0.9, 0.9, 0, 0, 0, 0]]]
    np.testing.assert_allclose(split.gates, gates, rtol=1e-6)
    assert split.place is None


# groups: the table


D, F, E = 6, 10, 3


def test_groups_by_hand():
    """Blocks of 2 rows, 3 experts, 2 choices; the fourth token is not routed."""
    chosen = jnp.asarray([[0, 2], [0, 1], [2, 0], [3, 3], [0, 2]])
    slot, assignment, groups = jax.jit(lambda chosen: sort_by_expert(chosen, 3, 2))(chosen)
    # expert 0: assignments 0 2 5 8 in blocks 0, 1; expert 1: 3 in block 2; expert 2: 1 4 9 in 3, 4
    np.testing.assert_array_equal(slot, [[0, 6], [1, 4], [7, 2], [16, 16], [3, 8]])
    np.testing.assert_array_equal(assignment, [0, 2, 5, 8, 3, 10, 1, 4, 9] + [10] * 7)
    np.testing.assert_array_equal(groups.expert[:5], [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(groups.sizes, [4, 2, 4])
    assert groups.expert.shape == (8,) and int(groups.used) == 5
    assert {x.dtype for x in (slot, assignment, *groups)} == {jnp.dtype("int32")}


def test_idle_experts_have_no_blocks():
    found = jax.jit(lambda chosen: sort_by_expert(chosen, 5, 2))(jnp.asarray([[3], [1], [3], [3]]))
    np.testing.assert_array_equal(found.groups.expert[:3], [1, 3, 3])
    np.testing.assert_array_equal(found.groups.sizes, [0, 2, 0, 4, 0])
    np.testing.assert_array_equal(found.slot, [[2], [0], [3], [4]])
    assert int(found.groups.used) == 3


T, K, ROWS = 300, 2, 128  # tokens, choices, rows of a block
sort = jax.jit(lambda chosen: sort_by_expert(chosen, E, ROWS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_with_many_rows_have_larger_blocks(backend):
    small, large = BLOCK[backend]
    many = SHARE[backend] * large * E
    assert block_size(1, E, backend) == block_size(many * small // large, E, backend) == small
    assert block_size(many - 1, E, backend) == large // 2
    assert block_size(many, E, backend) == block_size(8 * many, E, backend) == large > small
    chosen = np.random.default_rng(0).integers(0, E, (many, 1), np.int32)
    assert_sound(chosen, sort_by_expert(jnp.asarray(chosen), E, large), large)


def assert_sound(chosen: np.ndarray, found, size: int = ROWS) -> None:
    """What every table must hold, whatever the choices."""
    slot, assignment, groups = found
    chosen, slot, assignment, sizes, expert, used = (
        np.asarray(x) for x in (chosen, slot, assignment, *groups)
    )
    flat, rows = chosen.reshape(-1), len(assignment)
    counts = np.bincount(flat[flat < E], minlength=E)
    np.testing.assert_array_equal(sizes, -(-counts // size) * size)
    assert used == sizes.sum() / size <= len(expert) == rows / size
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
def test_groups_at_the_boundaries(name):
    chosen = filled(*FILLS[name])
    assert_sound(chosen, sort(jnp.asarray(chosen)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.01, 1), min_size=E + 1, max_size=E + 1))
def test_groups_of_any_choice(seed, odds):
    odds = np.array(odds) / sum(odds)
    chosen = np.random.default_rng(seed).choice(E + 1, (T, K), p=odds).astype(np.int32)
    assert_sound(chosen, sort(jnp.asarray(chosen)))


# groups: moving rows


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
    """Tokens to rows and back, as `dispatch.dropless` does it, against autodiff of x[i]."""
    chosen = jnp.asarray(filled(*FILLS[name]))
    slot, assignment, _ = sort(chosen)
    rng = np.random.default_rng(0)
    rows = assignment.shape[0]

    def compare(x, index, inverse):
        padded = jnp.concatenate([x, jnp.zeros((1, D))])
        expected, plain = jax.vjp(lambda p: p[index], padded)
        out, vjp = jax.vjp(lambda x: take_rows(x, index, inverse), x)
        np.testing.assert_array_equal(out, expected)
        g = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)
        np.testing.assert_allclose(vjp(g)[0], plain(g)[0][:-1], atol=1e-6)

    x, y = (jnp.asarray(rng.standard_normal((n, D)), jnp.float32) for n in (T, rows))
    compare(x, assignment // K, slot)
    compare(y, slot, assignment[:, None])


# groups: the products


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
def grouped_vjp(activation, execution, x, weights, groups, g):
    out, vjp = jax.vjp(
        lambda x, w: grouped_ffn(x, w, groups, ROWS, activation, execution), x, weights
    )
    return out, *vjp(g)


WAYS = (None, *IMPLEMENTATIONS)  # None: the loop of CPUs
# expert of each of 6 blocks, blocks in use
TABLES = {
    "each expert": ([0, 0, 1, 2, 2, 2], 5),
    "one expert": ([1] * 6, 6),
    "an idle one": ([0, 2, 2, 2, 2, 2], 2),
    "no tokens": ([2] * 6, 0),
}


def groups_of(table: str) -> Groups:
    expert, used = TABLES[table]
    sizes = np.bincount(expert[:used], minlength=E) * ROWS
    return Groups(*(jnp.asarray(x, jnp.int32) for x in (sizes, expert, used)))


def both(table, of_activation, execution: Execution):
    """(found, expected) outputs and gradients: `out, dx, dup, dup_bias, ddown, ddown_bias`.

    Of rows in use: what stands in others has no meaning.
    """
    (activation, weights), (expert, used) = of_activation, TABLES[table]
    rng, dtype = np.random.default_rng(2), execution.activations
    rows, here = len(expert) * ROWS, np.arange(len(expert) * ROWS) < used * ROWS
    x, g = (jnp.asarray(rng.standard_normal((rows, D)), dtype) for _ in range(2))
    g = g * here[:, None]
    found = grouped_vjp(activation, execution, x, weights, groups_of(table), g)
    assert found[0].dtype == found[1].dtype == dtype
    assert all(w.dtype == jnp.float32 for w in found[2])
    with jax.enable_x64(True):
        x, g, w = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (x, g, weights))
        of_row = jnp.asarray(np.repeat(expert, ROWS))
        expected = masked_vjp(activation, x, w, of_row, jnp.asarray(here), g)
    found, expected = (
        [np.asarray(a).astype("f8") for a in (out[here], dx[here], *dw)]
        for out, dx, dw in (found, expected)
    )
    return found, expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("table", TABLES)
def test_values_and_gradients_in_float32(of_activation, table, way):
    pairs = zip(*both(table, of_activation, Execution(grouped=way)), strict=True)
    for found, expected in pairs:
        scale = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16_operands"])
def test_values_and_gradients_with_bfloat16_operands(of_activation, precision, way):
    execution = Execution(*PRECISIONS[precision], grouped=way)
    for found, expected in zip(*both("each expert", of_activation, execution), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_unused_blocks_are_never_computed(of_activation):
    """By the loop of CPUs: rows behind the last block in use may hold anything, even NaN."""
    (activation, weights), (_, used) = of_activation, TABLES["an idle one"]
    x = np.full((6 * ROWS, D), np.nan, np.float32)
    x[: used * ROWS] = 1.0
    x, g = jnp.asarray(x), jnp.ones(x.shape)
    out, dx, dw = grouped_vjp(activation, Execution(), x, weights, groups_of("an idle one"), g)
    assert np.isfinite(out).all() and np.isfinite(dx).all()
    assert not np.asarray(out)[2 * ROWS :].any() and not np.asarray(dx)[2 * ROWS :].any()
    assert all(np.isfinite(d).all() for d in dw)
    assert not any(np.asarray(d)[1].any() for d in dw)  # nothing for the idle expert


@pytest.mark.parametrize("way", WAYS)
def test_idle_experts_learn_nothing_and_unused_rows_teach_nothing(of_activation, way):
    """Unused rows hold numbers, as they do where rows are gathered, but have no gradient."""
    (activation, weights), (_, used) = of_activation, TABLES["an idle one"]
    rng = np.random.default_rng(3)
    here = np.arange(6 * ROWS)[:, None] < used * ROWS
    x = rng.standard_normal((6 * ROWS, D)).astype("f4")
    g = (rng.standard_normal(x.shape) * here).astype("f4")
    run = partial(grouped_vjp, activation, Execution(grouped=way))
    groups = groups_of("an idle one")
    gradients = [
        run(jnp.asarray(x + 100 * ~here * more), weights, groups, jnp.asarray(g))[2]
        for more in (0, 1)
    ]
    for plain, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(plain, other)
        assert plain[0].any() and not plain[1].any()


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_a_product_of_groups_by_hand(way):
    """Blocks of 2: rows 0 to 3 by expert 0, none by 1, rows 4 and 5 by 2, the rest unused."""
    rng = np.random.default_rng(4)
    x, w = (rng.standard_normal(s).astype("f4") for s in ((10, 4), (3, 4, 5)))
    groups = Groups(*(jnp.asarray(a, jnp.int32) for a in ([4, 0, 2], [0, 0, 2, 2, 2], 3)))
    found = grouped_matmul(jnp.asarray(x), jnp.asarray(w), groups, 2, Execution(grouped=way))
    expected = np.concatenate([x[:4] @ w[0], x[4:6] @ w[2]])
    np.testing.assert_allclose(found[:6], expected, atol=1e-5)


def test_products_of_blocks_are_summed_part_by_part(monkeypatch):
    """Five blocks in use of seven, at most so many of them at a time; the last part overlaps."""
    rng = np.random.default_rng(5)
    x, g = (rng.standard_normal((14, n)).astype("f4") for n in (3, 4))
    expert = np.array([0, 0, 2, 2, 2, 2, 2])
    groups = Groups(*(jnp.asarray(a, jnp.int32) for a in ([4, 0, 6], expert, 5)))
    expected = np.zeros((3, 3, 4))
    for i in range(5):
        rows = slice(2 * i, 2 * i + 2)
        expected[expert[i]] += x[rows].astype("f8").T @ g[rows]
    for most in (1, 3, 4, 7):
        monkeypatch.setattr(experts, "AT_ONCE", most * 12 + 1)
        found = Batched.weight_gradient(jnp.asarray(x), jnp.asarray(g), groups, 2)
        np.testing.assert_allclose(found, expected, atol=1e-5)
