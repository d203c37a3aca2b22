"""The experts: their weights, and their FFNs on equal numbers of rows or on groups of any sizes.

Groups of unequal size go through `grouped_matmul`, which has several implementations
(`IMPLEMENTATIONS`) and a default for each backend. Rows are sorted by expert, and the rows of every
expert are padded to whole blocks, so that no array of size tokens x experts x width is built.
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
    """Experts of equal width.

    `up [E, D, F]`, `up_bias [E, F]`, `down [E, F, D]`, `down_bias [E, D]`; with a gated activation
    (SwiGLU) `up` and `up_bias` have 2 F instead of F.
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
    """The narrow experts, of width `chunk`, that make up each expert.

    Args:
      widths: of the E experts, multiples of `chunk`.
      chunk: width of a narrow expert.

    Returns:
      int32 `[E + 1, widest / chunk]`, numbers of narrow experts, padded with N, how many there are.
      The last row stands for "no expert" and is all N.
    """
    counts = [width // chunk for width in widths]
    ends = np.cumsum(counts)
    table = np.full((len(widths) + 1, max(counts)), ends[-1], np.int32)
    for e, count in enumerate(counts):
        table[e, :count] = np.arange(ends[e] - count, ends[e])
    return table


def split_wide(plan: Plan, table: np.ndarray) -> Plan:
    """Replaces experts of unequal width in a plan by the narrow experts that make them up.

    An FFN is a sum over its hidden units, so a wide expert is the sum of narrow ones with the same
    gate and the same tokens. `table` is that of `narrow_experts`.
    """
    experts = jnp.asarray(table)[plan.experts]
    gates = jnp.where(experts < table.max(), plan.gates[..., None], 0.0)
    shape = (*experts.shape[:2], -1)
    return Plan(experts.reshape(shape), gates.reshape(shape), None)


# groups of rows

BLOCK = {"cpu": (128, 256), "gpu": (128, 1024), "tpu": (128, 512)}  # rows: smallest, largest
# blocks of the mean expert: with more of them less padding is wasted (half a block an expert), but
# a GPU copies the expert's weights for every block
SHARE = {"cpu": 2, "gpu": 8, "tpu": 8}


def block_size(assignments: int, experts: int, backend: str) -> int:
    """Rows of a block, a power of 2, for a number of assignments."""
    smallest, largest = BLOCK[backend]
    fitting = assignments // (SHARE[backend] * experts)
    return min(max(1 << fitting.bit_length() - 1 if fitting else 0, smallest), largest)


class Groups(NamedTuple):
    """Which rows belong to which expert, in whole blocks.

    Attributes:
      sizes: int32 `[E]`, rows of each expert, padding included.
      expert: int32 `[blocks]`, the expert of each block; the last expert for unused blocks.
      used: int32, number of blocks that hold at least one assignment.
    """

    sizes: jax.Array
    expert: jax.Array
    used: jax.Array


class Sorted(NamedTuple):
    """Where every assignment is among the rows sorted by expert.

    Attributes:
      slot: int32 `[T, K]`, row of each assignment; `rows` where it is not routed.
      assignment: int32 `[rows]`, assignment `t * K + k` of each row; `T * K` where it is empty.
      groups: the groups of the rows.
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
      activation: a key of `layers.ACTIVATE`.
      execution: backend, dtypes and implementation.
      kept: whether products have the names by which the remat policy "matmuls" keeps them
        (`layers.KEPT`); without effect in the kernel for CPU.

    Returns:
      `[rows, D]` in the dtype of `x`; rows of unused blocks are undefined.
    """
    activate = partial(ACTIVATE[activation], backend=execution.backend)
    if execution.backend == "cpu" and execution.grouped is None:
        return cpu.grouped_ffn(x, weights, groups, block, activate, execution.operands)
    product = partial(grouped_matmul, groups=groups, block=block, execution=execution)
    membership = _membership(groups)
    hidden = _add_bias(product(x, weights.up), weights.up_bias, membership)
    hidden = checkpoint_name(hidden, "up") if kept else hidden
    out = _add_bias(product(activate(hidden), weights.down), weights.down_bias, membership)
    return checkpoint_name(out, "down") if kept else out


def _membership(groups: Groups) -> jax.Array:
    """float32 `[E, blocks]`, 1 where a block in use belongs to the expert."""
    membership = jax.nn.one_hot(groups.expert, groups.sizes.shape[0], axis=0)
    return jnp.where(jnp.arange(groups.expert.shape[0]) < groups.used, membership, 0)


def _add_bias(x: jax.Array, bias: jax.Array, membership: jax.Array) -> jax.Array:
    """Adds `bias [E, M]` to rows `[rows, M]` of whole blocks.

    The bias is added to rounded products. XLA does not fuse a bias that depends on the block into a
    product on GPUs, and would write the products to memory in float32.
    """
    of_block = jnp.tensordot(membership.T, bias, 1, precision=lax.Precision.HIGHEST)
    blocks = x.reshape(membership.shape[1], -1, x.shape[-1]) + of_block[:, None]
    return blocks.astype(x.dtype).reshape(x.shape)


def grouped_matmul(
    rows: jax.Array, weights: jax.Array, groups: Groups, block: int, execution: Execution
) -> jax.Array:
    """`rows @ weights[e]`, where e is the expert of each row.

    Args:
      rows: `[rows, N]`, sorted by expert, in whole blocks.
      weights: `[E, N, M]`.
      groups: of the rows.
      block: rows of a block.
      execution: implementation, and dtype of operands.

    Returns:
      `[rows, M]` in the dtype of `rows`. Rows of unused blocks are undefined, and the gradients
      that reach them must be 0. The gradient of weights is at least float32.
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


def _sum_blocks(membership: jax.Array, blocks: jax.Array) -> jax.Array:
    """Sums by expert, `[blocks, ...] -> [E, ...]`, as a matmul: scattered sums depend on order."""
    membership = membership.astype(blocks.dtype)
    return jnp.tensordot(membership, blocks, 1, precision=lax.Precision.HIGHEST)


class GroupedMatmul(Protocol):
    """An implementation of grouped matmuls: factors in the dtype of operands, sums `wide`."""

    @staticmethod
    def product(rows, weights, groups: Groups, block: int) -> jax.Array:
        """`[rows, N] x [E, N, M] -> [rows, M]`."""
        ...

    @staticmethod
    def weight_gradient(rows, gradient, groups: Groups, block: int) -> jax.Array:
        """`[rows, N] x [rows, M] -> [E, N, M]`."""
        ...


AT_ONCE = 1 << 26  # elements of block products that are in memory before they are summed


class Batched:
    """Batched matmuls over blocks in plain XLA, with a copy of the expert's weights for each."""

    @staticmethod
    def product(rows, weights, groups, block):
        blocks = rows.reshape(-1, block, rows.shape[-1])
        out = dot(blocks, weights[groups.expert], str(rows.dtype))
        return out.reshape(rows.shape[0], -1)

    @staticmethod
    def weight_gradient(rows, gradient, groups, block):
        columns = rows.reshape(-1, block, rows.shape[-1]).swapaxes(1, 2)
        gradient = gradient.reshape(-1, block, gradient.shape[-1])
        membership, count = _membership(groups), gradient.shape[0]
        size = max(1, AT_ONCE // (columns.shape[1] * gradient.shape[2]))
        if count <= size:
            return _sum_blocks(membership, dot(columns, gradient, str(rows.dtype)))

        def add(i, total):
            start = jnp.minimum(i * size, count - size)  # the last part overlaps the one before
            new = jnp.arange(size) + start >= i * size
            part = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
            products = dot(part(columns), part(gradient), str(rows.dtype))
            return total + _sum_blocks(jnp.where(new, part(membership, axis=1), 0), products)

        shape = membership.shape[0], columns.shape[1], gradient.shape[2]
        empty = jnp.zeros(shape, wide(rows.dtype))
        return lax.fori_loop(0, -(-count // size), add, empty)


class Ragged:
    """`lax.ragged_dot`: native on TPU; elsewhere it depends on how the jax version lowers it."""

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
