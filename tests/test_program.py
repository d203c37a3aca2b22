"""The program of a run: what it takes, and what is told of how it is computed."""

import pytest
from conftest import tiny_config

from moe_ablm import program
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.feed import Feed
from moe_ablm.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__batching": "packed", "data__length": 512},
        {"data__batching": "bucketed", "data__buckets": (256,)},
        {"data__regime": "unpaired:doubled"},
    ],
    ids=str,
)
def test_batches_are_as_the_compiler_is_told(changes):
    config = tiny_config(**changes)
    feed = Feed(config, Dataset(simulated_dataset(config.data.simulated_pairs)))
    found = next(iter(feed.train_batches(0)))
    _, expected = program.abstract_arguments(config, make_mesh(-1, 1, 1))
    assert {k: (v.shape, str(v.dtype)) for k, v in found.items()} == {
        k: (v.shape, str(v.dtype)) for k, v in expected.items()
    }


def test_a_backend_decides_what_the_config_leaves_open():
    config = tiny_config()
    gpu, cpu = (program.execution_on(config, backend) for backend in ("gpu", "cpu"))
    assert (gpu.activations, gpu.remat, gpu.backend) == ("bfloat16", "matmuls", "gpu")
    assert (cpu.remat, cpu.backend) == ("none", "cpu")
    said = program.execution_on(tiny_config(compute__remat="full", compute__scan=True), "gpu")
    assert (said.remat, said.scan) == ("full", True)
