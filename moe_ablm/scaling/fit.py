"""Fitting a smooth law: starts by variable projection, then quasi-Newton on the Huber loss."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.catalogue import SMOOTH, law_for, resolve
from moe_ablm.scaling.compute import Cost
from moe_ablm.scaling.gaps import gaps
from moe_ablm.scaling.identify import UNMOVED, at_bounds, judge, judge_derived, variances
from moe_ablm.scaling.inputs import Centre, Inputs, Target, check_inputs
from moe_ablm.scaling.laws import Parameter, SmoothLaw, with_gradient
from moe_ablm.scaling.noise import pure_error
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import Minimum, Problem, minimise
from moe_ablm.scaling.units import mixed_units

DELTA_DEFAULT = 1e-3  # Hoffmann et al. 2022
DELTA_FLOOR = 1e-4
DELTA_SMALLEST = 1e-12  # below it the objective is rounding error
MOST_FOR_STARTS = 4096  # most runs that starts are solved on; the fit uses all runs
POLISHED = 32  # starts that are minimised, the best ones
QUICK, FINISHED = 60, 3  # iterations of each of them, and how many then go on to the end
RESTARTS = 10  # of a fit that has not converged
OTHERS = 3  # ends of other starts that refits to resampled runs start from as well
APART = 0.1  # share of an exponent's range by which they differ
WORSE = 2.0  # and how many times the objective they may be
SMALLEST_SHARE, LARGEST_SHARE = 1e-9, 1e6  # of a term at the centre of the runs, over the loss


def fit_law(
    runs: Runs,
    law: str = "chinchilla",
    huber_delta: float | None = None,
    fixed: Mapping[str, float] | None = None,
    start: Mapping[str, float] | None = None,
    target: Target | None = None,
) -> SmoothFit:
    """Fits a smooth law to runs.

    Minimises the sum over runs of huber(ln L_model - ln L). `huber_delta` defaults to the seed sd
    of ln L where there are replicates (at least 1e-4), else to 1e-3; inf is least squares.
    `fixed` holds coefficients at values in the units of the input. `start` gives exponents to
    start from instead of the grid (linear coefficients are always solved for). `target` names
    inputs (`flops`, or `params`, `tokens`, ...) at which derived quantities are wanted.

    Raises:
      UserError: a column is missing, there are fewer runs than coefficients, losses are in mixed
        units, or a coefficient is unknown.
    """
    if huber_delta is not None and not huber_delta >= DELTA_SMALLEST:
        raise UserError(
            f"--huber-delta {huber_delta}: expected a positive number of at least "
            f"{DELTA_SMALLEST:g}, or inf"
        )
    check_inputs("--target", target or {})
    runs = gaps(runs) if SMOOTH[resolve(law)].of_gap else runs
    runs.require((*SMOOTH[resolve(law)].needs, *runs.covariates), resolve(law))
    made = law_for(law, runs.columns, runs.covariates)
    delta, delta_source = (huber_delta, "given") if huber_delta else default_delta(runs)
    fixed = {**made.defaults, **(fixed or {})}
    setup = prepare(made, runs, delta, fixed)
    free = int(setup.problem.free.sum())
    if len(runs) < free:
        raise UserError(
            f"law {made.name} has {free} coefficients to fit and there are only {len(runs)} runs; "
            "add runs, fix coefficients with --fix, or choose a smaller law"
        )
    best, starts = solve(setup, start)
    return describe(setup, best, starts, runs, fixed, delta_source, target or Target())


@dataclass(frozen=True)
class Setup:
    """A law and its runs: the problem in centred units, and the start of its parameters."""

    law: SmoothLaw
    problem: Problem
    centre: Centre
    template: np.ndarray  # [K], with fixed parameters at their values
    index: np.ndarray  # the run behind each observation


def default_delta(runs: Runs) -> tuple[float, str]:
    """Huber's delta, and its source: the seed sd of ln L from replicates, else 1e-3."""
    sd, freedom = pure_error(runs)
    if freedom >= 3:
        return max(
            sd, DELTA_FLOOR
        ), f"seed sd of ln L from replicates ({freedom} degrees of freedom)"
    return DELTA_DEFAULT, "convention (Hoffmann et al. 2022): no replicates to measure seed noise"


