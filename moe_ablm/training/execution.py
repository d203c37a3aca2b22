"""How a backend computes an encoder, where the config leaves it open."""

from pathlib import Path

from moe_ablm.model.spec import PRECISIONS, Execution


def make_execution(precision: str, scan: bool | None, remat: str | None, backend: str) -> Execution:
    """The execution of the config's section `compute` on a backend, which need not be here.

    Args:
      precision: of `PRECISIONS`, or "auto".
      scan: whether equal layers run under `lax.scan`; None: they are unrolled, since a scan copies
        all weights and all that the backward pass keeps (docs/accelerators.md).
      remat: of `spec.REMAT`; None: what fits is the caller's to find, "none" on CPU and "matmuls"
        elsewhere.
      backend: of `spec.BACKENDS`.
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
    """bfloat16 on accelerators; bfloat16 operands on CPUs with AMX; float32 on other CPUs."""
    if backend != "cpu":
        return "bfloat16"
    return "bfloat16_operands" if _has_amx() else "float32"


def _has_amx() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as f:
            return any("amx_bf16" in line for line in f if line.startswith("flags"))
    except OSError:
        return False
