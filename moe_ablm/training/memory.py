"""Memory of a training step, from shapes alone: nothing is allocated or compiled.

The state is exact. What the forward pass keeps for the backward pass is what `jax.vjp` keeps, in
the types of the execution; XLA may fuse some of it away, and needs some for itself.
"""

from dataclasses import replace
from functools import cache
from math import prod
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.flops import params_total
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import MESH_AXES
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OptimizerSpec
from moe_ablm.training.state import TrainState, abstract_state, make_definition
from moe_ablm.training.step import auxiliary_loss, forward, region_sums

SPARE = 1.1  # XLA's own temporaries and fragmentation, not visible in shapes
# of what a layer would keep without remat, alive at a time while its backward pass recomputes it:
# kernels that fuse hold no arrays between their operations (python -m launch.compare)
WORK = 0.5
_ROWS = 16  # that are counted at a time: experts' rows come in whole blocks
# any AdamW has the same two moments
_ADAM = OptimizerSpec(2, 1e-3, 1, "linear", 0.1, 0.9, 0.98, 1e-6, 0.01, 1.0)
_KINDS = {
    "tokens": "int32", "targets": "int32", "segment": "int32", "region": "int32",
    "loss_mask": "bool",
}  # fmt: skip


def abstract_mesh(data: int, expert: int, fsdp: int) -> AbstractMesh:
    """A mesh of devices that need not be there."""
    return AbstractMesh((data, expert, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@cache
def state_bytes(spec: EncoderSpec, mesh: AbstractMesh, ema: bool = False) -> tuple[int, int]:
    """Bytes a device of the parameters, and of the whole state that a checkpoint holds."""
    state: TrainState = abstract_state(spec, make_optimizer(_ADAM), ema, mesh)
    return _bytes(state.params), _bytes(state)


def _bytes(tree) -> int:
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


class Needed(NamedTuple):
    """What a device holds, in bytes.

    Attributes:
      state: parameters, moments (and average).
      summed: gradients of the micro-batches before, if there are several.
      gradients: as large as the parameters.
      activations: kept for the backward pass, with those of what is being worked on.
      gathered: weights of other devices for the layer that is being worked on.
    """

    state: int
    summed: int
    gradients: int
    activations: int
    gathered: int

    @property
    def total(self) -> float:
        """Bytes at the peak of a step, with `SPARE` for what shapes do not show.

        The backward pass begins with all activations and ends with all gradients.
        """
        held = self.state + self.summed + self.gathered
        return SPARE * (held + max(self.gradients, self.activations))


def needed(
    spec: EncoderSpec,
    execution: Execution,
    mesh: AbstractMesh,
    rows: tuple[int, int],
    ema: bool = False,
    accumulate: int = 1,
) -> Needed:
    """Memory of a training step.

    Args:
      spec: of the encoder.
      execution: dtypes and remat policy.
      mesh: the devices.
      rows: of a micro-batch on one device, and their length.
      ema: whether there is an average of the parameters.
      accumulate: micro-batches of a step.
    """
    count, length = rows
    params, state = state_bytes(spec, mesh, ema)
    kept = activation_bytes(spec, execution, length)
    whole = activation_bytes(spec, replace(execution, remat="none"), length)
    activations = kept.layers + max(kept.rest, round(WORK * whole.largest))
    gathered = 0
    if mesh.shape["fsdp"] > 1:  # and the next layer's, meanwhile
        near = abstract_mesh(1, mesh.shape["expert"], 1)
        gathered = 2 * state_bytes(spec, near)[0] // spec.layers
    summed = params if accumulate > 1 else 0
    return Needed(state, summed, params, count * activations, gathered)


def fitting_remat(
    spec: EncoderSpec,
    execution: Execution,
    mesh: AbstractMesh,
    rows: tuple[int, int],
    memory: float,
) -> Execution:
    """`execution` with "full" remat where what it has does not fit `memory` bytes a device."""
    if needed(spec, execution, mesh, rows).total <= memory:
        return execution
    return replace(execution, remat="full")


def least(spec: EncoderSpec, devices: int, rows: int, length: int) -> float:
    """Bytes that a device needs at least, whatever is recomputed; arithmetic alone, so that it can
    be asked of sizes that could not even be traced.

    Parameters, gradients and both moments in float32, spread over all devices; of every layer its
    input, in bfloat16.

    Args:
      spec: of the encoder.
      devices: that the state may be spread over.
      rows: of a micro-batch on one device.
      length: tokens of a row.
    """
    state = 4 * 4 * params_total(spec) / devices
    return max(state, 2.0 * rows * length * spec.d_model * spec.layers)


class Activations(NamedTuple):
    """Bytes that one row keeps for the backward pass: of embedding and head, of all layers, and of
    the largest layer."""

    rest: int
    layers: int
    largest: int


def activation_bytes(spec: EncoderSpec, execution: Execution, length: int) -> Activations:
    """What one row keeps for the backward pass.

    Layers of one kind store the same, so two of each suffice.

    Args:
      spec: of the encoder; its router losses count.
      execution: types, and whether layers are recomputed.
      length: tokens of the row.
    """
    if execution.backend == "gpu":
        # cuDNN's attention keeps what that of XLA keeps, but can be traced on GPUs alone
        execution = replace(execution, backend="tpu")
    dense = replace(spec, moe=None)
    one = _slope(replace(dense, layers=1), execution, length)
    layer = _slope(replace(dense, layers=2), execution, length) - one
    sparse = 0
    if spec.moe:
        moe = replace(spec.moe, placement="1", first_dense=0)
        sparse = _slope(replace(spec, layers=2, moe=moe), execution, length) - one
    count = len(spec.moe_layers)
    layers = layer * (spec.layers - count) + sparse * count
    return Activations(one - layer, layers, max(layer, sparse))


def _slope(spec: EncoderSpec, execution: Execution, length: int) -> int:
    """Bytes of one row more: parameters, which are kept as well, do not grow with rows."""
    more = _kept(spec, execution, 2 * _ROWS, length) - _kept(spec, execution, _ROWS, length)
    return more // _ROWS


@cache
def _kept(spec: EncoderSpec, execution: Execution, rows: int, length: int) -> int:
    if execution.backend == "gpu":  # cuDNN may be absent here; the generic kernels keep as much
        execution = replace(execution, backend="tpu")
    definition = make_definition(spec, execution)
    params = jax.eval_shape(lambda: nnx.split(Encoder(spec, Execution(), nnx.Rngs(params=0)))[1])
    batch = {n: jax.ShapeDtypeStruct((rows, length), kind) for n, kind in _KINDS.items()}

    def backward(params, batch):
        def loss(params):
            output = forward(nnx.merge(definition, params), batch, training=True)
            total = region_sums(output.logits, batch).loss.sum()
            if spec.moe and output.routing is not None:
                total = total + auxiliary_loss(output.routing.stats, spec.moe)
            return total

        return jax.vjp(loss, params)[1]

    kept = jax.eval_shape(backward, params, batch)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
