"""Dispatch and combine: sends tokens to experts and brings the outputs back.

`moe.Layer` chooses one of three ways by the router's spec:

* `dropless`: every assignment is computed, in groups of rows sorted by expert. On a mesh the rows
  travel to the devices that own the experts if they fit in arrays of fixed shape. In a step where
  they do not fit, the experts' weights are gathered on every device instead.
* `limited`: every expert has C places for each antibody. Rows travel by one all-to-all to the
  experts and one back.
* `softly`: the rows of an expert are weighted means of tokens. They travel as in `limited`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_ablm.model.experts import (
    ExpertWeights,
    block_size,
    expert_ffn,
    grouped_ffn,
    sort_by_expert,
)
from moe_ablm.model.linear import affine, wide
from moe_ablm.model.routing import Plan, SoftPlan
from moe_ablm.model.spec import Execution
from moe_ablm.parallel.mesh import BATCH_AXES

Experts = Callable[[jax.Array], jax.Array]  # `[E, T, D] -> [E, T, D]`
SLACK = 2.0  # places for rows from one device to another, as a multiple of their mean number


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[index]`, zeros where `index` is the number of rows N. The gradient is a gather as well.

    A scattered sum would be slow on accelerators, and on GPUs its result depends on the order.

    Args:
      x: `[N, D]`.
      index: int32 of any shape, values 0 to N.
      inverse: int32 `[N, M]`, the flat positions of `index` that read each row, padded with
        `index.size`. The gradient of a row is the sum over these M positions.
    """
    return x.at[index].get(mode="fill", fill_value=0)


def _take_rows_forward(x, index, inverse):
    return take_rows(x, index, inverse), inverse


def _take_rows_backward(inverse, gradient):
    rows = gradient.reshape(-1, gradient.shape[-1])
    read = rows.at[inverse].get(mode="fill", fill_value=0)
    total = read.astype(wide(read.dtype)).sum(1)
    return total.astype(gradient.dtype), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def combine(out: jax.Array, slot: jax.Array, assignment: jax.Array, gates: jax.Array) -> jax.Array:
    """Gate-weighted sum of the expert outputs of each token: `[T, D]`, at least float32.

    Args:
      out: expert outputs `[rows, D]`.
      slot: int32 `[T, K]`, row of each assignment; `rows` where there is none.
      assignment: int32 `[rows]`, assignment `t * K + k` of each row; `T * K` for empty rows.
      gates: `[T, K]`.
    """
    return (take_rows(out, slot, assignment[:, None]) * gates[..., None]).sum(1)


