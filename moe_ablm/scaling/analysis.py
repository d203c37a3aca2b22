"""From runs to a fit with everything that belongs beside it: intervals, verdicts, noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_ablm.errors import UserError
from moe_ablm.scaling.catalogue import PARABOLIC, resolve
from moe_ablm.scaling.fit import fit_law
from moe_ablm.scaling.noise import LackOfFit, delta_sensitivity, lack_of_fit
from moe_ablm.scaling.parabola_fit import fit_parabolas
from moe_ablm.scaling.profile import Profile, profiles
from moe_ablm.scaling.result import Fit
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.uncertainty import (
    FEWEST_DRAWS,
    Bootstrap,
    bootstrap,
    bootstrap_intervals,
    merge,
)


@dataclass(frozen=True)
class Question:
    """What is asked of the runs: see the flags of `python -m moe_ablm fit`."""

    law: str
    huber_delta: float | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)
    target: Mapping[str, float] = field(default_factory=dict)
    draws: int = 1000
    seed: int = 0
    seed_sd: float | None = None
    level: float = 0.95


@dataclass(frozen=True)
class Analysis:
    """A fit with its bootstrap draws and profiles; those are absent for exact and closed fits."""

    fit: Fit
    boot: Bootstrap | None = None
    profiles: Sequence[Profile] = ()
    lack_of_fit: LackOfFit | None = None
    deltas: Sequence[tuple[float, Mapping[str, float], float]] = ()


def analyse(runs: Runs, question: Question) -> Analysis:
    """Fits one law and asks how sure it is; raises UserError as `fit_law` does."""
    name = resolve(question.law)
    if name in PARABOLIC and question.fixed:
        raise UserError(f"--fix: law {name} has no coefficients that can be held")
    if name == "envelope":
        from moe_ablm.scaling.envelope import fit_envelope

        return Analysis(
            fit_envelope(runs, question.draws, question.seed, question.target, question.level)
        )
    if name in PARABOLIC:
        return Analysis(
            fit_parabolas(
                runs,
                PARABOLIC[name](),
                question.seed_sd,
                question.draws,
                question.seed,
                question.target,
                question.level,
            )
        )
    made = fit_law(runs, name, question.huber_delta, question.fixed, target=question.target)
    if made.status == "exact" or not made.problem.free.any():
        return Analysis(made)
    walked = profiles(made, question.level)
    parts = [{p.quantity.name: (p.interval(question.level),) for p in walked}]
    boot = None
    if question.draws > 0:
        boot = bootstrap(made, question.draws, question.seed)
        parts.insert(0, bootstrap_intervals(made, boot, question.level))
        if len(boot.usable) < FEWEST_DRAWS:
            note = (
                f"{len(boot.usable)} of {question.draws} bootstrap draws converged, too few for "
                f"an interval ({FEWEST_DRAWS})"
            )
            boot, made = None, replace(made, notes=(*made.notes, note))
    made = replace(with_open_profiles(made, walked), intervals=merge(*parts))
    return Analysis(made, boot, walked, lack_of_fit(made), delta_sensitivity(made))


def with_open_profiles(fit: Fit, walked: Sequence[Profile]) -> Fit:
    """The fit with coefficients whose profile never closes called not identified."""
    verdicts, identifiable = dict(fit.verdicts), dict(fit.identifiable)
    for p in walked:
        name = p.quantity.name
        if identifiable.get(name) and None in (p.low, p.high):
            side = "above" if p.high is None else "below"
            verdicts[name] = f"not identified: its profile never closes {side}"
            identifiable[name] = False
    status = fit.status
    if status == "converged" and not all(identifiable.values()):
        status = "not_identifiable"
    return replace(fit, verdicts=verdicts, identifiable=identifiable, status=status)
