"""The matmul primitive against float64 numpy: values, gradients, precisions, layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_ablm.model import linear as linear_module
from moe_ablm.model.linear import dot, dot_transposed, linear, matmul, row_major
from moe_ablm.model.spec import PRECISIONS

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


@pytest.fixture(scope="module", params=PRECISION_NAMES)
def case(request):
    """Inputs, output and gradients of one `matmul` under one precision."""
    activations, operands = PRECISIONS[request.param]
    x, kernel, cotangent = draws(0, (3, 7, 33), (33, 17), (3, 7, 17))
    x, cotangent = (jnp.asarray(a).astype(activations) for a in (x, cotangent))

    @jax.jit
    def run(x, kernel, cotangent):
        y, vjp = jax.vjp(lambda x, kernel: matmul(x, kernel, operands), x, kernel)
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
    assert float(matmul(x, jnp.ones((4, 1)), operands)[0, 0]) == 4 * (1 + 2.0**-12)


def test_sums_of_bfloat16_are_float32():
    """256 + 1 is not a bfloat16: adding 1 to 256 in bfloat16 would change nothing."""
    x = jnp.ones((1, 513)).at[0, 0].set(256.0)
    assert float(matmul(x, jnp.ones((513, 1)), "bfloat16")[0, 0]) == 768.0


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
def test_linear_adds_the_bias_in_the_dtype_of_the_input(name):
    activations, operands = PRECISIONS[name]
    x, kernel, bias, g = draws(2, (6, 8), (8, 3), (3,), (6, 3))
    x, g = jnp.asarray(x).astype(activations), jnp.asarray(g).astype(activations)
    y, vjp = jax.vjp(lambda b: linear(x, jnp.asarray(kernel), b, operands), jnp.asarray(bias))
    expected = matmul(x, jnp.asarray(kernel), operands) + jnp.asarray(bias).astype(activations)
    assert y.dtype == activations
    np.testing.assert_array_equal(y, expected)
    (dbias,) = vjp(g)
    assert dbias.dtype == jnp.float32
    tolerance = 1e-6 if activations == "float32" else 0.05
    np.testing.assert_allclose(dbias, np.asarray(g).astype("f8").sum(0), atol=tolerance)


def test_no_rows():
    y, vjp = jax.vjp(lambda x, k: matmul(x, k, "float32"), jnp.ones((0, 4)), jnp.ones((4, 3)))
    dx, dkernel = vjp(y)
    assert y.shape == (0, 3) and dx.shape == (0, 4)
    np.testing.assert_array_equal(dkernel, np.zeros((4, 3)))


def test_row_major_changes_no_value():
    (x,) = draws(3, (3, 4, 5))
    found = jax.jit(lambda x: row_major(jnp.swapaxes(x, 0, 2)))(x)
    np.testing.assert_array_equal(found, np.swapaxes(x, 0, 2))


def test_row_major_constrains_the_layout_on_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("a no-op on other backends")
    lowered = jax.jit(lambda x: row_major(x.T)).lower(jnp.ones((3, 5)))
    assert "LayoutConstraint" in lowered.as_text()


def test_row_major_is_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(linear_module.jax, "default_backend", lambda: "gpu")
    x = jnp.ones((2, 3))
    assert row_major(x) is x
