"""The MoE block: its equals among plain layers, its gradient in float64, and on eight devices.

`python tests/test_moe.py OUT.npz` computes one block on every device there is; the test of eight
devices runs it in a process of its own.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from moe_ablm.model.ffn import FeedForward
from moe_ablm.model.grouped import ExpertWeights
from moe_ablm.model.moe import MoE, dropless
from moe_ablm.model.routers import TokenChoice
from moe_ablm.model.spec import EncoderSpec, Execution, MoESpec
from moe_ablm.parallel.mesh import axes_sharding, batch_sharding, make_mesh

D, F = 8, 12
B, L = 8, 20
ROWS = np.random.default_rng(7)
X = ROWS.standard_normal((B, L, D)).astype(np.float32)
VALID = np.arange(L) < np.array([20, 3, 11, 20, 1, 16, 8, 13])[:, None]
COTANGENT = ROWS.standard_normal((B, L, D)).astype(np.float32)


def make(experts: int, k: int, execution: Execution = Execution()) -> MoE:  # noqa: B008
    """A block with weights far from their start, so that routing and biases matter."""
    spec = EncoderSpec(1, D, F, 2, moe=MoESpec("topk", experts=experts, k=k))
    moe = MoE(spec, execution, nnx.Rngs(0))
    rng = np.random.default_rng(8)
    for name in ("router", "up", "up_bias", "down", "down_bias"):
        variable = getattr(moe, name)
        draw = rng.standard_normal(variable.shape).astype(np.float32)
        variable[...] = jnp.asarray(draw / np.sqrt(variable.shape[-2] if draw.ndim > 1 else 1))
    return moe


def objective(definition, params, x, valid):
    """Everything that a loss may look at, in one scalar, and the output."""
    out, _, stats = nnx.merge(definition, params)(x, valid)
    return (out * COTANGENT).sum() + stats.load_balance + 0.1 * stats.z_loss, (out, stats)


@partial(jax.jit, static_argnums=0)
def value_and_grad(definition, params, x, valid):
    return jax.value_and_grad(objective, argnums=(1, 2), has_aux=True)(definition, params, x, valid)


@partial(jax.jit, static_argnums=0)
def forward(definition, params, *inputs):
    return nnx.merge(definition, params)(*inputs)


# in float64, with every expert on every token


def reference(params: dict, x, valid, k: int):
    """Output and auxiliary losses; `params` are plain float arrays by name."""
    logits = x @ params["router"]
    probabilities = jax.nn.softmax(logits)
    chosen = jnp.argsort(-probabilities, axis=-1)[..., :k]
    gates = jnp.take_along_axis(probabilities, chosen, axis=-1)
    gates = gates / gates.sum(-1, keepdims=True) if k > 1 else gates
    experts = params["router"].shape[-1]
    out, shares = jnp.zeros_like(x), []
    for e in range(experts):
        h = x @ params["up"][e] + params["up_bias"][e]
        y = jax.nn.gelu(h, approximate=False) @ params["down"][e] + params["down_bias"][e]
        here = (chosen == e) & valid[..., None]
        out += y * (gates * here).sum(-1, keepdims=True)
        shares.append(here.sum() / (valid.sum() * k))
    mean = (probabilities * valid[..., None]).sum((0, 1)) / valid.sum()
    z = (jax.nn.logsumexp(logits, -1) ** 2 * valid).sum() / valid.sum()
    return out, experts * jnp.dot(jnp.stack(shares), mean), z


def reference_objective(params, x, k):
    out, load_balance, z_loss = reference(params, x, jnp.asarray(VALID), k)
    return (out * COTANGENT).sum() + load_balance + 0.1 * z_loss, out


@pytest.fixture(
    scope="module", params=[(3, 1), (3, 2), (3, 3), (1, 1)], ids="E{0[0]}K{0[1]}".format
)
def compared(request):
    """A block's `(value, output, gradients)` and those of the float64 reference."""
    experts, k = request.param
    definition, params = nnx.split(make(experts, k))
    (value, (out, _)), (dparams, dx) = value_and_grad(
        definition, params, jnp.asarray(X), jnp.asarray(VALID)
    )
    with jax.enable_x64(True):
        plain = {n: jnp.asarray(np.asarray(v), jnp.float64) for n, v in named(params).items()}
        x = jnp.asarray(X, jnp.float64)
        objective = partial(reference_objective, k=k)
        gradient = jax.jit(jax.value_and_grad(objective, (0, 1), True))
        (expected_value, expected_out), (expected_dparams, expected_dx) = gradient(plain, x)
        if k == 2:  # the reference's own gradient numerically, so that none is taken on trust
            value_of = jax.jit(lambda p, x: objective(p, x)[0])
            check_grads(value_of, (plain, x), 1, ["rev"], eps=1e-6, atol=1e-6, rtol=1e-6)
    found = {"value": value, "out": out, "x": dx} | named(dparams)
    return found, {
        "value": expected_value,
        "out": expected_out,
        "x": expected_dx,
    } | expected_dparams


def named(params: nnx.State) -> dict:
    return {path[-1]: v.get_value() for path, v in nnx.to_flat_state(params)}


NAMES = ["value", "out", "x", "router", "up", "up_bias", "down", "down_bias"]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_against_every_expert_in_float64(compared, name):
    found, expected = (np.asarray(part[name], "f8") for part in compared)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * scale)