def combine_scattered(out: jax.Array, assignment: jax.Array, gates: jax.Array) -> jax.Array:
    """`combine` by a scattered sum, which moves fewer bytes where most assignments are empty.

    Only for CPU, see `take_rows`.
    """
    tokens, k = gates.shape
    weights = gates.reshape(-1).at[assignment].get(mode="fill", fill_value=0)
    rows = out.astype(wide(out.dtype)) * weights[:, None]
    total = jnp.zeros((tokens, out.shape[1]), rows.dtype)
    return total.at[assignment // k].add(rows, mode="drop")


def dropless(
    x: jax.Array,
    plan: Plan,
    weights: ExpertWeights,
    activation: str,
    execution: Execution,
    axis: str | None = None,
) -> jax.Array:
    """Sends every token to all of its experts and sums their outputs by gate.

    Args:
      x: `[B, L, D]`.
      plan: experts and gates `[B, L, K]`.
      weights: the experts of this device.
      activation: a key of `layers.ACTIVATE`.
      execution: backend and dtypes.
      axis: mesh axis that shards the experts; None: this device has all of them.

    Returns:
      `[B, L, D]`; 0 for tokens that are not routed.
    """
    b, length, d = x.shape
    k = plan.experts.shape[-1]
    ffn = partial(_local, activation=activation, execution=execution)
    if axis is not None:
        ffn = partial(_over_devices, local=ffn, axis=axis)
    out = ffn(x.reshape(-1, d), plan.experts.reshape(-1, k), plan.gates.reshape(-1, k), weights)
    return out.astype(x.dtype).reshape(b, length, d)


def _local(x, chosen, gates, weights, activation, execution, kept=True):
    """Output `[T, D]` of experts that are all on this device.

    `chosen` and `gates` are `[T, K]`; `kept` is that of `experts.grouped_ffn`.
    """
    experts = weights.up.shape[0]
    block = block_size(chosen.size, experts, execution.backend)
    slot, assignment, groups = sort_by_expert(chosen, experts, block)
    rows = take_rows(x, assignment // chosen.shape[1], slot)
    out = grouped_ffn(rows, weights, groups, block, activation, execution, kept)
    return combine(out, slot, assignment, gates)


def _over_devices(x, chosen, gates, weights, local, axis):
    """`_local` with the experts sharded over `axis`.

    Assignments are sorted by the device that owns their expert and travel in arrays
    `[ways, places]`. Whether all fit is decided for the whole mesh, so that all devices take the
    same branch. No assignment is dropped.
    """
    ways, owned = lax.axis_size(axis), weights.up.shape[0]
    t, k = chosen.shape
    places = min(-(-int(SLACK * t * k) // ways), t * k)
    owner = jnp.where(chosen < ways * owned, chosen // owned, ways)
    one_hot = jax.nn.one_hot(owner.reshape(-1), ways, dtype=jnp.int32)
    rank = ((jnp.cumsum(one_hot, axis=0) - 1) * one_hot).sum(-1).reshape(t, k)
    fits = lax.pmin((one_hot.sum(0).max() <= places).astype(jnp.int32), BATCH_AXES) > 0

    def travel(x, weights):
        slot = jnp.where((owner < ways) & (rank < places), owner * places + rank, ways * places)
        assignment = jnp.full(ways * places, t * k, jnp.int32)
        order = jnp.arange(t * k, dtype=jnp.int32)
        assignment = assignment.at[slot.reshape(-1)].set(order, mode="drop")
        rows = take_rows(x, assignment // k, slot)
        expert = jnp.append(chosen.reshape(-1) % owned, owned)[assignment]
        exchange = partial(lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
        rows, expert = checkpoint_name(exchange(rows), "rows"), exchange(expert)
        ones = jnp.ones((rows.shape[0], 1), wide(x.dtype))
        out = local(rows, expert[:, None], ones, weights).astype(x.dtype)
        return combine(checkpoint_name(exchange(out), "rows"), slot, assignment, gates)

    # a conditional keeps what either branch needs for its backward pass; this branch keeps nothing
    @jax.checkpoint
    def gather(x, weights):
        whole = jax.tree.map(lambda w: lax.all_gather(w, axis, tiled=True), weights)
        return local(x, chosen, gates, whole, kept=False)

    if places == t * k:
        return travel(x, weights)
    return lax.cond(fits, travel, gather, x, weights)


def sharded_experts(
    weights: ExpertWeights, activation: str, execution: Execution, axis: str | None
) -> Experts:
    """All experts as one function of their rows `[E, T, D]`.

    Args:
      weights: the experts of this device.
      activation: a key of `layers.ACTIVATE`.
      execution: backend and dtypes.
      axis: mesh axis that shards the experts; None: this device has all of them.
    """
    compute = partial(expert_ffn, weights=weights, activation=activation, execution=execution)
    if axis is None:
        return compute

    def travel(x: jax.Array) -> jax.Array:
        there = lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True)
        out = compute(checkpoint_name(there, "rows"))
        back = lax.all_to_all(out, axis, split_axis=1, concat_axis=0, tiled=True)
        return checkpoint_name(back, "rows")

    return travel


def limited(
    x: jax.Array, plan: Plan, places: int, count: int, experts: Experts, backend: str
) -> jax.Array:
    """Gathers the admitted tokens into `[E, B * C, D]` and sums the experts' outputs by gate.

    No array of size tokens x experts x capacity is built, only indices of the E * C rows.

    Args:
      x: `[B, L, D]`.
      plan: with places in the queues; those of admitted tokens are below `places`.
      places: C.
      count: E.
      experts: `[E, B * C, D] -> [E, B * C, D]`.
      backend: one of `spec.BACKENDS`.

    Returns:
      `[B, L, D]`; 0 for tokens that no expert took.
    """
    b, length, d = x.shape
    k = plan.experts.shape[-1]
    assert plan.place is not None
    # rows are ordered by expert, row of the batch and place
    row = lax.broadcasted_iota(jnp.int32, plan.experts.shape, 0)
    slot = (plan.experts * b + row) * places + plan.place
    slot = jnp.where(plan.experts < count, slot, count * b * places).reshape(-1, k)
    # the assignment in each slot; `b * length * k` where it is empty
    assignment = jnp.full(count * b * places, b * length * k, jnp.int32)
    order = lax.iota(jnp.int32, b * length * k)
    assignment = assignment.at[slot.reshape(-1)].set(order, mode="drop")
    slot, assignment = checkpoint_name((slot, assignment), "plan")
    tokens, gates = x.reshape(-1, d), plan.gates.reshape(-1, k)
    scattered = backend == "cpu" and slot.size > assignment.size
    if scattered:
        wide_rows = tokens.astype(wide(x.dtype)).at[assignment // k].get(mode="fill", fill_value=0)
        rows = wide_rows.astype(x.dtype)
    else:
        rows = take_rows(tokens, assignment // k, slot)
    out = experts(rows.reshape(count, b * places, d)).reshape(-1, d)
    if scattered:
        total = combine_scattered(out, assignment, gates)
    else:
        total = combine(out, slot, assignment, gates)
    return total.astype(x.dtype).reshape(b, length, d)


def softly(x: jax.Array, plan: SoftPlan, experts: Experts, execution: Execution) -> jax.Array:
    """Computes slots as weighted means of tokens, and tokens as weighted means of slot outputs.

    Args:
      x: `[B, L, D]`.
      plan: weights `[B, L, E, S]`.
      experts: `[E, B * S, D] -> [E, B * S, D]`.
      execution: dtypes.

    Returns:
      `[B, L, D]`.
    """
    b, length, e, s = plan.dispatch.shape
    dispatch = plan.dispatch.reshape(b, length, e * s).swapaxes(1, 2).astype(x.dtype)
    slots = affine(dispatch, x, None, execution)
    out = experts(slots.reshape(b, e, s, -1).swapaxes(0, 1).reshape(e, b * s, -1))
    out = out.reshape(e, b, s, -1).swapaxes(0, 1).reshape(b, e * s, -1)
    return affine(plan.combine.reshape(b, length, e * s).astype(x.dtype), out, None, execution)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_antibodies(
    function: Callable[[jax.Array, Any, Any], Any], most: jax.Array, values: Any, constants: Any
) -> Any:
    """`sum_a function(a, values, constants)` over the antibodies a = 1 to `most` of packed rows.

    `most` is the largest number of antibodies in any row; it varies, so the loop has a dynamic
    length. Gradients reach `values` only.
    """
    shapes = jax.eval_shape(function, jnp.int32(1), values, constants)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(a, total):
        return jax.tree.map(jnp.add, total, function(a, values, constants))

    return lax.fori_loop(1, most + 1, body, zeros)


def _sum_forward(function, most, values, constants):
    return sum_over_antibodies(function, most, values, constants), (most, values, constants)


def _sum_backward(function, residuals, gradient):
    most, values, constants = residuals

    def body(a, total):
        _, vjp = jax.vjp(lambda v: function(a, v, constants), values)
        return jax.tree.map(jnp.add, total, vjp(gradient)[0])

    total = lax.fori_loop(1, most + 1, body, jax.tree.map(jnp.zeros_like, values))
    return None, total, None


sum_over_antibodies.defvjp(_sum_forward, _sum_backward)
