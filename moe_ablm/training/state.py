"""The training state: what a checkpoint holds and a step turns over."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import axes_sharding, replicated


class TrainState(NamedTuple):
    """Step (int32, number of updates done), parameters, optimizer state and, if on, their EMA."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None


def make_definition(spec: EncoderSpec, execution: Execution) -> nnx.GraphDef:
    """The static half of an encoder; `nnx.merge(definition, params)` gives the module back."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(spec, execution, nnx.Rngs(0))))[0]


def init_state(
    spec: EncoderSpec, optimizer: optax.GradientTransformation, seed: int, ema: bool, mesh: Mesh
) -> TrainState:
    """A fresh state, made where it lives: no device ever holds more than its shards.

    The parameters depend on the seed alone, not on the mesh.
    """
    make = _maker(spec, optimizer, seed, ema)
    return jax.jit(make, out_shardings=state_sharding(jax.eval_shape(make), optimizer, mesh))()


def started_from(state: TrainState, params: nnx.State) -> TrainState:
    """A fresh state with given parameters, placed like its own; every process has them all."""

    def placed(like: nnx.State) -> nnx.State:
        return jax.tree.map(lambda x, y: jax.device_put(np.asarray(x), y.sharding), params, like)

    ema = None if state.ema is None else placed(state.ema)
    return state._replace(params=placed(state.params), ema=ema)


def abstract_state(
    spec: EncoderSpec, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, nothing allocated: the target of a restore."""
    shapes = jax.eval_shape(_maker(spec, optimizer, 0, ema))
    sharding = state_sharding(shapes, optimizer, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding
    )


def _maker(spec, optimizer, seed, ema):
    def make() -> TrainState:
        # parameters do not depend on how the encoder is executed
        params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(params=seed)))[1]
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    return make


def params_sharding(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Sharding of every parameter, from the axis letters that it carries."""
    return jax.tree.map(
        lambda p: p.replace(axes_sharding(mesh, p.axes, p.get_value().shape)),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def state_sharding(
    shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shardings of a whole state: moments lie where their parameters lie."""
    params = params_sharding(shapes.params, mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: replicated(mesh),
    )
    ema = None if shapes.ema is None else params
    return TrainState(replicated(mesh), params, moments, ema)


def count_params(params: nnx.State) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def params_sha256(params: nnx.State) -> str:
    """SHA-256 of all parameters: little-endian float32 bytes, ordered by path."""
    flat = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(params)}
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.asarray(flat[name].get_value(), dtype="<f4").tobytes())
    return digest.hexdigest()
