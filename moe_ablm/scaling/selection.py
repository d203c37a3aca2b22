"""One law with its intervals and tests, and which of several laws the runs support."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.approaches import bias_notes
from moe_ablm.scaling.catalogue import LAWS, PARABOLIC, SETTINGS, resolve
from moe_ablm.scaling.envelope import fit_envelope
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.forecast import Forecast, forecast_note, forecasts
from moe_ablm.scaling.inputs import Target
from moe_ablm.scaling.laws import Law
from moe_ablm.scaling.noise import LackOfFit, delta_sensitivity, lack_of_fit
from moe_ablm.scaling.optima import optima
from moe_ablm.scaling.parabola_fit import ParabolaFit, fit_parabolas
from moe_ablm.scaling.profile_likelihood import Profile, profiles
from moe_ablm.scaling.resampling import FEWEST_DRAWS, Bootstrap, bootstrap, bootstrap_intervals
from moe_ablm.scaling.result import Fit, SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import minimise
from moe_ablm.scaling.tuning import fit_tuning

FOLDS = 10
FAR_FROM_DELTA = 5.0  # misfit over delta beyond which the choice of delta is told
MOST_LOST = 0.05  # share of draws that may be lost where an interval is given
HELD_OUT = 0.15  # share of cells, the largest by compute, that is predicted from the rest
CLEAR = 10.0  # AICc difference beyond which a law has essentially no support (Burnham, Anderson)


@dataclass(frozen=True)
class Score:
    """The scores of one law; errors are of ln L, nan where it cannot be held out."""

    law: str
    fit: Fit
    parameters: int
    aicc: float
    cv_error: np.ndarray  # [cells] mean absolute error of ln L in held-out cells
    largest_error: float  # root mean square error of ln L on the largest runs
    largest_bias: float  # mean of model minus observed there

    @property
    def cv(self) -> float:
        return float(np.mean(self.cv_error)) if self.cv_error.size else math.nan


def compare(
    runs: Runs,
    laws: Sequence[str],
    huber_delta: float | None = None,
    seed: int = 0,
) -> list[Score]:
    """Scores of several laws on the same runs, best AICc first.

    A law with more coefficients than runs is left out, and so is a law of whole curves, unless all
    are. Laws of the best loss of each budget are compared with each other on these losses.

    Raises:
      UserError: some laws are of settings, best losses or gaps, and others of all runs.
    """
    names = dict.fromkeys(resolve(law) for law in laws)
    of = {name: what for name in names if (what := _of(LAWS[name]))}
    if "a setting" in of.values() or (of and (len(of) < len(names) or len({*of.values()}) > 1)):
        name, what = next(iter(of.items()))
        raise UserError(
            f"--law {name} is of {what}, and cannot be compared with laws of all runs; fit it by "
            "itself"
        )
    runs = optima(runs) if "the best loss of each budget" in of.values() else runs
    cells = runs.linked_cells()
    folds = _folds(int(cells.max()) + 1, seed)[cells]
    largest = _largest(runs, cells)
    scores = []
    whole = all(LAWS[name].needs_curves for name in names)
    for name in names:
        if LAWS[name].needs_curves and (name in PARABOLIC or not whole):
            continue
        try:
            made = _fit(runs, name, huber_delta)
            residuals = _residuals(made, runs)
        except UserError:
            continue
        parameters = _count(made)
        held = np.array([folds == k for k in range(folds.max() + 1)] + [largest])
        errors = _held_out(made, runs, held, huber_delta)
        inside = np.select(list(held[:-1]), list(errors[:-1]), np.nan)
        cv = np.bincount(cells, np.abs(inside)) / np.bincount(cells)
        outside = errors[-1][largest]
        scores.append(
            Score(
                name,
                made,
                parameters,
                aicc(residuals, made.huber_delta, parameters),
                cv if np.all(np.isfinite(cv)) else np.array([]),
                float(np.sqrt(np.mean(outside**2))),
                float(np.mean(outside)),
            )
        )
    return sorted(scores, key=lambda s: s.aicc if math.isfinite(s.aicc) else math.inf)


def _of(law: type[Law]) -> str:
    """What the law is of, if not of the losses of all runs."""
    if law.of_settings:
        return "a setting"
    if law.of_gap:
        return "the train-valid gap"
    return "the best loss of each budget" if law.of_optima else ""


def _fit(runs: Runs, name: str, huber_delta: float | None) -> Fit:
    if name in PARABOLIC:
        return fit_parabolas(runs, PARABOLIC[name].for_runs(runs.columns), draws=0)
    return fit_law(runs, name, huber_delta)


def _count(fit: Fit) -> int:
    """Free coefficients; a parabola's line through minima does not predict a loss."""
    if isinstance(fit, SmoothFit):
        return int(fit.problem.free.sum())
    return sum(name[:2] in ("a[", "b[", "c[") for name in fit.coefficients)