def prepare(law: SmoothLaw, runs: Runs, delta: float, fixed: Mapping[str, float]) -> Setup:
    """The problem of fitting `law` to `runs`, with `fixed` coefficients in natural units."""
    for name in fixed:
        if name not in law.names:
            raise UserError(
                f"--fix {name}=...: law {law.name} has no such coefficient; it has "
                f"{', '.join(law.names)}"
            )
    observed, index = law.observe(runs.columns)
    # A fixed linear coefficient is a constant in natural units only: then nothing is centred.
    natural = any(law.parameters[law.index(n)].linear for n in fixed)
    centre = Centre()
    if not natural:
        params, tokens, flops = (
            float(np.log(runs[k]).mean()) if k in runs else 0.0
            for k in ("params", "tokens", "flops")
        )
        centre = Centre(params, tokens, flops, _mean_log_rate(observed))
    x = law.inputs(observed, centre)
    log_loss = np.log(observed["loss"])
    low, high = _bounds(law, log_loss, natural)
    template = np.array([_middle(p) for p in law.parameters])
    template[[p.linear for p in law.parameters]] = log_loss.mean()
    free = np.ones(len(law.parameters), bool)
    for name, value in fixed.items():
        k = law.index(name)
        template[k] = _fixed_value(law.parameters[k], value)
        free[k] = False
    noise = delta if math.isfinite(delta) else DELTA_DEFAULT
    problem = Problem(
        law, x, log_loss, np.ones(log_loss.size), delta, low, high, free, prior_scale=noise**2
    )
    clusters = runs.clusters()
    if clusters is not None:
        problem = replace(problem, clusters=clusters[index])
    return Setup(law, problem, centre, template, index)


def _mean_log_rate(columns: Mapping[str, np.ndarray]) -> float:
    """Mean of ln of the learning rates after drops; 0 where there are none."""
    if "lr_history" not in columns:
        return 0.0
    nodes = columns["lr_history"][:, 1:]
    return float(nodes[..., 1][nodes[..., 0] != 0.0].mean()) if np.any(nodes[..., 0]) else 0.0


def _fixed_value(parameter: Parameter, value: float) -> float:
    """The internal value of a fixed coefficient; raises UserError outside its range."""
    if parameter.log and not value > 0:
        raise UserError(f"--fix {parameter.name}={value}: expected a positive number")
    low, high = parameter.report(parameter.low), parameter.report(parameter.high)
    if not low <= value <= high:
        raise UserError(
            f"--fix {parameter.name}={value}: expected a number from {low:.4g} to {high:.4g}"
        )
    return parameter.internal(value)


def _bounds(law: SmoothLaw, log_loss: np.ndarray, natural: bool) -> tuple[np.ndarray, np.ndarray]:
    """Internal bounds: a term is between a billionth and a million times the loss."""
    low = np.array([p.low for p in law.parameters])
    high = np.array([p.high for p in law.parameters])
    if not natural:
        linear = np.array([p.linear for p in law.parameters])
        low[linear] = log_loss.min() + np.log(SMALLEST_SHARE)
        high[linear] = log_loss.max() + np.log(LARGEST_SHARE)
    return low, high


def _middle(parameter: Parameter) -> float:
    low, high = parameter.search or (parameter.low, parameter.high)
    return 0.5 * (low + high)


