"""Parameters and plain layers against numpy, and the axis letters of every parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.families import Soft, TopK, TopP
from moe_ablm.model.layers import (
    INIT_STD,
    Balance,
    FeedForward,
    LayerNorm,
    Linear,
    constant,
    gelu,
    normal,
    swiglu,
)
from moe_ablm.model.spec import BACKENDS, EncoderSpec, Execution


def test_normal_has_its_spread_letters_and_seed():
    weight = normal(nnx.Rngs(0), (200, 100), "DF")
    assert weight.dtype == jnp.float32 and weight.axes == "DF"
    # 20,000 draws: the standard error of the standard deviation is 0.5 %, of the mean 0.7 % of it
    np.testing.assert_allclose(weight[...].std(), INIT_STD, rtol=0.025)
    assert abs(float(weight[...].mean())) < 4 * INIT_STD / math.sqrt(20_000)
    np.testing.assert_array_equal(weight[...], normal(nnx.Rngs(0), (200, 100), "DF")[...])
    assert (weight[...] != normal(nnx.Rngs(1), (200, 100), "DF")[...]).any()


def test_two_weights_of_one_stream_differ():
    rngs = nnx.Rngs(0)
    first, second = (normal(rngs, (4, 4), "DF") for _ in range(2))
    assert (first[...] != second[...]).all()


def test_constant():
    parameter = constant(1.5, (2, 3), "EF")
    assert parameter.dtype == jnp.float32 and parameter.axes == "EF"
    np.testing.assert_array_equal(parameter[...], np.full((2, 3), 1.5))


def test_linear_by_hand():
    layer = Linear(2, 3, "DF", Execution(), nnx.Rngs(0))
    assert (layer.kernel.axes, layer.bias.axes) == ("DF", "F")
    np.testing.assert_array_equal(layer.bias[...], np.zeros(3))
    layer.kernel[...] = jnp.asarray([[1.0, 0, 2], [0, -1, 1]])
    layer.bias[...] = jnp.asarray([0.5, 0, -1])
    np.testing.assert_array_equal(layer(jnp.asarray([[3.0, 4]])), [[3.5, -4, 9]])


# layer norm


def by_hand(x, scale, bias):
    x = np.asarray(x).astype("f8")
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


@pytest.fixture(scope="module")
def norm():
    layer, rng = LayerNorm(16, 1e-5), np.random.default_rng(0)
    layer.scale[...] = jnp.asarray(rng.standard_normal(16), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.standard_normal(16), jnp.float32)
    return layer


def expected_of(norm, x):
    return by_hand(x, np.asarray(norm.scale[...], "f8"), np.asarray(norm.bias[...], "f8"))


def test_layer_norm_starts_as_the_plain_normalisation():
    x = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    np.testing.assert_allclose(LayerNorm(16, 1e-5)(jnp.asarray(x)), by_hand(x, 1, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("offset", "spread", "tolerance"),
    [(0.0, 1.0, 3e-6), (0.0, 1e-3, 3e-6), (1e3, 1.0, 2e-3), (0.0, 1e6, 3e-6)],
)
def test_layer_norm(norm, offset, spread, tolerance):
    """Also where E[x^2] - E[x]^2 would cancel, and where eps matters."""
    x = np.random.default_rng(2).standard_normal((2, 5, 16)) * spread + offset
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(norm(x), expected_of(norm, x), atol=tolerance)


def test_layer_norm_of_bfloat16_has_float32_statistics(norm):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 16)) + 10, jnp.bfloat16)
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found).astype("f8"), expected_of(norm, x), rtol=2**-8, atol=1e-5
    )


def test_layer_norm_of_equal_values_is_its_bias(norm):
    """The variance is 0: eps alone keeps it finite, and so its gradient."""
    x = jnp.full((1, 16), 3.0)
    np.testing.assert_array_equal(norm(x)[0], norm.bias[...])
    assert bool(jnp.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all())


# feed-forward


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_is_the_exact_one(backend):
    """x Phi(x): the tanh approximation differs by 4e-4 in places."""
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    phi = [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype("f8")]
    np.testing.assert_allclose(gelu(jnp.asarray(x), backend), x * np.array(phi), atol=1e-6)


def test_gelu_of_bfloat16_is_computed_in_float32():
    """At -3.5 bfloat16 inside would lose all digits of Phi, 1 + erf."""
    x = jnp.asarray([-3.5, -1.0, 2.0], jnp.bfloat16)
    for backend in BACKENDS:
        exact = gelu(x.astype(jnp.float32), backend)
        found = gelu(x, backend)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8)


def test_the_gradient_of_gelu_is_the_same_on_every_backend():
    x = jnp.linspace(-6, 6, 101)
    found = [jax.grad(lambda x, b=b: gelu(x, b).sum())(x) for b in BACKENDS]
    phi = np.exp(-(np.asarray(x, "f8") ** 2) / 2) / math.sqrt(2 * math.pi)
    big_phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(x, "f8")])
    for gradient in found:
        np.testing.assert_allclose(gradient, big_phi + np.asarray(x, "f8") * phi, atol=2e-6)


def test_swiglu_gates_the_second_half_by_the_first():
    """silu(1) * 3 and silu(-2) * 5 (Shazeer 2020)."""
    sigmoid = [1 / (1 + math.exp(-v)) for v in (1, -2)]
    found = swiglu(jnp.asarray([[1.0, -2, 3, 5]]), "cpu")
    np.testing.assert_allclose(found, [[sigmoid[0] * 3, -2 * sigmoid[1] * 5]], rtol=1e-6)


@pytest.mark.parametrize(("activation", "halves"), [("gelu", 1), ("swiglu", 2)])
def test_feed_forward_is_linear_activation_linear(activation, halves):
    layer = FeedForward(
        EncoderSpec(1, 6, 99, 1, activation=activation), 10, Execution(), nnx.Rngs(0)
    )
    rng = np.random.default_rng(4)
    for linear in (layer.up, layer.down):
        linear.bias[...] = jnp.asarray(rng.standard_normal(linear.bias.shape), jnp.float32)
    up, up_bias, down, down_bias = (
        np.asarray(w[...], "f8")
        for w in (layer.up.kernel, layer.up.bias, layer.down.kernel, layer.down.bias)
    )
    assert up.shape == (6, halves * 10) and down.shape == (10, 6)
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    h = x.astype("f8") @ up + up_bias
    if activation == "gelu":
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    else:
        h = h[..., :10] / (1 + np.exp(-h[..., :10])) * h[..., 10:]
    np.testing.assert_allclose(layer(jnp.asarray(x)), h @ down + down_bias, atol=1e-6)
    assert (layer.up.kernel.axes, layer.down.kernel.axes) == ("DF", "FD")


# every parameter of an encoder


@pytest.mark.parametrize(
    "spec",
    [
        EncoderSpec(2, 8, 20, 2),
        EncoderSpec(2, 8, 20, 2, tied=False, moe=TopK(experts=3, balance_rate=0.1)),
        EncoderSpec(2, 8, 20, 2, moe=Soft(experts=3, slots=5, l2=True)),
        EncoderSpec(2, 8, 20, 2, activation="swiglu", moe=TopP(experts=3, ffn=11, shared=2)),
        EncoderSpec(2, 8, 20, 2, learned_positions=5, embedding_norm=True, post_norm=True),
    ],
    ids=["dense", "untied balanced", "soft l2", "swiglu shared", "learned positions"],
)
def test_every_parameter_is_float32_with_a_letter_for_every_axis(spec):
    """And the letter says how long the axis is."""
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(module))
    # attention's inner width (D or 3D) is an F too: it is what fsdp shards
    widths = {20, 40, *spec.expert_widths, *(2 * w for w in spec.expert_widths)}
    widths |= {spec.shared_ffn, 2 * spec.shared_ffn}
    lengths = {"V": {33}, "D": {8}, "E": {3}, "F": {8, 24} | widths, ".": {3, 5}}
    assert len(flat) > 20
    for path, variable in flat:
        assert type(variable) is (Balance if path[-1] == "balance" else nnx.Param), path
        assert variable.dtype == jnp.float32, path
        assert len(variable.axes) == len(variable.shape), path
        for letter, length in zip(variable.axes, variable.shape, strict=True):
            assert length in lengths[letter], (path, variable.axes, variable.shape)
