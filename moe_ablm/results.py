"""`results.jsonl` of a run, and the versions of what computed it."""

import importlib.metadata
import json
import subprocess
from pathlib import Path

from moe_ablm.errors import UserError
from moe_ablm.files import json_text, require_local, write_atomically

SHORTER = "ended-at-"  # begins the name of the folder with what a run was before it was extended


def is_extended(file: Path) -> bool:
    """Whether a file of a run lies in the run that goes on from it."""
    folder = file.parent
    return folder.name.startswith(SHORTER) and (folder.parent / "results.jsonl").exists()


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


def read_evaluated(run: Path) -> list[dict]:
    """The lines of a run that has evaluated at least once.

    Raises:
      UserError: it has not.
    """
    require_local(run, "--run")
    file = run / "results.jsonl"
    records = read_results(file)
    if not any(r["kind"] == "eval" for r in records):
        raise UserError(
            f"{file}: {'holds no evaluation yet' if file.exists() else 'is not there'}; --run must "
            "be the work directory of a run that has evaluated at least once"
        )
    return records


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`, atomically."""
    kept = [json_text(r) for r in read_results(path) if r["step"] <= step]
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


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" where files differ from it.

    None where there is no checkout, or no git.
    """
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