def candidates(setup: Setup, start: Mapping[str, float] | None) -> np.ndarray:
    """Starts `[S, K]`: a low-discrepancy grid of the searched parameters (or the user's point).

    The additive recurrence of Roberts 2018 (plastic-number sequence) fills any dimension evenly
    without a table or random numbers.
    """
    law, problem = setup.law, setup.problem
    searched = {
        k: p.search
        for k, p in enumerate(law.parameters)
        if problem.free[k] and not p.linear and p.search and p.search[1] > p.search[0]
    }
    if start is not None:
        theta = setup.template.copy()
        for name, value in start.items():
            k = law.index(name)
            if k in searched:
                theta[k] = np.clip(
                    law.parameters[k].internal(value), problem.low[k], problem.high[k]
                )
        grid = theta[None]
    else:
        dimension = max(len(searched), 1)
        count = min(48 * 2 ** (dimension - 1), law.most_starts) if searched else 1
        root = 1.5
        for _ in range(60):
            root = (1.0 + root) ** (1.0 / (dimension + 1))
        steps = root ** -np.arange(1.0, dimension + 1)
        points = (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1.0
        grid = np.repeat(setup.template[None], count, axis=0)
        for j, (k, (low, high)) in enumerate(searched.items()):
            grid[:, k] = low + points[:, j] * (high - low)
    x, log_loss, weights = _some(problem)
    solved = [law.linear_start(t, x, log_loss, weights) for t in grid]
    return np.where(problem.free, np.array(solved), setup.template)


def _some(problem: Problem) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """The observations that starts are solved on: all, or a sample (with a fixed seed)."""
    if problem.x.size <= MOST_FOR_STARTS:
        return problem.x, problem.log_loss, problem.weights
    # random, because a regular step through a grid could hit a single column
    some = np.random.default_rng(0).choice(problem.x.size, MOST_FOR_STARTS, replace=False)
    return problem.x.take(some), problem.log_loss[some], problem.weights[some]


def solve(setup: Setup, start: Mapping[str, float] | None = None) -> tuple[Minimum, np.ndarray]:
    """The best minimum over all starts, as a batch of one, and where refits start `[S, K]`.

    Resampled runs may have their minimum elsewhere: the first start is the minimum, the others
    are ends of other starts that are far from it and from each other.
    """
    theta = candidates(setup, start)
    problem = setup.problem
    value = problem.value_and_gradient(np.clip(theta, problem.low, problem.high))[0]
    value = np.where(np.isfinite(value), value, np.inf)
    theta = theta[np.argsort(value, kind="stable")[:POLISHED]]
    # Most starts reach one minimum within some tens of iterations: only the best few go on.
    ends = minimise(problem, theta, max_iterations=QUICK)
    last = minimise(problem, ends.theta[np.argsort(ends.value, kind="stable")[:FINISHED]])
    lowest = int(np.argmin(last.value))
    best = minimise(problem, last.theta[lowest : lowest + 1])
    for _ in range(RESTARTS):  # from a new Hessian: the valley of a badly known direction bends
        if best.converged[0]:
            break
        best = minimise(problem, best.theta, QUICK)
    return best, distinct(setup, best, ends)


def distinct(setup: Setup, best: Minimum, ends: Minimum) -> np.ndarray:
    """The minimum and up to three ends that differ from it and each other, `[S, K]`.

    Distances are shares of the range that starts are spread over, of what is not linear.
    """
    law = setup.law
    ranges = [(p.high - p.low) if p.search is None else np.ptp(p.search) for p in law.parameters]
    searched = setup.problem.free & ~np.array([p.linear for p in law.parameters])
    searched &= np.array(ranges) > 0
    order = np.argsort(ends.value, kind="stable")
    near = order[ends.value[order] <= WORSE * max(float(best.value[0]), 1e-300)]
    pool = ends.theta[near]
    kept = best.theta
    for _ in range(OTHERS):
        gap = np.abs(pool[:, None] - kept[None])[:, :, searched] / np.array(ranges)[searched]
        far = gap.max(axis=2, initial=0.0).min(axis=1) if len(pool) else np.zeros(0)
        if not np.any(far > APART):
            break
        kept = np.concatenate([kept, pool[[int(np.argmax(far))]]])
    return kept


def describe(
    setup: Setup,
    best: Minimum,
    starts: np.ndarray,
    runs: Runs,
    fixed: Mapping[str, float],
    delta_source: str,
    target: Target,
) -> SmoothFit:
    """The minimum as a `Fit`: natural units, verdicts, derived quantities."""
    law, problem, theta = setup.law, setup.problem, best.theta[0]
    residuals = problem.residuals(best.theta)[0]
    _check_units(setup, runs, residuals)
    natural = law.shift(theta, setup.centre)
    coefficients = {
        p.name: float(p.report(v)) for p, v in zip(law.parameters, natural, strict=True)
    }
    coefficients |= {name: float(value) for name, value in fixed.items()}
    bounds = at_bounds(problem, theta)
    condition, verdicts = judge(problem, theta, len(runs))
    verdicts |= _moved_by_units(setup, theta, verdicts)
    identifiable = {n: text == "identified" for n, text in verdicts.items() if n not in fixed}
    exact = len(runs) == int(problem.free.sum())
    notes = list(runs.notes)
    if exact:
        notes.append(
            f"{len(runs)} runs for {len(runs)} coefficients: the fit is exact, its residuals say "
            "nothing about its error and there is no interval"
        )
    status = _status(bool(best.converged[0]), exact, bounds, identifiable)
    quantities = law.derived(setup.centre, target)
    derived = {q.name: float(q.report(q.function(best.theta)[0])) for q in quantities}
    notes += _target_notes(setup, runs, target, derived)
    if law.cost != Cost() and derived:
        notes.append(f"training FLOPs are those of the runs: dense, {law.cost}")
    return SmoothFit(
        law=law,
        n=len(runs),
        coefficients=coefficients,
        objective=float(problem.huber(residuals[None])[0]),
        huber_delta=problem.delta,
        status=status,
        at_bounds=tuple(bounds),
        identifiable=identifiable,
        verdicts=verdicts,
        condition=condition,
        fixed=dict(fixed),
        delta_source=delta_source,
        standard_errors=_errors(setup, theta, exact),
        derived=derived,
        derived_verdicts={
            q.name: judge_derived(
                problem, theta, with_gradient(q.function)(best.theta)[1][0], q.log
            )
            for q in quantities
        },
        target=target.copy(),
        notes=tuple(notes),
        data_unit=runs.data_unit,
        theta=theta,
        starts=starts,
        centre=setup.centre,
        problem=problem,
        index=setup.index,
        runs=runs,
    )


def _moved_by_units(setup: Setup, theta: np.ndarray, verdicts: Mapping[str, str]) -> dict[str, str]:
    """Verdicts on coefficients that are known at the centre and not in natural units.

    B in natural units is its term at one token: with an unidentified beta it may be anything.
    """
    out = {}
    for k, p in enumerate(setup.law.parameters):
        if p.linear and verdicts[p.name] == "identified":

            def natural(t: np.ndarray, k: int = k) -> np.ndarray:
                return setup.law.shift(t, setup.centre)[:, k]

            slope = with_gradient(natural)(theta[None])[1][0]
            verdict = judge_derived(setup.problem, theta, slope, False)
            if UNMOVED in verdict:
                out[p.name] = verdict
    return out


def _target_notes(
    setup: Setup, runs: Runs, target: Target, derived: Mapping[str, float]
) -> list[str]:
    """Notes on a target that the law derives nothing from, and on extrapolated sizes."""
    out = []
    if target and len(derived) == len(setup.law.derived(setup.centre, Target())):
        needs = ", ".join(n for n in setup.law.needs if n != "loss")
        out.append(
            f"--target {', '.join(target)}: law {setup.law.name} derives nothing from it; a loss "
            f"needs {needs}"
        )
    for name in ("N_opt", "N_star"):
        if name not in derived:
            continue
        low, high = runs["params"].min(), runs["params"].max()
        if not low <= derived[name] <= high:
            out.append(
                f"{name} = {derived[name]:.3g} lies outside the sizes that were run ({low:.3g} to "
                f"{high:.3g}): an extrapolation"
            )
    return out


def _check_units(setup: Setup, runs: Runs, residuals: np.ndarray) -> None:
    """Raises UserError for mixed units: the law predicts better than the reader's smooth trend."""
    if setup.law.of_gap:  # a gap of .44 nats is not a loss in bits
        return
    log_loss = setup.problem.log_loss
    odd, unit = mixed_units(log_loss, log_loss + residuals)
    if odd.size:
        where = "; ".join(runs.source[setup.index[i]] for i in odd[:3])
        raise UserError(f"{where}: the losses look like {unit}: mixed loss units; convert them")


def _status(
    converged: bool, exact: bool, bounds: list[str], identifiable: Mapping[str, bool]
) -> str:
    if not converged:
        return "not_converged"
    if exact:
        return "exact"
    if bounds:
        return "at_bound"
    return "converged" if all(identifiable.values()) else "not_identifiable"


def _errors(setup: Setup, theta: np.ndarray, exact: bool) -> dict[str, float]:
    """Asymptotic standard errors in reported, natural units (delta method)."""
    if exact:
        return {}
    law = setup.law
    base = law.shift(theta, setup.centre)
    eye = np.eye(theta.size)
    # shift is affine in theta up to products with the centre, so differences are exact enough
    step = 1e-6
    by_theta = (law.shift(theta + step * eye, setup.centre) - base) / step  # [k from, k to]
    variance = variances(setup.problem, theta, by_theta.T)
    out = {}
    for k, p in enumerate(law.parameters):
        if setup.problem.free[k]:
            scale = float(np.exp(base[k])) if p.log else p.unit
            out[p.name] = scale * float(np.sqrt(variance[k]))
    return out
