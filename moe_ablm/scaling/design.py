"""What to train next: checks of a planned grid, the best model under limits, the best next run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.catalogue import SMOOTH, law_for, resolve
from moe_ablm.scaling.compute import along_sizes, excess
from moe_ablm.scaling.fit import Setup, prepare
from moe_ablm.scaling.identify import by_error, null_space, prior_precision
from moe_ablm.scaling.inputs import make_inputs
from moe_ablm.scaling.laws import Derived, with_gradient
from moe_ablm.scaling.noise import pure_error
from moe_ablm.scaling.resampling import Bootstrap
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs

EQUAL = 0.01  # relative spread below which a column counts as one value
SIZES = 96  # model sizes tried, log-spaced
BEYOND = 8.0  # the sizes reach this factor beyond those that were run
SHORTER = 0.5 ** np.arange(8)  # fractions of the affordable tokens that are tried
DRAWS = 200  # bootstrap draws that are evaluated
KIND = ("experts", "router", "granularity", "sparsity")


@dataclass(frozen=True)
class Design:
    """What a grid can identify: a verdict and an expected error for each coefficient."""

    law: str
    runs: int
    identifiable: Mapping[str, bool]
    verdicts: Mapping[str, str]
    expected_errors: Mapping[str, float]  # of the internal values: logs of coefficients
    condition: float
    warnings: tuple[str, ...]


def check_design(
    runs: Runs,
    law: str,
    seed_sd: float = 1e-3,
    coefficients: Mapping[str, float] | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Design:
    """Checks a grid of planned runs (no losses needed) for a smooth law.

    Uses the Jacobian of ln L at `coefficients` (an earlier fit's, in natural units), else at
    exponents in the middle of their ranges, with terms of equal size. `seed_sd` is the sd of ln L
    between seeds.

    Raises:
      UserError: a column that the law needs is missing.
    """
    name = resolve(law)
    needs = [n for n in SMOOTH[name].needs if n != "loss"]
    runs.require(needs, name)
    planned = replace(runs, columns={"loss": np.ones(len(runs)), **runs.columns})
    made = law_for(name, planned.columns, planned.covariates)
    setup = prepare(made, planned, seed_sd, {**made.defaults, **(fixed or {})})
    theta = _nominal(setup, coefficients)
    free = np.flatnonzero(setup.problem.free)
    jacobian = made.jacobian(theta[None], setup.problem.x)[0][:, free]
    prior = prior_precision(setup.problem)[np.ix_(free, free)]
    rows = np.concatenate([jacobian, seed_sd * np.sqrt(prior)])
    condition, null = null_space(rows)
    errors = _errors(rows, seed_sd, null)
    verdicts = {n: "fixed" for k, n in enumerate(made.names) if not setup.problem.free[k]}
    for j, k in enumerate(free):
        verdicts[made.names[k]] = "not identified: the design does not move the loss with it"
        if not null[j]:
            share = errors[j] * math.sqrt(prior[j, j])
            verdicts[made.names[k]] = by_error(made.parameters[k], theta[k], errors[j], share)
    named = [made.names[k] for k in free]
    return Design(
        law=made.name,
        runs=len(runs),
        identifiable={n: verdicts[n] == "identified" for n in named},
        verdicts={n: verdicts[n] for n in made.names},
        expected_errors=dict(zip(named, map(float, errors), strict=True)),
        condition=condition,
        warnings=(*_warnings(planned, len(free)), _assumption(seed_sd, coefficients)),
    )


def _nominal(setup: Setup, coefficients: Mapping[str, float] | None) -> np.ndarray:
    """Internal parameters to linearise at, `[K]`."""
    law = setup.law
    if coefficients:
        theta = np.array([p.internal(coefficients[p.name]) for p in law.parameters])
        # shift is linear in the centre, so the negative centre inverts it
        back = setup.centre.back()
        return law.shift(theta, back)
    theta = setup.template.copy()
    linear = [k for k, p in enumerate(law.parameters) if p.linear]
    if linear:
        terms = law.terms(theta[None], setup.problem.x)
        for k, (value, _) in zip(linear, terms, strict=True):
            seen = value[0][np.isfinite(value[0])]
            if seen.size and setup.problem.free[k]:
                theta[k] -= float(seen.mean()) + np.log(len(linear))
    return theta


def _errors(rows: np.ndarray, seed_sd: float, null: np.ndarray) -> np.ndarray:
    """Expected standard errors of the free parameters; inf for those in the null space."""
    norms = np.maximum(np.linalg.norm(rows, axis=0), 1e-300)
    scaled = rows / norms
    inverse = np.linalg.pinv(scaled.T @ scaled, rcond=1e-13, hermitian=True)
    errors = seed_sd * np.sqrt(np.maximum(np.diag(inverse), 0.0)) / norms
    return np.where(null, np.inf, errors)


def _assumption(seed_sd: float, coefficients: Mapping[str, float] | None) -> str:
    where = "the coefficients given"
    if not coefficients:
        where = "exponents in the middle of their range and every term an equal part of the loss"
    return f"expected errors are for a seed sd of {seed_sd:g} in ln L, at {where}"


def _warnings(runs: Runs, parameters: int) -> list[str]:
    out = []
    if len(runs) <= parameters:
        out.append(
            f"{len(runs)} runs for {parameters} coefficients leave nothing to estimate the error "
            "from"
        )
    if "tokens" in runs and np.ptp(np.log(runs["tokens"])) < EQUAL:
        out.append(
            "every run uses the same total tokens: B D^-beta is a constant and E absorbs it, so "
            "that E, B and beta cannot be identified however many sizes there are; add branches "
            "cooled at D/32 ... D, or runs of at most one epoch of the three smallest sizes"
        )
    elif "tokens" in runs and np.unique(runs["tokens"]).size < 3:
        out.append("fewer than three token counts: beta, B and E need three")
    if "params" in runs and np.unique(runs["params"]).size < 3:
        out.append("fewer than three model sizes: an exponent of parameters and E need three")
    if "unique_tokens" in runs and np.ptp(np.log(runs["unique_tokens"])) < EQUAL:
        out.append("one data size only: nothing tells over-fitting from the size of the data")
    cells = runs.cells()
    if np.bincount(cells).max() < 2:
        out.append(
            "no replicates: seed noise will not be measured, nor lack of fit tested; two cells "
            "run with three seeds each are enough"
        )
    return out


@dataclass(frozen=True)
class Limits:
    """Limits of a model; None is no limit.

    Training FLOPs; total parameters that fit in memory; unique tokens; FLOPs of a token at
    inference, a third of those of training.
    """

    flops: float
    total_params: float | None = None
    unique_tokens: float | None = None
    inference_flops: float | None = None


@dataclass(frozen=True)
class Advice:
    """The best model for each draw: arrays `[draws]`, and the kinds that `kind` indexes."""

    kinds: tuple[str, ...]
    kind: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    at_bound: np.ndarray  # the best size was the smallest or largest tried: an extrapolation
    memory_binds: np.ndarray
    repeats: np.ndarray  # epochs over the unique tokens


@dataclass(frozen=True)
class _Grid:
    """All candidates: columns for the law, and the kind of each row."""

    columns: Mapping[str, np.ndarray]
    kind: np.ndarray
    kinds: tuple[str, ...]
    edge: np.ndarray  # the smallest or largest size of the grid
    full: np.ndarray  # the largest size of its kind that memory allows


def advise(fit: SmoothFit, boot: Bootstrap, limits: Limits) -> Advice:
    """Minimises the law over (N, kind of model, D) under the limits, for each bootstrap draw.

    A kind is a combination of experts, router, granularity and sparsity that was run. Its ratio
    of total to active parameters is the median of its runs, and a token costs what the `flops` of
    its runs say (else 6 N). Fewer tokens than compute allows are tried too, because repeats may
    hurt. A law without unique tokens is trusted up to one epoch only: `unique_tokens` then limits
    the tokens.

    Raises:
      UserError: the law has no tokens or is of no loss, or no model fits the limits.
    """
    if fit.law.of_gap:
        raise UserError(
            f"--advise: law {fit.law.name} is of the train-valid gap, and the model of the least "
            "gap is not the best one; use a law of the loss, as joint"
        )
    if "tokens" not in fit.law.needs:
        raise UserError(f"--advise: law {fit.law.name} says nothing about tokens; use another law")
    for name, value in vars(limits).items():
        if value is not None and not value > 0:
            raise UserError(f"--advise: {name}={value}: expected a positive number")
    grid = _grid(fit, limits)
    x = make_inputs(grid.columns, fit.centre, fit.law.routers)
    theta = boot.usable[:DRAWS]
    loss = np.concatenate([fit.law.log_loss(t, x) for t in np.array_split(theta, 20) if len(t)])
    best = np.argmin(loss, axis=1)
    columns = grid.columns
    unique = columns.get("unique_tokens", columns["tokens"])
    return Advice(
        kinds=grid.kinds,
        kind=grid.kind[best],
        params=columns["params"][best],
        tokens=columns["tokens"][best],
        loss=np.exp(loss[np.arange(best.size), best]),
        at_bound=grid.edge[best],
        memory_binds=grid.full[best],
        repeats=(columns["tokens"] / unique)[best],
    )


def _grid(fit: SmoothFit, limits: Limits) -> _Grid:
    runs = fit.runs
    kinds, ratios, values, members = _kinds(runs)
    settings = _settings(fit)
    log_c = excess(runs.columns)
    if limits.total_params and "total_params" not in runs and any(r != 1.0 for r in ratios):
        raise UserError("--max-params: the input has no total_params column to hold against it")
    low, high = runs["params"].min() / BEYOND, runs["params"].max() * BEYOND
    sizes = np.geomspace(low, high, SIZES)
    parts = []
    for i, (ratio, value) in enumerate(zip(ratios, values, strict=True)):
        per_token = 6.0 * sizes  # FLOPs of training on a token
        if log_c is not None:
            here = members[i]
            log_n = np.log(runs["params"][here])
            per_token *= np.exp(along_sizes(log_n, log_c[here], np.log(sizes)))
        fits = sizes * ratio <= (limits.total_params or math.inf)
        fits &= per_token / 3.0 <= (limits.inference_flops or math.inf)
        if not fits.any():
            continue
        n, share = (a.ravel() for a in np.meshgrid(sizes[fits], SHORTER))
        tokens = limits.flops / np.tile(per_token[fits], len(SHORTER)) * share
        cap = limits.unique_tokens or math.inf
        if "unique_tokens" not in fit.law.needs:
            tokens = np.minimum(tokens, cap)
        column = {
            "params": n,
            "total_params": n * ratio,
            "tokens": tokens,
            "unique_tokens": np.minimum(tokens, cap),
            **{k: np.full(n.size, v) for k, v in (value | settings).items()},
        }
        largest = sizes[fits].max()
        edge = (n <= low * 1.0001) | (n >= high * 0.9999)
        full = (n >= largest * 0.9999) & (largest < high * 0.9999)
        parts.append((column, np.full(n.size, i), edge, full))
    if not parts:
        flags = {
            "--max-params": limits.total_params,
            "--max-inference-flops": limits.inference_flops,
        }
        given = ", ".join(f"{flag} {value:g}" for flag, value in flags.items() if value)
        raise UserError(f"{given}: not even the smallest model tried fits")
    columns = {k: np.concatenate([p[0][k] for p in parts]) for k in parts[0][0]}
    kind, edge, full = (np.concatenate([p[j] for p in parts]) for j in (1, 2, 3))
    return _Grid(columns, kind, kinds, edge, full)


def _settings(fit: SmoothFit) -> dict[str, float]:
    """The covariates of the law, as the target has them."""
    given: Mapping[str, Any] = {**fit.target}
    missing = [name for name in fit.runs.covariates if name not in given]
    if missing:
        raise UserError(f"--advise: the loss depends on {missing[0]}; --target {missing[0]}=...")
    return {name: value for name, value in given.items() if name in fit.runs.covariates}


def _kinds(runs: Runs) -> tuple[tuple[str, ...], list[float], list[dict], list[np.ndarray]]:
    """Kinds of models that were run: name, total over active parameters, columns, its runs."""
    present = [k for k in KIND if k in runs]
    rows = list(zip(*(runs[k].tolist() for k in present), strict=True)) or [()] * len(runs)
    ratio = runs["total_params"] / runs["params"] if "total_params" in runs else np.ones(len(runs))
    names, ratios, values, runs_of = [], [], [], []
    for row in sorted(set(rows), key=str):
        value = dict(zip(present, row, strict=True))
        members = np.array([r == row for r in rows])
        names.append(
            ", ".join(f"{k} {v:g}" if isinstance(v, float) else str(v) for k, v in value.items())
            or "dense"
        )
        ratios.append(float(np.median(ratio[members])))
        values.append(value)
        runs_of.append(members)
    return tuple(names), ratios, values, runs_of


@dataclass(frozen=True)
class DataValue:
    """Best loss when the unique data are multiplied by `factor`: median and 95 % range."""

    factor: float
    unique_tokens: float
    loss: tuple[float, float, float]
    gain: tuple[float, float, float]  # over the step before, as a relative loss


def worth_of_data(
    fit: SmoothFit,
    boot: Bootstrap,
    limits: Limits,
    noise: float,
    tokens_per_pair: float | None = None,
) -> tuple[list[DataValue], str]:
    """The gain of each doubling of the unique data at fixed compute, and a sentence on it.

    A doubling is worth it while its median gain in ln L exceeds `noise`, the sd between seeds.
    """
    if limits.unique_tokens is None or "unique_tokens" not in fit.law.needs:
        return [], "The worth of more data needs a data-constrained law and --max-unique."
    out: list[DataValue] = []
    before = None
    stop = None
    for factor in 2.0 ** np.arange(9):
        unique = limits.unique_tokens * factor
        loss = advise(fit, boot, replace(limits, unique_tokens=unique)).loss
        gain = np.zeros_like(loss) if before is None else np.log(before) - np.log(loss)
        out.append(DataValue(float(factor), unique, _range(loss), _range(gain)))
        if before is not None and stop is None and np.median(gain) < noise:
            stop = factor / 2
        before = loss
    if stop is None:
        return (
            out,
            f"Every doubling up to {out[-1].factor:g} times the data gains more than seed noise.",
        )
    if stop == 1.0:
        return out, "More unique data gain less than seed noise at this compute."
    amount = f"{limits.unique_tokens * stop:.4g} tokens"
    if tokens_per_pair:
        amount += f", {limits.unique_tokens * stop / tokens_per_pair:,.0f} pairs"
    return out, (
        f"Up to {stop:g} times the unique data ({amount}) each doubling gains more than seed "
        f"noise ({noise:.1g} in ln L)."
    )


def _range(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, [2.5, 50, 97.5])
    return float(middle), float(low), float(high)


@dataclass(frozen=True)
class Candidate:
    """A cell of the grid: its compute, and how far a run of it lowers var(ln quantity)."""

    source: str
    inputs: Mapping[str, object]
    flops: float
    variance_left: float  # share of the variance of the quantity that would remain
    per_flops: float  # expected reduction per FLOP


def next_runs(
    fit: SmoothFit, boot: Bootstrap, grid: Runs, quantity: Derived, noise: float
) -> list[Candidate]:
    """Cells of a grid by expected reduction of var(quantity) per FLOP, best first.

    Linearised at the fit with the covariance C of the bootstrap draws: a run with sensitivity j
    (d ln L / d theta) and noise s lowers var(g) by (g'Cj)^2 / (s^2 + j'Cj).
    """
    needs = [n for n in fit.law.needs if n != "loss"]
    columns = grid.columns
    grid.require(needs, fit.law.name)
    free = fit.problem.free
    cov = np.atleast_2d(np.cov(boot.usable[:, free], rowvar=False))
    slope = with_gradient(quantity.function)(fit.theta[None])[1][0, free]
    x = make_inputs(columns, fit.centre, fit.law.routers)
    sensitivity = fit.law.jacobian(fit.theta[None], x)[0][:, free]
    before = float(slope @ cov @ slope)
    gain = (sensitivity @ cov @ slope) ** 2
    gain /= noise**2 + np.einsum("ni,ij,nj->n", sensitivity, cov, sensitivity)
    flops = grid.flops()
    out = [
        Candidate(
            grid.source[i],
            {k: v[i].item() for k, v in columns.items() if k in (*needs, "router")},
            float(flops[i]),
            1.0 - float(gain[i]) / before,
            float(gain[i]) / float(flops[i]),
        )
        for i in range(len(grid))
    ]
    return sorted(out, key=lambda c: -c.per_flops)


def noise_of(fit: SmoothFit) -> float:
    """Sd of ln L of one run: between replicates, else the robust spread of the residuals."""
    sd, freedom = pure_error(fit.runs)
    if freedom >= 3:
        return sd
    residuals = fit.residuals()
    return float(1.4826 * np.median(np.abs(residuals)))


def pick_quantity(quantities: Sequence[Derived]) -> Derived:
    """The derived quantity to learn about: N_star, else N_opt, else the exponent ratio."""
    for name in ("N_star", "N_opt", "exponent_ratio"):
        for q in quantities:
            if q.name == name:
                return q
    raise UserError(
        "--next-run: this law has no best size to learn about; give --target flops=... or "
        "params=..., tokens=..., unique_tokens=... to a law that has one"
    )
