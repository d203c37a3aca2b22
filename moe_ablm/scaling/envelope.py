"""The envelope of training curves: which size has the lowest loss at each compute."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import Target, check_inputs
from moe_ablm.scaling.minima import line
from moe_ablm.scaling.parabolas import Envelope
from moe_ablm.scaling.result import Fit, Interval
from moe_ablm.scaling.runs import Runs

BUDGETS = 1500  # compute values at which curves are compared, as in the paper
FEWEST_SIZES = 3


def fit_envelope(
    runs: Runs,
    draws: int = 1000,
    seed: int = 0,
    target: Target | None = None,
    level: float = 0.95,
) -> Fit:
    """Hoffmann et al. 2022, section 3.1, from whole training curves (one row a step).

    Each of 1,500 budgets has a curve with the lowest interpolated loss. Where the lowest curve
    changes from one size to another, the best size lies between them, and the line of ln N_opt on
    ln C goes through these passages. A line through all budgets, as in the paper, is too flat:
    below the first passage and beyond the last one the best size was not run. `run` identifies a
    curve, else `params`. Intervals are percentiles of a bootstrap over whole curves.

    Raises:
      UserError: fewer than three sizes have curves of two points, or they never overlap.
    """
    law = Envelope()
    law.require(runs)
    target = target or Target()
    check_inputs("--target", target)
    curves, params = training_curves(runs)
    if np.unique(params).size < FEWEST_SIZES:
        raise UserError(
            f"law envelope: training curves of {np.unique(params).size} sizes; it needs at least "
            f"{FEWEST_SIZES}, each with two or more steps (give run= and step=, or results.jsonl)"
        )
    grid, losses = on_grid(curves)
    values = _regress(grid, losses, params, np.arange(len(curves)), target)
    if values is None:
        raise UserError("law envelope: the lowest curve passes from size to size fewer than twice")
    passages = int(values.pop("passages"))
    notes = list(runs.notes)
    if passages == 2:
        notes.append("two passages from size to size: the line through them is exact")
    intervals = _intervals(values, grid, losses, params, draws, seed, target, level)
    derived = {k: v for k, v in values.items() if k in ("N_opt", "D_opt")}
    coefficients = {k: v for k, v in values.items() if k not in derived}
    return Fit(
        law=law,
        n=len(curves),
        coefficients=coefficients,
        objective=float("nan"),
        huber_delta=float("inf"),
        delta_source="least squares on the log-log envelope",
        status="exact" if passages == 2 else "converged",
        identifiable=dict.fromkeys(coefficients, True),
        verdicts=dict.fromkeys(coefficients, "identified"),
        intervals=intervals,
        derived=derived,
        target=target.copy(),
        notes=tuple(notes),
        data_unit=runs.data_unit,
        runs=runs,
    )


def _intervals(
    values: Mapping[str, float],
    grid: np.ndarray,
    losses: np.ndarray,
    params: np.ndarray,
    draws: int,
    seed: int,
    target: Target,
    level: float,
) -> dict[str, tuple[Interval, ...]]:
    """Percentiles over draws of whole curves."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 4]))
    count = len(params)
    drawn = [
        _regress(grid, losses, params, rng.integers(0, count, count), target) for _ in range(draws)
    ]
    kept = [d for d in drawn if d is not None]
    if len(kept) < 20:
        return {}
    note = f"{len(kept)} draws of curves"
    if len(kept) < draws:
        note += f"; {draws - len(kept)} draws had fewer than two passages"
    out: dict[str, tuple[Interval, ...]] = {}
    for name in values:
        column = np.array([d[name] for d in kept])
        low, high = np.percentile(column, [50 * (1 - level), 50 * (1 + level)])
        spread = float(column.std(ddof=1))
        out[name] = (Interval("bootstrap", level, float(low), float(high), spread, note),)
    return out


def training_curves(runs: Runs) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Curves (ln C, loss), each with at least two points, and the size of each."""
    label = runs["run"] if "run" in runs else runs["params"].astype(str)
    log_c = np.log(runs.flops())
    curves, params = [], []
    for name in np.unique(label):
        members = np.flatnonzero(label == name)
        c, first = np.unique(log_c[members], return_index=True)
        if c.size >= 2:
            curves.append((c, runs["loss"][members][first]))
            params.append(runs["params"][members[0]])
    return curves, np.array(params)


def on_grid(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Values of ln C `[g]` and the loss of each curve there `[curves, g]`.

    A curve is not extrapolated: beyond its ends it is infinite, and cannot be the lowest.
    """
    low, high = min(c[0][0] for c in curves), max(c[0][-1] for c in curves)
    grid = np.linspace(low, high, BUDGETS)
    return grid, np.stack([np.interp(grid, c, y, left=np.inf, right=np.inf) for c, y in curves])


def _regress(
    grid: np.ndarray,
    losses: np.ndarray,
    params: np.ndarray,
    chosen: np.ndarray,
    target: Target,
) -> dict[str, float] | None:
    """Coefficients of the envelope of the chosen curves; None with fewer than two passages."""
    part = losses[chosen]
    lowest = np.argmin(part, axis=0)
    loss = part[lowest, np.arange(grid.size)]
    good = np.isfinite(loss)
    log_n, log_c = np.log(params[chosen][lowest[good]]), grid[good]
    changes = np.flatnonzero(np.diff(log_n))
    if changes.size < 2:
        return None
    intercept, slope = line(
        0.5 * (log_c[changes] + log_c[changes + 1]), 0.5 * (log_n[changes] + log_n[changes + 1])
    )
    loss_intercept, loss_slope = line(log_c, np.log(loss[good]))
    out = {
        "slope": float(slope),
        "intercept": float(intercept),
        "loss_slope": float(loss_slope),
        "loss_intercept": float(loss_intercept),
        "passages": float(changes.size),
    }
    if "flops" in target:
        log_c = np.log(target["flops"])
        n_opt = np.exp(intercept + slope * log_c)
        out |= {"N_opt": float(n_opt), "D_opt": float(np.exp(log_c) / 6.0 / n_opt)}
    return out
