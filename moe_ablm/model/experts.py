"""The experts' weights, and all experts at work: on equally many rows each, or on groups of rows.

Groups of unequal size go through one seam, `grouped_matmul`, with an implementation per backend
(`IMPLEMENTATIONS`). Rows are sorted by expert and every expert's rows are padded to whole blocks,
so that nothing of size tokens x experts is built.
"""

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_ablm.model import cpu
from moe_ablm.model.layers import ACTIVATE
from moe_ablm.model.linear import affine, dot, wide
from moe_ablm.model.routing import Plan
from moe_ablm.model.spec import Execution


class ExpertWeights(NamedTuple):
    """All experts: `up [E, D, H]`, `up_bias [E, H]`, `down [E, F, D]`, `down_bias [E, D]`.

    H is F, or 2 F where the activation is gated.
    """

    up: jax.Array
    up_bias: jax.Array
    down: jax.Array
    down_bias: jax.Array


def expert_ffn(
    x: jax.Array, weights: ExpertWeights, activation: str, execution: Execution
) -> jax.Array:
    """`down_e(activate(up_e(x_e)))`: `[E, T, D] -> [E, T, D]`, in the dtype of `x`."""
    hidden = checkpoint_name(affine(x, weights.up, weights.up_bias, execution), "up")
    hidden = ACTIVATE[activation](hidden, execution.backend)
    return checkpoint_name(affine(hidden, weights.down, weights.down_bias, execution), "down")


# experts of unequal width


