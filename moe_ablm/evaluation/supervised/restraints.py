"""What holds experts back from learning few antibodies by heart: frozen routers, expert dropout.

Both act on the parameters, not on the layers, as adapters do (`lora`): the encoder computes as it
always does, whatever its kind of router.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_ablm.evaluation.supervised.lora import Path

ROUTER = ("router", "scale")  # weights of a router, and the learned scale of a normalised one


def with_frozen_routers(params: nnx.State) -> nnx.State:
    """The same parameters; no gradient reaches those of routers.

    Tokens may still go to other experts than before, as what they are computed from is trained.
    """

    def stopped(path: Path, weight: jax.Array) -> jax.Array:
        of_router = path[-2:-1] == ("ffn",) and path[-1] in ROUTER
        return jax.lax.stop_gradient(weight) if of_router else weight

    return _mapped(params, stopped)


def with_expert_dropout(params: nnx.State, rate: float, key: jax.Array) -> nnx.State:
    """The parameters without a share of the hidden units of each expert, the others rescaled.

    Dropout at the intermediate layer of each expert (Fedus et al. 2022, section 2.4), with units
    drawn once for all tokens instead of for each: a unit is gone where its row of `down [E, F, D]`
    is 0. Shared experts and dense FFNs are left as they are.

    Args:
      params: of the encoder.
      rate: share that is dropped on average.
      key: of the draw.
    """

    def thinned(path: Path, weight: jax.Array) -> jax.Array:
        if path[-2:] != ("ffn", "down"):
            return weight
        kept = jax.random.bernoulli(
            jax.random.fold_in(key, path[1]), 1 - rate, (*weight.shape[:2], 1)
        )
        return jnp.where(kept, weight / (1 - rate), 0.0)

    return _mapped(params, thinned)


def _mapped(params: nnx.State, change) -> nnx.State:
    flat = nnx.to_flat_state(params)
    changed = [(path, v.replace(change(path, v.get_value()))) for path, v in flat]
    return nnx.from_flat_state(changed)
