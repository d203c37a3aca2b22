"""Named hardware -> mesh, XLA flags, split of the batch and remat, by size and router.

    python -m launch.meshes --hardware=h100x8
    python -m launch.meshes --hardware=v6e-8 --size=650m --router=top2-capacity --experts=32

prints what to use and what it takes of a device's memory, computed from the shapes of the state
and of what the backward pass needs. A single combination that does not fit is refused (exit 2).

Rules, in this order:
  * the batch is split over all devices, whatever the axes are called;
  * experts are spread over an axis inside a node or slice where their weights are large: at width
    1280, or width 640 with 32 experts or more;
  * "fsdp" is as small, and as little recomputed, as fits; fsdp stays inside a node or slice.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from math import gcd

from rich.console import Console
from rich.table import Table

from moe_ablm.errors import UserError
from moe_ablm.model.spec import (
    PRECISIONS,
    SIZES,
    EncoderSpec,
    Execution,
    ExpertChoice,
    Soft,
    TopK,
)
from moe_ablm.training.memory import Needed, abstract_mesh, needed

GIB = 1 << 30
USABLE = 0.92  # of a device's memory; the rest is the driver's, NCCL's and the programs'
# remat policies to try, in this order; a GPU recomputes elementwise work faster than it reads it
REMAT = {"cpu": ("none", "full"), "gpu": ("matmuls", "full"), "tpu": ("matmuls", "full")}
ROUTERS = ("none", "top2", "top2-capacity", "expert_choice", "soft")

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
class Hardware:
    """Devices that one run has to itself.

    Attributes:
      kind: gpu, tpu or cpu.
      devices: of all hosts; TPU: chips.
      hosts: machines, each with `devices / hosts` devices.
      memory: bytes of a device.
      near: devices joined by fast links: a GPU node, a TPU slice.
    """

    name: str
    kind: str
    devices: int
    hosts: int
    memory: int
    near: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables for every process of a run."""
        if self.kind == "gpu":
            # XLA takes three quarters of the memory unless it is told
            return {"XLA_FLAGS": " ".join(GPU_FLAGS), "XLA_PYTHON_CLIENT_MEM_FRACTION": str(USABLE)}
        return {"LIBTPU_INIT_ARGS": " ".join(TPU_FLAGS)} if self.kind == "tpu" else {}


GPUS = {"a100": 80, "h100": 80, "h200": 140}  # GB as sold; 8 a node
TPUS = {"v4": 32, "v5p": 95, "v6e": 32}  # GB a chip; 4 chips a host
CORES = {"v4": 2, "v5p": 2, "v6e": 1}  # a chip: what the number in a TPU's name counts
NAMES = "a100xG, h100xG, h200xG, any of them xN nodes (h100x8x4), v4-N, v5p-N, v6e-N, cpu"
DEFAULT = ("a100x8", "h100x8", "h200x8", "h100x8x4", "v4-8", "v5p-8", "v6e-8", "cpu")


def hardware(name: str) -> Hardware:
    """Hardware by its name: `h100x8`, `h100x8x4` (4 nodes), `v5p-128` (cores), `v6e-16` (chips).

    Raises:
      UserError: there is no such hardware.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware(name, "cpu", 1, 1, memory, 1)
    if found := re.fullmatch(r"([a-z]\d+)x([1248])(?:x([1-9]\d{0,3}))?", name):
        kind, each, nodes = found[1], int(found[2]), int(found[3] or 1)
        if kind in GPUS:
            memory = GPUS[kind] * 10**9
            return Hardware(name, "gpu", each * nodes, nodes, memory, each)
    if (found := re.fullmatch(r"(v\w+)-([1-9]\d{0,4})", name)) and found[1] in TPUS:
        kind, number = found[1], int(found[2])
        chips = number // CORES[kind]
        if number % CORES[kind] == 0 and (chips % 4 == 0 or (kind == "v6e" and chips == 1)):
            hosts = max(chips // 4, 1)
            return Hardware(name, "tpu", chips, hosts, TPUS[kind] * 10**9, chips)
    raise UserError(f"hardware {name!r} is not known: expected one of {NAMES}")


@dataclass(frozen=True)
class Plan:
    """How a run is spread over hardware, and what a device holds, in bytes.

    Attributes:
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
        return self.needed.total <= USABLE * self.hardware.memory

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments of the training command; none of them is part of a run's identity."""
        mesh = f"--config.mesh.expert={self.expert}", f"--config.mesh.fsdp={self.fsdp}"
        return (*mesh, f"--config.compute.remat={self.remat}")


