"""Runs to the best loss of each compute budget: the observations of laws of compute.

Where a budget has three sizes or more of a kind, the best loss is that at the minimum of their
parabola (`minima.py`); rows of other tables are taken as what they say they are.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.laws_compute import REFERENCE
from moe_ablm.scaling.parabola_fit import ParabolaFit, fit_parabolas
from moe_ablm.scaling.parabolas import IsoFlop
from moe_ablm.scaling.runs import Runs

FEWEST_SIZES = 3  # of a budget with a parabola


def optima(runs: Runs) -> Runs:
    """A row for each kind of model and budget: flops, loss and router, the name of the kind.

    Runs without a budget of three sizes are returned as they are. A kind is a router; where it was
    run with several numbers of experts, the router with each of them.

    Raises:
      UserError: a column is missing, rows are checkpoints, or no parabola has a minimum.
    """
    if not ("params" in runs and "tokens" in runs):
        runs.require(("flops",), "compute")
    if runs.clusters() is not None:
        raise UserError(
            "law compute: the rows are checkpoints of runs, and it is a law of the best loss of "
            "each budget; --law envelope takes curves and has the same law through their envelope"
        )
    kinds = kind_names(runs)
    known = {**runs.columns, "flops": runs.flops(), "router": kinds}
    together = replace(runs, columns=known)
    kind_runs = [together.take(kinds == kind) for kind in np.unique(kinds)]
    if not any(map(_has_budgets, kind_runs)):
        return together
    parts: list[Mapping[str, np.ndarray]] = []
    source: list[str] = []
    notes = list(runs.notes)
    for mine in kind_runs:
        columns, names = mine.columns, mine.source
        if _has_budgets(mine):
            made = fit_parabolas(mine, IsoFlop.for_runs(mine.columns), draws=0)
            columns, names = _minima(made, str(mine["router"][0]))
            notes.append(f"{names[0]} ...: the losses at the minima of {len(names)} budgets count")
            notes += [n for n in made.notes if n not in runs.notes]
        elif "params" in mine:
            lowest = _lowest(mine)
            notes.append(
                f"{mine['router'][0]}: no budget of {FEWEST_SIZES} sizes, so the lowest loss of "
                "each counts, which is above that of the best size; "
                f"{len(mine) - lowest.size} rows are left out"
            )
            mine = mine.take(lowest)
            columns, names = mine.columns, mine.source
        parts.append(columns)
        source += names
    roles = ("flops", "loss", "router")
    joined = {r: np.concatenate([part[r] for part in parts]) for r in roles}
    return Runs(joined, tuple(source), runs.dropped, tuple(notes), runs.data_unit)


def _lowest(runs: Runs) -> np.ndarray:
    """The row of the lowest loss of each budget."""
    groups = IsoFlop.for_runs(runs.columns).groups(runs)
    rows = (np.flatnonzero(groups == budget) for budget in np.unique(groups))
    return np.array([row[np.argmin(runs["loss"][row])] for row in rows])


def kind_names(runs: Runs) -> np.ndarray:
    """The kind of model of each run `[n]`; dense where nothing tells them apart."""
    if "router" not in runs:
        return np.full(len(runs), REFERENCE)
    router = runs["router"].astype(str).astype(object)
    if "experts" in runs:
        for name in np.unique(router.astype(str)):
            mine = router == name
            if np.unique(runs["experts"][mine]).size > 1:
                router[mine] = [f"{name} {e:g}" for e in runs["experts"][mine]]
    return router.astype(str)


def _has_budgets(runs: Runs) -> bool:
    if "params" not in runs:
        return False
    groups = IsoFlop().groups(runs)
    return any(
        np.unique(runs["params"][groups == b]).size >= FEWEST_SIZES for b in np.unique(groups)
    )


def _minima(made: ParabolaFit, kind: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Columns of the minima that lie within the sizes that were run, and a name for each."""
    budgets = [k[7:-1] for k in made.derived if k.startswith("L_star[")]
    inside = [b for b in budgets if made.verdicts[f"a[{b}]"] == "identified"]
    if not inside:
        raise UserError(f"law compute: {kind}: no budget has a minimum in its sizes")
    columns = {
        "flops": np.array([float(b) for b in inside]),
        "loss": np.array([made.derived[f"L_star[{b}]"] for b in inside]),
        "router": np.full(len(inside), kind),
    }
    return columns, tuple(f"{kind} {b} FLOPs" for b in inside)
