"""Routers: pure functions `(spec, logits, tokens, ...) -> plan, sums`, one per router family.

A router decides; it moves nothing. `dispatch` moves from the plan alone. Decisions are made in the
dtype of the logits, which is at least float32. Tokens of different antibodies never compete (unless
a caller hands over the whole batch as one), and padding is routed nowhere, unless one of BALM-MoE's
partial policies is asked for.
"""

from functools import singledispatch
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_ablm.model.families import ExpertChoice, Queued, Router, Soft, TokenChoice, TopP
from moe_ablm.model.routing import Plan, RowSums, SoftPlan, entropy_terms, token_sums

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


@singledispatch
def plan(
    spec: Router,
    logits: jax.Array,
    tokens: Tokens,
    balance: jax.Array | None = None,
    training: bool = False,
) -> tuple[Plan | SoftPlan, RowSums]:
    """Who computes for whom; a router family registers its function by its class of `spec`.

    Args:
      spec: of the layer.
      logits: at least float32 `[B, L, E]`, of soft-MoE `[B, L, E, S]`.
      tokens: which of them count, and which compete.
      balance: `[E]`, added to the affinities for the choice alone (auxiliary-loss-free balancing,
        Wang et al. 2024).
      training: whether token choice obeys the capacity; in inference it is dropless.
    """
    raise NotImplementedError(f"no plan function is registered for {type(spec).__name__}")


@plan.register
def _(spec: TokenChoice, logits, tokens, balance=None, training=False):
    pads = _pads(spec, logits, tokens)
    wanted = affinity(pads.logits, spec.gate)
    preference = wanted.gates if balance is None else wanted.gates + balance
    chosen = token_choices(preference, wanted.distribution, spec)
    asking = jnp.where(pads.routed[..., None], chosen, spec.experts)
    gates = _gates_of(wanted.gates, asking)
    experts, place = _admitted(asking, gates, pads, tokens, spec, training)
    if spec.renormalised:
        total = gates.sum(-1, keepdims=True)
        gates = gates / jnp.where(total > 0, total, 1.0)
    made = _plan(experts, gates, place, spec.experts)
    asked = Plan(asking, gates, None).assigned(spec.experts)
    load = made.assigned(spec.experts)
    sums = token_sums(pads.logits, wanted.distribution, asked, load, pads.counted, tokens.valid)
    return made, sums


@plan.register
def _(spec: ExpertChoice, logits, tokens, balance=None, training=False):
    pads = _pads(spec, logits, tokens)
    wanted = affinity(pads.logits, "softmax" if spec.gate == "tokens" else spec.gate)
    gates = wanted.gates
    if spec.gate == "tokens":
        gates = shares_of_tokens(pads.logits, pads.routed, tokens.antibody)
    everyone = jnp.broadcast_to(jnp.arange(spec.experts), logits.shape)
    asking = jnp.where(pads.routed[..., None], everyone, spec.experts)
    shown = jnp.where(pads.routed[..., None], gates, 0.0)
    experts, place = _admitted(asking, shown, pads, tokens, spec, training)
    made = _plan(experts, shown, place, spec.experts)
    load = made.assigned(spec.experts)
    sums = token_sums(pads.logits, wanted.distribution, load, load, pads.counted, tokens.valid)
    alone = jnp.where(pads.counted & (load.sum(-1) == 0), 1.0, 0.0).sum(1)
    sums = sums._replace(lost=alone, asked=sums.tokens)
    return made, sums._replace(**decisions_of_experts(gates, pads.counted))


def _plan(experts, gates, place, count) -> Plan:
    return Plan(experts.astype(jnp.int32), jnp.where(experts < count, gates, 0.0), place)


class Pads(NamedTuple):
    """What a pad policy does: logits, tokens that are routed, tokens in the router losses."""

    logits: jax.Array
    routed: jax.Array
    counted: jax.Array
    last: bool  # pads are last in the queues


def _pads(spec: Router, logits: jax.Array, tokens: Tokens) -> Pads:
    policies = spec.policies()
    partial = "excluded" not in policies
    routed = jnp.ones_like(tokens.valid) if partial else tokens.valid
    counted = tokens.valid if "aux" in policies or not partial else routed
    if "logits" in policies:
        logits = jnp.where(tokens.valid[..., None], logits, PAD_LOGIT)
    return Pads(logits, routed, counted, "probabilities" in policies)


