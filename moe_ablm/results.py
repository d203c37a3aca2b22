"""`results.jsonl` of a run, and versions of packages."""

import importlib.metadata
import json
from pathlib import Path

from moe_ablm.files import write_atomically


def read_results(path: Path) -> list[dict]:
    """The whole lines of a `results.jsonl`; a line cut off by a crash at its end is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`, atomically."""
    kept = [json.dumps(r) for r in read_results(path) if r["step"] <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept))


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each package; one that is not installed is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
