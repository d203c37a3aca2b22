"""The training step, compiled for TPUs and GPUs that are not here. `make test-aot`.

Every router is compiled for a TPU slice and a GPU node, at the widths of the 35M encoder, with
experts in every layer. What is asserted does not depend on the machine that compiles.
"""

from functools import cache
from importlib.util import find_spec
from itertools import permutations
from typing import NamedTuple

import jax
import pytest

from launch import per_layer, topology
from launch.compile import Compiled, compile_step
from launch.meshes import ROUTERS, hardware, rung
from moe_ablm.config import Config
from moe_ablm.program import abstract_arguments
from moe_ablm.training.memory import abstract_mesh

HARDWARE = {"tpu": "v5e-8", "gpu": "h100x8"}
ROWS, LENGTH = 32, 256  # a device


class Bound(NamedTuple):
    """Not to be exceeded.

    Attributes:
      temporaries: GB of a device, of four layers.
      kept: kB a token and layer for the backward pass.
      copies: a layer, within the memory of a device.
    """

    temporaries: float
    kept: float
    copies: float


TARGET = Bound(3.0, 12.0, 2.0)
BOUNDS = {(router, kind): TARGET for router in ROUTERS for kind in HARDWARE}
# a mesh with all axes, on which something may be gathered that should not be
SPREAD = {"mesh.data": 2, "mesh.expert": 2, "mesh.fsdp": 2}


def parameters():
    for kind in HARDWARE:
        missing = find_spec(topology.PLUGINS[kind]) is None
        skip = pytest.mark.skipif(missing, reason=f"{topology.PLUGINS[kind]}: {topology.MAKE}")
        for router in ROUTERS:
            # a worker compiles all that is asked of one
            group = pytest.mark.xdist_group(f"{kind} {router}")
            yield pytest.param(router, kind, marks=[skip, group], id=f"{router}-{kind}")


pytestmark = [pytest.mark.aot, pytest.mark.parametrize(("router", "kind"), parameters())]


def config_of(router: str, **overrides: object) -> Config:
    experts = {} if router == "none" else {"placement": "every", "first_dense": 0}
    given = {f"model__moe__{key}": value for key, value in experts.items()} | overrides
    return rung("35m", router, train__batch=8 * ROWS, data__length=LENGTH, **given)


@cache
def measured(router: str, kind: str) -> tuple[per_layer.PerLayer, Compiled]:
    jax.config.update("jax_platforms", "cpu")
    return per_layer.measure(config_of(router), hardware(HARDWARE[kind]))


def test_temporaries(router, kind):
    _, found = measured(router, kind)
    assert found.fits and found.memory.temporaries < BOUNDS[router, kind].temporaries * 1e9


def test_bytes_kept_for_the_backward_pass(router, kind):
    layer, _ = measured(router, kind)
    assert 0 < layer.kept < BOUNDS[router, kind].kept * 1e3


def test_copies_of_a_layer(router, kind):
    layer, _ = measured(router, kind)
    assert 0 <= layer.copies <= BOUNDS[router, kind].copies


def test_only_parameters_are_gathered(router, kind):
    """On a mesh with an expert and an fsdp axis: no activations."""
    jax.config.update("jax_platforms", "cpu")
    overrides = {key.replace(".", "__"): value for key, value in SPREAD.items()}
    config = per_layer.with_layers(config_of(router, **overrides), 2)
    found = compile_step(config, hardware(HARDWARE[kind]), SPREAD)
    state, _ = abstract_arguments(config, abstract_mesh(8, 1, 1))
    whole = {x.shape for x in jax.tree.leaves(state.params)}
    shapes = {
        shape for c in found.counts.collectives if c.name == "all-gather" for shape in c.shapes
    }
    assert [s for s in shapes if not any(is_part(s, w) for w in whole)] == []


def is_part(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array may be a piece of another, transposed or not, with axes of one or without.

    A parameter's own axes divide the tokens of no batch here.
    """
    shape, whole = (tuple(n for n in s if n > 1) for s in (shape, whole))
    return len(shape) == len(whole) and any(
        all(n % piece == 0 for n, piece in zip(order, shape, strict=True))
        for order in permutations(whole)
    )
