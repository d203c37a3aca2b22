"""Plans a run for named hardware: mesh, XLA flags, split of the batch and remat.

    python -m launch.meshes --hardware=h100x8
    python -m launch.meshes --hardware=v6e-8 --size=650m --router=top2-capacity --experts=32

prints the settings to use and the device memory that they take, computed from the shapes of the
state and of what the backward pass keeps. A single combination that does not fit is refused (exit
code 2).

Rules, in this order:
  * the batch is split over all devices, whatever the axes are called;
  * experts are spread over an axis inside a node or slice where their weights are large: at width
    1280, or width 640 with 32 experts or more;
  * "fsdp" is as small, and as little recomputed, as fits; fsdp stays inside a node or slice;
  * what the run's own config says of mesh and remat stays as it is.
"""

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd

from rich.console import Console
from rich.table import Table

from launch.cell import config_of
from moe_ablm.config_schema import Config
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError
from moe_ablm.model.flops import params_total
from moe_ablm.model.spec import SIZES, EncoderSpec
from moe_ablm.program import batch_rows, execution_on
from moe_ablm.training.memory import Needed, abstract_mesh, least, needed

GIB = 1 << 30
MOST_PARTS = 4096  # micro-batches considered at most
USABLE = 0.92  # of a device's memory; the rest is the driver's, NCCL's and the programs'
# remat policies to try, in this order; a GPU recomputes elementwise work faster than it reads it
REMAT = {"cpu": ("none", "full"), "gpu": ("matmuls", "full"), "tpu": ("matmuls", "full")}
# what leaves a choice to the hardware, unless the command line says just this
OPEN = {"mesh.data": -1, "mesh.expert": 1, "mesh.fsdp": 1, "compute.remat": None}
ROUTERS: dict[str, dict[str, object]] = {  # overrides of the model's section by name of a router
    "none": {},
    "top2": {"router": "topk"},
    "top2-capacity": {"router": "topk", "capacity": 1.25},
    "expert_choice": {"router": "expert_choice"},
    "soft": {"router": "soft"},
}

GPU_FLAGS = (
    # gradients are reduced while the backward pass goes on, instead of after it
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # an all-reduce for some layers at a time: few enough to be long, many enough to overlap
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    # the same for weights that fsdp or dropless experts gather, and for their gradients
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
)
TPU_FLAGS = (  # $LIBTPU_INIT_ARGS; as MaxText sets them for data parallelism, not run by us
    # gradients are reduced while the backward pass goes on
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    # ... also where their sizes differ, as of experts and dense layers
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)


@dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
      kind: gpu or tpu.
      memory: GB, as sold.
      cores: of a chip, as the number in a TPU's name counts them.
      slices: shape of a TPU slice by its number of chips.
    """

    kind: str
    memory: int
    cores: int = 1
    slices: dict[int, str] = field(default_factory=dict)


# v4 and v5p are tori of three dimensions, v5e and v6e of two
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
          256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}  # fmt: skip
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
            256: "16x16"}  # fmt: skip
CHIPS = {
    "a100": Chip("gpu", 80),
    "h100": Chip("gpu", 80),
    "h200": Chip("gpu", 141),
    "v4": Chip("tpu", 32, 2, _CUBES),
    "v5e": Chip("tpu", 16, 1, _SQUARES),
    "v5p": Chip("tpu", 95, 2, _CUBES),
    "v6e": Chip("tpu", 32, 1, _SQUARES),
}
CHIPS_PER_HOST = 4  # of a TPU slice with more than one
NAMES = "a100xG, h100xG, h200xG, any of them xN nodes (h100x8x4), v4-N, v5e-N, v5p-N, v6e-N, cpu"
DEFAULT = ("a100x8", "h100x8", "h200x8", "h100x8x4", "v4-8", "v5e-8", "v5p-8", "v6e-8", "cpu")


@dataclass(frozen=True)
class Hardware:
    """Devices that one run has to itself.

    Attributes:
      name: as in `NAMES`.
      kind: gpu, tpu or cpu.
      chip: a key of `CHIPS`, or cpu.
      devices: of all hosts; TPU: chips.
      hosts: machines, each with `devices / hosts` devices.
      memory: bytes of a device.
      near: devices joined by fast links: a GPU node, a TPU slice.
      topology: shape of a TPU slice, such as 2x4; else empty.
    """

    name: str
    kind: str
    chip: str
    devices: int
    hosts: int
    memory: int
    near: int
    topology: str = ""

    @property
    def usable(self) -> float:
        """Bytes of a device that a run may take."""
        return USABLE * self.memory

    @property
    def flags(self) -> tuple[str, ...]:
        """Of XLA, for the compiler of this hardware."""
        return {"gpu": GPU_FLAGS, "tpu": TPU_FLAGS, "cpu": ()}[self.kind]

    @property
    def environment(self) -> dict[str, str]:
        """Variables for every process of a run."""
        flags = " ".join(self.flags)
        if self.kind == "gpu":
            # XLA takes three quarters of the memory by default
            return {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": str(USABLE)}
        return {"LIBTPU_INIT_ARGS": flags} if self.kind == "tpu" else {}


def hardware(name: str) -> Hardware:
    """Hardware by its name: `h100x8`, `h100x8x4` (4 nodes), `v5p-128` (cores), `v6e-16` (chips).

    Raises:
      UserError: there is no such hardware.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware(name, "cpu", "cpu", 1, 1, memory, 1)
    gpus = re.fullmatch(r"([a-z]\d+)x([1248])(?:x([1-9]\d{0,3}))?", name)
    if gpus and gpus[1] in CHIPS:
        each, nodes, memory = int(gpus[2]), int(gpus[3] or 1), CHIPS[gpus[1]].memory * 10**9
        return Hardware(name, "gpu", gpus[1], each * nodes, nodes, memory, each)
    tpus = re.fullmatch(r"(v\d\w?)-([1-9]\d{0,4})", name)
    if tpus and tpus[1] in CHIPS:
        chip = CHIPS[tpus[1]]
        chips, rest = divmod(int(tpus[2]), chip.cores)
        if rest or chips not in chip.slices:
            slices = ", ".join(f"{tpus[1]}-{n * chip.cores}" for n in chip.slices)
            raise UserError(
                f"hardware {name!r}: {int(tpus[2]) / chip.cores:g} chips are no slice: expected "
                f"one of {slices}"
            )
        hosts, memory = max(chips // CHIPS_PER_HOST, 1), chip.memory * 10**9
        return Hardware(name, "tpu", tpus[1], chips, hosts, memory, chips, chip.slices[chips])
    raise UserError(f"hardware {name!r} is not known: expected one of {NAMES}")


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


def rung(size: str, router: str, **overrides: object) -> Config:
    """The config of an encoder of the ladder.

    Args:
      size: a key of `SIZES`.
      router: a key of `ROUTERS`.
      **overrides: values of config keys, with "__" for ".".

    Raises:
      UserError: a name is unknown, or a value is wrong.
    """
    if router not in ROUTERS:
        raise UserError(f"router {router!r}: expected one of {', '.join(ROUTERS)}")
    values = {"model.size": size} | {f"model.moe.{k}": v for k, v in ROUTERS[router].items()}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return config_of(
        ["--config=configs/base.py", *(f"--config.{k}={v}" for k, v in values.items())]
    )


def table(rows: list[tuple[str, str, str, MeshPlan | str]]) -> Table:
    """Hardware, size, router and their plan, or why there is none."""
    made = Table("hardware", "size", "router", "data x expert x fsdp", "rows", "remat", box=None)
    for name in ("state", "gradients", "activations", "total", "of GiB"):
        made.add_column(name, justify="right")
    for name, size, router, found in rows:
        if isinstance(found, str):
            made.add_row(name, size, router, "-", "-", "-", "-", "-", "-", "-", "refused")
            continue
        need = found.needed
        parts = need.state, need.gradients, need.activations, need.total
        numbers = [f"{part / GIB:.2f}" for part in parts]
        mesh = f"{found.data} x {found.expert} x {found.fsdp}"
        limit = f"{found.hardware.usable / GIB:.0f}"
        made.add_row(name, size, router, mesh, str(found.rows), found.remat, *numbers, limit)
    return made


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if what was asked for does not exist or does not fit."""
    return end(lambda: _run(argv), "launch.meshes")


def _run(argv: list[str] | None) -> int:
    parser = Parser(
        prog="python -m launch.meshes",
        description=__doc__,
    )
    add = parser.add_argument
    add("--hardware", action="append", help=f"{NAMES}; repeatable; default {', '.join(DEFAULT)}")
    add("--size", action="append", help=f"{', '.join(SIZES)}; repeatable; default all")
    add("--router", action="append", help=f"{', '.join(ROUTERS)}; repeatable; default all")
    add("--experts", type=int, default=8, help="default %(default)s")
    add("--batch", type=int, default=128, help="train.batch; default %(default)s")
    add("--accumulate", type=int, default=1, help="train.accumulate; default %(default)s")
    add("--length", type=int, default=256, help="data.length; default %(default)s")
    options = parser.parse_args(argv)
    rows = _rows(options)
    Console(width=None if sys.stdout.isatty() else 130).print(table(rows))
    for name in sorted({row[0] for row in rows if not isinstance(row[3], str)}):
        for variable, value in hardware(name).environment.items():
            print(f"{name}: {variable}={value}")
    if len(rows) == 1 and isinstance(rows[0][3], MeshPlan):
        print("of the training command:", *rows[0][3].flags)
    refused = [row for row in rows if isinstance(row[3], str)]
    for name, size, router, reason in refused:
        print(f"refused: {size} {router} on {name}: {reason}", file=sys.stderr)
    return 2 if refused and len(rows) == 1 else 0


def _rows(options: argparse.Namespace) -> list[tuple[str, str, str, MeshPlan | str]]:
    shape = {"train__batch": options.batch, "train__accumulate": options.accumulate,
             "data__length": options.length, "model__moe__experts": options.experts}  # fmt: skip
    rows = []
    for name in options.hardware or DEFAULT:
        where = hardware(name)
        for size in options.size or SIZES:
            for router in options.router or ROUTERS:
                config = rung(size, router, **shape)
                try:
                    found: MeshPlan | str = fitting_plan(config, where)
                except UserError as error:
                    found = str(error)
                rows.append((name, size, router, found))
    return rows


if __name__ == "__main__":
    sys.exit(main())
