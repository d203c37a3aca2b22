"""Learning rates of cells by a law that `python -m moe_ablm fit --law learning_rate` has fitted."""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_ablm.errors import UserError
from sweeps.planned import Planned

FAR = 2.0  # times the smallest or largest model of the fit


@lru_cache
def rate_law(folder: Path) -> Any:
    """The fit; raises UserError where it is of another law."""
    from moe_ablm.scaling import load

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
    """The rate of each size, and which lie far outside the models that the law has seen."""
    rates = {p.params_active: rate_of_law(folder, p) for p in cells}
    told = ", ".join(f"{rate:g} ({n:,} active parameters)" for n, rate in sorted(rates.items()))
    lines = [f"learning rates by {folder}: {told}"]
    path = folder / "fit.json" if folder.is_dir() else folder
    seen = [cell["params"] for cell in json.loads(path.read_text()).get("cells", [])]
    if seen:
        ends = math.log(min(seen) / FAR), math.log(FAR * max(seen))
        far = sum(not ends[0] <= math.log(n) <= ends[1] for n in rates)
        if far:
            lines.append(
                f"  warning: {far} of {len(rates)} sizes lie more than {FAR:g} times outside those "
                f"of the fit, {min(seen):,.0f} to {max(seen):,.0f}"
            )
    return lines
