"""Peak FLOP/s of the devices, the denominator of model FLOPs utilisation, and their memory."""

import contextlib
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from moe_ablm.model.linear import dot
from moe_ablm.training.peaks import data_sheet_peak

SIZE = {"cpu": 1024}  # of the matrices; elsewhere 8192, large enough to fill an accelerator


class Peak(NamedTuple):
    """FLOP/s of all devices, and the source of the number: "data sheet" or "measured"."""

    flops: float
    source: str


def peak(operands: str) -> Peak:
    """Peak of this hardware from its data sheet, or measured where there is none, as on CPU."""
    known = data_sheet_peak(jax.devices()[0].device_kind, operands)
    if known:
        return Peak(known * jax.device_count(), "data sheet")
    return Peak(matmul_peak(operands), "measured")


def matmul_peak(operands: str, rounds: int = 5) -> float:
    """Best FLOP/s of all devices in `rounds` square matmuls with factors of dtype `operands`."""
    n = SIZE.get(jax.default_backend(), 8192)
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(operands)
    multiply = jax.jit(lambda a: dot(a, a, operands).astype(a.dtype))
    multiply(a).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # several CPU devices share the same cores
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return 2 * n**3 / best * devices


def device_memory() -> int | None:
    """Bytes that this process may allocate on a device; None where unknown (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def memory_limit() -> int:
    """Bytes of a device; on CPU the machine's memory divided by the number of local devices."""
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device_memory() or shared // jax.local_device_count()


def processor() -> str:
    """Name of this machine's CPU, which decides how bfloat16 is computed, and number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def peak_memory() -> int:
    """Peak of the bytes in use: of the first local device, or on CPU of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
