"""The matmul of every layer: one primitive with its own VJP, the only place that knows precision.

Why not plain autodiff: on XLA:CPU bfloat16 operands reach the AMX units only with a float32 result
type, and a weight gradient that contracts the leading dimension runs at a third of its speed unless
the transposed operand is laid out row-major. Elsewhere the same code asks for nothing unusual.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType


def row_major(x: jax.Array) -> jax.Array:
    """Asks XLA:CPU to materialise `x` in row-major order; a no-op on other backends.

    And on meshes that XLA partitions: jax 0.10 would gather `x` for it (within `jax.shard_map` each
    device is its own).
    """
    if jax.default_backend() != "cpu" or partitioned():
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def partitioned() -> bool:
    """Whether XLA divides arrays over several devices here."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1 and kind != AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def dot(a: jax.Array, b: jax.Array, operands: str) -> jax.Array:
    """Batched matmul `[..., M, K] x [..., K, N]` of `operands`-typed factors, float32 result.

    float32 operands are multiplied in full float32 on every backend (no TF32).
    """
    batch = tuple(range(a.ndim - 2))
    return lax.dot_general(
        a.astype(operands),
        b.astype(operands),
        (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch)),
        precision=lax.Precision.HIGHEST if operands == "float32" else None,
        preferred_element_type=jnp.float32,
    )


def dot_transposed(a: jax.Array, b: jax.Array, operands: str) -> jax.Array:
    """`[..., M, K] x [..., N, K] -> [..., M, N]`, typed as `dot`."""
    batch = tuple(range(a.ndim - 2))
    return lax.dot_general(
        a.astype(operands),
        b.astype(operands),
        (((a.ndim - 1,), (b.ndim - 1,)), (batch, batch)),
        precision=lax.Precision.HIGHEST if operands == "float32" else None,
        preferred_element_type=jnp.float32,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, operands: str) -> jax.Array:
    """`x [..., N] @ kernel [N, M]`, or expert by expert `x [E, T, N] @ kernel [E, N, M]`.

    Factors are `operands`-typed, sums float32. The result has the dtype of `x`; the gradient of
    `kernel` is float32.
    """
    out = dot(_rows(x, kernel), kernel, operands).astype(x.dtype)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def _rows(x, kernel):
    return x.reshape(-1, x.shape[-1]) if kernel.ndim == 2 else x


def _matmul_forward(x, kernel, operands):
    return matmul(x, kernel, operands), (x.astype(operands), kernel, jnp.zeros((), x.dtype))


def _matmul_backward(operands, residuals, gradient):
    x, kernel, like = residuals
    gradient = _rows(gradient, kernel).astype(operands)
    dx = dot_transposed(gradient, kernel, operands).astype(like.dtype).reshape(x.shape)
    dkernel = dot(row_major(jnp.swapaxes(_rows(x, kernel), -1, -2)), gradient, operands)
    return dx, dkernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, operands: str) -> jax.Array:
    """`x [..., N] @ kernel [N, M] + bias [M]` in the dtype of `x`; see `matmul`."""
    return matmul(x, kernel, operands) + bias.astype(x.dtype)
