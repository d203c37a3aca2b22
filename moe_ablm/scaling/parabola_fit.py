"""Fitting parabolas and the line through their minima, with intervals from few points."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import Target, check_inputs
from moe_ablm.scaling.minima import OF_SIZES, Parabolas, split
from moe_ablm.scaling.noise import pure_error
from moe_ablm.scaling.parabolas import Quadratic
from moe_ablm.scaling.result import Fit, Interval
from moe_ablm.scaling.runs import Runs

LINE = ("slope", "intercept", "slope_tokens", "intercept_tokens")
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


@dataclass(frozen=True)
class Solved:
    """Parabolas at their minimum: skews `[...]` and coefficients `[..., G, 3]`."""

    parabolas: Parabolas
    skew: np.ndarray
    abc: np.ndarray

    @staticmethod
    def of(parabolas: Parabolas, loss: np.ndarray) -> "Solved":
        """Least squares on losses `[..., n]`."""
        skew = parabolas.skew(loss)
        return Solved(parabolas, skew, parabolas.coefficients(loss, skew))

    def moved(self, noise: np.ndarray, loss: np.ndarray) -> "Solved":
        """The same for losses on the parabolas plus noise `[draws, n]`."""
        return Solved.of(self.parabolas, self.parabolas.fitted(loss, float(self.skew)) + noise)

    def minima(self) -> np.ndarray:
        """Natural logs of the best sizes, `[..., G]`."""
        return self.parabolas.minima(self.abc, self.skew)

    def lowest(self) -> np.ndarray:
        """Natural logs of the losses there, `[..., G]`; nan where the parabola is below zero."""
        loss = self.parabolas.lowest(self.abc)
        return np.log(np.where(loss > 0.0, loss, np.nan))


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

    Local parabolas have one in log10 D besides each in log10 N. Noise is `seed_sd` (of one run's
    loss, in the units of the loss), else the sd between replicates, else the pooled residual of the
    parabolas. A measured sd is drawn as well (scaled inverse chi-square), so that few degrees of
    freedom give wide t intervals. Draws without a minimum count as an open end.
    """
    if seed_sd is not None and not 0 < seed_sd < np.inf:
        raise UserError(f"--seed-sd {seed_sd}: expected a positive number")
    law.require(runs)
    target = target or Target()
    check_inputs("--target", target)
    found = _find(runs, law, seed_sd)
    moved: dict[str, np.ndarray] = {}
    if found.noise is not None and draws > 0:
        errors = noise_draws(found.noise, len(runs), draws, seed)
        both = [s.moved(errors, runs["loss"]) for s in found.both]
        moved = quantities(law, both, found.usable, target)
    return _describe(found, target, moved, level)


@dataclass(frozen=True)
class _Found:
    """Least squares on the runs: parabolas in N (and in D), which of them have a minimum, noise."""

    law: Quadratic
    runs: Runs
    both: list[Solved]
    usable: list[int]
    residual: np.ndarray
    noise: Noise | None
    notes: list[str]


def _find(runs: Runs, law: Quadratic, seed_sd: float | None) -> _Found:
    parabolas, notes = _groups(law, runs)
    solved = Solved.of(parabolas, runs["loss"])
    residual = _residual(solved, runs["loss"])
    return _Found(
        law=law,
        runs=runs,
        both=[solved, *_in_tokens(law, runs, parabolas, runs["loss"])],
        usable=[i for i in range(len(parabolas.parts)) if _interior(law, solved, i)],
        residual=residual,
        noise=measure_noise(runs, parabolas, residual, seed_sd),
        notes=notes,
    )


