"""An antibody's output never depends on padding, batch order, neighbours or packing; of any router.

What is expected is the reference's answer, which looks at one antibody at a time.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_blocks import (
    ALONE,
    BLOCKS,
    COTANGENT,
    VALID,
    B,
    D,
    E,
    L,
    X,
    block,
    capacity_of,
    encoder_spec,
    forward,
    named,
    reference,
    value_and_grad,
)

from moe_ablm.model.packing import Packing

# inference, and training where it differs
MODES = [(name, False) for name in ALONE]
MODES += [(name, True) for name in ALONE if capacity_of(BLOCKS[name]) is not None]
MODES = pytest.mark.parametrize(
    ("name", "training"), MODES, ids=lambda v: {True: "training", False: "inference"}.get(v, v)
)


@cache
def alone(name: str, training: bool):
    """Output, assignments and statistics of each antibody by itself, in float64."""
    return reference(encoder_spec(name), X, VALID + 0, training)


def run(spec, training, x, valid, packing=None):
    inputs = [jnp.asarray(x, jnp.float32), jnp.asarray(valid)]
    out, routed = forward(*_with_mode(block(spec), training), *inputs, packing)
    return np.asarray(out), jax.tree.map(np.asarray, routed)


def _with_mode(parts, training):
    return parts[0], training, parts[1]


def assert_statistics(stats, expected: dict):
    for key, value in expected.items():
        np.testing.assert_allclose(getattr(stats, key), value, atol=1e-5, rtol=1e-5, err_msg=key)


def widened(x, valid, width: int):
    """More padding, which holds large numbers."""
    more = width - L
    x = np.pad(np.where(valid[..., None], x, -30.0), ((0, 0), (0, more), (0, 0)), "edge")
    return x, np.pad(valid, ((0, 0), (0, more)))


@MODES
def test_padding_order_and_neighbours(name, training):
    """All at once: rows 0 and 3 stay, 1 and 2 go, the order is turned, the rows grow."""
    expected, assigned, stats = alone(name, training)
    spec = encoder_spec(name)
    x, valid = widened(X, VALID, L + 5)
    out, routed = run(spec, training, x, valid)
    np.testing.assert_allclose(out[:, :L][VALID], expected[VALID], atol=1e-5)
    np.testing.assert_allclose(routed.assigned[:, :L], assigned, atol=1e-5)
    assert not routed.assigned[~valid].any()
    if not spec.moe.shared:
        assert not out[~valid].any()
    assert_statistics(routed.stats, stats)
    others, others_valid = np.flip(x, 0).copy(), np.flip(valid, 0).copy()
    others[1:3], others_valid[1:3] = -x[:2, ::-1], True
    turned, _ = run(spec, training, others, others_valid)
    for row, place in ((0, 3), (3, 0)):
        here = VALID[row]
        np.testing.assert_allclose(turned[place, :L][here], expected[row][here], atol=1e-5)


@cache
def packed():
    """The four antibodies in two rows: x, antibody, position, and where each one starts."""
    x, antibody, position = (np.zeros((2, 20, n)) for n in (D, 1, 1))
    lengths, starts = VALID.sum(1), {}
    for row, members in enumerate(((0, 1), (2, 3))):
        start = 0
        for number, member in enumerate(members, 1):
            here = slice(start, start + lengths[member])
            x[row, here] = X[member, : lengths[member]]
            antibody[row, here], position[row, here, 0] = number, np.arange(lengths[member])
            starts[member], start = (row, here), here.stop
    return x, antibody[..., 0].astype(int), position[..., 0].astype(int), starts


@MODES
def test_packed_rows_give_what_separate_ones_give(name, training):
    expected, assigned, stats = alone(name, training)
    x, antibody, position, starts = packed()
    packing = Packing(jnp.asarray(antibody), jnp.asarray(position))
    out, routed = run(encoder_spec(name), training, x, antibody > 0, packing)
    for member, where in starts.items():
        here = VALID[member]
        np.testing.assert_allclose(out[where], expected[member][here], atol=1e-5)
        np.testing.assert_allclose(routed.assigned[where], assigned[member][here], atol=1e-5)
    assert_statistics(routed.stats, stats)


@pytest.mark.parametrize("name", ["soft l2", "topk capacity"])
def test_gradients_of_packed_rows_are_those_of_separate_ones(name):
    """The loop over antibodies has a gradient of its own, and packed queues are sorted blocks."""
    definition, params = block(encoder_spec(name))
    x, antibody, position, starts = packed()
    cotangent = np.zeros(x.shape)
    for member, where in starts.items():
        cotangent[where] = COTANGENT[member][VALID[member]]
    packing = Packing(jnp.asarray(antibody), jnp.asarray(position))
    inputs = (x.astype("f4"), antibody > 0, cotangent.astype("f4"))
    (value, (_, routed)), (dparams, dx) = value_and_grad(
        definition, True, params, *map(jnp.asarray, inputs), packing
    )
    inputs = (X.astype("f4"), VALID, (COTANGENT * VALID[..., None]).astype("f4"))
    (expected, (_, apart)), (dexpected, dx_apart) = value_and_grad(
        definition, True, params, *map(jnp.asarray, inputs)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), routed.stats, apart.stats
    )
    for member, where in starts.items():
        np.testing.assert_allclose(dx[where], dx_apart[member][VALID[member]], atol=1e-5)
    for (part, a), b in zip(named(dparams).items(), named(dexpected).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=part)


# the group "batch", and padding that takes part


@pytest.mark.parametrize("name", ["topk batch", "expert choice batch"])
def test_in_the_group_batch_an_antibody_depends_on_its_neighbours(name):
    """As in BALM-MoE; not so the same routers one antibody at a time."""
    spec = encoder_spec(name)
    other = X.copy()
    other[0] = np.random.default_rng(11).standard_normal((L, D))
    for group, differs in (("batch", True), ("sequence", False)):
        each = replace(spec, moe=replace(spec.moe, group=group))
        before, after = (run(each, True, x, VALID)[0][1:][VALID[1:]] for x in (X, other))
        assert (np.abs(before - after).max() > 0.1) == differs
        if not differs:
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["topk batch", "expert choice batch"])
def test_a_batch_of_one_antibody_is_a_sequence(name):
    spec = encoder_spec(name)
    alike = replace(spec, moe=replace(spec.moe, group="sequence"))
    (out, found), (expected, routed) = (run(s, True, X[:1], VALID[:1]) for s in (spec, alike))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, routed)


def test_in_inference_token_choice_depends_on_no_neighbour_even_in_a_batch():
    spec = encoder_spec("topk batch")
    out = run(spec, False, X, VALID)[0]
    expected = reference(spec, X, VALID + 0, False)[0]
    np.testing.assert_allclose(out[VALID], expected[VALID], atol=1e-5)
    turned = run(spec, False, X[::-1], VALID[::-1])[0][::-1]
    np.testing.assert_allclose(turned, out, atol=1e-6)


def test_padding_that_takes_part_is_seen():
    """So the tests above can fail: under "none" pads have experts, and places of the tokens'."""
    spec = encoder_spec("topk capacity")
    partial = replace(spec, moe=replace(spec.moe, pads="none"))
    x, valid = widened(X, VALID, L + 5)
    out, routed = run(partial, True, x, valid)
    assert routed.assigned[~valid].any() and out[~valid].any()
    assert np.abs(out[:, :L][VALID] - alone("topk capacity", True)[0][VALID]).max() > 0.1


def test_rows_without_an_antibody_are_nothing():
    """A last batch may be filled with empty rows; a whole batch of them has finite statistics."""
    for name in ("topk capacity", "expert choice", "soft", "sequence"):
        out, routed = run(encoder_spec(name), True, X, np.zeros((B, L), bool))
        assert not out.any() and not routed.assigned.any()
        assert all(np.isfinite(s).all() and not s.any() for s in routed.stats)
        assert routed.assigned.shape == (B, L, E)
