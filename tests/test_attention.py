"""Attention against a plain float64 reference; rotary positions against their definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_ablm.model import attention
from moe_ablm.model.attention import (
    SelfAttention,
    attend,
    attend_by_blocks,
    attention_bias,
    rotary,
)
from moe_ablm.model.packing import Packing
from moe_ablm.model.spec import PRECISIONS, EncoderSpec, Execution

B, L, H, N = 3, 13, 2, 8
LENGTHS = np.array([13, 6, 1])
VALID = np.arange(L) < LENGTHS[:, None]
# three antibodies, two and one in the rows, of unequal lengths, then padding
ANTIBODY = np.array([[1] * 5 + [2] * 2 + [3] * 6, [1, 2, 2] + [0] * 10, [1] * 13])
POSITION = np.array([[*range(5), *range(2), *range(6)], [0, 0, 1] + [0] * 10, [*range(13)]])
PACKING = Packing(jnp.asarray(ANTIBODY), jnp.asarray(POSITION))
# relative to the largest value: what float32 sums, and bfloat16 factors of about 1, may lose
TOLERANCE = {"float32": 2e-6, "bfloat16_operands": 1e-2, "bfloat16": 2e-2}


def plain_attention(q, k, v, allowed):
    """softmax(q k^T) v over the allowed keys `[B, L or 1, L]`, with nothing but einsum."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    scores = jnp.where(allowed[:, None], scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


@pytest.fixture(scope="module")
def inputs():
    """q, k, v and a cotangent that is 0 at padded queries, whose outputs mean nothing."""
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((B, L, H, N)).astype(np.float32) for _ in range(4))
    return q, k, v, g * VALID[:, :, None, None]


def expected_of(inputs, allowed):
    """Output and gradients of q, k, v in float64."""
    with jax.enable_x64(True):
        q, k, v, g = (jnp.asarray(x, jnp.float64) for x in inputs)
        run = partial(plain_attention, allowed=jnp.asarray(allowed))
        out, vjp = jax.vjp(run, q, k, v)
        return [np.asarray(x) for x in (out, *vjp(g))]


# backend, and queries of a block: 13 are 4 blocks of 4, the last one padded
WAYS = {"cpu": ("cpu", 64), "one block": ("tpu", 64), "blocks": ("tpu", 4)}


def found_by(inputs, precision, way, packing=None):
    """The same of `attend`."""
    backend, queries = WAYS[way]
    execution = Execution(*PRECISIONS[precision], backend=backend)

    @jax.jit
    def run(q, k, v, g):
        attention = partial(attend, valid=jnp.asarray(VALID), execution=execution, packing=packing)
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(g)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", queries)
        results = run(*(jnp.asarray(x).astype(execution.activations) for x in inputs))
    assert all(x.dtype == execution.activations for x in results)
    return [np.asarray(x).astype("f8") for x in results]


@pytest.fixture(scope="module")
def reference(inputs):
    return expected_of(inputs, VALID[:, None, :])


EACH = [(precision, way) for precision in sorted(PRECISIONS) for way in WAYS]


@pytest.fixture(scope="module", params=EACH, ids=" ".join)
def found(request, inputs):
    precision, way = request.param
    return precision, found_by(inputs, precision, way)


def test_forward(found, reference):
    precision, (out, *_) = found
    scale = np.abs(reference[0]).max()
    np.testing.assert_allclose(
        out[VALID], reference[0][VALID], rtol=0, atol=TOLERANCE[precision] * scale
    )


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_gradient(found, reference, which):
    precision, results = found
    i = 1 + "qkv".index(which)
    scale = np.abs(reference[i]).max()
    np.testing.assert_allclose(results[i], reference[i], rtol=0, atol=TOLERANCE[precision] * scale)


def test_padded_keys_and_values_get_no_gradient(found):
    _, (_, _, dk, dv) = found
    assert not dk[~VALID].any() and not dv[~VALID].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_packed_antibodies_attend_to_themselves_alone(inputs, precision, way):
    *qkv, g = inputs
    inputs = *qkv, g * 0 + (ANTIBODY > 0)[:, :, None, None]
    same = (ANTIBODY[:, :, None] == ANTIBODY[:, None, :]) & (ANTIBODY > 0)[:, :, None]
    np.testing.assert_array_equal(PACKING.same(), same)
    allowed = same | (ANTIBODY == 0)[:, :, None]  # a padded query must see something
    expected = expected_of(inputs, allowed)
    tokens = ANTIBODY > 0
    results = found_by(inputs, precision, way, PACKING)
    for found, exact in zip(results, expected, strict=True):
        atol = TOLERANCE[precision] * np.abs(exact[tokens]).max()
        np.testing.assert_allclose(found[tokens], exact[tokens], rtol=0, atol=atol)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_blocks_of_queries_never_hold_all_weights(packed):
    """Nothing in the program of value and gradient is as large as `[B, H, L, L]`."""
    b, length, heads, n = 2, 256, 8, 8
    execution = Execution("bfloat16", "bfloat16", backend="tpu")
    antibody = jnp.ones((b, length), jnp.int32)
    packing = Packing(antibody, antibody) if packed else None
    bias = attention_bias(antibody > 0, packing)

    def value(q, k, v):
        return attend_by_blocks(q, k, v, bias, execution).astype(jnp.float32).sum()

    array = jax.ShapeDtypeStruct((b, length, heads, n), jnp.bfloat16)
    program = jax.make_jaxpr(jax.value_and_grad(value, (0, 1, 2)))(array, array, array)
    largest = max(sizes_of(program.jaxpr))
    assert largest <= b * heads * attention.QUERIES * length < b * heads * length * length


