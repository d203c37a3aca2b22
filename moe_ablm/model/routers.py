"""Routers: pure functions `(logits, valid, spec) -> plan, stats`, always in float32.

A router decides; it moves nothing. `moe` dispatches and combines from the plan alone. Padding is
routed nowhere, and takes no part in any loss or statistic.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_ablm.model.spec import MoESpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenChoice:
    """Plan of a token-choice router.

    Attributes:
      experts: int32 `[B, L, K]`, the experts of each token, best first; E where nothing is routed.
      gates: float32 `[B, L, K]`, their weights in the combined output; 0 where nothing is routed.
    """

    experts: jax.Array
    gates: jax.Array


class RouterStats(NamedTuple):
    """Statistics of one layer's routing over all valid tokens of the batch (float32).

    Attributes:
      load: `[E]`, share of the assignments that each expert received (sums to 1).
      entropy: entropy of `load` over log E; 1 is balanced, 0 one expert takes all.
      dropped: share of the assignments that found no place.
      load_balance, z_loss: the auxiliary losses, not yet weighted.
    """

    load: jax.Array
    entropy: jax.Array
    dropped: jax.Array
    load_balance: jax.Array
    z_loss: jax.Array


def top_k(logits: jax.Array, valid: jax.Array, spec: MoESpec) -> tuple[TokenChoice, RouterStats]:
    """Each token chooses the K experts of highest probability (Shazeer et al. 2017).

    Gates are the chosen probabilities, renormalised to sum 1 for K > 1 (Mixtral); for K = 1 the
    probability itself (Switch, eq. 2), since a constant gate would leave the router no gradient.

    Args:
      logits: float32 `[B, L, E]`.
      valid: bool `[B, L]`.
      spec: `k` is K; dropless.
    """
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits, axis=-1)
    gates, chosen = jax.lax.top_k(probabilities, spec.k)
    if spec.k > 1:
        gates = gates / gates.sum(-1, keepdims=True)
    here = valid[..., None]
    plan = TokenChoice(
        experts=jnp.where(here, chosen, experts).astype(jnp.int32),
        gates=jnp.where(here, gates, 0.0),
    )
    tokens = jnp.maximum(valid.sum(), 1)
    load = assignment_share(plan.experts, experts)
    stats = RouterStats(
        load=load,
        entropy=load_entropy(load),
        dropped=jnp.zeros(()),
        load_balance=experts * jnp.vdot(load, (probabilities * here).sum((0, 1)) / tokens),
        z_loss=router_z_loss(logits, valid),
    )
    return plan, stats


def assignment_share(chosen: jax.Array, experts: int) -> jax.Array:
    """`chosen [B, L, K]` (E: not routed) -> share of the assignments of each expert, `[E]`."""
    counts = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).sum((0, 1, 2))
    return counts / jnp.maximum(counts.sum(), 1)


def load_entropy(load: jax.Array) -> jax.Array:
    """Entropy of `load [E]` divided by log E, its maximum."""
    return jax.scipy.special.entr(load).sum() / jnp.log(max(load.shape[-1], 2))


def router_z_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, eq. 5)."""
    squared = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.where(valid, squared, 0.0).sum() / jnp.maximum(valid.sum(), 1)
