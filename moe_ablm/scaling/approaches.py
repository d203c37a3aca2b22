"""The three approaches of Hoffmann et al. 2022 beside each other, and the bias of parabolas.

A parabola through losses that are none has its minimum elsewhere. How far is seen where the truth
is known: on the surface of approach 3, fitted to the same runs, without noise.
"""

from dataclasses import dataclass

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.envelope import fit_envelope
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.inputs import Target
from moe_ablm.scaling.parabola_fit import ParabolaFit, fit_parabolas
from moe_ablm.scaling.parabolas import IsoFlop
from moe_ablm.scaling.resampling import bootstrap, bootstrap_intervals
from moe_ablm.scaling.result import Fit, Interval, SmoothFit
from moe_ablm.scaling.runs import Runs

BIASED = 0.03  # relative error of a minimum that is worth a warning
EXPONENT = "exponent of N_opt in C"


@dataclass(frozen=True)
class Approach:
    """One approach: exponent of N_opt in C, and N_opt at the target, with intervals."""

    name: str
    values: dict[str, float]
    intervals: dict[str, Interval]


def bias_notes(fit: ParabolaFit) -> list[str]:
    """What the parabolas of an isoFLOP fit miss on a surface of known minima; [] if little."""
    surface = _surface(fit.runs, fit.target)
    if surface is None:
        return []
    columns = dict(fit.runs.columns)
    columns["loss"] = surface.predict(params=columns["params"], tokens=columns["tokens"])
    again = fit_parabolas(
        Runs(columns, fit.runs.source), fit.law, draws=0, target=fit.target
    ).derived
    off = []
    for name, value in again.items():
        budget = fit.target.get("flops") if name == "N_opt" else None
        if name.startswith("N_star["):
            budget = float(name[7:-1])
        if budget is None or name not in fit.derived:
            continue
        true = fit_at(surface, budget)
        if abs(np.log(value / true)) > BIASED:
            off.append(f"{name} {value / true - 1:+.0%}")
    if not off:
        return []
    return [
        "the parabolas are biased: on the noise-free surface E + A N^-alpha + B D^-beta fitted to "
        f"these runs they give {', '.join(off)}; use approach 3 (--law chinchilla) or sizes nearer "
        "to the minima"
    ]


def fit_at(surface: SmoothFit, flops: float) -> float:
    """N_opt of a fitted surface."""
    (n_opt,) = (
        q for q in surface.law.derived(surface.centre, {"flops": flops}) if q.name == "N_opt"
    )
    return float(np.exp(n_opt.function(surface.theta[None])[0]))


def _surface(runs: Runs, target: Target) -> SmoothFit | None:
    if "tokens" not in runs:
        return None
    try:
        made = fit_law(runs, "chinchilla", target=target)
    except UserError:
        return None
    needed = ("alpha", "beta", "A", "B")
    return made if all(made.identifiable.get(name) for name in needed) else None


def approaches(runs: Runs, target: Target, draws: int, seed: int) -> list[Approach]:
    """The approaches that these runs allow, 1 (curves) to 3 (the surface)."""
    out = []
    curves = runs.clusters() is not None
    for name, fitted in (
        ("1: envelope of training curves", lambda: fit_envelope(runs, draws, seed, target)),
        ("2: parabolas at equal compute", lambda: fit_parabolas(
            runs, IsoFlop.for_runs(runs.columns), None, draws, seed, target)),
        ("3: surface E + A N^-alpha + B D^-beta", lambda: fit_law(
            runs, "chinchilla", target=target)),
    ):  # fmt: skip
        if name.startswith("1") and not curves:
            continue
        try:
            out.append(_approach(name, fitted(), draws, seed))
        except UserError:
            continue  # columns or sizes are missing for it
    return [a for a in out if a.values]


def _approach(name: str, fit: Fit, draws: int, seed: int) -> Approach:
    intervals = dict(fit.intervals)
    if isinstance(fit, SmoothFit) and fit.status != "exact" and draws:
        intervals = bootstrap_intervals(fit, bootstrap(fit, draws, seed))
    found = {**fit.coefficients, **fit.derived}
    names = {"slope": EXPONENT, "exponent_ratio": EXPONENT, "N_opt": "N_opt", "D_opt": "D_opt"}
    return Approach(
        name,
        {shown: found[k] for k, shown in names.items() if k in found},
        {shown: intervals[k][0] for k, shown in names.items() if k in intervals},
    )


def disagreement(made: list[Approach]) -> str:
    """A sentence on quantities whose intervals do not overlap between approaches."""
    apart = []
    for quantity in (EXPONENT, "N_opt"):
        ends = [a.intervals[quantity] for a in made if quantity in a.intervals]
        low = max((i.low for i in ends if i.low is not None), default=-np.inf)
        high = min((i.high for i in ends if i.high is not None), default=np.inf)
        if len(ends) > 1 and low > high:
            apart.append(quantity)
    if not apart:
        return ""
    return f"The approaches disagree on {' and '.join(apart)}: their 95 % intervals do not overlap."
