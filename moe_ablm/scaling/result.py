"""A fit, in memory and on disk: `fit.json` is schema-versioned, exact and enough to predict."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.scaling.catalogue import saved_law
from moe_ablm.scaling.inputs import Centre, Target, check_inputs
from moe_ablm.scaling.laws import Law, SmoothLaw
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import Problem

SCHEMA = "moe_ablm.fit/1"


@dataclass(frozen=True)
class Interval:
    """A range of a coefficient or a derived quantity; None stands for an open side."""

    method: str  # "bootstrap", "profile", "parametric bootstrap"
    level: float
    low: float | None
    high: float | None
    se: float | None = None
    note: str = ""
    open: bool = False  # too many draws have no value; the ends are those of the others
    se_log: float | None = None  # of the log, for a positive coefficient


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law; `coefficients` are unrounded and in the units of the input.

    A fit reloaded from disk predicts from its coefficients and has no `runs`.
    """

    law: Law
    n: int
    coefficients: Mapping[str, float]
    objective: float
    huber_delta: float
    status: str  # converged, at_bound, not_identifiable, exact, not_converged
    at_bounds: tuple[str, ...] = ()
    identifiable: Mapping[str, bool] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    condition: float = math.nan
    fixed: Mapping[str, float] = field(default_factory=dict)
    delta_source: str = ""
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[Interval, ...]] = field(default_factory=dict)
    derived: Mapping[str, float] = field(default_factory=dict)
    derived_verdicts: Mapping[str, str] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)  # what made it, from what
    draws: int = 0  # of the bootstrap
    draws_lost: int = 0  # that did not converge, and count in no interval
    data_unit: str = "tokens"
    runs: Runs = Runs({}, ())

    def predict(self, **inputs: float | np.ndarray) -> np.ndarray:
        """Losses at inputs in natural units, as `params=1e8, tokens=1e10`; arrays broadcast.

        Of a law of the gap: validation less training loss.

        Raises:
          UserError: an input that the law needs is missing, or is not a positive number.
        """
        for name in self.law.needs:
            if name not in inputs and name != "loss":
                raise UserError(f"predict: law {self.law.name} needs {name}=...")
        columns = {k: np.asarray(v) for k, v in inputs.items()}
        check_inputs("predict", columns)
        return self.law.predict(self.coefficients, columns)

    def to_json(self) -> dict:
        return {
            "schema": SCHEMA,
            "law": self.law.name,
            "equation": self.law.equation,
            "source": self.law.source,
            "routers": list(self.law.routers),
            "covariates": list(self.law.covariates),
            "n": self.n,
            "coefficients": _plain(self.coefficients),
            "objective": _number(self.objective),
            "huber_delta": _number(self.huber_delta),
            "delta_source": self.delta_source,
            "status": self.status,
            "at_bounds": list(self.at_bounds),
            "identifiable": {k: bool(v) for k, v in self.identifiable.items()},
            "verdicts": dict(self.verdicts),
            "condition": _number(self.condition),
            "fixed": _plain(self.fixed),
            "standard_errors": _plain(self.standard_errors),
            "intervals": {
                name: [{k: _number(v) for k, v in vars(i).items()} for i in items]
                for name, items in self.intervals.items()
            },
            "derived": _plain(self.derived),
            "derived_verdicts": dict(self.derived_verdicts),
            "target": _plain(self.target),
            "provenance": dict(self.provenance),
            "draws": self.draws,
            "draws_lost": self.draws_lost,
            "data_unit": self.data_unit,
            "notes": list(self.notes),
            "runs": list(self.runs.source),
            "dropped": [list(d) for d in self.runs.dropped],
        }

    def save(self, directory: Path | str) -> Path:
        """Writes `fit.json` into `directory` (made if absent), whole or not at all."""
        path = Path(directory) / "fit.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())
        return path


@dataclass(frozen=True, kw_only=True)
class SmoothFit(Fit):
    """A fit of a smooth law in the session that made it: what was minimised, in centred units."""

    law: SmoothLaw
    theta: np.ndarray  # [K], the minimum
    starts: np.ndarray  # [S, K], where refits to other runs start; the first is the minimum
    centre: Centre
    problem: Problem
    index: np.ndarray  # the run behind each observation of `problem`

    def residuals(self) -> np.ndarray:
        """ln L_model - ln L of each observation."""
        return self.problem.residuals(self.theta[None])[0]

    def by_run(self, values: np.ndarray) -> np.ndarray:
        """Means over the observations of each run, for a run that counts in several curves."""
        return np.bincount(self.index, values) / np.bincount(self.index)


def load(path: Path | str) -> Fit:
    """A fit from `fit.json` or the directory that holds it.

    Raises:
      UserError: the file is absent, not JSON, or of another schema.
    """
    path = Path(path)
    path = path / "fit.json" if path.is_dir() else path
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable fit: {error}") from None
    schema = saved.get("schema") if isinstance(saved, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}; fit the runs again")
    try:
        return Fit(
            law=saved_law(
                saved["law"], tuple(saved["routers"]), tuple(saved.get("covariates", ()))
            ),
            n=saved["n"],
            coefficients=_floats(saved["coefficients"]),
            objective=_float(saved["objective"]),
            huber_delta=_float(saved["huber_delta"]),
            status=saved["status"],
            at_bounds=tuple(saved["at_bounds"]),
            identifiable=saved["identifiable"],
            verdicts=saved["verdicts"],
            condition=_float(saved["condition"]),
            fixed=_floats(saved["fixed"]),
            delta_source=saved["delta_source"],
            standard_errors=_floats(saved["standard_errors"]),
            intervals={
                name: tuple(Interval(**item) for item in items)
                for name, items in saved["intervals"].items()
            },
            derived=_floats(saved["derived"]),
            derived_verdicts=saved.get("derived_verdicts", {}),
            target=saved["target"],
            notes=tuple(saved["notes"]),
            provenance=saved.get("provenance", {}),
            draws=saved.get("draws", 0),
            draws_lost=saved.get("draws_lost", 0),
            data_unit=saved["data_unit"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged fit: {type(error).__name__}: {error}") from None


def _number(value: object) -> object:
    """JSON has no infinity and no NaN: infinity becomes a string, NaN becomes null."""
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            return None
        return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    return value


def _plain(values: Mapping[str, object]) -> dict:
    return {
        k: _number(float(v) if isinstance(v, (int, float, np.number)) else v)
        for k, v in values.items()
    }


def _float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Mapping[str, float | str | None]) -> dict[str, float]:
    return {k: _float(v) for k, v in values.items()}
