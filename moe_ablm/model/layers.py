"""Parameters and the plain layers: linear, layer norm, embedding.

Every parameter carries the letters of its axes (`axes`, from the legend in `spec`): the mesh rules
in `parallel.mesh` turn letters into shardings, so that layers know nothing of devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_ablm.model.linear import linear
from moe_ablm.model.spec import Execution

INIT_STD = 0.02  # of every weight, as in ESM-2 and BALM


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: str) -> nnx.Param:
    """A float32 weight drawn from N(0, 0.02^2)."""
    return nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: str) -> nnx.Param:
    """A float32 parameter that starts at one value."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """`x @ kernel + bias`; axes names the kernel's two axes."""

    def __init__(self, inputs: int, outputs: int, axes: str, execution: Execution, rngs: nnx.Rngs):
        self.operands = execution.operands
        self.kernel = normal(rngs, (inputs, outputs), axes)
        self.bias = constant(0.0, (outputs,), axes[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., inputs] -> [..., outputs]` in the dtype of `x`."""
        return linear(x, self.kernel[...], self.bias[...], self.operands)


class LayerNorm(nnx.Module):
    """Layer normalisation over D with float32 statistics (eps 1e-5, as in ESM-2)."""

    def __init__(self, d_model: int):
        self.scale = constant(1.0, (d_model,), "D")
        self.bias = constant(0.0, (d_model,), "D")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]` in the dtype of `x`."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
