"""Dropout: bits that belong to an antibody wherever it stands, their share, and their gradients.

That a mesh changes nothing is tested in test_contracts, whose dense encoder drops out, too.
"""

import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from moe_blocks import jit

from moe_ablm import trainer
from moe_ablm.model import attention
from moe_ablm.model.attention import Dropped, attend
from moe_ablm.model.dropout import drop, kept_weights, mix, token_counters
from moe_ablm.model.encoder import Encoder, make_definition
from moe_ablm.model.packing import Packing
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.state import abstract_state
from moe_ablm.training.step import make_train_step

KEY = jax.random.key(0)
LENGTHS = (11, 7, 9)
DRAWS = np.random.default_rng(0)
ANTIBODIES = [DRAWS.integers(4, 24, n) for n in LENGTHS]


def in_rows(length: int, *rows: tuple[int, ...]):
    """Tokens `[rows, length]` that hold the antibodies of each row, and their packing."""
    tokens, antibody, position = (np.ones((len(rows), length), int) for _ in range(3))
    antibody[:], position[:] = 0, 0
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members, 1):
            here = slice(start, start := start + LENGTHS[member])
            tokens[row, here], antibody[row, here] = ANTIBODIES[member], number
            position[row, here] = np.arange(LENGTHS[member])
    return jnp.asarray(tokens), Packing(jnp.asarray(antibody), jnp.asarray(position))


ALONE = in_rows(12, (0,), (1,), (2,))
# antibody -> row and place
TOGETHER = in_rows(40, (2, 0), (1,)), {2: (0, slice(0, 9)), 0: (0, slice(9, 20)), 1: (1, slice(7))}


def counters_of(rows, packed: bool = True, key=KEY):
    tokens, packing = rows
    return np.asarray(
        token_counters(tokens, packing.antibody > 0, packing if packed else None, key)
    )


def test_counters_belong_to_the_antibody():
    """Alone, in a longer row, with others, in another row, packed or not: the same."""
    alone = counters_of(ALONE, packed=False)
    np.testing.assert_array_equal(counters_of(ALONE)[0, :11], alone[0, :11])
    rows, places = TOGETHER
    together = counters_of(rows)
    for member, (row, here) in places.items():
        np.testing.assert_array_equal(together[row, here], alone[member, : LENGTHS[member]])
    tokens = np.concatenate([alone[i, :n] for i, n in enumerate(LENGTHS)])
    assert len(set(tokens)) == sum(LENGTHS)  # and no two tokens share one
    other = counters_of(ALONE, packed=False, key=jax.random.key(1))
    assert (other[0, :11] != alone[0, :11]).all()


def test_one_letter_changes_every_counter_of_its_antibody():
    tokens, packing = ALONE
    changed = tokens.at[0, 3].set(tokens[0, 3] % 20 + 4)
    before, after = (counters_of((t, packing), packed=False) for t in (tokens, changed))
    assert (before[0, :11] != after[0, :11]).all()
    np.testing.assert_array_equal(before[1:], after[1:])


