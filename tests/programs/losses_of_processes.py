"""Three training steps over all devices of one or more processes; prints their losses as JSON.

`python losses_of_processes.py COUNT INDEX PORT EXPERT ROUTER...`: process INDEX of COUNT; the
mesh has an expert axis of EXPERT devices.
"""

import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests

import test_contracts as contracts  # noqa: E402

from moe_ablm.parallel.mesh import global_batch, make_mesh  # noqa: E402


def main(count: int, index: int, port: str, expert: int, routers: list[str]) -> dict:
    """Losses by router, the same in every process."""
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    mesh = make_mesh(-1, expert, 1)
    losses = {}
    for router in routers:
        step, _, _ = contracts.step_and_arguments(contracts.TINY[router], mesh)
        mine = contracts.BATCH // count
        rows = {k: v[index * mine : (index + 1) * mine] for k, v in contracts.host_batch().items()}
        with jax.set_mesh(mesh):
            batch = global_batch(rows, mesh)
            losses[router] = contracts.three_losses(
                contracts.TINY[router], jax.jit(step), mesh, batch
            )
    return losses


if __name__ == "__main__":
    found = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
    print(json.dumps(found))
