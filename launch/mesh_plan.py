"""The mesh, split of the batch and remat of a run on named hardware.

Rules, in this order:
  * the batch is split over all devices, whatever the axes are called;
  * experts are spread over an axis inside a node or slice where their weights are large: at width
    1280, or width 640 with 32 experts or more;
  * "fsdp" is as small, and as little recomputed, as fits; fsdp stays inside a node or slice;
  * what the run's own config says of mesh and remat stays as it is.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd

from launch.hardware import Hardware
from moe_ablm.config_schema import Config
from moe_ablm.errors import UserError
from moe_ablm.model.flops import params_total
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.program import batch_rows, execution_on
from moe_ablm.training.memory import Needed, abstract_mesh, least, needed

GIB = 1 << 30
MOST_PARTS = 4096  # micro-batches considered at most
# remat policies to try, in this order; a GPU recomputes elementwise work faster than it reads it
REMAT = {"cpu": ("none", "full"), "gpu": ("matmuls", "full"), "tpu": ("matmuls", "full")}
# what leaves a choice to the hardware, unless the command line says just this
OPEN = {"mesh.data": -1, "mesh.expert": 1, "mesh.fsdp": 1, "compute.remat": None}


@dataclass(frozen=True)
class MeshPlan:
    """How a run is spread over hardware, and what a device holds, in bytes.

    Attributes:
      hardware: that it was made for.
      data, expert, fsdp: the mesh.
      rows: of a micro-batch, a device.
      remat: what the backward pass recomputes (`Execution.remat`).
      needed: memory of a device.
    """

    hardware: Hardware
    data: int
    expert: int
    fsdp: int
    rows: int
    remat: str
    needed: Needed

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return self.needed.total <= self.hardware.usable

    @property
    def overrides(self) -> dict[str, object]:
        """Keys of a run's config; none of them is part of its identity."""
        return {
            "mesh.data": self.data,
            "mesh.expert": self.expert,
            "mesh.fsdp": self.fsdp,
            "compute.remat": self.remat,
        }

    @property
    def flags(self) -> tuple[str, ...]:
        """The same as arguments of the training command."""
        return tuple(f"--config.{key}={value}" for key, value in self.overrides.items())


def given_keys(argv: Sequence[str]) -> frozenset[str]:
    """Config keys that a command line sets."""
    flags = (a.lstrip("-").partition("=")[0] for a in argv if a.startswith("-"))
    return frozenset(f.removeprefix("config.") for f in flags if f.startswith("config."))


def plan(config: Config, where: Hardware, given: Collection[str] = ()) -> MeshPlan:
    """The first plan that fits, by the rules above; where none does, the most frugal one.

    Args:
      config: of the run; what it says of mesh and remat stays.
      where: it is to run.
      given: keys that the command line sets: they stay, whatever their value.

    Raises:
      UserError: the batch or the devices cannot be split.
    """
    rows, ways = batch_rows(config) // config.train.accumulate, where.devices
    if rows % ways:
        raise UserError(
            f"{batch_rows(config)} rows in {config.train.accumulate} micro-batch(es) cannot be "
            f"split over the {ways} devices of {where.name}: use a multiple of "
            f"{ways * config.train.accumulate}, or less hardware"
        )
    found = None
    for expert, fsdp, remat in _choices(config, where, given):
        found = _weigh(config, where, rows // ways, (expert, fsdp), remat)
        if found.fits:
            return found
    if found is None:
        m = config.mesh
        raise UserError(
            f"mesh.data={m.data}, mesh.expert={m.expert}, mesh.fsdp={m.fsdp} do not multiply to "
            f"the {ways} devices of {where.name}: change them or leave them out"
        )
    return found


def fitting_plan(config: Config, where: Hardware, given: Collection[str] = ()) -> MeshPlan:
    """As `plan`, but a run that does not fit is refused.

    Raises:
      UserError: the batch or the devices cannot be split, or nothing fits.
    """
    spec = config.model.spec()
    floor = least(spec, where.devices, 0, config.data.length, config.train.optimizer)
    if floor > where.usable:  # of so many layers not even the shapes would be known in time
        raise UserError(
            f"it does not fit {where.name}: {params_total(spec):,} parameters with gradients and "
            f"moments are at least {floor / GIB:,.1f} GiB a device, of {where.usable / GIB:.1f} "
            "that can be used: use more devices or a smaller model"
        )
    found = plan(config, where, given)
    if found.fits:
        return found
    raise UserError(
        f"it does not fit {where.name}: {found.needed.total / GIB:.1f} GiB a device, of "
        f"{where.usable / GIB:.1f} that can be used, with {found.rows} rows, fsdp={found.fsdp} "
        f"and {found.remat} remat: use more devices{_more_accumulation(config, where, given)}, or "
        "a smaller batch"
    )


def _more_accumulation(config: Config, where: Hardware, given: Collection[str]) -> str:
    """The fewest micro-batches with which a run fits, which only its user may choose."""
    rows = batch_rows(config) // where.devices
    for n in range(config.train.accumulate + 1, min(rows, MOST_PARTS) + 1):
        if rows % n == 0 and config.train.batch % n == 0:
            train = replace(config.train, accumulate=n)
            if plan(replace(config, train=train), where, given).fits:
                return f", train.accumulate={n} (which makes it another run)"
    return ""


def _choices(
    config: Config, where: Hardware, given: Collection[str]
) -> Iterator[tuple[int, int, str | None]]:
    """(expert, fsdp, remat) from the quickest to the most frugal; none if no mesh is possible."""
    mesh, remat = config.mesh, config.compute.remat
    current = {"mesh.data": mesh.data, "mesh.expert": mesh.expert, "mesh.fsdp": mesh.fsdp,
               "compute.remat": remat}  # fmt: skip
    is_open = {key: value == OPEN[key] and key not in given for key, value in current.items()}
    expert = _expert_axis(config.model.spec(), where) if is_open["mesh.expert"] else mesh.expert
    widths = (1, 2, 4, 8) if is_open["mesh.fsdp"] else (mesh.fsdp,)
    for policy in REMAT[where.kind] if is_open["compute.remat"] else (remat,):
        for fsdp in widths:
            # a choice of the rules stays inside a node or slice; one of the user need not
            room = where.near if is_open["mesh.fsdp"] else where.devices
            fits = room % (expert * fsdp) == 0
            if fits and mesh.data in (-1, where.devices // (expert * fsdp)):
                yield expert, fsdp, policy


def _expert_axis(spec: EncoderSpec, where: Hardware) -> int:
    moe = spec.moe
    if moe is None or not (spec.d_model >= 1280 or (spec.d_model >= 640 and moe.experts >= 32)):
        return 1
    return gcd(moe.experts, where.near, 8)


def _weigh(
    config: Config, where: Hardware, rows: int, axes: tuple[int, int], remat: str | None
) -> MeshPlan:
    """What a device holds with one choice of axes (expert, fsdp) and remat; None: the default."""
    expert, fsdp = axes
    data = where.devices // (expert * fsdp)
    execution = execution_on(config, where.kind)
    execution = replace(execution, remat=remat or execution.remat)
    shape, ema = (rows, config.data.length), config.train.ema > 0
    mesh, parts = abstract_mesh(data, expert, fsdp), config.train.accumulate
    optimizer = config.train.optimizer
    need = needed(config.model.spec(), execution, mesh, shape, ema, parts, optimizer)
    return MeshPlan(where, data, expert, fsdp, rows, execution.remat, need)