def narrow_experts(widths: tuple[int, ...], chunk: int) -> np.ndarray:
    """Which experts of width `chunk` make up each of the wide ones.

    Returns:
      int32 `[E + 1, widest / chunk]`, filled up with their number N; the last row, for no expert,
      is all N.
    """
    counts = [width // chunk for width in widths]
    ends = np.cumsum(counts)
    table = np.full((len(widths) + 1, max(counts)), ends[-1], np.int32)
    for e, count in enumerate(counts):
        table[e, :count] = np.arange(ends[e] - count, ends[e])
    return table


def split_wide(plan: Plan, table: np.ndarray) -> Plan:
    """Replaces experts of unequal width by the equal ones that they consist of.

    An FFN is the sum over its hidden units, so a wide expert is the sum of narrow ones with the
    same gate, each computing for the same tokens.
    """
    experts = jnp.asarray(table)[plan.experts]
    gates = jnp.where(experts < table.max(), plan.gates[..., None], 0.0)
    shape = (*experts.shape[:2], -1)
    return Plan(experts.reshape(shape), gates.reshape(shape), None)


# groups of rows

BLOCK = {"cpu": (128, 256), "gpu": (128, 1024), "tpu": (128, 512)}  # rows: smallest, largest
# blocks of an expert from which larger ones are taken: half a block is wasted, and a GPU copies the
# expert's weights for every block
SHARE = {"cpu": 2, "gpu": 8, "tpu": 8}


def block_size(assignments: int, experts: int, backend: str) -> int:
    """Rows of a block for so many assignments: a power of 2."""
    smallest, largest = BLOCK[backend]
    fitting = assignments // (SHARE[backend] * experts)
    return min(max(1 << fitting.bit_length() - 1 if fitting else 0, smallest), largest)


class Groups(NamedTuple):
    """Which rows belong to which expert, in whole blocks.

    Attributes:
      sizes: int32 `[E]`, rows of each expert, with its padding.
      expert: int32 `[blocks]`, the expert of each block; of unused ones the last.
      used: int32, number of blocks that hold at least one row.
    """

    sizes: jax.Array
    expert: jax.Array
    used: jax.Array


class Sorted(NamedTuple):
    """Where every assignment sits among the rows that are sorted by expert.

    Attributes:
      slot: int32 `[T, K]`, row of each assignment; `rows` where it is not routed.
      assignment: int32 `[rows]`, assignment `t * K + k` of each row; `T * K` where it is empty.
      groups: of the rows.
    """

    slot: jax.Array
    assignment: jax.Array
    groups: Groups


def sort_by_expert(chosen: jax.Array, experts: int, block: int) -> Sorted:
    """Sorts assignments by expert and pads each expert's rows to whole blocks.

    Args:
      chosen: int32 `[T, K]`, E where an assignment is not routed.
      experts: E.
      block: rows of a block.
    """
    t, k = chosen.shape
    blocks = -(-t * k // block) + experts
    rows = blocks * block
    one_hot = jax.nn.one_hot(chosen.reshape(-1), experts, dtype=jnp.int32)
    position = ((jnp.cumsum(one_hot, axis=0) - 1) * one_hot).sum(-1).reshape(t, k)
    blocks_of = -(-one_hot.sum(0) // block)
    ends = jnp.cumsum(blocks_of)
    starts = jnp.append(ends - blocks_of, blocks)
    slot = jnp.where(chosen < experts, starts[chosen] * block + position, rows)
    assignment = jnp.full(rows, t * k, jnp.int32)
    assignment = assignment.at[slot.reshape(-1)].set(
        jnp.arange(t * k, dtype=jnp.int32), mode="drop", unique_indices=False
    )
    expert = (jnp.arange(blocks)[:, None] >= ends).sum(-1, dtype=jnp.int32)
    groups = Groups(blocks_of * block, jnp.minimum(expert, experts - 1), ends[-1])
    return checkpoint_name(Sorted(slot, assignment, groups), "plan")


def grouped_ffn(
    x: jax.Array,
    weights: ExpertWeights,
    groups: Groups,
    block: int,
    activation: str,
    execution: Execution,
    kept: bool = True,
) -> jax.Array:
    """`down_e(activate(up_e(x)))` for rows sorted by expert.

    Args:
      x: `[rows, D]`, in whole blocks of equal size.
      weights: of all experts.
      groups: of the rows.
      block: rows of a block.
      activation: of `layers.ACTIVATE`.
      execution: backend, dtypes and implementation.
      kept: whether products are kept for the backward pass where matmuls are (`layers.KEPT`).

    Returns:
      `[rows, D]` in the dtype of `x`; rows of unused blocks hold no meaning.
    """
    activate = partial(ACTIVATE[activation], backend=execution.backend)
    if execution.backend == "cpu" and execution.grouped is None:
        return cpu.grouped_ffn(x, weights, groups, block, activate, execution.operands)
    product = partial(grouped_matmul, groups=groups, block=block, execution=execution)
    mine = _membership(groups)
    hidden = _add_bias(product(x, weights.up), weights.up_bias, mine)
    hidden = checkpoint_name(hidden, "up") if kept else hidden
    out = _add_bias(product(activate(hidden), weights.down), weights.down_bias, mine)
    return checkpoint_name(out, "down") if kept else out


def _membership(groups: Groups) -> jax.Array:
    """float32 `[E, blocks]`, 1 where a block in use belongs to the expert."""
    mine = jax.nn.one_hot(groups.expert, groups.sizes.shape[0], axis=0)
    return jnp.where(jnp.arange(groups.expert.shape[0]) < groups.used, mine, 0)


def _add_bias(x: jax.Array, bias: jax.Array, mine: jax.Array) -> jax.Array:
    """Adds `bias [E, M]` to rows `[rows, M]` of whole blocks; `mine` is that of `_membership`.

    After products are rounded: XLA fuses no bias that depends on the block into a product on GPUs,
    and would write sums in float32.
    """
    of_block = jnp.tensordot(mine.T, bias, 1, precision=lax.Precision.HIGHEST)
    blocks = x.reshape(mine.shape[1], -1, x.shape[-1]) + of_block[:, None]
    return blocks.astype(x.dtype).reshape(x.shape)


def grouped_matmul(
    rows: jax.Array, weights: jax.Array, groups: Groups, block: int, execution: Execution
) -> jax.Array:
    """`rows @ weights[e]` of the expert e that each row belongs to.

    Args:
      rows: `[rows, N]`, sorted by expert, in whole blocks.
      weights: `[E, N, M]`.
      groups: of the rows.
      block: rows of a block.
      execution: which implementation; dtype of operands.

    Returns:
      `[rows, M]` in the dtype of `rows`; the gradient of weights is summed `wide`. Rows of unused
      blocks hold no meaning, and their gradients must be 0.
    """
    name = execution.grouped or DEFAULT[execution.backend]
    return _grouped_matmul(rows, weights, groups, block, name, execution.operands)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped_matmul(rows, weights, groups, block, name, operands):
    factors = rows.astype(operands), weights.astype(operands)
    return IMPLEMENTATIONS[name].product(*factors, groups, block).astype(rows.dtype)


def _grouped_matmul_forward(rows, weights, groups, block, name, operands):
    out = _grouped_matmul(rows, weights, groups, block, name, operands)
    return out, (rows.astype(operands), weights, groups, jnp.zeros((), rows.dtype))


def _grouped_matmul_backward(block, name, operands, residuals, gradient):
    rows, weights, groups, like = residuals
    how, factor = IMPLEMENTATIONS[name], gradient.astype(operands)
    transposed = jnp.swapaxes(weights.astype(operands), 1, 2)
    dx = how.product(factor, transposed, groups, block).astype(like.dtype)
    return dx, how.weight_gradient(rows, factor, groups, block), None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def _sum_blocks(mine: jax.Array, blocks: jax.Array) -> jax.Array:
    """`[blocks, ...] -> [E, ...]`: a product; scattered sums of floats depend on their order."""
    mine = mine.astype(blocks.dtype)
    return jnp.tensordot(mine, blocks, 1, precision=lax.Precision.HIGHEST)


class GroupedMatmul(Protocol):
    """An implementation of grouped products: `operands`-typed factors, sums that are `wide`."""

    @staticmethod
    def product(rows, weights, groups: Groups, block: int) -> jax.Array:
        """`[rows, N] x [E, N, M] -> [rows, M]`."""
        ...

    @staticmethod
    def weight_gradient(rows, gradient, groups: Groups, block: int) -> jax.Array:
        """`[rows, N] x [rows, M] -> [E, N, M]`."""
        ...


AT_ONCE = 1 << 26  # elements of the products of blocks that are held before they are summed


class Batched:
    """Batched products over blocks, each with a copy of its expert's weights: plain XLA."""

    @staticmethod
    def product(rows, weights, groups, block):
        blocks = rows.reshape(-1, block, rows.shape[-1])
        out = dot(blocks, weights[groups.expert], str(rows.dtype))
        return out.reshape(rows.shape[0], -1)

    @staticmethod
    def weight_gradient(rows, gradient, groups, block):
        columns = rows.reshape(-1, block, rows.shape[-1]).swapaxes(1, 2)
        gradient = gradient.reshape(-1, block, gradient.shape[-1])
        mine, count = _membership(groups), gradient.shape[0]
        most = max(1, AT_ONCE // (columns.shape[1] * gradient.shape[2]))
        if count <= most:
            return _sum_blocks(mine, dot(columns, gradient, str(rows.dtype)))

        def add(i, total):
            start = jnp.minimum(i * most, count - most)  # the last part may begin in that before
            new = jnp.arange(most) + start >= i * most
            part = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=most)
            products = dot(part(columns), part(gradient), str(rows.dtype))
            return total + _sum_blocks(jnp.where(new, part(mine, axis=1), 0), products)

        shape = mine.shape[0], columns.shape[1], gradient.shape[2]
        empty = jnp.zeros(shape, wide(rows.dtype))
        return lax.fori_loop(0, -(-count // most), add, empty)


class Ragged:
    """`lax.ragged_dot`: native on TPU; elsewhere as the jax version lowers it."""

    @staticmethod
    def product(rows, weights, groups, block):
        return lax.ragged_dot(rows, weights, groups.sizes, **Ragged._types(rows))

    @staticmethod
    def weight_gradient(rows, gradient, groups, block):
        contract = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        types = Ragged._types(rows)
        return lax.ragged_dot_general(rows, gradient, groups.sizes, contract, **types)

    @staticmethod
    def _types(rows):
        precision = None if rows.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
        return {"precision": precision, "preferred_element_type": wide(rows.dtype)}


IMPLEMENTATIONS: dict[str, type[GroupedMatmul]] = {"batched": Batched, "ragged": Ragged}
DEFAULT = {"cpu": "batched", "gpu": "batched", "tpu": "ragged"}