def _gates_of(gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Gates `[B, L, K]` of chosen experts, 0 for none: a gather whose gradient is no scatter."""
    one_hot = jax.nn.one_hot(chosen, gates.shape[-1], dtype=gates.dtype)
    return (gates[..., None, :] * one_hot).sum(-1)


def _admitted(asking, score, pads: Pads, tokens: Tokens, spec: Router, training: bool):
    """Experts and places of those that get one; everyone, where there are no queues."""
    if not (isinstance(spec, Queued) and spec.queues(training)):
        return asking, None
    if pads.last:
        score = jnp.where(tokens.valid[..., None], score, 1e-9)
    return admit(asking, score, pads.routed, tokens.antibody, spec)


class Affinity(NamedTuple):
    """Router scores per (token, expert), `[B, L, E]`.

    `gates` weight outputs, `distribution` sums to 1 over experts.
    """

    gates: jax.Array
    distribution: jax.Array


def affinity(logits: jax.Array, gate: str) -> Affinity:
    """Softmax, or sigmoids (DeepSeek-V3, eq. 15) with their shares as the distribution."""
    if gate != "sigmoid":
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


def token_choices(preference: jax.Array, distribution: jax.Array, spec: TokenChoice) -> jax.Array:
    """The experts that each token chooses, best first: int32 `[B, L, K]`, E for none.

    Top-k (Shazeer et al. 2017) takes K; top-p (Huang et al. 2024) as few of the best as reach
    `threshold` together, but at most K; unless `exceed`, only those that stay within it, and the
    best one always (BALM). Ties go to the lower number.
    """
    _, chosen = lax.top_k(lax.stop_gradient(preference), spec.k)
    if not isinstance(spec, TopP):
        return chosen
    share = _gates_of(distribution, chosen)
    before = jnp.cumsum(share, axis=-1) - share
    kept = before < spec.threshold
    if not spec.exceed:
        kept = (before + share <= spec.threshold).at[..., 0].set(True)
    return jnp.where(kept, chosen, spec.experts)


def admit(
    asking: jax.Array,
    score: jax.Array,
    routed: jax.Array,
    antibody: jax.Array | None,
    spec: Queued,
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


def places(tokens: jax.Array, most: int, spec: Queued) -> jax.Array:
    """`spec.places` of an array of token counts, each at most `most`; int32."""
    table = np.array([spec.places(n) for n in range(most + 1)], np.int32)
    return jnp.asarray(table)[tokens]


def place_in_queue(queue: jax.Array, score: jax.Array) -> jax.Array:
    """Rank within each queue by descending score; ties keep token order.

    Args:
      queue: int32 `[B, N]`.
      score: float `[B, N]`.

    Returns:
      int32 `[B, N]`.
    """
    n = queue.shape[-1]
    index = lax.broadcasted_iota(jnp.int32, queue.shape, 1)
    # ties are broken by the index: the third operand is a key, too
    queue, _, order = lax.sort((queue, -lax.stop_gradient(score), index), num_keys=3)
    starts = jnp.where(queue != jnp.roll(queue, 1, axis=-1), index, 0)
    place = index - lax.cummax(starts, axis=1)
    rows = lax.broadcasted_iota(jnp.int32, queue.shape, 0)
    return jnp.zeros((queue.shape[0], n), jnp.int32).at[rows, order].set(place)


def tokens_of_antibody(antibody: jax.Array) -> jax.Array:
    """How many tokens belong to the antibody of each token.

    Args:
      antibody: integers `[B, L]`, 0 at padding.

    Returns:
      int32 `[B, L]`; at padding, the number of pads.
    """
    same = antibody[:, :, None] == antibody[:, None, :]
    return same.sum(-1, dtype=jnp.int32)


@plan.register
def _(spec: Soft, logits, tokens, balance=None, training=False):
    """Every slot reads all tokens of an antibody, every token all slots; the rest is left out."""
    valid = tokens.valid
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
