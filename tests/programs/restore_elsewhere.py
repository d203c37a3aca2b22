"""Saves a state on 8 fake devices as (1, 4, 2) and restores it on other meshes, bit for bit."""

import sys
from pathlib import Path

import jax
import numpy as np

from moe_ablm.model.families import TopK
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.training import state as states
from moe_ablm.training.checkpoint import Checkpoints
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OptimizerSpec

SPEC = EncoderSpec(2, 8, 16, 2, moe=TopK(experts=4))
optimizer = make_optimizer(OptimizerSpec(100, 1e-3, 10, "linear", 0.1, 0.9, 0.98, 1e-6, 0.01, 1.0))


def experts(params):
    return params["layers"][1]["ffn"]["up"].get_value()


mesh = make_mesh(1, 4, 2)
with jax.set_mesh(mesh):
    state = states.init_state(SPEC, optimizer, 0, False, mesh)
    for array in (experts(state.params), experts(state.opt_state[1][0].mu)):
        assert array.sharding.shard_shape(array.shape) == (1, 8, 8), array.sharding
    checkpoints = Checkpoints(Path(sys.argv[1]), 1)
    checkpoints.save(1, state, {}, None)
    checkpoints.wait()
for axes in ((2, 2, 2), (8, 1, 1)):
    mesh = make_mesh(*axes)
    with jax.set_mesh(mesh):
        found = checkpoints.restore(states.abstract_state(SPEC, optimizer, False, mesh)).state
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    array = experts(found.params)
    assert array.sharding.shard_shape(array.shape)[0] == 4 // axes[1]
print("equal")
