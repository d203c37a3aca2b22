"""A sweep on disk: the planned cells in `sweep.json`, beside their work directories."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cell import Cell
from moe_ablm.errors import UserError
from moe_ablm.files import write_json

PLAN = "sweep.json"


@dataclass(frozen=True)
class Planned:
    """A cell and what is known about it before it runs.

    Attributes:
      cell: for the launcher.
      axes: the point's values as text, for tables.
      steps, seed, params_total, params_active, experts, router: of its config.
      corpus_tokens: of its training data, in one epoch.
      unique_tokens: the same, counting equal chains once; None in older plans, which stored
        `corpus_tokens` under this name.
    """

    cell: Cell
    axes: dict[str, str]
    steps: int
    seed: int
    params_total: int
    params_active: int
    experts: int
    router: str
    corpus_tokens: int
    unique_tokens: int | None


def write_plan(out: Path, study: str, cells: Sequence[Planned]) -> None:
    """Writes `sweep.json`; cells of earlier plans stay in it, beside these.

    Those may wait in a queue, or for a launcher that runs, and begin later.

    Raises:
      UserError: the folder holds another study, or cannot be written.
    """
    now = {p.cell.fingerprint for p in cells}
    before: list[Planned] = []
    if (out / PLAN).exists():
        try:
            name, *parts = _read(out)
            before = [p for part in parts for p in part]
        except UserError as error:
            print(f"{error}; writing it again", file=sys.stderr)
            name = study
        if name != study:
            raise UserError(f"--out {out} holds the sweep {name!r}, not {study!r}: use another")
    earlier = [p for p in before if p.cell.fingerprint not in now]
    content = {
        "study": study,
        "cells": [_to_json(p) for p in cells],
        "earlier": [_to_json(p) for p in earlier],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, content)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


def read_plan(out: Path) -> tuple[str, list[Planned]]:
    """Name of the study, its cells, and those of earlier plans that have a directory.

    The folder may have moved since.

    Raises:
      UserError: there is no plan, or it is damaged.
    """
    study, cells, earlier = _read(out)
    return study, cells + [p for p in earlier if p.cell.workdir.exists()]


def _read(out: Path) -> tuple[str, list[Planned], list[Planned]]:
    """Study, cells of the newest plan, cells of earlier ones."""
    file = out / PLAN
    try:
        content = json.loads(file.read_text())
        parts = content["cells"], content.get("earlier", [])
        cells, earlier = ([_from_json(entry, out.resolve()) for entry in p] for p in parts)
        return content["study"], cells, earlier
    except FileNotFoundError:
        raise UserError(f"{file} is not there: expected the --out of a sweep") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}): the sweep's command with --launcher=print writes it "
            "again"
        ) from error


def _to_json(p: Planned) -> dict:
    values = {k: v for k, v in vars(p).items() if k != "cell"}
    cell = {k: v for k, v in vars(p.cell).items() if k != "workdir"}
    return {"cell": cell, **values}


def _from_json(entry: dict, out: Path) -> Planned:
    cell = dict(entry["cell"])
    name = cell["name"]
    if not re.fullmatch(r"[A-Za-z0-9.=-]+", name) or name.startswith("."):
        raise ValueError(f"cell name {name!r}")
    cell["argv"] = tuple(cell["argv"])
    rest = {k: v for k, v in entry.items() if k != "cell"}
    if "corpus_tokens" not in rest:
        rest |= {"corpus_tokens": rest["unique_tokens"], "unique_tokens": None}
    return Planned(cell=Cell(workdir=out / name, **cell), **rest)
