"""Updates that are skipped because their gradient is far larger than those before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 100  # updates that a norm is compared with; before there are so many nothing is skipped


class SpikeState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      norms: of the last `WINDOW` gradients, float32 `[WINDOW]`; of spikes the limit at that time.
      seen: int32, gradients so far.
      skipped: int32, how many of them were spikes.
      inner: state of the optimizer.
    """

    norms: jax.Array
    seen: jax.Array
    skipped: jax.Array
    inner: optax.OptState


def skip_spikes(
    inner: optax.GradientTransformation, deviations: float
) -> optax.GradientTransformation:
    """`inner`, but for gradients whose norm exceeds mean + `deviations` sd of a window.

    A skipped update changes neither parameters nor moments, and its place in the schedule is
    taken by the next one. In the window it counts as no more than the limit, so that norms that
    have grown for good are skipped for a while, not for ever. A norm that is no number is no spike:
    it ends the run.
    """

    def init(params: optax.Params) -> SpikeState:
        none = jnp.zeros((), jnp.int32)
        return SpikeState(jnp.zeros(WINDOW, jnp.float32), none, none, inner.init(params))

    def update(
        gradients: optax.Updates, state: SpikeState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SpikeState]:
        norm = optax.tree.norm(gradients)
        limit = state.norms.mean() + deviations * state.norms.std()
        spike = (state.seen >= WINDOW) & (norm > limit)
        updates, after = inner.update(gradients, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(spike, jnp.zeros_like(u), u), updates)
        after = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner, after)
        norms = state.norms.at[state.seen % WINDOW].set(jnp.where(spike, limit, norm))
        return updates, SpikeState(norms, state.seen + 1, state.skipped + spike, after)

    return optax.GradientTransformation(init, update)
