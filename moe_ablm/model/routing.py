"""What routers return: a plan for the dispatch, and sums from which statistics are made.

Sums are kept row by row, so that those of several devices, micro-batches or antibodies of a row
simply add up.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_ablm.model.linear import wide


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which experts compute for which token; the only thing that a dispatch looks at.

    Attributes:
      experts: int32 `[B, L, K]`, the experts of each token; E where nothing is routed.
      gates: float32 `[B, L, K]`, their weights in the combined output; 0 where nothing is routed.
      place: int32 `[B, L, K]`, place in the queue of that expert in that row, when queues are
        limited; None: they are not.
    """

    experts: jax.Array
    gates: jax.Array
    place: jax.Array | None

    def assigned(self, experts: int) -> jax.Array:
        """`[B, L, E]` in the dtype of the gates: 1 where the expert computes for the token."""
        return jax.nn.one_hot(self.experts, experts, dtype=self.gates.dtype).sum(-2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftPlan:
    """Weights of soft-MoE: slots as means of tokens, tokens as means of the slots' outputs.

    Attributes:
      dispatch: float32 `[B, L, E, S]`, sums to 1 over the tokens of an antibody; 0 at padding.
      combine: float32 `[B, L, E, S]`, sums to 1 over all slots; 0 at padding.
    """

    dispatch: jax.Array
    combine: jax.Array

    def assigned(self, experts: int) -> jax.Array:
        """float32 `[B, L, E]`: share of the token's output that comes from the expert."""
        return self.combine.sum(-1)


class RowSums(NamedTuple):
    """Sums over the counted tokens of each row (float32).

    Attributes:
      tokens, real: `[B]`, how many are counted, and how many are no padding.
      load: `[B, E]`, assignments that experts compute (soft-MoE: of the combined output).
      chosen: `[B, E]`, assignments before a capacity drops some.
      probability: `[B, E]`, of the router's distribution over experts.
      lost, asked: `[B]`, assignments dropped, of how many; expert choice: tokens without expert.
      z: `[B]`, logsumexp(logits)^2; never of padding, as `squared`.
      entropy: `[B]`, of the router's distribution over experts, in nats.
      spread, decisions: `[B]`, entropies of the router's decisions as shares of their maximum, and
        how many decisions there are: over experts for each token, or over tokens for each expert
        (expert choice) or slot (soft-MoE).
      squared: `[B]`, mean over experts of the squared logits.
    """

    tokens: jax.Array
    real: jax.Array
    load: jax.Array
    chosen: jax.Array
    probability: jax.Array
    lost: jax.Array
    asked: jax.Array
    z: jax.Array
    entropy: jax.Array
    spread: jax.Array
    decisions: jax.Array
    squared: jax.Array


class RouterStats(NamedTuple):
    """Statistics of one layer's routing over the batch (float32).

    Attributes:
      load: `[E]`, share of the computed assignments that each expert received (sums to 1).
      asked: `[E]`, share of the assignments that asked for each expert, before drops (sums to 1).
      choices: mean experts that computed for a token (soft-MoE: 1, the shares of the output).
      entropy: entropy of `load` over log E; 1 is balanced, 0 one expert takes all.
      dropped: share of the assignments that found no place; expert choice: of the tokens that no
        expert chose.
      spread: how undecided the router is, 0 to 1: the mean entropy of its decisions over their
        maximum. Soft-MoE near 1: every slot is the plain mean of all tokens, dispatch does nothing.
      logit_rms: root mean square of the router's logits.
      load_balance, z_loss, entropy_loss: the auxiliary losses, not yet weighted.
    """

    load: jax.Array
    asked: jax.Array
    choices: jax.Array
    entropy: jax.Array
    dropped: jax.Array
    spread: jax.Array
    logit_rms: jax.Array
    load_balance: jax.Array
    z_loss: jax.Array
    entropy_loss: jax.Array


def summarise(rows: RowSums, balanced: bool) -> RouterStats:
    """Statistics of the batch from those of its rows.

    The load-balance loss is Switch's (Fedus et al. 2022, eq. 4), `E sum_e f_e P_e` with the shares
    before drops; 1 is balanced. The z-loss is ST-MoE's (Zoph et al. 2022, eq. 5), the entropy loss
    that of top-p routing (Huang et al. 2024, eq. 5): means over tokens.

    Args:
      rows: sums `[B, ...]`.
      balanced: whether the router has a load-balance loss; expert choice and soft-MoE have none.
    """
    total = jax.tree.map(lambda x: x.sum(0), rows)
    tokens, real = jnp.maximum(total.tokens, 1), jnp.maximum(total.real, 1)
    experts = total.load.shape[-1]
    load = _shares(total.load)
    asked = _shares(total.chosen)
    products = asked * total.probability / tokens
    return RouterStats(
        load=load,
        asked=asked,
        choices=total.load.sum() / tokens,
        entropy=load_entropy(load),
        dropped=total.lost / jnp.maximum(total.asked, 1),
        spread=total.spread / jnp.maximum(total.decisions, 1),
        logit_rms=jnp.sqrt(total.squared / real),
        load_balance=experts * products.sum() if balanced else jnp.zeros_like(tokens),
        z_loss=total.z / real,
        entropy_loss=total.entropy / tokens,
    )


def _shares(counts: jax.Array) -> jax.Array:
    total = counts.sum()
    return counts / jnp.where(total > 0, total, 1)


def load_entropy(load: jax.Array) -> jax.Array:
    """Entropy of `load [E]` divided by log E, its maximum."""
    return entropy_terms(load).sum() / jnp.log(max(load.shape[-1], 2))


def entropy_terms(p: jax.Array) -> jax.Array:
    """`-p log p`, 0 at p = 0, where the derivative is large but no infinity: 0 times it is 0."""
    return -p * jnp.log(jnp.maximum(p, 1e-30))


def token_sums(
    logits: jax.Array,
    distribution: jax.Array,
    chosen: jax.Array,
    load: jax.Array,
    counted: jax.Array,
    valid: jax.Array,
) -> RowSums:
    """Sums of a router whose tokens each have a distribution over experts.

    Args:
      logits: float32 `[B, L, N]`, one an expert or a slot.
      distribution: `[B, L, E]`, sums to 1.
      chosen, load: `[B, L, E]`, before and after drops.
      counted: bool `[B, L]`; may hold padding under BALM-MoE's policies.
      valid: bool `[B, L]`, False at padding.
    """
    here = counted[..., None]
    chosen, load = (jnp.where(here, x, 0.0).sum(1) for x in (chosen, load))
    entropy = jnp.where(here, entropy_terms(distribution), 0.0).sum((1, 2))
    tokens, real = (x.sum(1).astype(wide(logits.dtype)) for x in (counted, valid))
    finite = jnp.where(valid[..., None], logits, 0.0)
    return RowSums(
        tokens=tokens,
        real=real,
        load=load,
        chosen=chosen,
        probability=jnp.where(here, distribution, 0.0).sum(1),
        lost=(chosen - load).sum(-1),
        asked=chosen.sum(-1),
        z=jnp.where(valid, jnp.square(jax.nn.logsumexp(finite, axis=-1)), 0.0).sum(1),
        entropy=entropy,
        spread=entropy / jnp.log(max(distribution.shape[-1], 2)),
        decisions=tokens,
        squared=jnp.square(finite).mean(-1).sum(1),
    )
