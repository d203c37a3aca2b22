"""Auxiliary-loss-free load balancing: a bias on the choice of experts that follows their load."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_ablm.model.layers import Balance


def rebalanced(params: nnx.State, asked: jax.Array, rate: float) -> nnx.State:
    """Parameters with each layer's `balance` moved towards equal loads.

    An expert with less than its share becomes easier to choose by `rate`, one with more harder:
    `b_e += rate * sign(1/E - load_e)` (Wang et al. 2024, algorithm 1; used by DeepSeek-V3). Where
    experts have a capacity, the load is what was asked for: what is left after drops is capped, and
    would push experts below their share further down.

    Args:
      params: of an encoder whose M MoE layers have a `balance [E]`.
      asked: `[M, E]`, shares of the assignments before drops.
      rate: of the update.
    """
    flat = dict(nnx.to_flat_state(params))
    paths = sorted(path for path, variable in flat.items() if isinstance(variable, Balance))
    for path, shares in zip(paths, asked, strict=True):
        missing = 1 / asked.shape[-1] - shares
        # a share that is fair but for its last bits moves nothing
        step = rate * jnp.where(jnp.abs(missing) < 1e-6, 0.0, jnp.sign(missing))
        flat[path] = flat[path].replace(flat[path].get_value() + step)
    return nnx.from_flat_state(flat)
