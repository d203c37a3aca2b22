"""Bootstrap over runs, and what it says of coefficients, derived quantities and new runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import make_inputs
from moe_ablm.scaling.laws import Derived
from moe_ablm.scaling.result import Fit, Interval
from moe_ablm.scaling.solver import minimise

FEWEST_DRAWS = 20  # that an interval is made of
MOST_WEIGHTS = 10**8  # draws times runs: beyond, the weights alone take gigabytes


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


def resample(cells: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, str]:
    """How often each run is drawn, `[draws, runs]`, and the scheme in words.

    Whole runs are drawn with replacement. Where every cell has replicates they are drawn within
    their cell, so that each draw keeps the design; a cell of one run would then never change, so
    otherwise runs are drawn from all runs.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    runs = cells.size
    counts = np.bincount(cells)
    out = np.zeros((draws, runs))
    rows = np.arange(draws)[:, None]
    if counts.min() < 2:
        np.add.at(out, (rows, rng.integers(0, runs, (draws, runs))), 1.0)
        return out, "runs"
    for cell, count in enumerate(counts):
        members = np.flatnonzero(cells == cell)
        np.add.at(out, (rows, members[rng.integers(0, count, (draws, count))]), 1.0)
    return out, "runs within cells"


def bootstrap(fit: Fit, draws: int = 4000, seed: int = 0) -> Bootstrap:
    """Refits the law to resampled runs, all draws as one batch, from the fit's own minimum.

    The same seed gives the same draws whatever the machine. A draw that loses a coefficient's
    runs may end at a bound; the share of such draws is reported.
    """
    if draws * len(fit.runs) > MOST_WEIGHTS:
        raise UserError(
            f"--bootstrap {draws}: {draws} draws of {len(fit.runs)} runs do not fit in memory; use "
            f"at most {MOST_WEIGHTS // len(fit.runs)}"
        )
    weights, scheme = resample(fit.runs.cells(), draws, seed)
    problem = replace(fit.problem, weights=weights[:, fit.index])
    ends = minimise(problem, np.repeat(fit.theta[None], draws, axis=0))
    width = 1e-6 * (problem.high - problem.low)

    def share(hit: np.ndarray) -> dict[str, float]:
        hit = (hit & problem.free).mean(axis=0)
        return {n: float(s) for n, s in zip(fit.law.names, hit, strict=True) if s > 0}

    low, high = ends.theta <= problem.low + width, ends.theta >= problem.high - width
    return Bootstrap(ends.theta, ends.converged, share(low), share(high), scheme)


def coefficient_draws(fit: Fit, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Free coefficients in natural units for draws `[B, K]`, each `[B]`."""
    natural = fit.law.shift(theta, fit.centre)
    free = fit.problem.free
    return {p.name: p.report(natural[:, k]) for k, p in enumerate(fit.law.parameters) if free[k]}


def quantities(fit: Fit) -> list[Derived]:
    """Free coefficients (their internal, natural-unit values) and derived quantities."""

    def natural(k: int):
        return lambda theta: fit.law.shift(theta, fit.centre)[:, k]

    out = [
        Derived(p.name, p.meaning, natural(k), p.log)
        for k, p in enumerate(fit.law.parameters)
        if fit.problem.free[k]
    ]
    return out + fit.law.derived(fit.centre, fit.target)


def bootstrap_intervals(
    fit: Fit, boot: Bootstrap, level: float = 0.95
) -> dict[str, tuple[Interval, ...]]:
    """Percentile intervals and standard errors of coefficients and derived quantities."""
    out = {}
    for q in quantities(fit):
        with np.errstate(all="ignore"):
            values = q.report(q.function(boot.usable))
        values = values[np.isfinite(values)]
        if values.size < FEWEST_DRAWS:
            continue
        if np.ptp(values) <= 1e-12 * np.abs(values[0]):  # nothing free moves it
            continue
        tail = 50 * (1 - level)
        ends: list[float | None] = [float(v) for v in np.percentile(values, [tail, 100 - tail])]
        spread: float | None = float(values.std(ddof=1))
        note = f"{values.size} draws of {boot.scheme}"
        for end, (side, shares) in enumerate((("lower", boot.at_low), ("upper", boot.at_high))):
            if shares.get(q.name, 0.0) > 0.5 * (1 - level):  # the bound's end, not the data's
                note += f"; {shares[q.name]:.1%} at the {side} bound: open on that side"
                ends[end], spread = None, None
        out[q.name] = (Interval("bootstrap", level, ends[0], ends[1], spread, note),)
    return out


def prediction_interval(
    fit: Fit,
    boot: Bootstrap,
    columns: Mapping[str, np.ndarray],
    level: float = 0.95,
    new_run: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Low and high loss `[m]` at inputs in natural units.

    The spread of the draws, plus for a new run one of the fit's own residuals (scaled up for the
    parameters that were spent on them).
    """
    x = make_inputs(columns, fit.centre, fit.law.routers)
    log_loss = fit.law.log_loss(boot.usable, x)
    if new_run:
        rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
        residuals = -fit.problem.residuals(fit.theta[None])[0]
        freedom = max(residuals.size - int(fit.problem.free.sum()), 1)
        residuals = residuals * np.sqrt(residuals.size / freedom)
        log_loss = log_loss + rng.choice(residuals, log_loss.shape)
    tail = 50 * (1 - level)
    low, high = np.percentile(log_loss, [tail, 100 - tail], axis=0)
    return np.exp(low), np.exp(high)


def merge(*parts: Mapping[str, tuple[Interval, ...]]) -> dict[str, tuple[Interval, ...]]:
    """Intervals of several methods side by side."""
    out: dict[str, tuple[Interval, ...]] = {}
    for part in parts:
        for name, items in part.items():
            out[name] = (*out.get(name, ()), *items)
    return out
