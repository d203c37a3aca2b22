"""Mixture-of-experts antibody language models in JAX: `moe_ablm.load` is the way in from Python."""

from typing import TYPE_CHECKING, Any

from moe_ablm.xla_flags import require_right_sums

if TYPE_CHECKING:
    from moe_ablm.api import load as load

require_right_sums()


def __getattr__(name: str) -> Any:
    if name == "load":  # what it needs is imported when it is called for
        from moe_ablm.api import load

        return load
    if name == "__version__":
        from importlib.metadata import version

        return version("moe_ablm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
