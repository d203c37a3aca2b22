"""Routers: pure functions `(logits, tokens, spec) -> plan, sums`, always in float32.

A router decides; it moves nothing. `dispatch` moves from the plan alone. Tokens of different
antibodies never compete (unless a caller hands over the whole batch as one), and padding is routed
nowhere, unless one of BALM-MoE's partial policies is asked for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_ablm.model.capacity import place_in_queue, places, tokens_of_antibody
from moe_ablm.model.routing import Plan, RowSums, SoftPlan, entropy_terms, token_sums
from moe_ablm.model.spec import TOKEN_ROUTERS, MoESpec

PAD_LOGIT = -1e9  # BALM's, under the policy "logits"


class Tokens(NamedTuple):
    """What a router knows of the tokens.

    Attributes:
      valid: bool `[B, L]`, False at padding.
      antibody: integers `[B, L]`, which antibody of its row a token belongs to, 0 at padding;
        None: a row is one antibody.
    """

    valid: jax.Array
    antibody: jax.Array | None = None


class Affinity(NamedTuple):
    """How much tokens and experts want each other, `[B, L, E]`: gates, and a distribution."""

    gates: jax.Array
    distribution: jax.Array


def affinity(logits: jax.Array, spec: MoESpec) -> Affinity:
    """Softmax, or sigmoids (DeepSeek-V3, eq. 15) with their shares as the distribution."""
    if spec.gate != "sigmoid":
        probabilities = jax.nn.softmax(logits, axis=-1)
        return Affinity(probabilities, probabilities)
    gates = jax.nn.sigmoid(logits)
    return Affinity(gates, gates / jnp.maximum(gates.sum(-1, keepdims=True), 1e-20))


def shares_of_tokens(logits: jax.Array, routed: jax.Array, antibody: jax.Array | None) -> jax.Array:
    """Softmax over the tokens that compete, as BALM's expert choice has it: `[B, L, E]`.

    Args:
      logits: float32 `[B, L, E]`.
      routed: bool `[B, L]`; others have share 0.
      antibody: integers `[B, L]`, within which tokens compete; None: within a row.
    """
    b, length, _ = logits.shape
    antibody = jnp.zeros((b, length), jnp.int32) if antibody is None else antibody
    here = routed[..., None]

    def row(logits, antibody):
        most = jax.ops.segment_max(logits, antibody, length + 1)
        weight = jnp.exp(logits - lax.stop_gradient(most)[antibody])
        return weight / jax.ops.segment_sum(weight, antibody, length + 1)[antibody]

    return jnp.where(here, jax.vmap(row)(jnp.where(here, logits, -1e30), antibody), 0.0)


def route(
    logits: jax.Array,
    tokens: Tokens,
    spec: MoESpec,
    balance: jax.Array | None = None,
    training: bool = False,
) -> tuple[Plan, RowSums]:
    """Plan of any router but soft-MoE.

    Args:
      logits: float32 `[B, L, E]`.
      tokens: which of them count, and which compete.
      spec: of the layer.
      balance: float32 `[E]`, added to the affinities for the choice alone (auxiliary-loss-free
        balancing, Wang et al. 2024).
      training: whether token choice obeys the capacity; in inference it is dropless.
    """
    policies = spec.policies()
    partial = "excluded" not in policies
    routed = jnp.ones_like(tokens.valid) if partial else tokens.valid
    counted = tokens.valid if "aux" in policies or not partial else routed
    if "logits" in policies:
        logits = jnp.where(tokens.valid[..., None], logits, PAD_LOGIT)
    wanted = affinity(logits, spec)
    if spec.gate == "tokens":
        wanted = wanted._replace(gates=shares_of_tokens(logits, routed, tokens.antibody))
    preference = wanted.gates if balance is None else wanted.gates + balance
    token_choice = spec.router in TOKEN_ROUTERS
    chosen = token_choices(preference, wanted.distribution, spec) if token_choice else _all(logits)
    asking = jnp.where(routed[..., None], chosen, spec.experts)
    gates = jnp.take_along_axis(wanted.gates, chosen % spec.experts, axis=-1)
    gates = jnp.where(asking < spec.experts, gates, 0.0)
    experts, place = asking, None
    if spec.limit is not None and (training or not token_choice):
        score = gates
        if "probabilities" in policies:
            score = jnp.where(tokens.valid[..., None], gates, 1e-9)
        experts, place = admit(asking, score, routed, tokens.antibody, spec)
    if token_choice:
        gates = _scaled(gates, spec)
    plan = Plan(experts.astype(jnp.int32), jnp.where(experts < spec.experts, gates, 0.0), place)
    load = plan.assigned(spec.experts)
    before = Plan(asking, gates, None).assigned(spec.experts) if token_choice else load
    sums = token_sums(logits, wanted.distribution, before, load, counted, tokens.valid)
    if not token_choice:
        alone = jnp.where(counted & (load.sum(-1) == 0), 1.0, 0.0).sum(1)
        sums = sums._replace(lost=alone, asked=sums.tokens)
        sums = sums._replace(**decisions_of_experts(wanted.gates, counted))
    return plan, sums


def _all(logits: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)


def token_choices(preference: jax.Array, distribution: jax.Array, spec: MoESpec) -> jax.Array:
    """The experts that each token chooses, best first: int32 `[B, L, K]`, E for none.

    Top-k (Shazeer et al. 2017) takes K; top-p (Huang et al. 2024) as few of the best as reach
    `threshold` together, but at most K; unless `exceed`, only those that stay within it, and the
    best one always (BALM). Ties go to the lower number.
    """
    _, chosen = lax.top_k(lax.stop_gradient(preference), spec.k)
    if spec.router != "topp":
        return chosen
    share = jnp.take_along_axis(distribution, chosen, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    kept = before < spec.threshold
    if not spec.exceed:
        kept = (before + share <= spec.threshold).at[..., 0].set(True)
    return jnp.where(kept, chosen, spec.experts)


def _scaled(gates: jax.Array, spec: MoESpec) -> jax.Array:
    """Gates that sum to 1, where asked for: by default of top-k with K > 1 (Mixtral).

    Not for K = 1: a constant gate would leave the router no gradient (Switch, section 2.1).
    """
    default = spec.router in ("topk", "sequence") and spec.k > 1
    if not (default if spec.renormalise is None else spec.renormalise):
        return gates
    total = gates.sum(-1, keepdims=True)
    return gates / jnp.where(total > 0, total, 1.0)


def admit(
    asking: jax.Array,
    score: jax.Array,
    routed: jax.Array,
    antibody: jax.Array | None,
    spec: MoESpec,
) -> tuple[jax.Array, jax.Array]:
    """Lets experts take the tokens of highest score, up to the capacity of each antibody.

    Args:
      asking: integers `[B, L, K]`, the experts that each token asks for, E for none.
      score: float `[B, L, K]`.
      routed: bool `[B, L]`, tokens that may ask; the capacity counts them.
      antibody: integers `[B, L]`, 0 at padding; None: a row is one antibody.
      spec: of the layer.

    Returns:
      Experts `[B, L, K]` with E for those turned away, and places in the queues.
    """
    b, length, k = asking.shape
    if antibody is None:
        count = jnp.broadcast_to(routed.sum(-1, keepdims=True, dtype=jnp.int32), (b, length))
        queue = asking
    else:
        count = tokens_of_antibody(antibody)
        queue = asking + (spec.experts + 1) * antibody[..., None].astype(jnp.int32)
    place = place_in_queue(
        queue.reshape(b, length * k).astype(jnp.int32), score.reshape(b, length * k)
    ).reshape(asking.shape)
    admitted = place < places(count, length, spec)[..., None]
    return jnp.where(admitted, asking, spec.experts), place


def decisions_of_experts(gates: jax.Array, counted: jax.Array) -> dict[str, jax.Array]:
    """Entropy over tokens of what each expert sees: 1 where it finds all tokens alike."""
    weights = jnp.where(counted[..., None], lax.stop_gradient(gates), 0.0)
    shares = weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-20)
    tokens = counted.sum(-1)
    scale = jnp.log(jnp.maximum(tokens, 2))[:, None]
    spread = (entropy_terms(shares).sum(1) / scale).sum(-1)
    decisions = jnp.where(tokens > 0, float(gates.shape[-1]), 0.0)
    return {"spread": spread, "decisions": decisions}


def soft(logits: jax.Array, valid: jax.Array) -> tuple[SoftPlan, RowSums]:
    """Soft-MoE (Puigcerver et al. 2024): every slot reads all tokens, every token all slots.

    Args:
      logits: float32 `[B, L, E, S]`.
      valid: bool `[B, L]`, the tokens of one antibody; the rest is neither read nor written.
    """
    b, length, e, s = logits.shape
    here = valid[:, :, None, None]
    # an antibody without tokens must give zeros, not NaN
    masked = jnp.where(here, logits, -1e30)
    dispatch = jnp.where(here, jax.nn.softmax(masked, axis=1), 0.0)
    combine = jax.nn.softmax(logits.reshape(b, length, e * s), axis=-1).reshape(logits.shape)
    combine = jnp.where(here, combine, 0.0)
    share = combine.sum(-1)
    sums = token_sums(logits.reshape(b, length, e * s), share, share, share, valid, valid)
    tokens = valid.sum(-1)
    scale = jnp.log(jnp.maximum(tokens, 2))[:, None, None]
    spread = (entropy_terms(lax.stop_gradient(dispatch)).sum(1) / scale).sum((1, 2))
    decisions = jnp.where(tokens > 0, float(e * s), 0.0)
    nothing = jnp.zeros_like(sums.lost)
    sums = sums._replace(spread=spread, decisions=decisions, lost=nothing, asked=nothing)
    return SoftPlan(dispatch, combine), sums
