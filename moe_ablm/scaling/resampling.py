"""Refits to resampled runs, and their percentile intervals."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.identify import STANDS_ON, UNMOVED
from moe_ablm.scaling.quantities import quantities
from moe_ablm.scaling.result import Interval, SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import Minimum, Problem, minimise

FEWEST_DRAWS = 20  # of an interval
FEWEST_IN_CELL = 10  # runs of each cell where draws are made within cells
MOST_WEIGHTS = 10**8  # draws times runs; more weights than these take gigabytes
REFITTED = 30  # iterations from each start; the best one then goes on to the end
ROUND, MORE = 100, 8  # iterations until the Hessian is made anew, and how often


@dataclass(frozen=True)
class Bootstrap:
    """Refits to resampled runs: `theta [draws, K]` in the fit's centred units."""

    theta: np.ndarray
    converged: np.ndarray
    at_low: Mapping[str, float]  # share of draws in which a parameter ended at its lower bound
    at_high: Mapping[str, float]
    scheme: str

    @property
    def usable(self) -> np.ndarray:
        return self.theta[self.converged]


def resample_rows(runs: Runs, draws: int, seed: int) -> tuple[np.ndarray, str]:
    """How often each row is drawn, `[draws, rows]`: a run is drawn with all its checkpoints."""
    run = runs.clusters()
    if run is None:
        return resample(runs.cells(), draws, seed)
    first = np.unique(run, return_index=True)[1]
    weights, scheme = resample(_alike(run, runs.cells())[first], draws, seed)
    return weights[:, run], f"whole {scheme} ({first.size} with {run.size} checkpoints)"


def _alike(run: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """An integer per row, equal for runs with the same set of cells, `[rows]`."""
    sets = [tuple(np.unique(cells[run == r])) for r in range(run.max() + 1)]
    number = {s: i for i, s in enumerate(dict.fromkeys(sets))}
    return np.array([number[s] for s in sets])[run]


def resample(cells: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, str]:
    """How often each run is drawn, `[draws, runs]`, and the scheme in words.

    Whole runs are drawn with replacement. Where every cell has many, runs are drawn within their
    cell, so that each draw keeps the design. Otherwise they are drawn from all runs: a cell of one
    run would never change, and draws within cells of m have a variance of (m - 1) / m.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    runs = cells.size
    counts = np.bincount(cells)
    out = np.zeros((draws, runs))
    rows = np.arange(draws)[:, None]
    if counts.min() < FEWEST_IN_CELL:
        np.add.at(out, (rows, rng.integers(0, runs, (draws, runs))), 1.0)
        return out, "runs"
    for cell, count in enumerate(counts):
        members = np.flatnonzero(cells == cell)
        np.add.at(out, (rows, members[rng.integers(0, count, (draws, count))]), 1.0)
    return out, "runs within cells"


def bootstrap(fit: SmoothFit, draws: int = 4000, seed: int = 0) -> Bootstrap:
    """Refits the law to resampled runs, all draws as one batch, from the fit's own minimum.

    The same seed gives the same draws whatever the machine. A draw that loses a coefficient's
    runs may end at a bound; the share of such draws is reported.
    """
    if draws * len(fit.runs) > MOST_WEIGHTS:
        raise UserError(
            f"--bootstrap {draws}: {draws} draws of {len(fit.runs)} runs do not fit in memory; use "
            f"at most {MOST_WEIGHTS // len(fit.runs)}"
        )
    weights, scheme = resample_rows(fit.runs, draws, seed)
    problem = replace(fit.problem, weights=weights[:, fit.index])
    ends = refit(fit, problem, draws)
    width = 1e-6 * (problem.high - problem.low)

    def share(hit: np.ndarray) -> dict[str, float]:
        hit = (hit & problem.free).mean(axis=0)
        return {n: float(s) for n, s in zip(fit.law.names, hit, strict=True) if s > 0}

    low, high = ends.theta <= problem.low + width, ends.theta >= problem.high - width
    return Bootstrap(ends.theta, ends.converged, share(low), share(high), scheme)


def refit(fit: SmoothFit, problem: Problem, size: int) -> Minimum:
    """The minimum of each row of a batch of `size` problems, the best of the fit's starts.

    What has not converged goes on from a new Hessian: the valley of a badly known direction bends.
    """
    if len(fit.starts) == 1:
        return _go_on(problem, minimise(problem, np.repeat(fit.theta[None], size, axis=0)))
    theta, value = np.empty((size, fit.theta.size)), np.full(size, np.inf)
    for start in fit.starts:
        ends = minimise(problem, np.repeat(start[None], size, axis=0), REFITTED)
        better = ends.value < value
        theta[better], value[better] = ends.theta[better], ends.value[better]
    return _go_on(problem, minimise(problem, theta, ROUND))


def _go_on(problem: Problem, ends: Minimum) -> Minimum:
    parts = {f.name: getattr(ends, f.name).copy() for f in fields(ends)}
    for _ in range(MORE):
        rows = np.flatnonzero(~parts["converged"])
        if rows.size == 0:
            break
        again = minimise(problem.rows(rows), parts["theta"][rows], ROUND)
        for f in fields(again):
            parts[f.name][rows] = getattr(again, f.name)
    return Minimum(**parts)


def bootstrap_intervals(
    fit: SmoothFit, boot: Bootstrap, level: float = 0.95
) -> dict[str, tuple[Interval, ...]]:
    """Percentile intervals and standard errors of coefficients and derived quantities."""
    out: dict[str, tuple[Interval, ...]] = {}
    positive = {p.name for p in fit.law.parameters if p.log}
    said = {**fit.verdicts, **fit.derived_verdicts}
    unmoved = {n for n, v in said.items() if UNMOVED in v or STANDS_ON in v}
    for q in quantities(fit):
        if q.name in unmoved:  # where it ends is where it began
            continue
        with np.errstate(all="ignore"):
            values = q.report(q.function(boot.usable))
        values = values[np.isfinite(values)]
        if values.size < FEWEST_DRAWS:
            continue
        if np.ptp(values) <= 1e-12 * np.abs(values[0]):  # depends on fixed coefficients only
            continue
        tail = 50 * (1 - level)
        ends: list[float | None] = [float(v) for v in np.percentile(values, [tail, 100 - tail])]
        spread: float | None = float(values.std(ddof=1))
        note = f"{values.size} draws of {boot.scheme}"
        for end, (side, shares) in enumerate((("lower", boot.at_low), ("upper", boot.at_high))):
            if shares.get(q.name, 0.0) > 0.5 * (1 - level):  # the bound's end, not the data's
                note += f"; {shares[q.name]:.1%} at the {side} bound: open on that side"
                ends[end], spread = None, None
        spread_log = float(np.log(values).std(ddof=1)) if spread and values.min() > 0 else None
        if q.name not in positive:
            spread_log = None
        out[q.name] = (
            Interval("bootstrap", level, ends[0], ends[1], spread, note, se_log=spread_log),
        )
    return out
