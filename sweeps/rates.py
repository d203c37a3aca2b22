"""Learning rates of cells by a law that `python -m moe_ablm fit --law learning_rate` has fitted."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_ablm.errors import UserError, counted
from sweeps.planned import Planned

FAR = 2.0  # times the least or the most of the fit


@lru_cache
def rate_law(folder: Path) -> Any:
    """The fit; raises UserError where it is of another law."""
    from moe_ablm.scaling.result import load

    fit = load(folder)
    if fit.law.name != "learning_rate":
        raise UserError(
            f"--rate-law {folder}: a fit of law {fit.law.name}, expected learning_rate (`python -m "
            "moe_ablm fit --law learning_rate`)"
        )
    return fit


def rate_of_law(folder: Path, planned: Planned) -> float:
    """The peak rate of a cell by its active parameters and tokens, to three digits.

    Digits further on say nothing, and would be others with another sum.
    """
    inputs = {"params": float(planned.params_active), "tokens": planned.cell.tokens}
    return float(f"{float(rate_law(folder).predict(**inputs)):.3g}")


def rates_lines(folder: Path, cells: Sequence[Planned]) -> list[str]:
    """The rates of each size, and a warning where cells lie far outside those of the fit."""
    by_size: dict[int, set[float]] = {}
    for p in cells:
        by_size.setdefault(p.params_active, set()).add(rate_of_law(folder, p))
    told = ", ".join(
        " to ".join(f"{rate:g}" for rate in sorted({min(rates), max(rates)})) + f" ({n:,})"
        for n, rates in sorted(by_size.items())
    )
    lines = [f"learning rates by {folder} (active parameters): {told}"]
    asked = {"params": [float(p.params_active) for p in cells]}
    if rate_law(folder).coefficients.get("by_tokens"):
        asked["tokens"] = [p.cell.tokens for p in cells]
    for name, values in asked.items():
        lines += _far(name, values, _seen(folder, name))
    return lines


def _seen(folder: Path, name: str) -> list[float]:
    """What the cells of the fit had; empty where it is of before fits kept them."""
    path = folder / "fit.json" if folder.is_dir() else folder
    found = [cell[name] for cell in json.loads(path.read_text()).get("cells", [])]
    return [value for value in found if value is not None]


def _far(name: str, values: Sequence[float], seen: Sequence[float]) -> list[str]:
    if not seen:
        return [f"  warning: the fit does not say of which {name} it is"]
    low, high = min(seen), max(seen)
    far = sum(not low / FAR <= value <= FAR * high for value in values)
    if not far:
        return []
    return [
        f"  warning: {far} of {counted(len(values), 'cell')} lie more than {FAR:g} times outside "
        f"the {name} of the fit, {low:,.0f} to {high:,.0f}"
    ]
