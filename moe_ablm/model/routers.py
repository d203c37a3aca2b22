"""Routers: pure functions `(spec, logits, tokens, ...) -> plan, sums`, one per router family.

A router only decides; `dispatch` moves tokens as the plan says. Decisions are made in the dtype of
the logits, which is at least float32. Tokens of different antibodies never compete, unless the
caller passes the whole batch as one row. Padding is not routed, unless one of BALM-MoE's partial
policies is set.
"""

from functools import singledispatch
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_ablm.model.families import ExpertChoice, Queued, Router, Soft, TokenChoice, TopP
from moe_ablm.model.routing import Plan, RowSums, SoftPlan, entropy_terms, token_sums

PAD_LOGIT = -1e9  # logits of padding in BALM's policy "logits"


class Tokens(NamedTuple):
    """What a router knows of the tokens.

    Attributes:
      valid: bool `[B, L]`, False at padding.
      antibody: integers `[B, L]`, number of the token's antibody within its row, 0 at padding;
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
    """The plan of a layer and its sums. Each family registers a function for its class of `spec`.

    Args:
      spec: the router's spec.
      logits: at least float32 `[B, L, E]`, of soft-MoE `[B, L, E, S]`.
      tokens: padding, and which tokens compete.
      balance: `[E]`, added to the gates for the choice only, not for the output
        (auxiliary-loss-free balancing, Wang et al. 2024); None: no bias.
      training: whether token choice obeys the capacity; in inference it is dropless.

    Raises:
      NotImplementedError: no function is registered for the family.
    """
    raise NotImplementedError(f"no plan function is registered for {type(spec).__name__}")


@plan.register
def _(spec: TokenChoice, logits, tokens, balance=None, training=False):
    pads = _pads(spec, logits, tokens)
    scores = affinity(pads.logits, spec.gate)
    preference = scores.gates if balance is None else scores.gates + balance
    chosen = token_choices(preference, scores.distribution, spec)
    asking = jnp.where(pads.routed[..., None], chosen, spec.experts)
    gates = _gates_of(scores.gates, asking)
    experts, place = _admitted(asking, gates, pads, tokens, spec, training)
    if spec.renormalised:
        total = gates.sum(-1, keepdims=True)
        gates = gates / jnp.where(total > 0, total, 1.0)
    decided = _plan(experts, gates, place, spec.experts)
    asked = Plan(asking, gates, None).assigned(spec.experts)
    load = decided.assigned(spec.experts)
    sums = token_sums(pads.logits, scores.distribution, asked, load, pads.counted, tokens.valid)
    return decided, sums


@plan.register
def _(spec: ExpertChoice, logits, tokens, balance=None, training=False):
    pads = _pads(spec, logits, tokens)
    scores = affinity(pads.logits, "softmax" if spec.gate == "tokens" else spec.gate)
    gates = scores.gates
    if spec.gate == "tokens":
        gates = shares_of_tokens(pads.logits, pads.routed, tokens.antibody)
    everyone = jnp.broadcast_to(jnp.arange(spec.experts), logits.shape)
    asking = jnp.where(pads.routed[..., None], everyone, spec.experts)
    routed_gates = jnp.where(pads.routed[..., None], gates, 0.0)
    experts, place = _admitted(asking, routed_gates, pads, tokens, spec, training)
    decided = _plan(experts, routed_gates, place, spec.experts)
    load = decided.assigned(spec.experts)
    sums = token_sums(pads.logits, scores.distribution, load, load, pads.counted, tokens.valid)
    without_expert = jnp.where(pads.counted & (load.sum(-1) == 0), 1.0, 0.0).sum(1)
    sums = sums._replace(lost=without_expert, asked=sums.tokens)
    return decided, sums._replace(**decisions_of_experts(gates, pads.counted))


def _plan(experts, gates, place, count) -> Plan:
    return Plan(experts.astype(jnp.int32), jnp.where(experts < count, gates, 0.0), place)


class Pads(NamedTuple):
    """The effect of a pad policy.

    Attributes:
      logits: `[B, L, E]`.
      routed: bool `[B, L]`, tokens that are routed.
      counted: bool `[B, L]`, tokens in the router losses and statistics.
      last: whether padding is last in the queues.
    """

    logits: jax.Array
    routed: jax.Array
    counted: jax.Array
    last: bool


def _pads(spec: Router, logits: jax.Array, tokens: Tokens) -> Pads:
    policies = spec.policies()
    partial = "excluded" not in policies
    routed = jnp.ones_like(tokens.valid) if partial else tokens.valid
    counted = tokens.valid if "aux" in policies or not partial else routed
    if "logits" in policies:
        logits = jnp.where(tokens.valid[..., None], logits, PAD_LOGIT)
    return Pads(logits, routed, counted, "probabilities" in policies)


def _gates_of(gates: jax.Array, chosen: jax.Array) -> jax.Array:
    """Gates `[B, L, K]` of chosen experts, 0 for E: a gather whose gradient is not a scatter."""
    one_hot = jax.nn.one_hot(chosen, gates.shape[-1], dtype=gates.dtype)
    return (gates[..., None, :] * one_hot).sum(-1)


def _admitted(asking, score, pads: Pads, tokens: Tokens, spec: Router, training: bool):
    """Experts and places after admission; `asking` and None where there are no queues."""
    if not (isinstance(spec, Queued) and spec.queues(training)):
        return asking, None
    if pads.last:
        score = jnp.where(tokens.valid[..., None], score, 1e-9)
    return admit(asking, score, pads.routed, tokens.antibody, spec)


class Affinity(NamedTuple):
    """Router scores per (token, expert), `[B, L, E]`.

    `gates` weight the experts' outputs; `distribution` sums to 1 over experts.
    """

    gates: jax.Array
    distribution: jax.Array


def affinity(logits: jax.Array, gate: str) -> Affinity:
    """Softmax, or sigmoids (DeepSeek-V3, eq. 15) whose normalised values are the distribution."""
    if gate != "sigmoid":
        probabilities = jax.nn.softmax(logits, axis=-1)
        return Affinity(probabilities, probabilities)
    gates = jax.nn.sigmoid(logits)
    return Affinity(gates, gates / jnp.maximum(gates.sum(-1, keepdims=True), 1e-20))


def shares_of_tokens(logits: jax.Array, routed: jax.Array, antibody: jax.Array | None) -> jax.Array:
    """Softmax over the tokens that compete, as in BALM's expert choice: `[B, L, E]`.

    Args:
      logits: at least float32 `[B, L, E]`.
      routed: bool `[B, L]`; other tokens have share 0.
      antibody: integers `[B, L]`, tokens of one number compete; None: all tokens of a row compete.
    """
    b, length, _ = logits.shape
    antibody = jnp.zeros((b, length), jnp.int32) if antibody is None else antibody
    mask = routed[..., None]

    def row(logits, antibody):
        largest = jax.ops.segment_max(logits, antibody, length + 1)
        weight = jnp.exp(logits - lax.stop_gradient(largest)[antibody])
        return weight / jax.ops.segment_sum(weight, antibody, length + 1)[antibody]

    return jnp.where(mask, jax.vmap(row)(jnp.where(mask, logits, -1e30), antibody), 0.0)


def token_choices(preference: jax.Array, distribution: jax.Array, spec: TokenChoice) -> jax.Array:
    """The experts that each token chooses, best first: int32 `[B, L, K]`, E for none.

    K experts, or for top-p as many as `families.TopP` says. Ties go to the lower number.

    Args:
      preference: `[B, L, E]`, gates with the bias of balancing; experts are ranked by it.
      distribution: `[B, L, E]`, probabilities that top-p adds up.
      spec: the router's spec.
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
    """Admits the tokens of highest score to every expert, up to its places for each antibody.

    Args:
      asking: integers `[B, L, K]`, the experts that each token asks for, E for none.
      score: float `[B, L, K]`.
      routed: bool `[B, L]`, tokens that may ask; where a row is one antibody, the number of places
        depends on how many there are.
      antibody: integers `[B, L]`, 0 at padding; None: a row is one antibody.
      spec: the router's spec.

    Returns:
      Experts `[B, L, K]`, E for those that did not admit the token, and places in the queues,
      int32 `[B, L, K]`.
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
    """Fields `spread` and `decisions` of `RowSums` for expert choice.

    `spread` sums over experts the entropy of the expert's gates over tokens as a share of its
    maximum: 1 where the expert weighs all tokens alike.
    """
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
    # the third operand is a key as well, so ties are broken by the index
    queue, _, order = lax.sort((queue, -lax.stop_gradient(score), index), num_keys=3)
    starts = jnp.where(queue != jnp.roll(queue, 1, axis=-1), index, 0)
    place = index - lax.cummax(starts, axis=1)
    rows = lax.broadcasted_iota(jnp.int32, queue.shape, 0)
    return jnp.zeros((queue.shape[0], n), jnp.int32).at[rows, order].set(place)


def tokens_of_antibody(antibody: jax.Array) -> jax.Array:
    """Number of tokens of each token's antibody.

    Args:
      antibody: integers `[B, L]`, 0 at padding.

    Returns:
      int32 `[B, L]`; at padding, the number of pads.
    """
    same = antibody[:, :, None] == antibody[:, None, :]
    return same.sum(-1, dtype=jnp.int32)


@plan.register
def _(spec: Soft, logits, tokens, balance=None, training=False):
    """Every slot reads all valid tokens of the row, and every token reads all slots."""
    valid = tokens.valid
    b, length, e, s = logits.shape
    mask = valid[:, :, None, None]
    # a row without valid tokens must give zeros, not NaN
    masked = jnp.where(mask, logits, -1e30)
    dispatch = jnp.where(mask, jax.nn.softmax(masked, axis=1), 0.0)
    combine = jax.nn.softmax(logits.reshape(b, length, e * s), axis=-1).reshape(logits.shape)
    combine = jnp.where(mask, combine, 0.0)
    share = combine.sum(-1)
    sums = token_sums(logits.reshape(b, length, e * s), share, share, share, valid, valid)
    tokens = valid.sum(-1)
    scale = jnp.log(jnp.maximum(tokens, 2))[:, None, None]
    spread = (entropy_terms(lax.stop_gradient(dispatch)).sum(1) / scale).sum((1, 2))
    decisions = jnp.where(tokens > 0, float(e * s), 0.0)
    nothing = jnp.zeros_like(sums.lost)
    sums = sums._replace(spread=spread, decisions=decisions, lost=nothing, asked=nothing)
    return SoftPlan(dispatch, combine), sums
