"""Memory of a training step, from shapes alone: nothing is allocated or compiled.

The state is exact. Activations are what `jax.vjp` keeps for the backward pass, in the dtypes of the
execution. XLA may fuse some of them away, and needs memory of its own. On TPUs arrays lie in tiles.
"""

from dataclasses import replace
from functools import cache
from itertools import permutations
from math import prod
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from moe_ablm.model.encoder import make_definition, parameter_shapes
from moe_ablm.model.flops import params_total
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import MESH_AXES
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OptimizerSpec
from moe_ablm.training.state import TrainState, abstract_state
from moe_ablm.training.step import auxiliary_loss, forward, region_sums

SPARE = 1.1  # XLA's own temporaries and fragmentation, not visible in shapes
# share of what a layer would keep without remat that is alive at once while its backward pass
# recomputes it; fused kernels hold no arrays between their operations (python -m launch.compare)
WORK = 0.5
LANES, SUBLANES = 128, 8  # of a TPU's tile, to which the last two axes are padded
PROGRAM = 25_000_000  # bytes of a layer's instructions on a TPU, which lie in its large memory, too
_ROWS = 16  # rows traced at a time, since experts' rows come in whole blocks
# any AdamW has the same two moments; of what Muon moves there is one
_ADAM = OptimizerSpec(2, 1e-3, 1, "linear", 0.1, 0.9, 0.98, 1e-6, 0.01, 1.0)
_KINDS = {
    "tokens": "int32", "targets": "int32", "segment": "int32", "region": "int32",
    "loss_mask": "bool",
}  # fmt: skip


