"""The training state: what a checkpoint holds and a step updates."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.parallel.mesh import axes_sharding, replicated


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
      step: int32, number of updates done.
      params: all variables of the encoder, including those that no optimizer moves
        (`layers.Balance`); `split_trained` separates them.
      opt_state: state of the optimizer.
      ema: average of the parameters; None: off.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None


def split_trained(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The variables that the optimizer moves, and the others."""
    trained, fixed = nnx.split_state(params, nnx.Param, ...)
    return trained, fixed


def with_untrained_moments(state: TrainState) -> TrainState:
    """The state in the layout of earlier checkpoints, with moments of untrained variables."""
    fixed = split_trained(state.params)[1]
    moments = _map_states(lambda moments: nnx.merge_state(moments, fixed), state.opt_state)
    return state._replace(opt_state=moments)


def without_untrained_moments(state: TrainState) -> TrainState:
    """The inverse of `with_untrained_moments`; those moments were 0."""
    moments = _map_states(lambda moments: split_trained(moments)[0], state.opt_state)
    return state._replace(opt_state=moments)


def _map_states(function: Callable[[nnx.State], nnx.State], tree: optax.OptState):
    return jax.tree.map(
        lambda x: function(x) if isinstance(x, nnx.State) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nnx.State),
    )


def init_state(
    spec: EncoderSpec, optimizer: optax.GradientTransformation, seed: int, ema: bool, mesh: Mesh
) -> TrainState:
    """A fresh state, created sharded: no device ever holds more than its shards.

    The parameters depend on the seed but not on the mesh.
    """
    make = _maker(spec, optimizer, seed, ema)
    return jax.jit(make, out_shardings=state_sharding(jax.eval_shape(make), optimizer, mesh))()


def started_from(state: TrainState, params: nnx.State) -> TrainState:
    """A fresh state with other parameters, sharded like its own; every process has all of them."""

    def placed(like: nnx.State) -> nnx.State:
        return jax.tree.map(lambda x, y: jax.device_put(np.asarray(x), y.sharding), params, like)

    ema = None if state.ema is None else placed(state.ema)
    return state._replace(params=placed(state.params), ema=ema)


def abstract_state(
    spec: EncoderSpec, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh | AbstractMesh
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
        moments = optimizer.init(split_trained(params)[0])
        return TrainState(jnp.zeros((), jnp.int32), params, moments, average)

    return make


def params_sharding(params: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
    """Sharding of every parameter, from its axis letters."""
    return jax.tree.map(
        lambda p: p.replace(axes_sharding(mesh, p.axes, p.get_value().shape)),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def state_sharding(
    shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shardings of a whole state; moments are sharded like their parameters."""
    params = params_sharding(shapes.params, mesh)
    moments = optax.tree.map_params(
        optimizer,
        # a part of an optimizer has nothing in the place of parameters that another part moves
        lambda x, sharding: x if _is_masked(x) else sharding,
        shapes.opt_state,
        split_trained(params)[0],
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,
    )
    ema = None if shapes.ema is None else params
    step: Any = replicated(mesh)  # a TrainState of shardings instead of arrays
    return TrainState(step, params, moments, ema)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def path_name(path: tuple) -> str:
    """Name of a parameter, such as "layers/0/attention/qkv/kernel"."""
    return "/".join(map(str, path))


def params_sha256(
    params: nnx.State, about: str = "", name: Callable[[tuple], str] = path_name
) -> str:
    """SHA-256 of the name and the little-endian float32 bytes of all parameters, in name order.

    Without `about` it is `params_sha256` of `run.json`: equal for equal parameters.

    Args:
      params: of an encoder.
      about: hashed before them; `Model.digest` gives the encoder and its rows.
      name: of a path.
    """
    digest = hashlib.sha256(about.encode())
    flat = {name(path): variable for path, variable in nnx.to_flat_state(params)}
    for each in sorted(flat):
        digest.update(each.encode())
        digest.update(np.asarray(flat[each].get_value(), dtype="<f4").tobytes())
    return digest.hexdigest()
