"""Auxiliary-loss-free balancing: the step by hand, in a training step, and what it achieves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.families import TopK
from moe_ablm.model.routers import Tokens, plan
from moe_ablm.model.routing import load_entropy, summarise
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.state import TrainState, abstract_state, split_trained
from moe_ablm.training.step import make_train_step, rebalanced

SPARSE = TopK(experts=4, balance_rate=0.125, placement="every", first_dense=0)


def balances(params: nnx.State) -> dict[tuple, np.ndarray]:
    flat = nnx.to_flat_state(params)
    return {path: np.asarray(v.get_value()) for path, v in flat if path[-1] == "balance"}


def test_each_layer_follows_its_own_load():
    """Up where the load is below 1/E, down above, not at all at 1/E; layers in their order."""
    spec = EncoderSpec(11, 4, 4, 2, moe=SPARSE)  # 10 and 2: not in the order of their letters
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    before = {
        path: np.full(v.shape, 0.0 if path[-1] == "balance" else i, "f4")
        for i, (path, v) in enumerate(nnx.to_flat_state(nnx.state(module)))
    }
    flat = nnx.to_flat_state(nnx.state(module))
    params = nnx.from_flat_state({p: v.replace(jnp.asarray(before[p])) for p, v in flat})
    load = np.full((11, 4), 0.25, "f4")
    load[2] = [0.5, 0.25, 0.125, 0.125]
    load[10] = [0.0, 0.0, 0.0, 1.0]
    once = rebalanced(params, jnp.asarray(load), 0.125)
    expected = np.zeros((11, 4))
    expected[2], expected[10] = [-0.125, 0, 0.125, 0.125], [0.125, 0.125, 0.125, -0.125]
    found = balances(once)
    for layer in range(11):
        (path,) = (path for path in found if path[1] == layer)
        np.testing.assert_array_equal(found[path], expected[layer])
    for path, v in nnx.to_flat_state(once):
        if path[-1] != "balance":
            np.testing.assert_array_equal(v.get_value(), before[path])
    twice = balances(rebalanced(once, jnp.asarray(load), 0.125))
    np.testing.assert_array_equal(
        np.stack([twice[p] for p in found]), 2 * np.stack([*found.values()])
    )


def test_the_numbers_of_layers_and_loads_must_agree():
    params = nnx.split(Encoder(EncoderSpec(2, 4, 4, 2, moe=SPARSE), Execution(), nnx.Rngs(0)))[1]
    with pytest.raises(ValueError, match="zip"):
        rebalanced(params, jnp.zeros((1, 4)), 0.1)


def test_a_biased_router_becomes_balanced():
    """A router that likes expert 0 best: its gates stay, its load evens out."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 64, 4)) + [1.5, 0.5, 0, -1], jnp.float32)
    moe, rate = TopK(experts=4, k=1, balance_rate=0.02), 0.02
    tokens = Tokens(jnp.ones((4, 64), bool))

    @jax.jit
    def load_of(balance):
        return summarise(plan(moe, logits, tokens, balance)[1], True).asked

    params = nnx.split(Encoder(EncoderSpec(2, 4, 4, 2, moe=moe), Execution(), nnx.Rngs(0)))[1]
    loads = []
    for _ in range(60):
        (balance,) = balances(params).values()
        loads.append(load_of(jnp.asarray(balance)))
        params = rebalanced(params, loads[-1][None], rate)
    assert load_entropy(loads[0]) < 0.85 and load_entropy(loads[-1]) > 0.98


def test_a_training_step_moves_it_by_the_rate_alone():
    """No gradient, no weight decay, no moment of Adam has a part in it."""
    config = tiny_config(model__moe__balance_rate=0.125, train__weight_decay=0.5)
    spec, optimizer = config.model.spec(), make_optimizer(config.train)
    definition, params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(4, 24, (2, 12)), jnp.int32)
    # 46 assignments: no expert has exactly its share, where the sign would be rounding's
    ones = jnp.ones((2, 12), jnp.int32).at[1, 11].set(0)
    batch = {"tokens": tokens, "targets": tokens, "segment": ones, "region": ones,
             "loss_mask": ones > 0}  # fmt: skip
    moments = optimizer.init(split_trained(params)[0])
    state = TrainState(jnp.zeros((), jnp.int32), params, moments, None)
    quickly = {"xla_backend_optimization_level": 0}
    step = jax.jit(make_train_step(definition, optimizer, spec, 1, 0.0), compiler_options=quickly)
    expected = np.zeros(4)
    for _ in range(3):
        state, metrics = step(state, batch)
        expected += 0.125 * np.sign(0.25 - np.asarray(metrics.router.asked[0]))
        (found,) = balances(state.params).values()
        np.testing.assert_array_equal(found, expected)
    assert expected.any()


def test_a_balance_has_no_moment():
    spec, optimizer = EncoderSpec(2, 4, 4, 2, moe=SPARSE), make_optimizer(tiny_config().train)
    mesh = make_mesh(1, 1, 1)
    state = abstract_state(spec, optimizer, True, mesh)
    trained, fixed = split_trained(state.params)
    assert [path[-1] for path, _ in nnx.to_flat_state(fixed)] == ["balance"] * 2
    adam = state.opt_state[1][0]
    assert jax.tree.structure(adam.mu) == jax.tree.structure(trained)
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)


@pytest.mark.parametrize("capacity", [None, 0.25])
def test_with_a_capacity_it_follows_what_was_asked_for(capacity):
    """A router that likes expert 0: with capacity .25 all experts compute for about as many.

    Loads after drops would tell that all is well.
    """
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.standard_normal((4, 64, 4)) + [2.0, 0.5, 0.2, 0], jnp.float32)
    moe = TopK(experts=4, k=1, balance_rate=0.02, capacity=capacity)
    tokens = Tokens(jnp.ones((4, 64), bool))
    run = jax.jit(lambda balance: summarise(plan(moe, logits, tokens, balance, True)[1], True))
    params = nnx.split(Encoder(EncoderSpec(2, 4, 4, 2, moe=moe), Execution(), nnx.Rngs(0)))[1]
    for step in range(80):
        (balance,) = balances(params).values()
        stats = run(jnp.asarray(balance))
        if step == 0 and capacity:
            assert load_entropy(stats.load) > 0.99 and load_entropy(stats.asked) < 0.8
        params = rebalanced(params, stats.asked[None], 0.02)
    assert load_entropy(stats.asked) > 0.98
