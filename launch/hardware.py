"""Named hardware: its devices, their memory, and the XLA flags of its compiler."""

import os
import re
from dataclasses import dataclass, field

from moe_ablm.errors import UserError

USABLE = 0.92  # of a device's memory; the rest is the driver's, NCCL's and the programs'
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