def _residuals(fit: Fit, runs: Runs) -> np.ndarray:
    """ln L_model - ln L of each run; the mean over curves where a run counts in several."""
    if isinstance(fit, SmoothFit):
        return fit.by_run(fit.residuals())
    inputs = runs.inputs()
    if isinstance(fit, ParabolaFit):
        inputs[fit.law.group] = fit.law.groups(runs)
    return np.log(fit.predict(**inputs)) - np.log(runs["loss"])


def aicc(residuals: np.ndarray, delta: float, parameters: int) -> float:
    """Akaike's criterion, corrected for few runs, of the density that the Huber loss implies.

    exp(-huber(r) / s) / Z(s), its scale s fitted too (one more parameter); with an infinite delta
    it is the normal density. Infinite where there are too few runs for the correction.
    """
    n, k = residuals.size, parameters + 1
    if n <= k + 1:
        return math.inf
    return 2.0 * negative_log_likelihood(residuals, delta) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def negative_log_likelihood(residuals: np.ndarray, delta: float) -> float:
    """Minimum over the scale s of n ln Z(s) + sum huber(r) / s."""
    from scipy.optimize import minimize_scalar
    from scipy.special import erf

    size = np.abs(residuals)
    inner = np.minimum(size, delta)
    total = float(np.sum(inner * (size - 0.5 * inner)))
    n = residuals.size
    if total <= 0.0:
        return -math.inf
    if not math.isfinite(delta):
        return 0.5 * n * (math.log(2 * math.pi * 2 * total / n) + 1.0)

    def cost(log_s: float) -> float:
        s = math.exp(log_s)
        middle = math.sqrt(2 * math.pi * s) * erf(delta / math.sqrt(2 * s))
        tails = 2 * s / delta * math.exp(-(delta**2) / (2 * s))
        return n * math.log(middle + tails) + total / s

    guess = math.log(total / n)
    best = minimize_scalar(cost, bounds=(guess - 10, guess + 10), method="bounded")
    return float(best.fun)