def sizes_of(jaxpr) -> list[int]:
    """Elements of every array of a program, of its loops and calls, too."""
    sizes = []
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars]
        parts = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
        for part in parts:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                sizes += sizes_of(part)
    return sizes


BACKENDS = ("cpu", "tpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_at_padding_is_never_seen(inputs, backend):
    q, k, v, _ = (jnp.asarray(x) for x in inputs)
    pads, execution = jnp.asarray(~VALID)[:, :, None, None], Execution(backend=backend)
    before = attend(q, k, v, jnp.asarray(VALID), execution)
    after = attend(q, k + 1e4 * pads, v - 1e4 * pads, jnp.asarray(VALID), execution)
    np.testing.assert_array_equal(before[VALID], after[VALID])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_padding_stays_finite(inputs, backend):
    q, k, v, g = (jnp.asarray(x[:1]) for x in inputs)
    empty, execution = jnp.zeros((1, L), bool), Execution(backend=backend)
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, empty, execution), q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *vjp(jnp.zeros_like(g))))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_the_gpu_kernel_is_asked_for_the_same_thing(inputs, monkeypatch, packed):
    """The cuDNN call, answered by XLA's own implementation of the same interface."""
    asked = {}

    def answer(*qkv, implementation, **settings):
        asked["implementation"] = implementation
        return plain(*qkv, implementation="xla", **settings)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", answer)
    q, k, v = (jnp.asarray(x).astype(jnp.bfloat16) for x in inputs[:3])
    execution = Execution("bfloat16", "bfloat16", backend="gpu")
    valid, packing, allowed = VALID, None, VALID[:, None, :]
    if packed:
        valid, packing = ANTIBODY > 0, PACKING
        allowed = np.asarray(PACKING.same()) | ~valid[:, :, None]
    out = attend(q, k, v, jnp.asarray(valid), execution, packing)
    assert asked == {"implementation": "cudnn"} and out.dtype == jnp.bfloat16
    exact = expected_of(inputs, allowed)[0]
    np.testing.assert_allclose(
        np.asarray(out).astype("f8")[valid], exact[valid], rtol=0, atol=2e-2 * np.abs(exact).max()
    )


def test_bias_by_hand():
    bias = attention_bias(jnp.asarray([[True, False], [True, True]]))
    assert bias.shape == (2, 1, 1, 2) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[:, 0, 0], np.float32([[0, -1e30], [0, 0]]))
    packing = Packing(jnp.asarray([[1, 2, 2, 0]]), jnp.asarray([[0, 0, 1, 0]]))
    x = np.float32(-1e30)
    packed = attention_bias(jnp.asarray([[True] * 3 + [False]]), packing)
    assert packed.shape == (1, 1, 4, 4) and packed.dtype == jnp.float32
    np.testing.assert_array_equal(packed[0, 0], [[0, x, x, x], [x, 0, 0, x], [x, 0, 0, x], [x] * 4])


# rotary positions


def test_rotary_by_hand():
    """D/H = 4, base 100: pairs (0, 2) and (1, 3) turn by i and i / 10 radians."""
    x = jnp.asarray([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, -1.0]])
    found = rotary(x[None, :, None, :], base=100.0)[0, :, 0]
    # cos 1, sin 1, cos .1, sin .1; cos 2, sin 2, cos .2, sin .2
    expected = [
        [1.0, 2.0, 0.0, 0.0],
        [0.540302306, 2 * 0.995004165, 0.841470985, 2 * 0.099833417],
        [-3 * 0.909297427, 0.198669331, 3 * -0.416146837, -0.980066578],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rotary_is_a_complex_rotation_at_every_position():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 300, 3, 6)).astype(np.float32)
    as_complex = x[..., :3].astype("f8") + 1j * x[..., 3:]
    frequency = 10_000.0 ** (-2 * np.arange(3) / 6)
    turned = as_complex * np.exp(1j * np.arange(300)[:, None, None] * frequency)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotary(jnp.asarray(x)), expected, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(2)
    q, k = (np.tile(rng.standard_normal(16).astype(np.float32), (40, 1)) for _ in range(2))
    turned = [np.asarray(rotary(jnp.asarray(x)[None, :, None])[0, :, 0], "f8") for x in (q, k)]
    scores = turned[0] @ turned[1].T
    for distance in (-5, 0, 17):
        along = np.diagonal(scores, distance)
        np.testing.assert_allclose(along, along[0], atol=1e-5)
    assert np.ptp(scores[0]) > 0.1  # and they do depend on it


