"""Files of sequences in, batches with the study's columns out, every row accounted for.

Help and refusals need the names of formats and options, not pyarrow: what needs it is imported when
it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_ablm.data.readers.options import FORMATS, Reading

if TYPE_CHECKING:
    from moe_ablm.data.readers.columns import parse_columns
    from moe_ablm.data.readers.report import Report
    from moe_ablm.data.readers.source import Source, open_sources

__all__ = ["FORMATS", "Reading", "Report", "Source", "open_sources", "parse_columns"]
_MODULES = {"Report": "report", "Source": "source", "open_sources": "source",
            "parse_columns": "columns"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
