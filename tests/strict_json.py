"""Reads JSON as other programs do: Python's NaN and Infinity are no JSON."""

import json
from pathlib import Path
from typing import Any


def read_strictly(path: Path) -> list[Any]:
    """The values of a `.json` file (one) or of a `.jsonl` file (one a line)."""

    def refuse(constant: str):
        raise ValueError(f"{path}: {constant}")

    text = path.read_text(encoding="utf-8")
    texts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(each, parse_constant=refuse) for each in texts]


def read_all_strictly(directory: Path) -> set[str]:
    """Reads every such file in a directory, but for orbax's; returns their names."""
    files = [p for p in directory.rglob("*.json*") if "checkpoints" not in p.parts]
    for path in files:
        read_strictly(path)
    return {path.name for path in files}
