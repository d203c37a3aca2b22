"""A line through logs of optima: ln x = ln k + p ln N + q ln D, with Student's t intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import Target
from moe_ablm.scaling.laws_settings import EXPONENTS
from moe_ablm.scaling.result import Interval

SAME = 0.01  # of a log: inputs that vary by less are one value
TOGETHER = 0.999  # correlation of ln N and ln D beyond which their exponents cannot be told apart


@dataclass(frozen=True)
class Line:
    """Least squares on `[n]` optima: ln k and the exponents that are free, around the mean inputs.

    An exponent that the cells cannot tell is held at 0.
    """

    names: tuple[str, ...]  # of the free exponents
    middle: np.ndarray  # mean of their logs
    solution: np.ndarray  # ln of the optimum at `middle`, then the exponents
    covariance: np.ndarray
    squares: float  # of the residuals, summed
    freedom: int
    fixed: Mapping[str, float]
    notes: tuple[str, ...]

    @staticmethod
    def through(
        log_n: np.ndarray,
        log_d: np.ndarray,
        log_best: np.ndarray,
        fixed: Mapping[str, float],
        law: str,
    ) -> "Line":
        """The line; exponents that the optima cannot tell are held, with a note.

        Raises:
          UserError: there are fewer optima than coefficients.
        """
        logs = dict(zip(EXPONENTS, (log_n, log_d), strict=True))
        held, notes = _untold(logs, fixed) if log_best.size else (dict.fromkeys(logs, 0.0), [])
        names = tuple(n for n in logs if n not in held)
        y = log_best - sum(value * logs[n] for n, value in held.items() if value)
        if log_best.size < 1 + len(names):
            raise UserError(
                f"law {law}: {log_best.size} cells have a minimum among the values tried, and it "
                f"has {1 + len(names)} coefficients; try values on both sides of the best ones"
            )
        middle = np.array([logs[n].mean() for n in names])
        design = np.stack([np.ones(y.size), *(logs[n] - logs[n].mean() for n in names)], axis=1)
        inverse = np.linalg.inv(design.T @ design)
        solution = inverse @ design.T @ y
        squares = float(np.sum((y - design @ solution) ** 2))
        freedom = y.size - design.shape[1]
        covariance = inverse * (squares / freedom if freedom else np.nan)
        if not freedom:
            notes.append("as many cells as coefficients: the line is exact and has no interval")
        return Line(names, middle, solution, covariance, squares, freedom, held, tuple(notes))

    def coefficients(self) -> dict[str, float]:
        """k and both exponents, in the units of the input."""
        exponents = dict(zip(self.names, self.solution[1:].tolist(), strict=True))
        log_k = self.solution[0] - float(self.solution[1:] @ self.middle)
        return {"k": float(np.exp(log_k)), **exponents, **self.fixed}

    def intervals(self, level: float) -> dict[str, tuple[Interval, ...]]:
        """Of k and the free exponents; none where the line is exact."""
        if not self.freedom:
            return {}
        out = {
            name: (self._interval(np.eye(1 + len(self.names))[i], level, False),)
            for i, name in enumerate(self.names, 1)
        }
        return {"k": (self._interval(np.append(1.0, -self.middle), level, True),), **out}

    def at(
        self, target: Target, name: str, level: float
    ) -> tuple[dict[str, float], dict[str, tuple[Interval, ...]]]:
        """The setting at the target's inputs and its interval; nothing where one is missing."""
        needed = {*self.names, *(n for n, value in self.fixed.items() if value)}
        given = cast(Mapping[str, float], target)
        logs = {n: np.log(given[r]) for n, r in EXPONENTS.items() if r in given}
        if not logs or not needed <= set(logs):
            return {}, {}
        gap = np.array([logs[n] for n in self.names]) - self.middle
        row = np.append(1.0, gap)
        shift = sum(value * logs[n] for n, value in self.fixed.items() if value)
        value = float(np.exp(row @ self.solution + shift))
        if not self.freedom:
            return {name: value}, {}
        return {name: value}, {name: (self._interval(row, level, True, shift),)}

    def _interval(self, row: np.ndarray, level: float, log: bool, shift: float = 0.0) -> Interval:
        """Of a combination of the solution."""
        from scipy.special import stdtrit

        error = float(np.sqrt(row @ self.covariance @ row))
        half = float(stdtrit(self.freedom, 0.5 * (1 + level))) * error
        middle = float(row @ self.solution) + shift
        ends = [middle - half, middle + half]
        note = f"scatter of the optima around the law, {self.freedom} degrees of freedom"
        if log:
            low, high = np.exp(ends)
            return Interval("scatter", level, float(low), float(high), None, note, se_log=error)
        return Interval("scatter", level, ends[0], ends[1], error, note)


def _untold(
    logs: Mapping[str, np.ndarray], fixed: Mapping[str, float]
) -> tuple[dict[str, float], list[str]]:
    """Exponents that are held: those fixed, and those that the cells cannot tell (at 0)."""
    held, notes = dict(fixed), []
    for name, values in logs.items():
        if name in held:
            continue
        if not np.isfinite(values).all():
            held[name] = 0.0
        elif np.ptp(values) < SAME:
            held[name] = 0.0
            notes.append(f"{name} is held at 0: all cells have the same {EXPONENTS[name]}")
    free = np.stack([logs[n] for n in logs if n not in held] or [np.zeros(1)])
    if len(free) == 2 and abs(np.corrcoef(free)[0, 1]) > TOGETHER:
        held["by_tokens"] = 0.0
        notes.append(
            "by_tokens is held at 0: tokens go with sizes in these cells, so that by_params is the "
            "exponent of both together"
        )
    return held, notes
