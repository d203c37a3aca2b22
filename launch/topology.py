"""Descriptions of absent devices for the compiler: TPU slices and nodes of NVIDIA GPUs."""

import os
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from launch.hardware import CHIPS, Hardware
from moe_ablm.errors import UserError

MAKE = "make .venv-aot"  # makes an environment with both plug-ins
PLUGINS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}
# read when libtpu is loaded
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two compilations at once, since they share no device
}
# what XLA asks a GPU for; from data sheets and drivers
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  {numbers}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_HOPPER = """shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"""
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", """shared_memory_per_core: 167936
  shared_memory_per_block_optin: 166912 core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
  l2_cache_size: 41943040 memory_bandwidth: 2039040000000 device_memory_size: 85100068864
  cuda_compute_capability { major: 8 }"""),
    "h100": ("NVIDIA H100 80GB HBM3", f"""{_HOPPER}
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072"""),
    "h200": ("NVIDIA H200", f"""{_HOPPER}
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184"""),
}  # fmt: skip


def devices(where: Hardware) -> list[jax.Device]:
    """The devices of named hardware, which can be compiled for and nothing else.

    Raises:
      UserError: the compiler's plug-in is not installed, or the hardware needs none.
    """
    if where.kind == "cpu":
        raise UserError(
            "--hardware cpu: expected GPUs or TPUs: the CPU is here and compiles by itself"
        )
    if find_spec(PLUGINS[where.kind]) is None:
        raise UserError(
            f"--hardware {where.name}: {PLUGINS[where.kind]}, its compiler, is not installed: "
            f"`{MAKE}`, then use .venv-aot/bin/python"
        )
    if where.kind == "gpu":
        name, numbers = _GPUS[where.chip]
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=where.chip,
            topology=f"1x{where.hosts}x{where.near}",
            target_config=_TARGET.format(name=name, numbers=numbers),
        ).devices
    os.environ.update({k: v for k, v in _TPU_ENVIRONMENT.items() if k not in os.environ})
    # two cores of a chip are one device
    options: dict = {"chip_config_name": "megacore" if CHIPS[where.chip].cores == 2 else "default"}
    if where.devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{where.chip}:{where.topology}", **options
    ).devices


def compiler_options(where: Hardware) -> dict[str, str | bool]:
    """The flags that a run of this hardware has, and what a compiler without devices needs."""
    flags = (flag.removeprefix("--").split("=", 1) for flag in where.flags)
    options: dict[str, str | bool] = {
        name: value == "true" if value.isalpha() else value for name, value in flags
    }
    # there is nothing on which kernels could be timed
    return options | ({"xla_gpu_autotune_level": "0"} if where.kind == "gpu" else {})
