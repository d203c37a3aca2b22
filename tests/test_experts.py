"""All experts at work on equally many rows, and wide experts as several narrow ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from moe_blocks import ffn

from moe_ablm.model.experts import ExpertWeights, expert_ffn, narrow_experts, split_wide
from moe_ablm.model.routing import Plan


@pytest.mark.parametrize(("activation", "halves"), [("gelu", 1), ("swiglu", 2)])
def test_every_expert_computes_its_own_rows(activation, halves):
    rng = np.random.default_rng(0)
    e, d, f = 3, 4, 5
    shapes = (e, d, halves * f), (e, halves * f), (e, f, d), (e, d)
    weights = ExpertWeights(*(rng.standard_normal(s).astype(np.float32) for s in shapes))
    x = rng.standard_normal((e, 7, d)).astype(np.float32)
    found = expert_ffn(jnp.asarray(x), weights, activation, "float32")
    for i in range(e):
        expected = ffn(x[i].astype("f8"), *(w[i].astype("f8") for w in weights), activation)
        np.testing.assert_allclose(found[i], expected, atol=2e-5)


def test_experts_in_bfloat16_keep_the_dtype_of_their_rows():
    weights = ExpertWeights(*(jnp.ones(s) for s in ((1, 2, 3), (1, 3), (1, 3, 2), (1, 2))))
    x = jnp.ones((1, 4, 2), jnp.bfloat16)
    assert expert_ffn(x, weights, "gelu", "bfloat16").dtype == jnp.bfloat16


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
