"""The dense feed-forward block of ESM-2 and BALM."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_ablm.model.layers import Linear
from moe_ablm.model.spec import EncoderSpec, Execution


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016), x * Phi(x)."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_backward(x, gradient):
    # apart from what stands around it: XLA:CPU would compute erf again in every loop that reads
    # the result, transposed ones among them (2.4x the time of an FFN's gradient)
    x, gradient = lax.optimization_barrier((x, gradient))
    _, vjp = jax.vjp(partial(jax.nn.gelu, approximate=False), x)
    return lax.optimization_barrier(vjp(gradient))


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def swiglu(x: jax.Array) -> jax.Array:
    """`silu(gate) * value` of the two halves of `x [..., 2 F]` (Shazeer 2020): `[..., F]`."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


ACTIVATE = {"gelu": gelu, "swiglu": swiglu}
HIDDEN = {"gelu": 1, "swiglu": 2}  # inputs of the activation for each of its outputs


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, spec: EncoderSpec, width: int, execution: Execution, rngs: nnx.Rngs):
        """Args: spec of the encoder; width F."""
        self.activation = spec.activation
        self.up = Linear(spec.d_model, HIDDEN[spec.activation] * width, "DF", execution, rngs)
        self.down = Linear(width, spec.d_model, "FD", execution, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`."""
        return self.down(ACTIVATE[self.activation](self.up(x)))
