"""Laws of settings: the best learning rate or batch of each cell, a power of size and tokens.

A cell is a model and a number of tokens. Its best setting is the minimum of a parabola through the
lowest loss at each value tried (`minima.py`: local, weighted, a skew that all cells share); the law
is a line through the logs of the minima. What a rule costs is the loss at its setting less the
lowest loss of the cell: its regret.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import Target, check_inputs
from moe_ablm.scaling.laws_settings import EXPONENTS, BestSetting
from moe_ablm.scaling.minima import Local, split
from moe_ablm.scaling.parabola_fit import Noise, Solved, noise_draws
from moe_ablm.scaling.result import Fit
from moe_ablm.scaling.runs import TUNED, Runs, numbered, within
from moe_ablm.scaling.tuning_line import Line
from moe_ablm.scaling.tuning_next import SIDES, step_of, to_try

# at twice or half the best rate losses are near a parabola; they are steeper toward large rates
NEAR = Local(factor=4.0, fewest=5, most_skew=1.5)


@dataclass(frozen=True)
class Tried:
    """The lowest loss at each value of a setting, `[m]` points of all cells together."""

    cell: np.ndarray
    params: np.ndarray
    tokens: np.ndarray  # nan where they are not known
    value: np.ndarray
    loss: np.ndarray
    noise: Noise | None  # of one loss, where settings were repeated with other seeds


@dataclass(frozen=True)
class Cell:
    """One model and number of tokens: what was tried, its optimum, and what rules cost there."""

    params: float
    tokens: float
    tried: np.ndarray  # [m] values of the setting, ascending
    loss: np.ndarray  # [m] the lowest at each
    best: float  # minimum of the parabola
    ends: tuple[float, float]  # percentiles of `best` over draws of noise; nan: too many without
    regret: Mapping[str, float] = field(default_factory=dict)  # by rule, in the unit of the loss

    @property
    def name(self) -> str:
        return cell_name(self.params, self.tokens)

    def to_json(self) -> dict:
        """Size, tokens, optimum and its interval; None where a number is not known."""
        numbers = {"params": self.params, "tokens": self.tokens, "best": self.best}
        numbers |= dict(zip(("low", "high"), self.ends, strict=True))
        return {name: value if np.isfinite(value) else None for name, value in numbers.items()}

    def loss_at(self, value: float) -> float:
        """Between the values tried on a line in the log; beyond them that of the last one."""
        return float(np.interp(np.log(value), np.log(self.tried), self.loss))


def cell_name(params: float, tokens: float) -> str:
    """A cell in words; tokens are nan where they are not known."""
    return f"N {params:.3g}" + ("" if np.isnan(tokens) else f", D {tokens:.3g}")


@dataclass(frozen=True, kw_only=True)
class TuningFit(Fit):
    """A law of a setting, with the cells that it was made from."""

    law: BestSetting
    cells: tuple[Cell, ...]

    def to_json(self) -> dict:
        """With the optimum of each cell, and where the law has been."""
        return super().to_json() | {"cells": [cell.to_json() for cell in self.cells]}


def fit_tuning(
    runs: Runs,
    law: BestSetting,
    fixed: Mapping[str, float] | None = None,
    rule: Mapping[str, float] | None = None,
    seed_sd: float | None = None,
    draws: int = 1000,
    seed: int = 0,
    target: Target | None = None,
    level: float = 0.95,
) -> TuningFit:
    """The optimum of each cell, the power law through them, and the regret of rules.

    Intervals of the law are Student's t of the scatter of the optima around it, those of an optimum
    are percentiles of draws of noise. `fixed` holds exponents. Rules are `law` (fitted without the
    cell that it is judged on), `one value` (the geometric mean of the other cells' optima) and
    `rule`, the coefficients k, by_params and by_tokens of another one.

    Raises:
      UserError: a column is missing, or fewer cells than coefficients have a minimum.
    """
    fixed = fixed or {}
    runs.require(("params", law.setting, "loss"), law.name)
    check_inputs("--target", target or {})
    _check_given("--fix", fixed, tuple(EXPONENTS), runs, law)
    _check_given("--rule", rule or {}, (*EXPONENTS, "k"), runs, law)
    tried = lowest_at_each(runs, law.setting)
    cells, notes = _cells(tried, law, seed_sd, draws, seed, level)
    lacking = to_try_notes(tried, law.setting)
    try:
        line = _line(cells, fixed, law)
    except UserError as error:  # a sweep that has just begun, or of too few models
        raise UserError("; ".join([str(error), *lacking])) from None
    left = lacking or [
        f"every cell has {SIDES} values of {law.setting} on either side of its lowest loss: no "
        "others need be run"
    ]
    cells = tuple(_judged(i, cells, line, fixed, law, rule) for i in range(len(cells)))
    coefficients = line.coefficients()
    derived, reach = line.at(target or Target(), law.setting, level)
    return TuningFit(
        law=law,
        n=len(runs),
        coefficients=coefficients,
        objective=line.squares,
        huber_delta=float("inf"),
        delta_source="least squares on the logs of the optima",
        status="converged" if line.freedom else "exact",
        identifiable={n: True for n in coefficients if n not in line.fixed},
        verdicts={n: "fixed" if n in line.fixed else "identified" for n in coefficients},
        fixed=line.fixed,
        intervals={**line.intervals(level), **reach},
        derived=derived,
        target=(target or Target()).copy(),
        notes=(*runs.notes, *notes, *left, *line.notes, *_regret_notes(cells)),
        data_unit=runs.data_unit,
        runs=runs,
        cells=cells,
    )


def _check_given(
    flag: str, given: Mapping[str, float], allowed: Sequence[str], runs: Runs, law: BestSetting
) -> None:
    """UserError where a coefficient of a flag is none of the law, or has no input."""
    for name, value in given.items():
        if name not in allowed:
            raise UserError(f"{flag} {name}=...: law {law.name} takes {', '.join(allowed)}")
        if not np.isfinite(value) or (name == "k" and value <= 0):
            above = ", above 0" if name == "k" else ""
            raise UserError(f"{flag} {name}={value:g}: expected a finite number{above}")
        if value and name in EXPONENTS and EXPONENTS[name] not in runs:
            raise UserError(f"{flag} {name}={value:g}: the input has no column {EXPONENTS[name]!r}")


def lowest_at_each(runs: Runs, setting: str) -> Tried:
    """The lowest mean loss at each value of the setting over all other settings tried with it.

    Values within .2 % are one. Runs that agree in all settings are seeds: their mean counts.
    """
    cells, loss = runs.cells(), runs["loss"]
    value = within(cells, np.log(runs[setting]))  # counted over all cells
    config = value
    for role in TUNED:
        if role in runs and role != setting:
            other = numbered(runs[role])
            config = numbered(config * (other.max() + 1) + other)
    counts = np.bincount(config)
    mean = np.bincount(config, loss) / counts
    lowest = np.full(value.max() + 1, np.inf)
    np.minimum.at(lowest, value, mean[config])
    first = np.unique(value, return_index=True)[1]
    freedom = int(np.sum(counts - 1))
    noise = None
    if freedom:
        sd = float(np.sqrt(np.sum((loss - mean[config]) ** 2) / freedom))
        noise = Noise(sd, freedom, "replicates")
    tokens = runs["tokens"] if "tokens" in runs else np.full(len(runs), np.nan)
    return Tried(
        cell=cells[first],
        params=runs["params"][first],
        tokens=tokens[first],
        value=runs[setting][first],
        loss=lowest,
        noise=noise,
    )


def to_try_notes(tried: Tried, setting: str) -> list[str]:
    """The values that each cell lacks, in words."""
    cells = [np.flatnonzero(tried.cell == cell) for cell in np.unique(tried.cell)]
    step = step_of([tried.value[mine] for mine in cells])
    notes = []
    for mine in cells:
        if left := to_try(tried.value[mine], tried.loss[mine], step):
            lowest = tried.value[mine[np.argmin(tried.loss[mine])]]
            name = cell_name(tried.params[mine[0]], tried.tokens[mine[0]])
            values = ", ".join(f"{value:.3g}" for value in left)
            notes.append(f"cell {name}: lowest at {lowest:.3g}; its minimum needs {values}, too")
    return notes


def _cells(
    tried: Tried, law: BestSetting, seed_sd: float | None, draws: int, seed: int, level: float
) -> tuple[tuple[Cell, ...], list[str]]:
    """The cells that have a minimum among the values tried, and notes on the others."""
    try:
        parabolas, _ = split(tried.cell, tried.value, tried.loss, "cell", NEAR)
    except UserError:
        raise UserError(
            f"law {law.name}: no cell (one model, one number of tokens) has three values of "
            f"'{law.setting}'; it needs runs that differ in it alone"
        ) from None
    solved = Solved.of(parabolas, tried.loss)
    noise = Noise(seed_sd, float("inf"), "given") if seed_sd else tried.noise
    if noise is None and parabolas.freedom > 0:
        missed = tried.loss - parabolas.fitted(tried.loss, float(solved.skew))
        sd = float(np.sqrt(np.sum(missed**2) / parabolas.freedom))
        noise = Noise(sd, parabolas.freedom, "residuals of the parabolas", from_residuals=True)
    drawn = np.full((1, len(parabolas.parts)), np.nan)
    if noise is not None and draws > 0:
        errors = noise_draws(noise, tried.loss.size, draws, seed)
        drawn = solved.moved(errors, tried.loss).minima()
    out: list[Cell] = []
    outside: list[Cell] = []
    for i, part in enumerate(parabolas.parts):
        mine = np.flatnonzero(tried.cell == part.size)
        order = mine[np.argsort(tried.value[mine])]
        value = tried.value[order]
        best = float(np.exp(solved.minima()[i]))
        lost = float(np.mean(~np.isfinite(drawn[:, i])))
        ends = (np.nan, np.nan)
        if lost <= 0.5 * (1 - level):
            low, high = np.nanpercentile(drawn[:, i], [50 * (1 - level), 50 * (1 + level)])
            ends = (float(np.exp(low)), float(np.exp(high)))
        first = order[0]
        size, tokens = float(tried.params[first]), float(tried.tokens[first])
        cell = Cell(size, tokens, value, tried.loss[order], best, ends)
        (out if value[0] <= best <= value[-1] else outside).append(cell)
    notes = [
        f"cell {c.name}: no minimum among the values tried ({c.tried[0]:.3g} to {c.tried[-1]:.3g})"
        for c in outside
    ]
    fewer = np.unique(tried.cell).size - len(parabolas.parts)
    if fewer:
        notes.append(f"{fewer} cells have fewer than three values of {law.setting}: left out")
    if noise is not None:
        notes.append(f"noise of a loss: sd {noise.sd:.2g}, {noise.source}")
    return tuple(out), notes


def _line(cells: Sequence[Cell], fixed: Mapping[str, float], law: BestSetting) -> Line:
    """The power law through the optima of the cells."""
    return Line.through(
        np.log([c.params for c in cells]),
        np.log([c.tokens for c in cells]),
        np.log([c.best for c in cells]),
        fixed,
        law.name,
    )


def _judged(
    i: int,
    cells: tuple[Cell, ...],
    line: Line,
    fixed: Mapping[str, float],
    law: BestSetting,
    rule: Mapping[str, float] | None,
) -> Cell:
    """A cell with the regret of each rule; fitted ones do not know it."""
    cell, others = cells[i], cells[:i] + cells[i + 1 :]
    columns = {"params": np.array(cell.params), "tokens": np.array(cell.tokens)}
    rules: dict[str, float] = {}
    if line.freedom:
        held = _line(others, {**fixed, **line.fixed}, law)
        rules["law"] = float(law.predict(held.coefficients(), columns))
        rules["one value"] = float(np.exp(np.mean(np.log([c.best for c in others]))))
    if rule:
        rules["rule"] = float(law.predict({"k": 1.0, **rule}, columns))
    lowest = float(cell.loss.min())
    return replace(cell, regret={n: cell.loss_at(v) - lowest for n, v in rules.items()})


def _regret_notes(cells: Sequence[Cell]) -> list[str]:
    """Mean and largest regret of each rule, in words."""
    out = []
    for name in cells[0].regret:
        regret = np.array([c.regret[name] for c in cells])
        worst = cells[int(np.argmax(regret))]
        out.append(
            f"regret of {RULES[name]}: {regret.mean():.2g} on average over {len(cells)} cells, at "
            f"most {regret.max():.2g} ({worst.name})"
        )
    return out


RULES = {
    "law": "the law, fitted without the cell",
    "one value": "one value for all, the mean of the other cells",
    "rule": "the rule given",
}
