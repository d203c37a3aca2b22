"""Defaults of a backend for what the config leaves open in the section `compute`."""

from pathlib import Path

from moe_ablm.model.spec import PRECISIONS, Execution


def make_execution(precision: str, scan: bool | None, remat: str | None, backend: str) -> Execution:
    """The execution of the config's section `compute` on a backend, which may be absent.

    Args:
      precision: a key of `PRECISIONS`, or "auto".
      scan: whether equal layers run under `lax.scan`; None: they are unrolled, since a scan copies
        all weights and everything that the backward pass keeps (docs/accelerators.md).
      remat: one of `spec.REMAT`; None: "none" on CPU and "matmuls" elsewhere. The caller checks
        whether that fits the memory.
      backend: one of `spec.BACKENDS`.
    """
    activations, operands = PRECISIONS[
        default_precision(backend) if precision == "auto" else precision
    ]
    return Execution(
        activations=activations,
        operands=operands,
        scan=bool(scan),
        remat=remat or ("none" if backend == "cpu" else "matmuls"),
        backend=backend,
    )


def default_precision(backend: str) -> str:
    """bfloat16 on accelerators, bfloat16_operands on CPUs with AMX, float32 on other CPUs."""
    if backend != "cpu":
        return "bfloat16"
    return "bfloat16_operands" if _has_amx() else "float32"


def _has_amx() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as f:
            return any("amx_bf16" in line for line in f if line.startswith("flags"))
    except OSError:
        return False
