"""Fitting parabolas and the line through their minima, with intervals from few points."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.compute import cost_of
from moe_ablm.scaling.inputs import Target, check_inputs
from moe_ablm.scaling.noise import pure_error
from moe_ablm.scaling.parabolas import (
    IsoFlop,
    Parabola,
    Quadratic,
    coefficients_of,
    interior,
    quantities,
    split,
)
from moe_ablm.scaling.result import Fit, Interval
from moe_ablm.scaling.runs import Runs

LINE = ("slope", "intercept")
NORMAL = 1.959964  # quantile of the normal distribution at 97.5 %


@dataclass(frozen=True, kw_only=True)
class ParabolaFit(Fit):
    """A fit of parabolas, with the runs that it was made from."""

    law: Quadratic
    noise_sd: float  # of one run's loss, widened for few degrees of freedom; nan: not known


@dataclass(frozen=True)
class Noise:
    """Sd of one run's loss; `freedom` is inf where it was given and not measured."""

    sd: float
    freedom: float
    source: str
    from_residuals: bool = False  # of the parabolas themselves

    def quantile(self) -> float:
        """Student's t at 97.5 %."""
        from scipy.special import stdtrit

        return float(stdtrit(min(self.freedom, 1e6), 0.975))


def fit_parabolas(
    runs: Runs,
    law: Quadratic,
    seed_sd: float | None = None,
    draws: int = 4000,
    seed: int = 0,
    target: Target | None = None,
    level: float = 0.95,
) -> ParabolaFit:
    """Parabolas, their minima, the line through the minima, and a parametric bootstrap of all.

    Noise is `seed_sd` (of one run's loss, in the units of the loss), else the sd between
    replicates, else the pooled residual of the parabolas. A measured sd is drawn as well (scaled
    inverse chi-square), so that few degrees of freedom give wide t intervals. Draws without a
    minimum count as an open end.
    """
    if seed_sd is not None and not 0 < seed_sd < np.inf:
        raise UserError(f"--seed-sd {seed_sd}: expected a positive number")
    law.require(runs)
    if isinstance(law, IsoFlop):
        law.cost = cost_of(runs.columns)
    target = target or Target()
    check_inputs("--target", target)
    parabolas, notes = split(law, runs)
    loss = runs["loss"]
    abc = coefficients_of(parabolas, loss)
    residual = np.concatenate(
        [
            loss[p.members] - np.polyval(row, np.log10(runs["params"][p.members]))
            for p, row in zip(parabolas, abc, strict=True)
        ]
    )
    noise = measure_noise(runs, parabolas, residual, seed_sd)
    usable = [i for i, p in enumerate(parabolas) if interior(law, p, abc[i], runs)]
    estimates = quantities(law, parabolas, usable, abc, target)
    coefficients, verdicts = _verdicts(law, parabolas, abc, noise, runs, notes)
    for name in LINE:
        if name in estimates:
            coefficients[name] = float(estimates.pop(name))
            through = [parabolas[i].key for i in usable]
            vague = [key for key in through if verdicts[f"a[{key}]"].startswith("not id")]
            verdicts[name] = (
                f"not identified: it goes through the minimum of {vague[0]}"
                if vague
                else "identified"
            )
    if len(usable) < 2:
        notes.append(f"{len(usable)} {law.group} with a minimum: no line through minima")
    notes += _misfit(noise, residual, parabolas)
    intervals = {}
    if noise is not None and draws > 0:
        moved = abc + coefficients_of(parabolas, _noise_draws(noise, loss.size, draws, seed))
        intervals = {
            name: (percentile_interval(drawn, level, noise, name not in LINE),)
            for name, drawn in quantities(law, parabolas, usable, moved, target).items()
        }
        for p in parabolas:
            if p.freedom == 0 and noise.from_residuals:
                intervals.pop(f"N_star[{p.key}]", None)
    identifiable = {n: v == "identified" for n, v in verdicts.items()}
    return ParabolaFit(
        law=law,
        n=len(runs),
        coefficients=coefficients,
        objective=float(np.sum(residual**2)),
        huber_delta=float("inf"),
        delta_source="least squares on the loss, as published",
        status=_status(parabolas, abc[:, 0] > 0, identifiable),
        identifiable=identifiable,
        verdicts=verdicts,
        intervals=intervals,
        derived={k: float(np.exp(v)) for k, v in estimates.items()},
        target=target.copy(),
        notes=(*runs.notes, *notes),
        data_unit=runs.data_unit,
        noise_sd=np.nan if noise is None else noise.quantile() / NORMAL * noise.sd,
        runs=runs,
    )


