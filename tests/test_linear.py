"""The affine primitive against float64 numpy: values, gradients, precisions, layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_ablm.model.linear import affine, dot, dot_transposed, row_major, wide
from moe_ablm.model.spec import BACKENDS, PRECISIONS, Execution

# Unit roundoff of the result's dtype; the rest of the tolerance is what a float32 sum may lose.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
PRECISION_NAMES = sorted(PRECISIONS)


def rounded(x, dtype: str) -> np.ndarray:
    """`x` in float64, after the rounding that a cast to `dtype` does."""
    return np.asarray(x).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype("f8")


def assert_product(found, a, b, operands: str, result: str) -> None:
    """`found` is the product of two matrices, rounded to `operands`, summed in float32."""
    a, b = rounded(a, operands), rounded(b, operands)
    terms = np.abs(a) @ np.abs(b)
    error = np.abs(np.asarray(found).astype("f8") - a @ b)
    allowed = terms * 8 * ROUNDOFF["float32"] + np.abs(a @ b) * 1.01 * ROUNDOFF[result] + 1e-30
    assert (error <= allowed).all(), f"worst {np.max(error / allowed):.3g} times what is allowed"


def draws(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def product(x, kernel, operands: str):
    """`affine` without a bias."""
    return affine(x, kernel, None, Execution(operands=operands))


@pytest.fixture(scope="module", params=PRECISION_NAMES)
def case(request):
    """Inputs, output and gradients of one product under one precision."""
    activations, operands = PRECISIONS[request.param]
    x, kernel, cotangent = draws(0, (3, 7, 33), (33, 17), (3, 7, 17))
    x, cotangent = (jnp.asarray(a).astype(activations) for a in (x, cotangent))

    @jax.jit
    def run(x, kernel, cotangent):
        y, vjp = jax.vjp(lambda x, kernel: product(x, kernel, operands), x, kernel)
        return y, *vjp(cotangent)

    return activations, operands, x, kernel, cotangent, *run(x, jnp.asarray(kernel), cotangent)


def test_forward(case):
    activations, operands, x, kernel, _, y, _, _ = case
    assert y.shape == (3, 7, 17) and y.dtype == activations
    assert_product(y.reshape(21, 17), x.reshape(21, 33), kernel, operands, activations)


def test_gradient_of_the_input(case):
    activations, operands, _, kernel, g, _, dx, _ = case
    assert dx.shape == (3, 7, 33) and dx.dtype == activations
    assert_product(dx.reshape(21, 33), g.reshape(21, 17), kernel.T, operands, activations)


def test_gradient_of_the_kernel_is_float32(case):
    _, operands, x, kernel, g, _, _, dkernel = case
    assert dkernel.shape == kernel.shape and dkernel.dtype == jnp.float32
    assert_product(dkernel, x.reshape(21, 33).T, g.reshape(21, 17), operands, "float32")


def test_float32_is_not_computed_in_a_shorter_type(case):
    """A product that bfloat16 or TF32 factors would lose: 1 + 2^-12 differs from 1."""
    activations, operands, *_ = case
    if operands != "float32":
        pytest.skip("only float32 promises it")
    x = jnp.full((1, 4), 1 + 2.0**-12)
    assert float(product(x, jnp.ones((4, 1)), operands)[0, 0]) == 4 * (1 + 2.0**-12)


def test_sums_of_bfloat16_are_float32():
    """256 + 1 is not a bfloat16: adding 1 to 256 in bfloat16 would change nothing."""
    x = jnp.ones((1, 513)).at[0, 0].set(256.0)
    assert float(product(x, jnp.ones((513, 1)), "bfloat16")[0, 0]) == 768.0


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_batched_dots(operands, batch):
    a, b = draws(1, (*batch, 5, 9), (*batch, 9, 4))
    plain = dot(jnp.asarray(a), jnp.asarray(b), operands)
    transposed = dot_transposed(jnp.asarray(a), jnp.asarray(np.swapaxes(b, -1, -2)), operands)
    assert plain.dtype == transposed.dtype == jnp.float32
    for i in np.ndindex(*batch):
        assert_product(plain[i], a[i], b[i], operands, "float32")
        assert_product(transposed[i], a[i], b[i], operands, "float32")


@pytest.mark.parametrize("name", PRECISION_NAMES)
def test_the_bias_is_added_before_the_result_is_rounded(name):
    execution = Execution(*PRECISIONS[name])
    x, kernel, bias, g = draws(2, (6, 8), (8, 3), (3,), (6, 3))
    x, g = jnp.asarray(x).astype(execution.activations), jnp.asarray(g)
    g = g.astype(execution.activations)
    y, vjp = jax.vjp(lambda b: affine(x, jnp.asarray(kernel), b, execution), jnp.asarray(bias))
    plain = product(x.astype(jnp.float32), jnp.asarray(kernel), execution.operands)
    assert y.dtype == execution.activations
    np.testing.assert_array_equal(y, (plain + bias).astype(execution.activations))
    (dbias,) = vjp(g)
    assert dbias.dtype == jnp.float32
    np.testing.assert_allclose(dbias, np.asarray(g).astype("f8").sum(0), atol=1e-6)


def test_gradients_of_biases_are_summed_in_float32():
    """4,097 gradients of 1: a sum in bfloat16 would stay at 256."""
    execution = Execution("bfloat16", "bfloat16")
    x, kernel, bias = jnp.ones((4097, 2), jnp.bfloat16), jnp.ones((2, 3)), jnp.zeros(3)
    _, vjp = jax.vjp(lambda b: affine(x, kernel, b, execution), bias)
    np.testing.assert_array_equal(vjp(jnp.ones((4097, 3), jnp.bfloat16))[0], np.full(3, 4097.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRECISION_NAMES)
def test_every_expert_has_its_kernel_and_its_bias(name, backend):
    """`[E, T, N]` by `[E, N, M]`: values and all three gradients."""
    execution = Execution(*PRECISIONS[name], backend=backend)
    x, kernel, bias, g = draws(4, (3, 5, 8), (3, 8, 6), (3, 6), (3, 5, 6))
    bias = rounded(bias, execution.operands).astype("f4")  # below a row of the kernel
    x, g = (jnp.asarray(a).astype(execution.activations) for a in (x, g))

    @jax.jit
    def run(x, kernel, bias, g):
        y, vjp = jax.vjp(lambda *a: affine(*a, execution), x, kernel, bias)
        return y, *vjp(g)

    y, dx, dkernel, dbias = run(x, jnp.asarray(kernel), jnp.asarray(bias), g)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert dkernel.dtype == dbias.dtype == jnp.float32
    operands = execution.operands
    for e in range(3):
        # the bias as one more row of the kernel
        whole = np.concatenate([kernel[e], bias[e][None]])
        assert_product(
            y[e],
            np.pad(rounded(x[e], operands), ((0, 0), (0, 1)), constant_values=1),
            whole,
            operands,
            execution.activations,
        )
        assert_product(dx[e], g[e], kernel[e].T, operands, execution.activations)
        assert_product(dkernel[e], x[e].T, g[e], operands, "float32")
        assert_product(dbias[e][None], np.ones((1, 5)), g[e], "float32", "float32")


def test_float64_stays_float64():
    """So that tests can take small differences."""
    x, kernel, bias = (a.astype("f8") for a in draws(5, (4, 6), (6, 3), (3,)))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in (x, kernel, bias)]
        y, vjp = jax.vjp(lambda *a: affine(*a, Execution("float64", "float64")), *arrays)
        found = [np.asarray(a) for a in (y, *vjp(jnp.ones_like(y)))]
    assert {a.dtype for a in found} == {np.dtype("f8")}
    np.testing.assert_allclose(found[0], x @ kernel + bias, rtol=1e-14)
    np.testing.assert_allclose(found[2], x.T @ np.ones((4, 3)), rtol=1e-13)
    assert wide("bfloat16") == wide("float32") == jnp.float32 and wide("float64") == jnp.float64


def test_no_rows():
    y, vjp = jax.vjp(lambda x, k: product(x, k, "float32"), jnp.ones((0, 4)), jnp.ones((4, 3)))
    dx, dkernel = vjp(y)
    assert y.shape == (0, 3) and dx.shape == (0, 4)
    np.testing.assert_array_equal(dkernel, np.zeros((4, 3)))


def test_row_major_changes_no_value():
    (x,) = draws(3, (3, 4, 5))
    found = jax.jit(lambda x: row_major(jnp.swapaxes(x, 0, 2), "cpu"))(x)
    np.testing.assert_array_equal(found, np.swapaxes(x, 0, 2))


def test_row_major_constrains_the_layout_on_cpu():
    lowered = jax.jit(lambda x: row_major(x.T, "cpu")).lower(jnp.ones((3, 5)))
    assert "LayoutConstraint" in lowered.as_text()


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_row_major_is_nothing_elsewhere(backend):
    x = jnp.ones((2, 3))
    assert row_major(x, backend) is x
