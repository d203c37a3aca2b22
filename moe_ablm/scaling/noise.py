"""Seed noise: its sd from replicates, the lack-of-fit test, and sensitivity to Huber's delta."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import minimise


def pure_error(runs: Runs) -> tuple[float, int]:
    """Pooled sd of ln L within cells of one config, and its degrees of freedom (0: none)."""
    cells, log_loss = runs.cells(), np.log(runs["loss"])
    run = runs.clusters()
    if run is not None:  # checkpoints of one run in one cell are no replicates: their mean counts
        pair = np.unique(cells * (run.max() + 1) + run, return_inverse=True)[1].reshape(-1)
        first = np.unique(pair, return_index=True)[1]
        log_loss = np.bincount(pair, log_loss) / np.bincount(pair)
        linked, cells, run = runs.linked_cells()[first], cells[first], run[first]
    counts = np.bincount(cells)
    means = np.bincount(cells, log_loss) / np.maximum(counts, 1)
    freedom = int(np.sum(counts - 1))
    if freedom == 0:
        return float("nan"), 0
    sd = float(np.sqrt(np.sum((log_loss - means[cells]) ** 2) / freedom))
    if run is not None:  # a run errs in all its checkpoints alike
        freedom = min(freedom, np.unique(run).size - np.unique(linked).size)
    return sd, freedom


@dataclass(frozen=True)
class LackOfFit:
    """F test of a law's misfit against seed noise: at a small p the law itself is wrong."""

    seed_sd: float
    freedom: tuple[int, int]  # of the lack of fit, of the pure error
    statistic: float
    p_value: float


def lack_of_fit(fit: SmoothFit) -> LackOfFit | None:
    """Fisher's test on ln L; None without replicates or spare cells, and with checkpoints."""
    from scipy.special import fdtrc

    runs = fit.runs
    sd, pure = pure_error(runs)
    cells = runs.cells()
    spare = int(cells.max()) + 1 - len(fit.identifiable)
    if runs.clusters() is not None or pure == 0 or spare <= 0 or sd == 0.0:
        return None
    residuals = fit.by_run(fit.residuals())
    counts = np.bincount(cells)
    means = np.bincount(cells, residuals) / counts
    misfit = float(np.sum(counts * means**2)) / spare
    statistic = misfit / sd**2
    return LackOfFit(sd, (spare, pure), statistic, float(fdtrc(spare, pure, statistic)))


def delta_sensitivity(fit: SmoothFit) -> list[tuple[float, Mapping[str, float], float]]:
    """The fit at deltas around its own: (delta, coefficients, sum of |residual|).

    The deltas go from nearly least absolute deviations to least squares. Each fit starts from the
    one at the delta next to it, beginning at the fit's own.
    """
    base = fit.huber_delta if np.isfinite(fit.huber_delta) else 1e-3
    down = [base, base / 3, base / 10, base / 100]
    up = [base * 3, base * 10, np.inf]
    law = fit.law
    out = []
    for path in (down, up):
        theta = fit.theta[None]
        for delta in path:
            problem = replace(fit.problem, delta=delta)
            theta = minimise(problem, theta).theta
            natural = law.shift(theta[0], fit.centre)
            values = {
                p.name: float(p.report(v)) for p, v in zip(law.parameters, natural, strict=True)
            }
            out.append((delta, values, float(np.abs(problem.residuals(theta)).sum())))
    return sorted(out, key=lambda item: item[0])