def band(fit: ParabolaFit, size: float, params: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """95 % band `[m]` of the parabola at one data size (or budget); None without known noise."""
    if not np.isfinite(fit.noise_sd):
        return None
    for p in split(fit.law, fit.runs)[0]:
        if p.key == f"{size:.15g}":
            z = np.log10(params)
            basis = np.stack([z**2, z, np.ones_like(z)], axis=1)
            half = NORMAL * fit.noise_sd * np.linalg.norm(basis @ p.solve, axis=1)
            abc = np.array([fit.coefficients[f"{name}[{p.key}]"] for name in "abc"])
            return basis @ abc - half, basis @ abc + half
    return None


def _status(
    parabolas: list[Parabola], convexity: np.ndarray, identifiable: Mapping[str, bool]
) -> str:
    if any(not convex for convex in convexity):
        return "not_convex"
    if all(p.freedom == 0 for p in parabolas):
        return "exact"
    return "converged" if all(identifiable.values()) else "not_identifiable"


def measure_noise(
    runs: Runs, parabolas: list[Parabola], residual: np.ndarray, seed_sd: float | None
) -> Noise | None:
    """The sd of one run's loss; None where nothing measures it."""
    if seed_sd is not None:
        return Noise(seed_sd, float("inf"), "given")
    sd, freedom = pure_error(runs)
    if freedom > 0:
        return Noise(sd * float(np.mean(runs["loss"])), freedom, "replicates")
    freedom = sum(p.freedom for p in parabolas)
    if freedom == 0:
        return None
    sd = float(np.sqrt(np.sum(residual**2) / freedom))
    source = f"residuals of the parabolas ({freedom} degrees of freedom)"
    return Noise(sd, freedom, source, from_residuals=True)


def _misfit(noise: Noise | None, residual: np.ndarray, parabolas: list[Parabola]) -> list[str]:
    """A note where the parabolas miss by more than the noise, if that is known independently."""
    from scipy.special import chdtrc

    freedom = sum(p.freedom for p in parabolas)
    if noise is None or freedom == 0 or noise.from_residuals or noise.sd == 0.0:
        return []
    statistic = float(np.sum(residual**2)) / noise.sd**2
    p_value = float(chdtrc(freedom, statistic))
    if p_value >= 0.05:
        return []
    return [
        f"the parabolas miss by more than the noise (chi-square {statistic:.3g} on {freedom} "
        f"degrees of freedom, p = {p_value:.1g}): the noise is larger or the loss is no parabola, "
        "and the intervals are too narrow"
    ]


def _verdicts(
    law: Quadratic,
    parabolas: list[Parabola],
    abc: np.ndarray,
    noise: Noise | None,
    runs: Runs,
    notes: list[str],
) -> tuple[dict[str, float], dict[str, str]]:
    """Coefficients by name, and whether each parabola has a minimum that the noise allows."""
    coefficients: dict[str, float] = {}
    verdicts: dict[str, str] = {}
    for p, row in zip(parabolas, abc, strict=True):
        for name, value in zip("abc", row, strict=True):
            coefficients[f"{name}[{p.key}]"] = float(value)
        if p.freedom == 0:
            notes.append(
                f"data size or budget {p.key}: three sizes for three coefficients: the parabola is "
                "exact and its residual says nothing about its error"
            )
        verdict = "identified"
        if row[0] <= 0:
            verdict = "not convex: the parabola has no minimum"
            notes.append(f"data size or budget {p.key}: {verdict}")
        elif noise is not None:
            half = noise.quantile() * noise.sd * float(np.linalg.norm(p.solve[0]))
            if half >= row[0]:
                verdict = f"not identified: curvature {row[0]:.3g} +- {half:.2g} reaches zero"
        log10_n = -row[1] / (2 * row[0]) if row[0] > 0 else np.nan
        seen = np.log10(runs["params"][p.members])
        if row[0] > 0 and not seen.min() <= log10_n <= seen.max():
            outside = "its minimum lies outside the sizes that were run"
            notes.append(f"data size or budget {p.key}: {outside}")
            if law.local:
                verdict = f"not identified: {outside}, and the line leaves it out"
        verdicts[f"a[{p.key}]"] = verdict
        # three sizes always determine the other two
        verdicts |= {f"{name}[{p.key}]": "identified" for name in "bc"}
    return coefficients, verdicts


def _noise_draws(noise: Noise, runs: int, draws: int, seed: int) -> np.ndarray:
    """Noise `[draws, runs]`; a measured sd is drawn as well."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    sd = np.full(draws, noise.sd)
    if np.isfinite(noise.freedom):
        sd *= np.sqrt(noise.freedom / rng.chisquare(noise.freedom, draws))
    return rng.standard_normal((draws, runs)) * sd[:, None]


def percentile_interval(value: np.ndarray, level: float, noise: Noise, log: bool) -> Interval:
    """Quantiles over the draws that have a value; the note counts the others."""
    good = np.isfinite(value)
    missing = 1.0 - float(good.mean())
    note = f"noise sd {noise.sd:.2g}, {noise.source}"
    if missing > 0:
        note += f"; {missing:.1%} of the draws have no minimum"
    is_open = missing > 0.5 * (1 - level)
    if is_open:
        note += ", so the interval is open"
    if not good.any():
        return Interval("parametric bootstrap", level, None, None, None, note, True)
    tail = 50 * (1 - level)
    low, high = np.percentile(value[good], [tail, 100 - tail])
    spread = float(np.std(value[good], ddof=1)) if good.sum() > 1 else None
    if log:
        low, high, spread = np.exp(low), np.exp(high), None
    return Interval("parametric bootstrap", level, float(low), float(high), spread, note, is_open)
