"""Parameters and the plain layers: linear, layer norm, activations, FFN.

Every parameter has the letters of its axes (`axes`, from the legend in `spec`). The rules in
`parallel.mesh` turn letters into shardings, so layers know nothing of devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_ablm.model import cpu
from moe_ablm.model.linear import affine, wide
from moe_ablm.model.spec import EncoderSpec, Execution

INIT_STD = 0.02  # of every weight, as in ESM-2 and BALM
# arrays that the remat policy "matmuls" keeps for the backward pass; all others are recomputed
KEPT = ("qkv", "attended", "attention_out", "up", "down", "plan", "rows")


class Balance(nnx.Variable):
    """The bias of auxiliary-loss-free balancing; a rule moves it, not the optimizer."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: str) -> nnx.Param:
    """A float32 weight drawn from N(0, 0.02^2)."""
    return nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(
    value: float, shape: tuple[int, ...], axes: str, kind: type[nnx.Variable] = nnx.Param
) -> nnx.Variable:
    """A float32 parameter (or another kind of variable) that starts at one value."""
    return kind(jnp.full(shape, value, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """`x @ kernel + bias`; `axes` names the two axes of the kernel."""

    def __init__(self, inputs: int, outputs: int, axes: str, execution: Execution, rngs: nnx.Rngs):
        self.execution = execution
        self.kernel = normal(rngs, (inputs, outputs), axes)
        self.bias = constant(0.0, (outputs,), axes[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., inputs] -> [..., outputs]` in the dtype of `x`."""
        return affine(x, self.kernel[...], self.bias[...], self.execution)


class LayerNorm(nnx.Module):
    """Layer normalisation over D with statistics of at least float32."""

    def __init__(self, d_model: int, eps: float):
        self.eps = eps
        self.scale = constant(1.0, (d_model,), "D")
        self.bias = constant(0.0, (d_model,), "D")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]` in the dtype of `x`."""
        y = x.astype(wide(x.dtype))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def gelu(x: jax.Array, backend: str) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016), x * Phi(x), computed `wide`."""
    if backend == "cpu":
        return cpu.gelu(x.astype(wide(x.dtype))).astype(x.dtype)
    return _gelu(x)


def _plain_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x.astype(wide(x.dtype)), approximate=False).astype(x.dtype)


_gelu = jax.custom_vjp(_plain_gelu)


def _gelu_backward(x, gradient):
    # Without the barriers XLA would share erf with the recomputed forward pass and skip the
    # rounding of the gradient, and so would write both to memory in float32.
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    _, vjp = jax.vjp(_plain_gelu, x)
    return jax.lax.optimization_barrier(vjp(gradient))


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def swiglu(x: jax.Array, backend: str) -> jax.Array:
    """`silu(gate) * value` of the two halves of `x [..., 2 F]` (Shazeer 2020): `[..., F]`."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


ACTIVATE = {"gelu": gelu, "swiglu": swiglu}
HIDDEN = {"gelu": 1, "swiglu": 2}  # inputs of the activation per output


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, spec: EncoderSpec, width: int, execution: Execution, rngs: nnx.Rngs):
        """Args: spec of the encoder; width F."""
        self.activation, self.backend = spec.activation, execution.backend
        self.up = Linear(spec.d_model, HIDDEN[spec.activation] * width, "DF", execution, rngs)
        self.down = Linear(width, spec.d_model, "FD", execution, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`."""
        hidden = checkpoint_name(self.up(x), "up")
        return checkpoint_name(self.down(ACTIVATE[self.activation](hidden, self.backend)), "down")