def _describe(
    found: _Found, target: Target, moved: Mapping[str, np.ndarray], level: float
) -> ParabolaFit:
    """The fit with its verdicts, and intervals of what the noise `moved`."""
    law, noise, notes, solved = found.law, found.noise, list(found.notes), found.both[0]
    parabolas = solved.parabolas
    coefficients, verdicts = _verdicts(law, solved, noise, notes)
    estimates = quantities(law, found.both, found.usable, target)
    line = {name: float(estimates.pop(name)) for name in LINE if name in estimates}
    keys = [parabolas.parts[i].key for i in found.usable]
    coefficients |= line
    verdicts |= dict.fromkeys(line, _verdict_of_line([verdicts[f"a[{k}]"] for k in keys], keys))
    if len(keys) < 2:
        notes.append(f"{len(keys)} {law.group} with a minimum: no line through minima")
    notes += _misfit(noise, found.residual, parabolas)
    identifiable = {n: v == "identified" for n, v in verdicts.items() if v != "fixed"}
    return ParabolaFit(
        law=law,
        n=len(found.runs),
        coefficients=coefficients,
        objective=float(np.sum(found.residual**2)),
        huber_delta=float("inf"),
        delta_source="least squares on the loss, as published",
        status=_status(parabolas, solved.abc[:, 0] > 0, identifiable),
        identifiable=identifiable,
        verdicts=verdicts,
        fixed={k: coefficients[k] for k, v in verdicts.items() if v == "fixed"},
        intervals={} if noise is None else _intervals(moved, noise, level, parabolas),
        derived={k: float(np.exp(v)) for k, v in estimates.items()},
        target=target.copy(),
        notes=(*found.runs.notes, *notes),
        data_unit=found.runs.data_unit,
        noise_sd=np.nan if noise is None else noise.quantile() / NORMAL * noise.sd,
        runs=found.runs,
    )


def _groups(law: Quadratic, runs: Runs) -> tuple[Parabolas, list[str]]:
    near = OF_SIZES if law.local else None
    try:
        return split(law.groups(runs), runs["params"], runs["loss"], law.group, near)
    except UserError as error:
        raise UserError(f"law {law.name}: {error}") from None


def _in_tokens(law: Quadratic, runs: Runs, parabolas: Parabolas, loss: np.ndarray) -> list[Solved]:
    """The parabolas of the same runs in log10 D, where the law is local; else none."""
    if not law.local or "tokens" not in runs:
        return []
    tokens = np.log10(runs["tokens"])
    parts = tuple(replace(p, z=tokens[p.members]) for p in parabolas.parts)
    middle = float(np.mean(np.concatenate([p.z for p in parts])))
    return [Solved.of(Parabolas(parts, middle, parabolas.skewed), loss)]


def _residual(solved: Solved, loss: np.ndarray) -> np.ndarray:
    """What the parabolas miss, of every run that one of them has."""
    missed = loss - solved.parabolas.fitted(loss, float(solved.skew))
    return missed[np.concatenate([p.members for p in solved.parabolas.parts])]


def _interior(law: Quadratic, solved: Solved, i: int) -> bool:
    """Whether a parabola has a minimum, within the sizes that were run where it is local."""
    log_n, z = solved.minima()[i], solved.parabolas.parts[i].z * np.log(10.0)
    return bool(np.isfinite(log_n)) and (not law.local or bool(z.min() <= log_n <= z.max()))


def quantities(
    law: Quadratic, both: list[Solved], usable: list[int], target: Target
) -> dict[str, np.ndarray]:
    """Logs of derived quantities of parabolas in N (and in D), each `[...]`; lines as they are.

    The line goes through the `usable` parabolas, those that have a minimum in the runs; where one
    of them has none in a draw, the line of that draw is nan.
    """
    parts = both[0].parabolas.parts
    log_size = np.log([parts[i].size for i in usable])
    log_loss = both[0].lowest()
    out = {f"L_star[{p.key}]": log_loss[..., i] for i, p in enumerate(parts)}
    for solved, star, through in zip(
        both, ("N_star", "D_star"), (law.through_minima, law.through_tokens), strict=False
    ):
        log_best = solved.minima()
        out |= {f"{star}[{p.key}]": log_best[..., i] for i, p in enumerate(parts)}
        if len(usable) > 1:
            log_best = log_best[..., usable]
            out |= through(log_best, np.broadcast_to(log_size, log_best.shape), target)
    return out


def _verdict_of_line(through: list[str], keys: list[str]) -> str:
    vague = [k for k, verdict in zip(keys, through, strict=True) if verdict.startswith("not id")]
    if vague:
        return f"not identified: it goes through the minimum of {vague[0]}"
    return "identified"


def _intervals(
    moved: Mapping[str, np.ndarray], noise: Noise, level: float, parabolas: Parabolas
) -> dict[str, tuple[Interval, ...]]:
    """Of every quantity; not of exact parabolas whose noise is their own residual."""
    exact = {p.key for p in parabolas.parts if p.freedom == 0 and noise.from_residuals}
    return {
        name: (percentile_interval(drawn, level, noise, name not in LINE),)
        for name, drawn in moved.items()
        if name.partition("[")[2].rstrip("]") not in exact
    }


