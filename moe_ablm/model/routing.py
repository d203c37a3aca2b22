"""What routers return: a plan for the dispatch, and sums for the statistics.

Sums are kept row by row, so that the sums of several devices or of the antibodies of a row can be
added. Arrays have the dtype of the router's logits: float32, or float64 in tests.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_ablm.model.linear import wide


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which experts compute for which token.

    Attributes:
      experts: int32 `[B, L, K]`, the experts of each token; E where nothing is routed.
      gates: `[B, L, K]`, their weights in the combined output; 0 where nothing is routed.
      place: int32 `[B, L, K]`, place in the queue of the expert within the row; None: there are no
        queues.
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
    """Weights of soft-MoE: slots are means of tokens, outputs of tokens are means of slot outputs.

    Attributes:
      dispatch: `[B, L, E, S]`, sums to 1 over the tokens of an antibody; 0 at padding.
      combine: `[B, L, E, S]`, sums to 1 over all slots; 0 at padding.
    """

    dispatch: jax.Array
    combine: jax.Array

    def assigned(self, experts: int) -> jax.Array:
        """`[B, L, E]`: share of the token's output that comes from each expert."""
        return self.combine.sum(-1)


class RowSums(NamedTuple):
    """Sums over the counted tokens of each row. BALM-MoE's pad policies may count padding.

    Attributes:
      tokens: `[B]`, number of counted tokens.
      real: `[B]`, number of tokens that are not padding.
      load: `[B, E]`, assignments that experts compute; in soft-MoE shares of the combined output.
      chosen: `[B, E]`, assignments before a capacity drops some.
      probability: `[B, E]`, the router's distribution over experts.
      lost, asked: `[B]`, assignments that were dropped, and all that were asked for; in expert
        choice tokens without an expert, and all tokens; 0 in soft-MoE.
      z: `[B]`, logsumexp(logits)^2, without padding.
      entropy: `[B]`, entropy of the router's distribution over experts, in nats.
      spread, decisions: `[B]`, entropies of the router's decisions as shares of their maximum, and
        the number of decisions. A decision is over experts for each token, or over tokens for each
        expert (expert choice) or slot (soft-MoE).
      squared: `[B]`, mean over logits of their squares, without padding.
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
    """Statistics of one layer's routing over the batch.

    Attributes:
      load: `[E]`, share of the computed assignments that each expert received (sums to 1).
      asked: `[E]`, share of the assignments that asked for each expert, before drops (sums to 1).
      choices: mean number of experts that computed for a token (soft-MoE: 1).
      entropy: entropy of `load` over log E: 1 is balanced; at 0 one expert takes all.
      dropped: share of the assignments that found no place; in expert choice, of the tokens that no
        expert chose; 0 in soft-MoE.
      spread: mean entropy of the router's decisions over its maximum, 0 (decided) to 1. Near 1 in
        soft-MoE, every slot is the plain mean of all tokens and dispatch does nothing.
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
    """Statistics of the batch from the sums of its rows.

    The load-balance loss is Switch's (Fedus et al. 2022, eq. 4), `E sum_e f_e P_e` with f the
    shares before drops; 1 is balanced. The z-loss is ST-MoE's (Zoph et al. 2022, eq. 5), the
    entropy loss that of top-p routing (Huang et al. 2024, eq. 5). Both are means over tokens.

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
    """`-p log p`, 0 at p = 0. The derivative there is finite, so that 0 times it is 0, not NaN."""
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
      logits: `[B, L, N]`, one for each expert or slot.
      distribution: `[B, L, E]`, sums to 1 over experts.
      chosen, load: `[B, L, E]`, assignments before and after drops.
      counted: bool `[B, L]`, tokens that count; may include padding under BALM-MoE's policies.
      valid: bool `[B, L]`, False at padding.
    """
    mask = counted[..., None]
    chosen, load = (jnp.where(mask, x, 0.0).sum(1) for x in (chosen, load))
    entropy = jnp.where(mask, entropy_terms(distribution), 0.0).sum((1, 2))
    tokens, real = (x.sum(1).astype(wide(logits.dtype)) for x in (counted, valid))
    finite = jnp.where(valid[..., None], logits, 0.0)
    return RowSums(
        tokens=tokens,
        real=real,
        load=load,
        chosen=chosen,
        probability=jnp.where(mask, distribution, 0.0).sum(1),
        lost=(chosen - load).sum(-1),
        asked=chosen.sum(-1),
        z=jnp.where(valid, jnp.square(jax.nn.logsumexp(finite, axis=-1)), 0.0).sum(1),
        entropy=entropy,
        spread=entropy / jnp.log(max(distribution.shape[-1], 2)),
        decisions=tokens,
        squared=jnp.square(finite).mean(-1).sum(1),
    )
