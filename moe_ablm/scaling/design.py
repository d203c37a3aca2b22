"""Checks of a planned grid: what it can identify, and what is missing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.scaling.catalogue import SMOOTH, law_for, resolve
from moe_ablm.scaling.fit import Setup, prepare
from moe_ablm.scaling.identify import by_error, null_space, prior_precision
from moe_ablm.scaling.runs import Runs

EQUAL = 0.01  # relative spread below which a column counts as one value


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
        theta = np.array([p.internal(p.found(coefficients)) for p in law.parameters])
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
