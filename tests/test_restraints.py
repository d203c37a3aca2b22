"""Frozen routers and expert dropout: what they touch, and nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_lora import flat
from tiny_models import MOE, tiny_model

from moe_ablm.evaluation.supervised.restraints import with_expert_dropout, with_frozen_routers
from moe_ablm.model.encoder import Observe, make_definition
from moe_ablm.model.families import Soft
from moe_ablm.model.spec import Execution

RATE = 0.25
NORMALISED = Soft(experts=4, slots=3, placement="every", first_dense=0, l2=True)


@pytest.mark.parametrize("router", ["topk", "soft"])
def test_whole_units_of_experts_are_dropped_and_the_others_rescaled(router):
    params = tiny_model(router).params
    before = flat(params)
    after = flat(with_expert_dropout(params, RATE, jax.random.key(3)))
    downs = {f"layers/{i}/ffn/down" for i in range(2)}
    assert {name for name in before if (before[name] != after[name]).any()} == downs
    gone = {}
    for name in downs:
        gone[name] = (after[name] == 0).all(-1)  # [E, F]
        kept = ~gone[name]
        np.testing.assert_allclose(after[name][kept], before[name][kept] / (1 - RATE), rtol=1e-6)
    both = np.stack(list(gone.values()))
    assert 0.15 < both.mean() < 0.35  # 256 units: four standard errors around .25 are .14 to .36
    first, second = both
    assert (first != second).any(), "each layer has its own draw"
    assert (first[0] != first[1]).any(), "and each expert"
    again, other = (flat(with_expert_dropout(params, RATE, jax.random.key(k))) for k in (3, 4))
    assert all((again[name] == after[name]).all() for name in downs)
    assert any((other[name] != after[name]).any() for name in downs)


def test_dense_layers_and_shared_experts_are_left_as_they_are():
    with_shared = replace(MOE["topk"], shared=1)
    for changes in ({}, {"moe": with_shared}):
        params = tiny_model("dense", **changes).params
        before, after = flat(params), flat(with_expert_dropout(params, 0.9, jax.random.key(0)))
        moved = {name for name in before if (before[name] != after[name]).any()}
        assert moved == ({f"layers/{i}/ffn/down" for i in range(2)} if changes else set())


def test_no_gradient_reaches_a_frozen_router_nor_its_scale():
    """Of token choice the same is trained in `test_evaluate_heads.py`."""
    model = tiny_model(moe=NORMALISED, layers=1)
    definition = make_definition(model.spec, Execution())
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 24, (2, 12)), jnp.int32)

    def total(params):
        encoder = nnx.merge(definition, with_frozen_routers(params))
        hidden = encoder(tokens, tokens > 0, observe=Observe(hidden=True)).hidden[-1]
        return (hidden * jnp.arange(16)).sum()

    gradient = flat(jax.jit(jax.grad(total))(model.params))
    without = {name for name, value in gradient.items() if not value.any()}
    still = {"layers/0/ffn/router", "layers/0/ffn/scale"}
    assert {name for name in without if not name.startswith("head/")} == still
