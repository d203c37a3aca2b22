"""The matmuls of linear layers, attention and experts, at the precision of the execution.

The dtype policy is one rule: activations have the dtype of the execution, and every sum (in
matmuls, statistics, losses, gradients of weights and biases) is at least float32 (`wide`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

from moe_ablm.model.spec import Execution


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which values of `dtype` are summed: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _dot(a, b, operands, contract):
    batch = tuple(range(a.ndim - 2))
    return lax.dot_general(
        a.astype(operands),
        b.astype(operands),
        (contract, (batch, batch)),
        precision=None if operands == "bfloat16" else lax.Precision.HIGHEST,
        preferred_element_type=wide(operands),
    )


def dot(a: jax.Array, b: jax.Array, operands: str) -> jax.Array:
    """Batched matmul `[..., M, K] x [..., K, N]` of factors cast to `operands`; sums are `wide`.

    float32 operands are multiplied in full float32 on every backend (no TF32).
    """
    return _dot(a, b, operands, ((a.ndim - 1,), (b.ndim - 2,)))


def dot_transposed(a: jax.Array, b: jax.Array, operands: str) -> jax.Array:
    """`[..., M, K] x [..., N, K] -> [..., M, N]`, with the dtypes of `dot`."""
    return _dot(a, b, operands, ((a.ndim - 1,), (b.ndim - 1,)))


def row_major(x: jax.Array, backend: str) -> jax.Array:
    """Makes `x` row-major on CPU, where a matmul with a transposed factor is 3x slower.

    A no-op on other backends, and under automatic partitioning, where the layout constraint would
    all-gather `x` (within `jax.shard_map` there is no automatic partitioning).
    """
    if backend != "cpu" or partitioned():
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def partitioned() -> bool:
    """Whether XLA partitions arrays over several devices in the current context."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1 and kind != AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, execution: Execution):
    """`x [..., N] @ kernel [N, M] + bias [M]`, or batched `x [E, T, N] @ kernel [E, N, M]`.

    It has its own VJP because autodiff would multiply float32 cotangents with factors in the dtype
    of operands, and would sum gradients of biases over tokens in the dtype of activations.

    Args:
      x: in the dtype of activations.
      kernel: parameters, or activations in attention and soft-MoE.
      bias: `[M]`, batched `[E, M]`; None: no bias.
      execution: dtype of operands; backend.

    Returns:
      An array in the dtype of `x`. Gradients of `kernel` and `bias` are summed `wide` and have
      their dtypes.
    """
    out = dot(_rows(x, kernel), kernel, execution.operands)
    if bias is not None:
        out = out + (bias if kernel.ndim == 2 else bias[:, None])
    return out.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[-1])


def _rows(x, kernel):
    return x.reshape(-1, x.shape[-1]) if kernel.ndim == 2 else x


def _affine_forward(x, kernel, bias, execution):
    residuals = x.astype(execution.operands), kernel, bias, jnp.zeros((), x.dtype)
    return affine(x, kernel, bias, execution), residuals


def _affine_backward(execution, residuals, gradient):
    x, kernel, bias, like = residuals
    operands = execution.operands
    gradient = _rows(gradient, kernel)
    dbias = None
    if bias is not None:
        dbias = gradient.astype(wide(gradient.dtype)).sum(-2).astype(bias.dtype)
    gradient = gradient.astype(operands)
    dx = dot_transposed(gradient, kernel, operands).astype(like.dtype).reshape(x.shape)
    columns = jnp.swapaxes(_rows(x, kernel), -1, -2)
    dkernel = dot(row_major(columns, execution.backend), gradient, operands)
    if execution.backend != "cpu":
        # else, on several devices, XLA may put off weight gradients until their all-reduce, and
        # keeps what they are made of until then: 35 % more memory a layer
        dx, dkernel = lax.optimization_barrier((dx, dkernel))
    return dx, dkernel.astype(kernel.dtype), dbias


affine.defvjp(_affine_forward, _affine_backward)