def test_one_expert_is_the_dense_ffn():
    """The gate of the only expert is 1; only padding differs, where the dense FFN computes too."""
    moe = make(1, 1)
    dense = FeedForward(EncoderSpec(1, D, F, 2), Execution(), nnx.Rngs(0))
    dense.up.kernel[...], dense.up.bias[...] = moe.up[0], moe.up_bias[0]
    dense.down.kernel[...], dense.down.bias[...] = moe.down[0], moe.down_bias[0]
    out, plan, stats = forward(*nnx.split(moe), jnp.asarray(X), jnp.asarray(VALID))
    expected = forward(*nnx.split(dense), jnp.asarray(X))
    np.testing.assert_allclose(out[VALID], expected[VALID], atol=2e-6)
    np.testing.assert_array_equal(plan.gates[..., 0], VALID.astype(np.float32))
    assert float(stats.load_balance) == pytest.approx(1.0)


def test_padding_comes_out_as_zero_and_is_never_seen():
    parts, valid = nnx.split(make(3, 2)), jnp.asarray(VALID)
    out = np.asarray(forward(*parts, jnp.asarray(X), valid)[0])
    assert not out[~VALID].any() and out[VALID].any(-1).all()
    other = np.where(VALID[..., None], X, np.float32(1e3))
    np.testing.assert_array_equal(out, forward(*parts, jnp.asarray(other), valid)[0])


def test_a_plan_is_followed_whatever_router_made_it():
    """Dispatch knows the plan alone: unequal numbers of experts, gates that sum to anything."""
    moe = make(3, 2)
    weights = ExpertWeights(*(w[...] for w in (moe.up, moe.up_bias, moe.down, moe.down_bias)))
    x = jnp.asarray(X[:1, :3])
    plan = TokenChoice(
        experts=jnp.asarray([[[2, 3], [3, 3], [1, 0]]]),
        gates=jnp.asarray([[[0.5, 0.0], [0.0, 0.0], [2.0, -1.0]]]),
    )

    @partial(jax.jit, static_argnums=(0, 1))
    def ffn(e, token):
        h = jax.nn.gelu(x[0, token] @ weights.up[e] + weights.up_bias[e], approximate=False)
        return h @ weights.down[e] + weights.down_bias[e]

    out = jax.jit(partial(dropless, operands="float32"))(x, plan, weights)[0]
    np.testing.assert_allclose(out[0], 0.5 * ffn(2, 0), atol=1e-6)
    np.testing.assert_array_equal(out[1], np.zeros(D))
    np.testing.assert_allclose(out[2], 2 * ffn(1, 2) - ffn(0, 2), atol=2e-6)


def test_bfloat16_routes_in_float32():
    """Logits that bfloat16 cannot tell apart still decide."""
    moe = make(2, 1, Execution("bfloat16", "bfloat16"))
    moe.router[...] = jnp.zeros((D, 2)).at[0].set(jnp.asarray([1.0, 1.0 + 2.0**-12]))
    x = jnp.ones((1, 2, D), jnp.bfloat16).at[0, 1, 0].set(-1.0)
    out, plan, stats = forward(*nnx.split(moe), x, jnp.ones((1, 2), bool))
    assert out.dtype == jnp.bfloat16 and plan.gates.dtype == jnp.float32
    assert all(s.dtype == jnp.float32 for s in stats)
    np.testing.assert_array_equal(plan.experts[0, :, 0], [1, 0])


# eight devices


MESHES = {1: [(1, 1, 1)], 8: [(8, 1, 1), (2, 4, 1), (2, 2, 2)]}


def on_this_machine() -> dict[str, np.ndarray]:
    """Value, output, statistics and gradients on every mesh of this machine's devices."""
    found = {}
    for sizes in MESHES[jax.device_count()]:
        mesh = make_mesh(*sizes)
        definition, params = nnx.split(make(4, 2))
        params = jax.tree.map(
            lambda p, mesh=mesh: p.replace(
                jax.device_put(p.get_value(), axes_sharding(mesh, p.axes, p.shape))
            ),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        x, valid = (jax.device_put(a, batch_sharding(mesh)) for a in (X, VALID))
        with jax.set_mesh(mesh):
            (value, (out, stats)), (dparams, dx) = value_and_grad(definition, params, x, valid)
        parts = {"value": value, "out": out, "dx": dx} | stats._asdict()
        parts |= {f"d{name}": g for name, g in named(dparams).items()}
        found |= {f"{sizes}/{name}": np.asarray(a) for name, a in parts.items()}
    return found


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    path = tmp_path_factory.mktemp("eight") / "found.npz"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, path], env=environment, check=True)
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="module")
def one_device():
    definition, params = nnx.split(make(4, 2))
    (value, (out, stats)), (dparams, dx) = value_and_grad(
        definition, params, jnp.asarray(X), jnp.asarray(VALID)
    )
    parts = {"value": value, "out": out, "dx": dx} | stats._asdict()
    return parts | {f"d{name}": g for name, g in named(dparams).items()}


@pytest.mark.parametrize("sizes", MESHES[8], ids=str)
def test_eight_devices_give_the_answer_of_one(eight_devices, one_device, sizes):
    for name, expected in one_device.items():
        found = eight_devices[f"{sizes}/{name}"]
        scale = float(jnp.abs(expected).max()) + 1e-30
        np.testing.assert_allclose(
            found / scale, np.asarray(expected) / scale, atol=1e-5, err_msg=name
        )


if __name__ == "__main__":
    np.savez(Path(sys.argv[1]), **on_this_machine())
