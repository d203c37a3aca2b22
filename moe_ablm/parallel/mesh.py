"""The device mesh and the one table from axis letters to mesh axes.

The batch is split over all mesh axes: "expert" and "fsdp" are data parallelism outside the arrays
that they shard.
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
# which mesh axis shards an array's axis; letters as in model.spec
AXIS_RULES = {"E": EXPERT_AXIS, "F": "fsdp"}


def make_mesh(
    data: int, expert: int, fsdp: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over devices, by default all; `data=-1` takes what the other axes leave.

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
    """The same value on every device."""
    return NamedSharding(mesh, P())


def axes_sharding(mesh: Mesh | AbstractMesh, axes: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of a parameter from its axis letters.

    An axis that its mesh axis does not divide stays whole, so that one table serves every size.
    """
    names = [AXIS_RULES.get(letter) for letter in axes]
    spec = [n if n and shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(names)]
    return NamedSharding(mesh, P(*spec))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as part of the global arrays `[B, L]`."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
