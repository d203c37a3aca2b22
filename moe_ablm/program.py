"""The program that a run compiles: its update, made from a config, and the shapes of what it takes.

The trainer runs it; `launch.compile` compiles it for devices that are not here.
"""

from typing import NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from moe_ablm.config_schema import Config
from moe_ablm.data.mixture import parse_regime
from moe_ablm.model.encoder import make_definition
from moe_ablm.model.spec import Execution
from moe_ablm.parallel.mesh import batch_sharding
from moe_ablm.training.execution import make_execution
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.state import TrainState, abstract_state
from moe_ablm.training.step import make_train_step

HARDWARE = "MOE_ABLM_HARDWARE"  # variable in which a launcher names the hardware
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables that change what is compiled
# arrays [B, L] of a training batch, as `data.assemble` makes them
_ARRAYS = {"tokens": "uint8", "targets": "uint8", "loss_mask": "bool", "segment": "uint8",
           "region": "uint8"}  # fmt: skip
_PACKED = {"antibody": "uint8", "position": "uint16"}  # where antibodies share rows


class Program(NamedTuple):
    """The update of a run.

    Attributes:
      definition: static half of the encoder.
      optimizer: of its parameters.
      step: jitted (state, batch) -> (state, metrics); the state is donated.
    """

    definition: nnx.GraphDef
    optimizer: optax.GradientTransformation
    step: jax.stages.Wrapped


def execution_on(config: Config, backend: str) -> Execution:
    """How a backend (cpu, gpu, tpu) computes: `compute.*`, with what is left open decided by it."""
    c = config.compute
    return make_execution(c.precision, c.scan, c.remat, backend)


def make_program(config: Config, execution: Execution) -> Program:
    """The update that a config describes."""
    spec, t = config.model.spec(), config.train
    definition = make_definition(spec, execution)
    optimizer = make_optimizer(t)
    step = make_train_step(definition, optimizer, spec, t.accumulate, t.ema, config.seed, t.z_loss)
    return Program(definition, optimizer, jax.jit(step, donate_argnums=0))


def batch_rows(config: Config) -> int:
    """Rows of a training batch, over all devices and micro-batches."""
    return config.train.batch * (2 if parse_regime(config.data.regime).doubled else 1)


def abstract_arguments(
    config: Config, mesh: Mesh | AbstractMesh
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes, dtypes and shardings of the state and of the longest batch of a run."""
    optimizer = make_optimizer(config.train)
    state = abstract_state(config.model.spec(), optimizer, config.train.ema > 0, mesh)
    kinds = _ARRAYS | (_PACKED if config.data.batching == "packed" else {})
    shape, rows = (batch_rows(config), config.data.length), batch_sharding(mesh)
    return state, {n: jax.ShapeDtypeStruct(shape, k, sharding=rows) for n, k in kinds.items()}