def test_mix_is_a_bijection():
    """Of any 2^16 numbers none collide, and every bit of the result is set half of the time."""
    numbers = jnp.arange(2**16, dtype=jnp.uint32)
    for inputs in (numbers, numbers << 16, numbers * jnp.uint32(0x9E3779B9)):
        found = np.asarray(mix(inputs))
        assert len(np.unique(found)) == 2**16
        share = (found[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
        assert np.abs(share - 0.5).max() < 5 * 0.5 / 2**8


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_units_are_dropped_at_the_rate_and_the_rest_rescaled(rate):
    tokens = jnp.asarray(DRAWS.integers(4, 24, (64, 50)))
    counters = token_counters(tokens, jnp.ones((64, 50), bool), None, KEY)
    x = jnp.ones((64, 50, 32))
    found = np.asarray(drop(x, counters, rate, KEY))
    np.testing.assert_array_equal(np.unique(found), np.float32([0, 1 / (1 - rate)]))
    kept = found > 0
    error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * error
    for axis in range(3):  # neighbours are dropped independently
        pairs = (np.moveaxis(kept, axis, 0)[1:] & np.moveaxis(kept, axis, 0)[:-1]).mean()
        assert abs(pairs - (1 - rate) ** 2) < 8 * error
    other = np.asarray(drop(x, counters, rate, jax.random.key(1))) > 0  # another layer
    assert abs((kept & other).mean() - (1 - rate) ** 2) < 8 * error
    assert drop(x.astype(jnp.bfloat16), counters, rate, KEY).dtype == jnp.bfloat16


def test_weights_are_dropped_at_the_rate_and_each_by_itself():
    rate, heads = 0.2, 4
    tokens = jnp.asarray(DRAWS.integers(4, 24, (4, 60)))
    counters = token_counters(tokens, jnp.ones((4, 60), bool), None, KEY)
    kept = np.asarray(kept_weights(counters, counters, heads, rate, KEY))
    assert kept.shape == (4, heads, 60, 60)
    error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * error
    both = (1 - rate) ** 2
    assert abs((kept & kept.swapaxes(2, 3)).mean() - both) < 8 * error  # (i, j) and (j, i)
    assert abs((kept[:, 1:] & kept[:, :-1]).mean() - both) < 8 * error
    assert abs((kept[..., 1:] & kept[..., :-1]).mean() - both) < 8 * error
    assert abs((kept[:, :, 1:] & kept[:, :, :-1]).mean() - both) < 8 * error


# attention


def heads_of(rng, dtype="f4"):
    """q, k, v `[3, 12, 2, 8]`."""
    return [jnp.asarray(rng.standard_normal((3, 12, 2, 8)), dtype) for _ in range(3)]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu"])
def test_attention_drops_the_weights_that_are_told(backend, packed, monkeypatch):
    """Against all weights, one by one; in blocks of 5 queries. cuDNN has no such dropout."""
    monkeypatch.setattr(attention, "QUERIES", 5)
    monkeypatch.setattr(attention, "_attend_cudnn", None)
    rate, (tokens, packing) = 0.3, ALONE
    valid = packing.antibody > 0
    counters = token_counters(tokens, valid, packing if packed else None, KEY)
    q, k, v = heads_of(np.random.default_rng(1))
    kept = kept_weights(counters, counters, 2, rate, KEY)

    def plain(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", kept * weights / (1 - rate), v)

    def dropped(q, k, v):
        execution = Execution(backend=backend)
        given = Dropped(counters, KEY)
        return attend(q, k, v, valid, execution, packing if packed else None, given, rate)

    cotangent = jnp.where(valid[..., None, None], heads_of(np.random.default_rng(2))[0], 0)

    def both(f):
        """Output, and gradients of q, k, v."""

        def run(*given):
            out, vjp = jax.vjp(f, *given)
            return out, vjp(cotangent)

        return jit(run)(q, k, v)

    (expected, gradients), (found, found_gradients) = both(plain), both(dropped)
    np.testing.assert_allclose(found[valid], expected[valid], atol=2e-6)
    for a, b in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


# the encoder

RATES = {"attention_dropout": 0.2, "hidden_dropout": 0.3, "embedding_dropout": 0.1}
SPEC = EncoderSpec(2, 8, 16, 2, **RATES)


def logits(spec, rows, key=KEY, packed=True, execution=Execution()):  # noqa: B008
    tokens, packing = rows
    encoder = Encoder(spec, execution, nnx.Rngs(0))
    valid, packing = packing.antibody > 0, packing if packed else None
    run = jit(lambda *inputs: encoder(*inputs, packing, True, key).logits)
    return np.asarray(run(tokens, valid))


def test_an_antibody_has_its_logits_wherever_it_stands():
    """Together with others in a row, alone in one, in batches of other order, scanned or not."""
    rows, places = TOGETHER
    alone = logits(SPEC, ALONE, packed=False)
    together = logits(SPEC, rows, execution=Execution(scan=True))
    for member, (row, here) in places.items():
        expected = alone[member, : LENGTHS[member]]
        np.testing.assert_allclose(together[row, here], expected, atol=2e-6)
    turned = logits(SPEC, in_rows(12, (2,), (0,)), packed=False)
    np.testing.assert_allclose(turned[1, :11], alone[0, :11], atol=2e-6)
    for key in (None, jax.random.key(1)):
        assert np.abs(logits(SPEC, ALONE, key, packed=False) - alone)[0, :11].max() > 1e-3


@pytest.mark.parametrize("name", RATES)
def test_each_kind_of_dropout_does_something_by_itself(name):
    plain = EncoderSpec(2, 8, 16, 2)
    one = EncoderSpec(2, 8, 16, 2, **{name: 0.3})
    before, after = (logits(spec, ALONE) for spec in (plain, one))
    assert np.abs(before - after)[0, :11].max() > 1e-4
    np.testing.assert_array_equal(logits(one, ALONE, None), logits(plain, ALONE, None))


def test_without_dropout_nothing_is_drawn():
    spec = EncoderSpec(2, 8, 16, 2)
    np.testing.assert_array_equal(logits(spec, ALONE), logits(spec, ALONE, None))
    config = tiny_config()
    optimizer = make_optimizer(config.train)
    batch = {n: jax.ShapeDtypeStruct((2, 12), "int32") for n in
             ("tokens", "targets", "segment", "region")}  # fmt: skip
    batch["loss_mask"] = jax.ShapeDtypeStruct((2, 12), "bool")

    def program(spec):
        step = make_train_step(make_definition(spec, Execution()), optimizer, spec, 1, 0.0)
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "expert", "fsdp")
        )
        return str(jax.make_jaxpr(step)(abstract_state(spec, optimizer, False, mesh), batch))

    assert "random" not in program(spec)
    assert "random" in program(SPEC)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("attention_dropout", "cpu"),
        ("hidden_dropout", "tpu"),
        pytest.param("attention_dropout", "tpu", marks=pytest.mark.slow),
        pytest.param("hidden_dropout", "cpu", marks=pytest.mark.slow),
    ],
)
def test_gradients_numerically_in_float64(name, backend, monkeypatch):
    """Central differences along a random direction of all parameters."""
    monkeypatch.setattr(attention, "QUERIES", 5)
    spec = EncoderSpec(2, 8, 16, 2, **{name: 0.3})
    execution, h = Execution("float64", "float64", backend=backend), 1e-6
    tokens, packing = ALONE
    params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))[1]
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        definition = make_definition(spec, execution)
        draw = partial(jax.tree.map, lambda x: jnp.asarray(rng.standard_normal(x.shape)))
        params, direction = (draw(params) for _ in range(2))
        valid, key = packing.antibody > 0, jax.random.key(0)

        @jit
        def run(params):
            def loss(params):
                output = nnx.merge(definition, params)(tokens, valid, packing, True, key)
                return jnp.square(output.logits * valid[..., None]).mean()

            return jax.value_and_grad(loss)(params)

        moved = (jax.tree.map(lambda x, d, s=s: x + s * d, params, direction) for s in (h, -h))
        up, down = (run(p)[0] for p in moved)
        products = jax.tree.map(lambda g, d: (g * d).sum(), run(params)[1], direction)
        analytic = sum(jax.tree.leaves(products))
        assert analytic.dtype == jnp.float64
        np.testing.assert_allclose(analytic, (up - down) / (2 * h), rtol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_drops_what_it_would_have_dropped(tmp_path, monkeypatch):
    changes = {f"model__{name}": rate for name, rate in RATES.items()}
    config = tiny_config(**changes, model__moe__router="none", data__batching="packed")
    whole = trainer.run(config, tmp_path / "whole")
    save = trainer.Trainer._save

    def save_and_signal(self, state):
        save(self, state)
        if self.step == 6:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save", save_and_signal)
        assert trainer.run(config, tmp_path / "halves")["status"] == "stopped"
    resumed = trainer.run(config, tmp_path / "halves")
    assert resumed["params_sha256"] == whole["params_sha256"]
