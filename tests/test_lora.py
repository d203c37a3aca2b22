"""Adapters: what is adapted, and by which product."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import tiny_model

from moe_ablm.evaluation.supervised.lora import SCALE, adapted, adapters


def flat(params) -> dict[str, np.ndarray]:
    return {
        "/".join(map(str, path)): np.asarray(v.get_value(), np.float64)
        for path, v in nnx.to_flat_state(params)
    }


@pytest.fixture(scope="module", params=["topk", "soft"])
def factors(request):
    params = tiny_model(request.param).params
    drawn, rng = adapters(params, 3, seed=1), np.random.default_rng(0)
    return params, {
        k: (a, rng.standard_normal(b.shape).astype(np.float32)) for k, (a, b) in drawn.items()
    }


def test_attention_routers_and_every_expert_are_adapted_and_nothing_else(factors):
    params, found = factors
    names = ("attention/qkv/kernel", "attention/out/kernel", "ffn/router", "ffn/up", "ffn/down")
    assert set(found) == {f"layers/{i}/{name}" for i in range(2) for name in names}
    assert found["layers/0/ffn/up"][0].shape == (4, 16, 3)  # factors of each expert
    before, after = flat(params), flat(adapted(params, found))
    assert {name for name in before if (before[name] != after[name]).any()} == set(found)


def test_a_weight_is_itself_and_twice_the_product_of_its_factors(factors):
    params, found = factors
    before, after = flat(params), flat(adapted(params, found))
    for name, (a, b) in found.items():
        a, b, change = np.float64(a), np.float64(b), after[name] - before[name]
        if a.ndim == 3:
            expected = np.stack([SCALE * a[e] @ b[e] for e in range(4)])
        else:
            expected = (SCALE * a @ b).reshape(change.shape)
        np.testing.assert_allclose(change, expected, atol=1e-5)


def test_fresh_adapters_change_nothing_and_are_drawn_by_the_seed():
    params = tiny_model("topk").params
    fresh, other = adapters(params, 2, 0), adapters(params, 2, 1)
    jax.tree.map(np.testing.assert_array_equal, params, adapted(params, fresh))
    name = "layers/1/attention/qkv/kernel"
    assert np.abs(fresh[name][0] - other[name][0]).max() > 0.1
    assert np.std(fresh[name][0]) == pytest.approx(1 / 4, rel=0.4)  # of 16 inputs
