"""Raw rows of one input, each with its place."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row of a table: its place, and its values by column name (text or numbers)."""

    source: str
    values: dict[str, Any]


@dataclass
class Sheet:
    """All rows of one input, and what was left out with the reason."""

    path: Path
    header: list[str]
    rows: list[Row]
    is_runs: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
