"""The device mesh and the one table from axis letters to mesh axes.

The batch is split over all mesh axes, so "expert" and "fsdp" are data parallelism for every array
that they do not shard.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_ablm.errors import UserError

MESH_AXES = ("data", "expert", "fsdp")
EXPERT_AXIS = "expert"
BATCH_AXES = MESH_AXES
# mesh axis that shards an array's axis, by letter (model.spec); other axes stay whole
AXIS_RULES = {"E": EXPERT_AXIS, "F": "fsdp"}


def make_mesh(
    data: int, expert: int, fsdp: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices` (None: all of them). `data=-1` uses what the other axes leave.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    fixed = expert * fsdp
    if data == -1 and count % fixed == 0:
        data = count // fixed
    if data * fixed != count:
        raise UserError(
            f"mesh.data={data}, mesh.expert={expert}, mesh.fsdp={fsdp} do not multiply to the "
            f"{count} devices found: change them or set mesh.data=-1"
        )
    sizes, axes = (data, expert, fsdp), (AxisType.Auto,) * 3
    return jax.make_mesh(sizes, MESH_AXES, axis_types=axes, devices=devices)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of batch arrays `[B, ...]`: rows over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def axes_sharding(mesh: Mesh | AbstractMesh, axes: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of a parameter from its axis letters.

    An array axis that the mesh axis does not divide stays whole, so one table serves every size.
    """
    names = [AXIS_RULES.get(letter) for letter in axes]
    spec = [n if n and shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(names)]
    return NamedSharding(mesh, P(*spec))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays `[B, L]`, of which every process provides its own rows."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