def test_rotary_takes_positions_from_the_packing():
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((B, L, H, N)), jnp.float32)
    found, whole = rotary(x, PACKING.position), np.asarray(rotary(x))
    np.testing.assert_array_equal(found[2], whole[2])  # one antibody: the same as unpacked
    alone = rotary(x[:1, 7:])  # the third antibody of the first row, in a row of its own
    np.testing.assert_allclose(found[0, 7:], alone[0], atol=1e-7)


def test_rotary_keeps_the_dtype():
    assert rotary(jnp.ones((1, 2, 1, 4), jnp.bfloat16)).dtype == jnp.bfloat16


# the layer


@pytest.fixture(scope="module")
def layer():
    module = SelfAttention(EncoderSpec(1, H * N, 32, H), Execution(), nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for linear in (module.qkv, module.out):  # weights and biases far from their start
        linear.kernel[...] = jnp.asarray(rng.standard_normal(linear.kernel.shape), jnp.float32) / 4
        linear.bias[...] = jnp.asarray(rng.standard_normal(linear.bias.shape), jnp.float32)
    return module


def by_hand(layer, x):
    """Weights and output of the layer in float64 numpy, head by head."""
    kernel, bias = (np.asarray(a[...], "f8") for a in (layer.qkv.kernel, layer.qkv.bias))
    q, k, v = np.split(x @ kernel + bias, 3, axis=-1)
    weights, heads = np.zeros((B, H, L, L)), []
    for h in range(H):
        mine = slice(h * N, (h + 1) * N)
        qh, kh = (_turned(a[..., mine]) for a in (q, k))
        scores = qh @ np.swapaxes(kh, 1, 2) / np.sqrt(N)
        scores = np.where(VALID[:, None, :], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        weights[:, h] = scores / scores.sum(-1, keepdims=True)
        heads.append(weights[:, h] @ v[..., mine])
    out = np.concatenate(heads, axis=-1)
    return weights, out @ np.asarray(layer.out.kernel[...], "f8") + np.asarray(layer.out.bias[...])


def _turned(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-2 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_layer_and_its_weights_by_hand(layer):
    x = np.random.default_rng(4).standard_normal((B, L, H * N)).astype(np.float32)
    expected_weights, expected = by_hand(layer, x.astype("f8"))
    valid = jnp.asarray(VALID)
    np.testing.assert_allclose(
        layer(jnp.asarray(x), valid)[VALID], expected[VALID], atol=1e-5, rtol=0
    )
    weights = np.asarray(layer.weights(jnp.asarray(x), valid))
    assert weights.shape == (B, H, L, L) and weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected_weights, atol=2e-6)
    assert not np.swapaxes(weights, 1, 3)[~VALID].any()  # keys of padding


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position_of_each_row_is_that_of_all(layer, backend):
    x = jnp.asarray(np.random.default_rng(7).standard_normal((B, L, H * N)), jnp.float32)
    other = SelfAttention(EncoderSpec(1, H * N, 32, H), Execution(backend=backend), nnx.Rngs(0))
    nnx.update(other, nnx.state(layer))
    valid, at = jnp.asarray(VALID), np.array([7, 5, 0])
    found = other(x, valid, at=jnp.asarray(at))
    assert found.shape == (B, 1, H * N)
    expected = layer(x, valid)[np.arange(B), at]
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


def test_weights_can_be_differentiated(layer):
    """Saliency methods differentiate attention weights."""
    x = jnp.asarray(np.random.default_rng(5).standard_normal((1, 4, H * N)), jnp.float32)
    valid = jnp.ones((1, 4), bool)
    objective = jax.jit(lambda x: jnp.square(layer.weights(x, valid)).sum())
    gradient = jax.grad(objective)(x)
    step = jnp.zeros_like(x).at[0, 1, 3].set(1e-2)
    slope = (objective(x + step) - objective(x - step)) / 2e-2
    np.testing.assert_allclose(gradient[0, 1, 3], slope, rtol=2e-2, atol=1e-4)


def test_execution_keeps_the_dtype_of_activations():
    execution = Execution("bfloat16", "bfloat16")
    layer = SelfAttention(EncoderSpec(1, 8, 16, 2), execution, nnx.Rngs(0))
    out = jax.eval_shape(partial(layer), jnp.ones((1, 3, 8), jnp.bfloat16), jnp.ones((1, 3), bool))
    assert out.dtype == jnp.bfloat16 and out.shape == (1, 3, 8)
