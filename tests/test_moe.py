"""The MoE block against every expert on every token, its gradient in float64, and its like among
plain layers; on eight devices it gives the answer of one.

`python tests/test_moe.py OUT.npz` computes blocks on every device there is; the test of eight
devices runs it in a process of its own.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import moe_blocks
import numpy as np
import pytest
from conftest import xla_flags
from flax import nnx
from moe_blocks import (
    BLOCKS,
    COTANGENT,
    FLOAT64,
    VALID,
    D,
    E,
    F,
    L,
    X,
    block,
    encoder_spec,
    forward,
    named,
    value_and_grad,
)

from moe_ablm.model import dispatch
from moe_ablm.model.families import Soft, TopK
from moe_ablm.model.layers import FeedForward
from moe_ablm.model.moe import MoE
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import axes_sharding, batch_sharding, make_mesh


@cache
def exact(name: str):
    """Value, `(output, routing)` and gradients of a training block, all in float64."""
    with moe_blocks.in_float64():
        definition, params = block(encoder_spec(name), FLOAT64)
        inputs = [jnp.asarray(a) for a in (X, VALID, COTANGENT)]
        (value, aux), (dparams, dx) = value_and_grad(definition, True, params, *inputs)
        assert value.dtype == aux[0].dtype == dx.dtype == jnp.float64
        return float(value), jax.tree.map(np.asarray, aux), named(dparams) | {"x": np.asarray(dx)}


@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_statistics_are_those_of_every_expert_on_every_token(name):
    expected, assigned, stats = moe_blocks.reference(encoder_spec(name), X, VALID + 0, True)
    _, (out, routed), _ = exact(name)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(routed.assigned, assigned, atol=1e-12)
    for key, value in stats.items():
        np.testing.assert_allclose(getattr(routed.stats, key), value, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [n for n, m in BLOCKS.items() if isinstance(m, TopK) and m.capacity is not None],
)
def test_capacities_of_these_tests_turn_some_away(name):
    assert 0.05 < exact(name)[1][1].stats.dropped < 0.95


def moved(params: nnx.State, part: str, step: np.ndarray) -> nnx.State:
    flat = {
        path: v.replace(v.get_value() + step) if "/".join(map(str, path)) == part else v
        for path, v in nnx.to_flat_state(params)
    }
    return nnx.from_flat_state(flat)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_numerically_in_float64(name):
    """Central differences, each array along a random direction of its own."""
    rng, h = np.random.default_rng(9), 1e-6
    gradients = exact(name)[2]
    with moe_blocks.in_float64():
        definition, params = block(encoder_spec(name), FLOAT64)
        valid, cotangent = jnp.asarray(VALID), jnp.asarray(COTANGENT)

        def value(part: str, step: np.ndarray) -> float:
            x = jnp.asarray(X + step if part == "x" else X)
            changed = moved(params, part, step)
            return float(value_and_grad(definition, True, changed, x, valid, cotangent)[0][0])

        for part, gradient in gradients.items():
            direction = rng.standard_normal(gradient.shape)
            numeric = (value(part, h * direction) - value(part, -h * direction)) / (2 * h)
            analytic = (gradient * direction).sum()
            np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-7, err_msg=part)


@pytest.mark.parametrize("name", BLOCKS)
def test_everything_is_taught_but_the_balance(name):
    for part, gradient in exact(name)[2].items():
        assert gradient.any() != (part == "balance"), part


@pytest.mark.parametrize("name", ["top1", "topk", "topk capacity", "soft l2", "unequal"])
def test_values_and_gradients_in_float32(name):
    value, (out, _), gradients = exact(name)
    definition, params = block(encoder_spec(name))
    inputs = [jnp.asarray(a, a.dtype if a.dtype == bool else "f4") for a in (X, VALID, COTANGENT)]
    (found, (found_out, _)), (dparams, dx) = value_and_grad(definition, True, params, *inputs)
    assert found_out.dtype == jnp.float32
    pairs = {"value": (found, value), "out": (found_out, out)}
    pairs |= {part: (g, gradients[part]) for part, g in (named(dparams) | {"x": dx}).items()}
    for part, (a, b) in pairs.items():
        atol = 3e-6 * np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, "f8"), b, rtol=0, atol=atol, err_msg=part)


# its like among plain layers


def both_of(spec: EncoderSpec, other: EncoderSpec, training: bool):
    """Outputs of two blocks of equally shaped weights, which they share."""
    definition, params = block(spec)
    inputs = params, jnp.asarray(X, "f4"), jnp.asarray(VALID)
    return [forward(d, training, *inputs)[0] for d in (definition, block(other)[0])]


def test_one_expert_is_the_dense_ffn():
    """The gate of the only expert is 1; only padding differs, where the dense FFN computes too."""
    spec = EncoderSpec(1, D, F, 2, moe=TopK(experts=1, k=1))
    definition, params = block(spec)
    dense = FeedForward(EncoderSpec(1, D, F, 2), F, Execution(), nnx.Rngs(0))
    weights = {name: a[0] for name, a in named(params).items()}
    dense.up.kernel[...], dense.up.bias[...] = weights["up"], weights["up_bias"]
    dense.down.kernel[...], dense.down.bias[...] = weights["down"], weights["down_bias"]
    x = jnp.asarray(X, "f4")
    out, routed = forward(definition, False, params, x, jnp.asarray(VALID))
    np.testing.assert_allclose(out[VALID], dense(x)[VALID], atol=2e-6)
    np.testing.assert_array_equal(routed.assigned[..., 0], VALID.astype(np.float32))
    assert float(routed.stats.load_balance) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["topk capacity", "topp capacity", "unequal"])
def test_a_large_capacity_is_none(name):
    """Fixed queues and sorted blocks: two ways of dispatch, one answer."""
    spec = encoder_spec(name)
    large, none = (replace(spec, moe=replace(spec.moe, capacity=c)) for c in (E / spec.moe.k, None))
    limited, dropless = both_of(large, none, training=True)
    np.testing.assert_allclose(limited, dropless, atol=2e-6)
    small = both_of(spec, none, training=True)[0]
    assert np.abs(small - dropless).max() > 0.1  # so the capacity is obeyed


@pytest.mark.parametrize("name", ["topk capacity", "topp capacity", "shared", "unequal"])
def test_inference_is_dropless(name):
    spec = encoder_spec(name)
    without = replace(spec, moe=replace(spec.moe, capacity=None))
    np.testing.assert_array_equal(*both_of(spec, without, training=False))


@pytest.mark.parametrize("training", [True, False])
def test_equal_widths_written_out_are_the_plain_experts(training):
    spec = encoder_spec("topk capacity")
    wide = replace(spec, moe=replace(spec.moe, widths=(F,) * E))
    np.testing.assert_allclose(*both_of(spec, wide, training), atol=2e-6)


def test_the_width_of_experts_can_be_their_own():
    spec = replace(encoder_spec("topk"), moe=replace(BLOCKS["topk"], ffn=10))
    definition, params = block(spec)
    assert named(params)["up"].shape == (E, D, 10)
    found, _ = forward(definition, False, params, jnp.asarray(X, "f4"), jnp.asarray(VALID))
    expected, _, _ = moe_blocks.reference(spec, X, VALID + 0, False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_routes_in_float32():
    """Logits that bfloat16 cannot tell apart still decide."""
    spec = EncoderSpec(1, D, F, 2, moe=TopK(experts=2, k=1))
    moe = MoE(spec, Execution("bfloat16", "bfloat16"), nnx.Rngs(0))
    moe.router[...] = jnp.zeros((D, 2)).at[0].set(jnp.asarray([1.0, 1.0 + 2.0**-12]))
    x = jnp.ones((1, 2, D), jnp.bfloat16).at[0, 1, 0].set(-1.0)
    definition, params = nnx.split(moe)
    out, routed = forward(definition, False, params, x, jnp.ones((1, 2), bool))
    assert out.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in (*routed.stats, routed.assigned))
    np.testing.assert_array_equal(routed.assigned[0], [[0, 1], [1, 0]])


def test_jitter_is_noise_of_the_router_alone():
    """A factor within 1 +- jitter on what the router sees; by its key, and none without a key."""
    spec = EncoderSpec(1, D, F, 2, moe=Soft(experts=E, slots=3, jitter=0.5))
    definition, params = block(spec)
    x, valid = jnp.asarray(X[:1], "f4"), jnp.ones((1, L), bool)

    @moe_blocks.jit
    def run(key):
        return nnx.merge(definition, params)(x, valid, None, True, key)[0]

    plain, _ = forward(definition, True, params, x, valid)
    quiet = block(replace(spec, moe=replace(spec.moe, jitter=0.0)))[0]
    np.testing.assert_array_equal(plain, forward(quiet, True, params, x, valid)[0])
    first, again, other = (run(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4 and np.abs(first - plain).max() > 1e-4
    # experts that are all alike: the output is theirs of the plain slots, whatever the router sees
    noise = np.asarray(jax.random.uniform(jax.random.key(0), x.shape, x.dtype, 0.5, 1.5), "f8")
    weights = moe_blocks.arrays(spec)
    logits = np.einsum("td,des->tes", X[0] * noise[0], weights["router",])
    slots = np.einsum("tes,td->esd", moe_blocks.softmax(logits, 0), X[0])
    combine = moe_blocks.softmax(logits.reshape(L, -1)).reshape(logits.shape)
    expected = sum(
        combine[:, e] @ moe_blocks.expert_outputs(slots[e], weights, spec)[e] for e in range(E)
    )
    np.testing.assert_allclose(first[0], expected, atol=1e-5)


def test_jitter_has_many_values_in_bfloat16():
    """bfloat16 itself has five from .99 to 1.01."""
    spec = EncoderSpec(1, D, F, 2, moe=TopK(experts=E, jitter=0.01))
    moe = MoE(spec, Execution("bfloat16", "bfloat16"), nnx.Rngs(0))
    x = jnp.ones((4, L, D), jnp.bfloat16)
    seen = np.asarray(moe._seen(x, jnp.ones((4, L), bool), None, jax.random.key(0)))
    assert seen.dtype == np.float32 and 0.99 <= seen.min() < 0.991 < 1.009 < seen.max() <= 1.01
    assert len(np.unique(seen)) > 0.9 * seen.size


# eight devices


MESHES = {1: [(1, 1, 1)], 8: [(8, 1, 1), (2, 4, 1), (2, 2, 2)]}
SPREAD = ("topk", "topk capacity", "soft", "crowded")  # each way of dispatch
# every token to the first expert, so that rows do not fit where they would travel to
CROWDED = replace(BLOCKS["topk sigmoid"], k=1)
EIGHT = {"x": np.tile(X, (2, 1, 1)), "valid": np.tile(VALID, (2, 1))}


def spread_block(name: str):
    """Definition and parameters of a block of `SPREAD`."""
    if name != "crowded":
        return block(encoder_spec(name))
    definition, params = block(replace(encoder_spec("topk sigmoid"), moe=CROWDED))
    return definition, moved(params, "balance", np.array([9, 0, 0, 0], "f4"))


def results(definition, params, x, valid, cotangent) -> dict[str, np.ndarray]:
    (value, (out, routed)), (dparams, dx) = value_and_grad(
        definition, True, params, x, valid, cotangent
    )
    parts = {"value": value, "out": out, "x": dx, "assigned": routed.assigned}
    parts |= routed.stats._asdict() | {f"d{n}": g for n, g in named(dparams).items()}
    return {part: np.asarray(a) for part, a in parts.items()}


def on_this_machine() -> dict[str, np.ndarray]:
    """Value, output, statistics and gradients on every mesh of this machine's devices."""
    found = {}
    cotangent = np.tile(COTANGENT, (2, 1, 1)).astype("f4")
    rows = EIGHT["x"].astype("f4"), EIGHT["valid"], cotangent
    for sizes in MESHES[jax.device_count()]:
        mesh = make_mesh(*sizes)
        for name in SPREAD:
            definition, params = spread_block(name)
            params = jax.tree.map(
                lambda p, mesh=mesh: p.replace(
                    jax.device_put(p.get_value(), axes_sharding(mesh, p.axes, p.shape))
                ),
                params,
                is_leaf=lambda x: isinstance(x, nnx.Variable),
            )
            with jax.set_mesh(mesh):
                inputs = [jax.device_put(a, batch_sharding(mesh)) for a in rows]
                parts = results(definition, params, *inputs)
            found |= {f"{sizes}/{name}/{part}": a for part, a in parts.items()}
    return found


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    path = tmp_path_factory.mktemp("eight") / "found.npz"
    environment = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, path], env=environment, check=True)
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="module")
def one_device():
    return on_this_machine()


@pytest.mark.slow  # tests/test_contracts.py has three steps of every router on every mesh
@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("sizes", MESHES[8], ids=str)
def test_eight_devices_give_the_answer_of_one(eight_devices, one_device, sizes, name):
    prefix = f"{MESHES[1][0]}/{name}/"
    parts = [key.removeprefix(prefix) for key in one_device if key.startswith(prefix)]
    assert len(parts) > 12
    for part in parts:
        expected, found = one_device[prefix + part], eight_devices[f"{sizes}/{name}/{part}"]
        scale = np.abs(expected).max() + 1e-30
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5, err_msg=part)


def test_rows_fit_on_the_way_or_they_do_not(one_device):
    """On four devices, which each have one row; so both ways of a dropless layer are tested."""
    for name, fits in (("topk", True), ("crowded", False)):
        assigned = one_device[f"{MESHES[1][0]}/{name}/assigned"]  # an expert a device
        k = 2 if name == "topk" else 1
        places = dispatch.SLACK * L * k / 4
        assert (assigned.sum(1).max() <= places) == fits


if __name__ == "__main__":
    np.savez(Path(sys.argv[1]), **on_this_machine())