def _folds(cells: int, seed: int) -> np.ndarray:
    """The fold of each cell `[cells]`, balanced and shuffled."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    return rng.permutation(np.arange(cells) % min(FOLDS, cells))


def _largest(runs: Runs, cells: np.ndarray) -> np.ndarray:
    """Runs of the largest cells by compute (by parameters where tokens are unknown)."""
    size = runs.flops() if "tokens" in runs or "flops" in runs else runs["params"]
    count = max(1, round(HELD_OUT * (cells.max() + 1)))
    by_cell = np.zeros(cells.max() + 1)
    np.maximum.at(by_cell, cells, size)
    return np.isin(cells, np.argsort(-by_cell, kind="stable")[:count])


def _held_out(fit: Fit, runs: Runs, held: np.ndarray, huber_delta: float | None) -> np.ndarray:
    """ln L_model - ln L `[splits, runs]`, each model fitted without its `held [splits, runs]`."""
    if isinstance(fit, SmoothFit):
        problem = replace(fit.problem, weights=(~held[:, fit.index]).astype(float))
        ends = minimise(problem, np.repeat(fit.theta[None], len(held), axis=0))
        errors = fit.problem.residuals(ends.theta)
        return np.stack([fit.by_run(e) for e in errors])
    out = np.full(held.shape, np.nan)
    for row, without in zip(out, held, strict=True):
        try:
            row[:] = _residuals(_fit(runs.take(~without), fit.law.name, huber_delta), runs)
        except UserError:
            continue  # a parabola has too few points left: the split has no error
    return out


def verdict(scores: Sequence[Score]) -> str:
    """A sentence: which law the data support, and which others they cannot exclude."""
    ranked = [s for s in scores if math.isfinite(s.aicc)]
    if not ranked:
        return "There are too few runs to compare these laws."
    best = ranked[0]
    same: list[str] = []
    worse: list[str] = []
    for other in ranked[1:]:
        gap = other.aicc - best.aicc
        text = f"{other.law} (AICc +{gap:.1f}"
        undecided = gap < CLEAR
        if best.cv_error.size and other.cv_error.size:
            difference = other.cv_error - best.cv_error
            error = math.inf  # of one cell
            if difference.size > 1:
                error = float(difference.std(ddof=1) / math.sqrt(difference.size))
            text += f", held-out error {float(difference.mean()):+.2g} +- {error:.1g}"
            # AICc has checkpoints of one run independent, which they are not: there only this tells
            weak = gap < CLEAR or best.fit.runs.clusters() is not None
            undecided = gap < 2.0 or (weak and not difference.mean() >= _beyond(other) * error)
        (same if undecided else worse).append(text + ")")
    sentence = f"The data support {best.law}"
    if best.fit.status not in ("converged", "at_bound"):
        vague = [n for n, v in best.fit.verdicts.items() if v.startswith("not identified")]
        named = f": {', '.join(vague[:4])}{' ...' if len(vague) > 4 else ''}" if vague else ""
        sentence = (
            f"No law is supported: {best.law} has the best AICc and is {best.fit.status}{named}"
        )
    if same:
        sentence += f", and cannot tell it from {', '.join(same)}"
    if worse:
        sentence += f"; less supported: {', '.join(worse)}"
    far = [s for s in ranked if s.largest_error < 0.8 * best.largest_error]
    if far:
        winner = min(far, key=lambda s: s.largest_error)
        sentence += (
            f". The largest runs, held out, are predicted better by {winner.law} "
            f"({winner.largest_error:.2g} against {best.largest_error:.2g}): mistrust extrapolation"
        )
    return sentence + "."


def _beyond(score: Score) -> float:
    """Standard errors of a mean over held-out cells that are no chance, at 5 %."""
    from scipy.special import stdtrit

    return max(2.0, float(stdtrit(max(score.cv_error.size - 1, 1), 0.975)))


@dataclass(frozen=True)
class Question:
    """The law and the settings of an analysis; see the flags of `python -m moe_ablm fit`."""

    law: str
    huber_delta: float | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    draws: int = 1000
    seed: int = 0
    seed_sd: float | None = None
    level: float = 0.95
    rule: Mapping[str, float] = field(default_factory=dict)  # of a setting, to be judged


@dataclass(frozen=True)
class Analysis:
    """A fit with its bootstrap draws and profiles; exact fits and parabolas have neither."""

    fit: Fit
    boot: Bootstrap | None = None
    profiles: Sequence[Profile] = ()
    lack_of_fit: LackOfFit | None = None
    deltas: Sequence[tuple[float, Mapping[str, float], float]] = ()
    forecasts: Sequence[Forecast] = ()  # of laws of compute, from the smaller budgets


def analyse(runs: Runs, question: Question) -> Analysis:
    """Fits one law, with intervals and tests; raises UserError as `fit_law` does."""
    name = resolve(question.law)
    if name in PARABOLIC:
        return Analysis(_parabolic(runs, name, question))
    if name in SETTINGS:
        tuned = fit_tuning(
            runs,
            SETTINGS[name](),
            fixed=question.fixed,
            rule=question.rule,
            seed_sd=question.seed_sd,
            draws=question.draws,
            seed=question.seed,
            target=question.target,
            level=question.level,
        )
        return Analysis(tuned)
    of_optima = LAWS[name].of_optima
    fitted = optima(runs) if of_optima else runs
    if of_optima:
        _require_kind(fitted, question.target)
    made = _at_its_delta(fitted, name, question)
    if made.status == "exact" or not made.problem.free.any():
        return Analysis(made)
    walked = profiles(made, question.level)
    made, boot = _drawn(made, question)
    drawn = bootstrap_intervals(made, boot, question.level) if boot else {}
    intervals = {**drawn}  # those of the bootstrap before those of the profiles
    for p in walked:
        name = p.quantity.name
        intervals[name] = (*drawn.get(name, ()), p.interval(question.level))
    deltas = delta_sensitivity(made)
    notes = (*made.notes, *delta_notes(made, deltas))
    future = forecasts(made) if of_optima else []
    notes += (forecast_note(future),) if future else ()
    made = replace(with_open_profiles(made, walked), intervals=intervals, notes=notes)
    return Analysis(made, boot, walked, lack_of_fit(made), deltas, future)


def _parabolic(runs: Runs, name: str, question: Question) -> Fit:
    """A law of parabolas, or the envelope of curves."""
    if question.fixed:
        raise UserError(f"--fix: law {name} has no coefficients that can be held")
    law = PARABOLIC[name].for_runs(runs.columns)
    settings = (question.draws, question.seed, question.target, question.level)
    if law.needs_curves:
        return fit_envelope(runs, *settings)
    parabolas = fit_parabolas(runs, law, question.seed_sd, *settings)
    if law.group == "flops":
        parabolas = replace(parabolas, notes=(*parabolas.notes, *bias_notes(parabolas)))
    return parabolas


def _drawn(made: SmoothFit, question: Question) -> tuple[SmoothFit, Bootstrap | None]:
    """The fit with the count of its draws, and these; None where there are none or too few."""
    if question.draws <= 0:
        return made, None
    boot = bootstrap(made, question.draws, question.seed)
    lost = int((~boot.converged).sum())
    made = replace(made, draws=question.draws, draws_lost=lost)
    if len(boot.usable) >= FEWEST_DRAWS and lost <= MOST_LOST * question.draws:
        return made, boot
    note = (
        f"{len(boot.usable)} of {question.draws} bootstrap draws converged: no bootstrap "
        f"interval (it needs {FEWEST_DRAWS} draws and {1 - MOST_LOST:.0%} of them, because "
        "those that are lost are not like the others)"
    )
    return replace(made, notes=(*made.notes, note)), None


def _require_kind(fitted: Runs, target: Target | None) -> None:
    """UserError where a target names a kind of model that there is not."""
    asked, kinds = (target or {}).get("router"), np.unique(fitted["router"].astype(str)).tolist()
    if asked is not None and asked not in kinds:
        raise UserError(f"--target router={asked}: the kinds are {', '.join(kinds)}")


def _at_its_delta(runs: Runs, name: str, question: Question) -> SmoothFit:
    """The fit at the delta asked for, else at the seed sd; at the misfit where that is far larger.

    With a delta far below what the law misses the fit is one of least absolute deviations, and seed
    noise is not what the residuals are of.
    """

    def fitted(delta: float | None) -> SmoothFit:
        return fit_law(runs, name, delta, question.fixed, target=question.target)

    made = fitted(question.huber_delta)
    misfit = misfit_of(made)
    measured = question.huber_delta is None and made.delta_source.startswith("seed sd")
    if not measured or made.status == "exact" or not misfit > FAR_FROM_DELTA * made.huber_delta:
        return made
    wide = fitted(misfit)
    note = (
        f"the law misses by {misfit:.2g} of ln L, {misfit / made.huber_delta:.0f} times the seed "
        f"sd of {made.huber_delta:.2g}: delta is that misfit; --huber-delta takes another"
    )
    return replace(wide, delta_source="misfit of the law", notes=(*wide.notes, note))


def misfit_of(fit: SmoothFit) -> float:
    """Robust sd of the residuals of ln L: their median size, as that of a normal distribution."""
    return 1.4826 * float(np.median(np.abs(fit.residuals())))


def delta_notes(
    fit: SmoothFit, deltas: Sequence[tuple[float, Mapping[str, float], float]]
) -> list[str]:
    """A note where the law misses by far more than delta, and how much then hangs on delta."""
    misfit = misfit_of(fit)
    if not misfit > FAR_FROM_DELTA * fit.huber_delta:
        return []
    names = [p.name for p in fit.law.parameters if not p.log and p.name in fit.identifiable]
    ends = (fit.coefficients, deltas[-1][1])
    moved = [f"{n} {ends[0][n]:.3g} -> {ends[1][n]:.3g}" for n in names]
    return [
        f"the law misses by {misfit / fit.huber_delta:.0f} times delta, so that this fit is nearly "
        f"one of least absolute deviations; from there to least squares: {', '.join(moved)}"
    ]


def with_open_profiles(fit: SmoothFit, walked: Sequence[Profile]) -> SmoothFit:
    """The fit, with "not identified" for coefficients whose profile never closes."""
    verdicts, identifiable = dict(fit.verdicts), dict(fit.identifiable)
    derived = dict(fit.derived_verdicts)
    for p in walked:
        name = p.quantity.name
        if derived.get(name) == "identified" and None in (p.low, p.high):
            derived[name] = (
                f"not identified: its profile never closes {'above' if p.high is None else 'below'}"
            )
        if identifiable.get(name) and None in (p.low, p.high):
            side = "above" if p.high is None else "below"
            verdicts[name] = f"not identified: its profile never closes {side}"
            identifiable[name] = False
    status = fit.status
    if status == "converged" and not all(identifiable.values()):
        status = "not_identifiable"
    return replace(
        fit,
        verdicts=verdicts,
        derived_verdicts=derived,
        identifiable=identifiable,
        status=status,
    )