def abstract_mesh(data: int, expert: int, fsdp: int) -> AbstractMesh:
    """A mesh of devices that may be absent."""
    return AbstractMesh((data, expert, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@cache
def state_bytes(
    spec: EncoderSpec, mesh: AbstractMesh, ema: bool = False, optimizer: str = "adamw"
) -> tuple[int, int]:
    """Bytes per device of the parameters, and of the whole state that a checkpoint holds."""
    made = make_optimizer(replace(_ADAM, optimizer=optimizer))
    state: TrainState = abstract_state(spec, made, ema, mesh)
    return _bytes(state.params), _bytes(state)


def _bytes(tree) -> int:
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


class Needed(NamedTuple):
    """What a device holds, in bytes.

    Attributes:
      state: parameters, moments and, if there is one, the average of the weights.
      summed: summed gradients of earlier micro-batches, if there are several.
      gradients: as large as the parameters.
      activations: kept for the backward pass, and those of the layer being computed.
      gathered: weights of other devices for the layer being computed and the next one.
      program: the step's instructions, where they are large and lie in the same memory.
    """

    state: int
    summed: int
    gradients: int
    activations: int
    gathered: int
    program: int = 0

    @property
    def total(self) -> float:
        """Bytes at the peak of a step, times `SPARE` for what shapes do not show.

        The backward pass starts with all activations and ends with all gradients, so only the
        larger of the two counts.
        """
        held = self.state + self.summed + self.gathered
        return SPARE * (held + max(self.gradients, self.activations)) + self.program


def needed(
    spec: EncoderSpec,
    execution: Execution,
    mesh: AbstractMesh,
    rows: tuple[int, int],
    ema: bool = False,
    accumulate: int = 1,
    optimizer: str = "adamw",
) -> Needed:
    """Memory of a training step.

    Args:
      spec: the encoder.
      execution: dtypes and remat policy.
      mesh: the devices.
      rows: number of rows of a micro-batch on one device, and tokens of a row.
      ema: whether there is an average of the weights.
      accumulate: micro-batches of a step.
      optimizer: one of `spec.OPTIMIZERS`.
    """
    count, length = rows
    params, state = state_bytes(spec, mesh, ema, optimizer)
    kept = activation_bytes(spec, execution, length)
    whole = activation_bytes(spec, replace(execution, remat="none"), length)
    activations = kept.layers + max(kept.rest, round(WORK * whole.largest))
    gathered = 0
    if mesh.shape["fsdp"] > 1:  # the weights of this layer and of the next one
        near = abstract_mesh(1, mesh.shape["expert"], 1)
        gathered = 2 * state_bytes(spec, near)[0] // spec.layers
    summed = params if accumulate > 1 else 0
    program = PROGRAM * spec.layers if execution.backend == "tpu" else 0
    return Needed(state, summed, params, count * activations, gathered, program)


def fitting_remat(
    spec: EncoderSpec,
    execution: Execution,
    mesh: AbstractMesh,
    rows: tuple[int, int],
    memory: float,
    optimizer: str = "adamw",
) -> Execution:
    """`execution`, with remat "full" where its own remat does not fit `memory` bytes per device."""
    if needed(spec, execution, mesh, rows, optimizer=optimizer).total <= memory:
        return execution
    return replace(execution, remat="full")


def least(
    spec: EncoderSpec, devices: int, rows: int, length: int, optimizer: str = "adamw"
) -> float:
    """Lower bound of the bytes that a device needs, whatever is recomputed.

    It is the larger of two: parameters, gradients and moments in float32 (two of AdamW; of Muon
    one, which most weights have), sharded over all devices; and the input of every layer in
    bfloat16. It traces nothing, so it also works for sizes that could not be traced.

    Args:
      spec: the encoder.
      devices: over which the state may be sharded.
      rows: rows of a micro-batch on one device.
      length: tokens of a row.
      optimizer: one of `spec.OPTIMIZERS`.
    """
    moments = 1 if optimizer == "muon" else 2
    state = 4 * (2 + moments) * params_total(spec) / devices
    return max(state, 2.0 * rows * length * spec.d_model * spec.layers)


class Activations(NamedTuple):
    """Bytes that one row keeps for the backward pass.

    Attributes:
      rest: of embedding and head.
      layers: of all layers.
      largest: of the largest layer.
    """

    rest: int
    layers: int
    largest: int


def activation_bytes(spec: EncoderSpec, execution: Execution, length: int) -> Activations:
    """What one row keeps for the backward pass.

    Layers of one kind store the same, so two of each suffice.

    Args:
      spec: the encoder; its router losses count.
      execution: dtypes and remat policy.
      length: tokens of the row.
    """
    tiled = execution.backend == "tpu"
    if execution.backend == "gpu":
        # cuDNN's attention keeps as much as the generic one, but can be traced only on GPUs
        execution = replace(execution, backend="tpu")
    dense = replace(spec, moe=None)
    one = _slope(replace(dense, layers=1), execution, length, tiled)
    layer = _slope(replace(dense, layers=2), execution, length, tiled) - one
    sparse = 0
    if spec.moe:
        moe = replace(spec.moe, placement="1", first_dense=0)
        sparse = _slope(replace(spec, layers=2, moe=moe), execution, length, tiled) - one
    count = len(spec.moe_layers)
    layers = layer * (spec.layers - count) + sparse * count
    return Activations(one - layer, layers, max(layer, sparse))


def _slope(spec: EncoderSpec, execution: Execution, length: int, tiled: bool) -> int:
    """Bytes per additional row; parameters are kept as well, but do not grow with rows."""
    size = in_tiles if tiled else packed
    few, more = (_kept(spec, execution, n * _ROWS, length) for n in (1, 2))
    return (sum(map(size, more)) - sum(map(size, few))) // _ROWS


def packed(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array's elements."""
    return x.size * x.dtype.itemsize


def in_tiles(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on a TPU: its last two axes in whole tiles.

    The axes stay in their order where the last one fills a tile; else XLA takes the order that pads
    the least.
    """
    if x.ndim < 2:
        return packed(x)
    kept = x.shape[-1] >= LANES
    orders = [(x.ndim - 1, x.ndim - 2)] if kept else permutations(range(x.ndim), 2)
    return min(_padded(x.shape, last, before) for last, before in orders) * x.dtype.itemsize


def _padded(shape: tuple[int, ...], last: int, before: int) -> int:
    """Elements with axis `last` padded to whole tiles, and axis `before` as well."""
    whole = list(shape)
    whole[last] = -(-shape[last] // LANES) * LANES
    whole[before] = -(-shape[before] // SUBLANES) * SUBLANES
    return prod(whole)


@cache
def _kept(
    spec: EncoderSpec, execution: Execution, rows: int, length: int
) -> list[jax.ShapeDtypeStruct]:
    definition = make_definition(spec, execution)
    params = parameter_shapes(spec)
    batch = {n: jax.ShapeDtypeStruct((rows, length), kind) for n, kind in _KINDS.items()}

    def backward(params, batch):
        def loss(params):
            output = forward(nnx.merge(definition, params), batch, training=True)
            total = region_sums(output.logits, batch).loss.sum()
            if spec.moe and output.routing is not None:
                total = total + auxiliary_loss(output.routing.stats, spec.moe)
            return total

        return jax.vjp(loss, params)[1]

    return jax.tree.leaves(jax.eval_shape(backward, params, batch))
