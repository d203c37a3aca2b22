"""The dense feed-forward block of ESM-2."""

import jax
from flax import nnx

from moe_ablm.model.layers import Linear
from moe_ablm.model.spec import EncoderSpec, Execution


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016), x * Phi(x)."""
    return jax.nn.gelu(x, approximate=False)


class FeedForward(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        self.up = Linear(spec.d_model, spec.ffn, "DF", execution, rngs)
        self.down = Linear(spec.ffn, spec.d_model, "FD", execution, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, L, D] -> [B, L, D]`."""
        return self.down(gelu(self.up(x)))
