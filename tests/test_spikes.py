"""Skipped spikes, the rate of routers and the z-loss, each against what it should do by hand."""

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_config

from moe_ablm import config as configs
from moe_ablm.errors import UserError
from moe_ablm.training import spikes
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OptimizerSpec
from moe_ablm.training.step import logit_z_loss

SPEC = OptimizerSpec(100, 0.1, 0, "linear", 0.2, 0.9, 0.98, 1e-6, 0.01, 0.0)


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 8)


def updates_of(optimizer, gradients) -> tuple[list[np.ndarray], tuple]:
    params = {"kernel": np.zeros((2, 3), np.float32)}
    state, found = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update({"kernel": gradient}, state, params)
        found.append(np.asarray(updates["kernel"]))
    return found, state


def ordinary(n: int) -> list[np.ndarray]:
    """Gradients whose norms are 1 give or take a tenth."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((n, 2, 3))
    norms = 1 + 0.1 * rng.standard_normal(n)
    return [np.float32(g / np.linalg.norm(g) * norm) for g, norm in zip(drawn, norms, strict=True)]


def test_a_spike_is_as_if_it_had_not_been():
    plain = ordinary(12)
    with_spike = [*plain[:10], 50 * plain[10], *plain[10:]]
    skipping = spikes.skip_spikes(optax.adam(0.1), 6.0)
    found, state = updates_of(skipping, with_spike)
    expected, _ = updates_of(optax.adam(0.1), plain)
    assert not found[10].any() and int(state.skipped) == 1 and int(state.seen) == 13
    for one, two in zip([*found[:10], *found[11:]], expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_nothing_is_skipped_before_the_window_is_full():
    gradients = ordinary(8)
    gradients[5] = 50 * gradients[5]
    _, state = updates_of(spikes.skip_spikes(optax.sgd(0.1), 3.0), gradients)
    assert int(state.skipped) == 0


def test_the_limit_is_that_of_the_window():
    """Against numpy in float64, update by update, with growing norms."""
    rng, window = np.random.default_rng(2), []
    gradients = [g * np.float32(rng.lognormal(0, 0.5)) for g in ordinary(60)]
    found, _ = updates_of(spikes.skip_spikes(optax.sgd(0.1), 1.0), gradients)
    skipped = 0
    for gradient, update in zip(gradients, found, strict=True):
        norm = np.linalg.norm(np.float64(gradient))
        last = window[-8:]
        limit = np.mean(last) + np.std(last) if len(last) == 8 else np.inf
        window.append(min(norm, limit))
        skipped += norm > limit
        assert update.any() == (norm <= limit)
    assert 3 < skipped < 40


def test_norms_that_have_grown_for_good_are_taken_in_the_end():
    gradients = [*ordinary(10), *[4 * g for g in ordinary(60)]]
    found, state = updates_of(spikes.skip_spikes(optax.sgd(0.1), 3.0), gradients)
    assert not found[10].any() and found[-1].any() and int(state.skipped) < 40


def test_a_norm_that_is_no_number_is_no_spike():
    gradients = [*ordinary(9), np.full((2, 3), np.nan, np.float32)]
    found, state = updates_of(spikes.skip_spikes(optax.sgd(0.1), 3.0), gradients)
    assert np.isnan(found[-1]).all() and int(state.skipped) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_routers_have_a_rate_of_their_own(optimizer):
    rng, keys = np.random.default_rng(1), ("router", "up")
    params, gradient = (
        {"layers": {0: {k: rng.standard_normal((4, 4)).astype(np.float32) for k in keys}}}
        for _ in range(2)
    )
    found = []
    for router_lr in (1.0, 0.25):
        changed = {"router_lr": router_lr, "optimizer": optimizer}
        made = make_optimizer(OptimizerSpec(**(vars(SPEC) | changed)))
        found.append(made.update(gradient, made.init(params), params)[0]["layers"][0])
    np.testing.assert_allclose(found[1]["router"], 0.25 * found[0]["router"], rtol=1e-6)
    np.testing.assert_array_equal(found[1]["up"], found[0]["up"])


def test_the_z_loss_is_the_squared_log_of_the_partition_function_where_masked():
    rng = np.random.default_rng(3)
    logits, mask = rng.standard_normal((2, 5, 7)) * 3, rng.random((2, 5)) < 0.4
    expected = sum(np.log(np.exp(row).sum()) ** 2 for row in logits[mask])
    found = logit_z_loss(jax.numpy.asarray(logits, "float32"), {"loss_mask": mask})
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_what_is_off_leaves_the_identity_of_runs_of_before_alone():
    names = ("router_lr", "skip_spikes", "z_loss")
    config = tiny_config()
    assert not {f"train.{name}" for name in names} & set(configs.identity(config, "d"))
    prints = {configs.fingerprint(tiny_config(**{f"train__{n}": 2.0}), "d") for n in names}
    assert len(prints | {configs.fingerprint(config, "d")}) == 4


WRONG = {
    "spikes": ({"train__skip_spikes": 0.5}, r"skip_spikes=0.5: expected 0 .off., or standard dev"),
    "z": ({"train__z_loss": -1.0}, "z_loss=-1.0: expected 0 .off. or more"),
    "router": ({"train__router_lr": -1.0}, "router_lr=-1.0: expected 0 .off. or more"),
    "dense": (
        {"train__router_lr": 0.5, "model__moe__router": "none"},
        "router_lr=0.5: expected 1 with model.moe.router='none'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    changes, words = WRONG[name]
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)
