"""Auxiliary-loss-free load balancing: a bias on the choice of experts that follows their load."""

import jax
import jax.numpy as jnp
from flax import nnx


def rebalanced(params: nnx.State, load: jax.Array, rate: float) -> nnx.State:
    """Parameters with each layer's `balance` moved towards equal loads.

    An expert with less than its share becomes easier to choose by `rate`, one with more harder:
    `b_e += rate * sign(1/E - load_e)` (Wang et al. 2024, algorithm 1; used by DeepSeek-V3).

    Args:
      params: of an encoder whose M MoE layers have a `balance [E]`.
      load: `[M, E]`, shares of the assignments.
      rate: of the update.
    """
    flat = dict(nnx.to_flat_state(params))
    paths = sorted((p for p in flat if p[-1] == "balance"), key=lambda p: p[1])
    for path, shares in zip(paths, load, strict=True):
        missing = 1 / load.shape[-1] - shares
        # a share that is fair but for its last bits moves nothing
        step = rate * jnp.where(jnp.abs(missing) < 1e-6, 0.0, jnp.sign(missing))
        flat[path] = flat[path].replace(flat[path].get_value() + step)
    return nnx.from_flat_state(flat)