def band(fit: ParabolaFit, size: float, params: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """95 % band `[m]` of the parabola at one data size (or budget); None without known noise.

    That of the parabola's own coefficients, at the skew as fitted.
    """
    if not np.isfinite(fit.noise_sd):
        return None
    skew = fit.coefficients.get("skew", 0.0)
    parabolas = _groups(fit.law, fit.runs)[0]
    for p in parabolas.parts:
        if p.key == f"{size:.15g}":
            basis = replace(p, z=np.log10(params)).basis(skew, parabolas.middle)
            solve = p.solve(skew, parabolas.middle)
            half = NORMAL * fit.noise_sd * np.linalg.norm(basis @ solve, axis=1)
            abc = np.array([fit.coefficients[f"{name}[{p.key}]"] for name in "abc"])
            return basis @ abc - half, basis @ abc + half
    return None


def _status(parabolas: Parabolas, convexity: np.ndarray, identifiable: Mapping[str, bool]) -> str:
    if any(not convex for convex in convexity):
        return "not_convex"
    if all(p.freedom == 0 for p in parabolas.parts):
        return "exact"
    return "converged" if all(identifiable.values()) else "not_identifiable"


def measure_noise(
    runs: Runs, parabolas: Parabolas, residual: np.ndarray, seed_sd: float | None
) -> Noise | None:
    """The sd of one run's loss; None where nothing measures it."""
    if seed_sd is not None:
        return Noise(seed_sd, float("inf"), "given")
    sd, freedom = pure_error(runs)
    if freedom > 0:
        return Noise(sd * float(np.mean(runs["loss"])), freedom, "replicates")
    freedom = parabolas.freedom
    if freedom == 0:
        return None
    sd = float(np.sqrt(np.sum(residual**2) / freedom))
    source = f"residuals of the parabolas ({freedom} degrees of freedom)"
    return Noise(sd, freedom, source, from_residuals=True)


def _misfit(noise: Noise | None, residual: np.ndarray, parabolas: Parabolas) -> list[str]:
    """A note where the parabolas miss by more than the noise, if that is known independently."""
    from scipy.special import chdtrc

    freedom = parabolas.freedom
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
    law: Quadratic, solved: Solved, noise: Noise | None, notes: list[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Coefficients by name, and whether each parabola has a minimum that the noise allows."""
    coefficients: dict[str, float] = {}
    verdicts: dict[str, str] = {}
    for i, (p, row) in enumerate(zip(solved.parabolas.parts, solved.abc, strict=True)):
        for name, value in zip("abc", row, strict=True):
            coefficients[f"{name}[{p.key}]"] = float(value)
        if p.freedom == 0:
            notes.append(
                f"data size or budget {p.key}: three sizes for three coefficients: the parabola is "
                "exact and its residual says nothing about its error"
            )
        verdicts[f"a[{p.key}]"] = _verdict(law, solved, i, noise, notes)
        # three sizes always determine the other two
        verdicts |= {f"{name}[{p.key}]": "identified" for name in "bc"}
    if solved.parabolas.skewed:
        skew, end = float(solved.skew), solved.parabolas.local.most_skew
        coefficients |= {"skew": skew, "N0": float(10.0**solved.parabolas.middle)}
        at_end = f"not identified: at the end of the range that is tried, {skew:g}"
        verdicts |= {"skew": at_end if abs(skew) >= end else "identified", "N0": "fixed"}
    return coefficients, verdicts


def _verdict(law: Quadratic, solved: Solved, i: int, noise: Noise | None, notes: list[str]) -> str:
    """Of the curvature of one parabola."""
    parabolas = solved.parabolas
    p, curvature = parabolas.parts[i], solved.abc[i, 0]
    if not np.isfinite(solved.minima()[i]):
        verdict = "not convex: the parabola has no minimum"
        notes.append(f"data size or budget {p.key}: {verdict}")
        return verdict
    verdict = "identified"
    if noise is not None:
        solve = p.solve(float(solved.skew), parabolas.middle)
        half = noise.quantile() * noise.sd * float(np.linalg.norm(solve[0]))
        if half >= curvature:
            verdict = f"not identified: curvature {curvature:.3g} +- {half:.2g} reaches zero"
    log10_n = solved.minima()[i] / np.log(10.0)
    if not p.z.min() <= log10_n <= p.z.max():
        outside = "its minimum lies outside the sizes that were run"
        notes.append(f"data size or budget {p.key}: {outside}")
        if law.local:
            verdict = f"not identified: {outside}, and the line leaves it out"
    return verdict


def noise_draws(noise: Noise, runs: int, draws: int, seed: int) -> np.ndarray:
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
