"""A flag of XLA without which some versions compute wrong gradients on CPUs."""

import os
from collections.abc import MutableMapping
from importlib.metadata import PackageNotFoundError, version

_FUSED = "--xla_cpu_experimental_ynn_fusion_type"


def require_right_sums(
    environment: MutableMapping[str, str] = os.environ, jaxlib: str | None = None
) -> None:
    """Sets `XLA_FLAGS` so that XLA:CPU fuses sums rightly; JAX reads it when it first computes.

    jaxlib 0.11.2 and 0.12.0.1 hand sums and what surrounds them to YNNPACK as one kernel, which
    makes the gradient of a layer norm of 4,096 rows wrong by 9 % (`benchmarks/versions.py`). With
    the flag they hand over matmuls alone.

    Args:
      environment: of the process; a choice that it has stays.
      jaxlib: its version; None: the one installed.
    """
    try:
        major, minor = (jaxlib or version("jaxlib")).split(".")[:2]
    except PackageNotFoundError:  # nothing computes here
        return
    flags = environment.get("XLA_FLAGS", "")
    if (major, minor) in (("0", "11"), ("0", "12")) and _FUSED not in flags:
        environment["XLA_FLAGS"] = f"{flags} {_FUSED}=LIBRARY_FUSION_TYPE_DOT".strip()
