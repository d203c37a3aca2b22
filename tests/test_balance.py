"""Auxiliary-loss-free balancing: the step by hand, in a training step, and what it achieves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.routers import Tokens, route
from moe_ablm.model.routing import load_entropy, summarise
from moe_ablm.model.spec import EncoderSpec, Execution, TopK
from moe_ablm.training.balance import rebalanced
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.state import TrainState
from moe_ablm.training.step import make_train_step

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
        return summarise(route(logits, tokens, moe, balance)[1], True).load

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
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)
    quickly = {"xla_backend_optimization_level": 0}
    step = jax.jit(
        make_train_step(definition, optimizer, spec.moe, 1, 0.0), compiler_options=quickly
    )
    expected = np.zeros(4)
    for _ in range(3):
        state, metrics = step(state, batch)
        expected += 0.125 * np.sign(0.25 - np.asarray(metrics.router.load[0]))
        (found,) = balances(state.params).values()
        np.testing.assert_array_equal(found, expected)
    assert expected.any()