def plan(spec: EncoderSpec, where: Hardware, batch: int, length: int, accumulate: int = 1) -> Plan:
    """The first plan that fits, by the rules above.

    Args:
      spec: of the encoder.
      where: it is to run.
      batch, accumulate: `train.batch` and `train.accumulate`; both belong to a run's identity.
      length: `data.length`.

    Raises:
      UserError: the batch cannot be split, or no plan fits.
    """
    rows = batch // accumulate
    if rows % where.devices:
        raise UserError(
            f"{batch} rows in {accumulate} micro-batch(es) cannot be split over the "
            f"{where.devices} devices of {where.name}: use a multiple of "
            f"{where.devices * accumulate}, or less hardware"
        )
    expert = _expert_axis(spec, where)
    widths = [n for n in (1, 2, 4, 8) if (where.near // expert) % n == 0]
    for remat in REMAT[where.kind]:
        for fsdp in widths:
            found = _weigh(spec, where, rows // where.devices, length, (expert, fsdp), remat)
            if found.fits:
                return found
    raise UserError(
        f"it does not fit {where.name}: {found.needed.total / GIB:.1f} GiB a device, of "
        f"{USABLE * where.memory / GIB:.1f} that can be used, with {found.rows} rows, fsdp={fsdp} "
        "and full remat: use more devices, train.accumulate, or a smaller batch"
    )


def _expert_axis(spec: EncoderSpec, where: Hardware) -> int:
    moe = spec.moe
    if moe is None or not (spec.d_model >= 1280 or (spec.d_model >= 640 and moe.experts >= 32)):
        return 1
    return gcd(moe.experts, where.near, 8)


def _weigh(
    spec: EncoderSpec,
    where: Hardware,
    rows: int,
    length: int,
    axes: tuple[int, int],
    remat: str,
) -> Plan:
    """What a device holds with one choice of axes (expert, fsdp) and remat."""
    expert, fsdp = axes
    data = where.devices // (expert * fsdp)
    precision = "bfloat16" if where.kind != "cpu" else "float32"
    execution = Execution(*PRECISIONS[precision], remat=remat, backend=where.kind)
    mesh = abstract_mesh(data, expert, fsdp)
    return Plan(
        where, data, expert, fsdp, rows, remat, needed(spec, execution, mesh, (rows, length))
    )


def encoder(size: str, router: str, experts: int) -> EncoderSpec:
    """A rung of the ladder; `router` is one of `ROUTERS`.

    Raises:
      UserError: it is none.
    """
    moes = {
        "none": None,
        "top2": TopK(experts=experts),
        "top2-capacity": TopK(experts=experts, capacity=1.25),
        "expert_choice": ExpertChoice(experts=experts),
        "soft": Soft(experts=experts),
    }
    if size not in SIZES or router not in moes:
        raise UserError(
            f"size {size!r}, router {router!r}: expected one of {', '.join(SIZES)} and one of "
            f"{', '.join(ROUTERS)}"
        )
    return EncoderSpec(*SIZES[size], moe=moes[router])


def table(rows: list[tuple[str, str, str, Plan | str]]) -> Table:
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
        limit = f"{USABLE * found.hardware.memory / GIB:.0f}"
        made.add_row(name, size, router, mesh, str(found.rows), found.remat, *numbers, limit)
    return made


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if what was asked for does not exist or does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.meshes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    try:
        rows = _rows(options)
    except UserError as error:
        print(f"launch.meshes: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 130).print(table(rows))
    for name in sorted({row[0] for row in rows if not isinstance(row[3], str)}):
        for variable, value in hardware(name).environment.items():
            print(f"{name}: {variable}={value}")
    if len(rows) == 1 and isinstance(rows[0][3], Plan):
        print("of the training command:", *rows[0][3].flags)
    refused = [row for row in rows if isinstance(row[3], str)]
    for name, size, router, reason in refused:
        print(f"refused: {size} {router} on {name}: {reason}", file=sys.stderr)
    return 2 if refused and len(rows) == 1 else 0


def _rows(options: argparse.Namespace) -> list[tuple[str, str, str, Plan | str]]:
    for name in ("experts", "batch", "accumulate", "length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected a positive number")
    rows = []
    for name in options.hardware or DEFAULT:
        where = hardware(name)
        for size in options.size or SIZES:
            for router in options.router or ROUTERS:
                spec = encoder(size, router, options.experts)
                shape = options.batch, options.length, options.accumulate
                try:
                    found: Plan | str = plan(spec, where, *shape)
                except UserError as error:
                    found = str(error)
                rows.append((name, size, router, found))
    return rows


if __name__ == "__main__":
    sys.exit(main())
