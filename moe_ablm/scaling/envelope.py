"""The envelope of training curves: the size with the lowest loss at each compute, and that loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.fit import prepare, solve
from moe_ablm.scaling.inputs import Target, check_inputs
from moe_ablm.scaling.laws_compute import Compute
from moe_ablm.scaling.minima import line
from moe_ablm.scaling.parabolas import Envelope
from moe_ablm.scaling.result import Fit, Interval
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import minimise

BUDGETS = 1500  # compute values at which curves are compared, as in the paper
THINNED = 10  # every so many of them in the law of compute
FEWEST_SIZES = 3
FEWEST_PASSAGES = 4  # of the law of compute: three sizes that are best somewhere between two others
MOST_LOST = 0.05  # share of draws with fewer, where the law of compute has an interval
FEWEST_DRAWS = 20


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
    below the first passage and beyond the last one the best size was not run. Between them the
    lowest loss has a law L_inf + A C^-alpha (`laws_compute.py`), where there are four passages or
    more. `run` identifies a curve, else `params`. Intervals are percentiles of a bootstrap over
    whole curves.

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
    lowest = _lowest(grid, losses, params, np.arange(len(curves)))
    if lowest is None:
        raise UserError("law envelope: the lowest curve passes from size to size fewer than twice")
    kept = _resampled(grid, losses, params, draws, seed)
    values = _regress(lowest, target)
    moved = {name: [_regress(d, target)[name] for d in kept] for name in values}
    intervals = _intervals(moved, draws, level)
    floor, moved_floor = _above_floor(lowest, kept)
    if all(len(v) >= (1 - MOST_LOST) * draws for v in moved_floor.values()):
        intervals |= _intervals(moved_floor, draws, level)
    open_ended = [name for name in floor if name not in intervals]
    derived = {k: v for k, v in values.items() if k in ("N_opt", "D_opt")}
    coefficients = {k: v for k, v in (values | floor).items() if k not in derived}
    return Fit(
        law=law,
        n=len(curves),
        coefficients=coefficients,
        objective=float("nan"),
        huber_delta=float("inf"),
        delta_source="least squares on the log-log envelope",
        status="exact" if lowest.passages.size == 2 else "converged",
        identifiable={name: name not in open_ended for name in coefficients},
        verdicts={n: "not judged" if n in open_ended else "identified" for n in coefficients},
        intervals=intervals,
        derived=derived,
        target=target.copy(),
        notes=(*runs.notes, *_few(lowest.passages.size), *_without_interval(open_ended)),
        data_unit=runs.data_unit,
        runs=runs,
    )


def _without_interval(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{', '.join(names)}: no interval, as too many draws have too few passages"]


def _few(passages: int) -> list[str]:
    """Notes on what so few passages cannot tell."""
    notes = []
    if passages == 2:
        notes.append("two passages from size to size: the line through them is exact")
    if passages < FEWEST_PASSAGES:
        notes.append(f"{passages} passages: L_inf + A C^-alpha needs {FEWEST_PASSAGES}")
    return notes


def _intervals(
    moved: Mapping[str, Sequence[float] | np.ndarray], draws: int, level: float
) -> dict[str, tuple[Interval, ...]]:
    """Percentiles over draws of whole curves."""
    out: dict[str, tuple[Interval, ...]] = {}
    for name, values in moved.items():
        if len(values) < FEWEST_DRAWS:
            continue
        note = f"{len(values)} draws of curves"
        if len(values) < draws:
            note += f"; {draws - len(values)} draws had too few passages"
        low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
        spread = float(np.std(values, ddof=1))
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


@dataclass(frozen=True)
class Lowest:
    """The lowest of some curves on a grid `[g]` of ln C: ln N and loss of the lowest.

    `seen` are the grid points that a curve reaches, `passages` indices of these before which the
    lowest curve is of another size than after.
    """

    log_c: np.ndarray
    log_n: np.ndarray
    loss: np.ndarray
    seen: np.ndarray
    passages: np.ndarray

    def between(self) -> np.ndarray:
        """Which grid points lie between the first passage and the last, `[g]`."""
        at = np.flatnonzero(self.seen)[self.passages[[0, -1]]]
        index = np.arange(self.log_c.size)
        return self.seen & (index > at[0]) & (index <= at[1])


def _resampled(
    grid: np.ndarray, losses: np.ndarray, params: np.ndarray, draws: int, seed: int
) -> list[Lowest]:
    """Envelopes of draws of whole curves, of those that have two passages."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 4]))
    count = len(params)
    drawn = [_lowest(grid, losses, params, rng.integers(0, count, count)) for _ in range(draws)]
    return [d for d in drawn if d is not None]


def _lowest(
    grid: np.ndarray, losses: np.ndarray, params: np.ndarray, chosen: np.ndarray
) -> Lowest | None:
    """The envelope of the chosen curves; None with fewer than two passages."""
    part = losses[chosen]
    lowest = np.argmin(part, axis=0)
    loss = part[lowest, np.arange(grid.size)]
    seen = np.isfinite(loss)
    log_n = np.log(params[chosen][lowest])
    passages = np.flatnonzero(np.diff(log_n[seen]))
    return Lowest(grid, log_n, loss, seen, passages) if passages.size >= 2 else None


def _regress(lowest: Lowest, target: Target) -> dict[str, float]:
    """Lines through the passages and through all of the envelope, and what the target asks."""
    log_c, log_n, at = lowest.log_c[lowest.seen], lowest.log_n[lowest.seen], lowest.passages
    intercept, slope = line(0.5 * (log_c[at] + log_c[at + 1]), 0.5 * (log_n[at] + log_n[at + 1]))
    loss_intercept, loss_slope = line(log_c, np.log(lowest.loss[lowest.seen]))
    out = {
        "slope": float(slope),
        "intercept": float(intercept),
        "loss_slope": float(loss_slope),
        "loss_intercept": float(loss_intercept),
    }
    if "flops" in target:
        wanted = np.log(target["flops"])
        n_opt = np.exp(intercept + slope * wanted)
        out |= {"N_opt": float(n_opt), "D_opt": float(np.exp(wanted) / 6.0 / n_opt)}
    return out


def _above_floor(
    lowest: Lowest, drawn: Sequence[Lowest]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """L_inf, A and alpha of the lowest loss between the passages, and those of the draws.

    Draws with fewer passages than it takes have none.
    """
    if lowest.passages.size < FEWEST_PASSAGES:
        return {}, {}
    rows = [lowest, *(d for d in drawn if d.passages.size >= FEWEST_PASSAGES)]
    loss = np.stack([np.where(r.between(), r.loss, 1.0)[::THINNED] for r in rows])
    weights = np.stack([r.between()[::THINNED] for r in rows]).astype(float)
    flops = np.exp(lowest.log_c[::THINNED])
    points = Runs({"flops": flops, "loss": loss[0]}, tuple(map(str, flops)))
    setup = prepare(Compute(), points, float("inf"), {})
    one = replace(setup, problem=replace(setup.problem, weights=weights[0]))
    best, _ = solve(one)
    problem = replace(setup.problem, log_loss=np.log(loss), weights=weights)
    ends = minimise(problem, np.repeat(best.theta, len(rows), axis=0))
    natural = np.exp(setup.law.shift(ends.theta, setup.centre)[:, :2])
    found = {"L_inf": natural[:, 0], "A": natural[:, 1], "alpha": ends.theta[:, 2]}
    moved = {name: values[1:][ends.converged[1:]] for name, values in found.items()}
    return {name: float(values[0]) for name, values in found.items()}, moved
