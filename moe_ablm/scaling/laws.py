"""What scaling laws have in common, and the smooth ones: L is a sum of positive terms.

A smooth law gives the log of each term and its derivatives by the parameters. From these follow
ln L and its gradient (a softmax over terms), so that gradients are exact and nothing overflows.
Parameters are kept as an internal vector `theta [B, K]`: logs of positive coefficients, in centred
units. The smooth laws are in `laws_dense.py`, `laws_moe.py` and `laws_joint.py`, the others in
`parabolas.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moe_ablm.scaling.compute import SIX_N_D, Cost, cost_of
from moe_ablm.scaling.inputs import Centre, Inputs, Target, make_inputs, routed

# theta `[B, K]` to a quantity `[B]` and its gradient `[B, K]`
WithGradient = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# A derivative of a term by one parameter: its index and a scalar, `[n]` or `[B, n]`.
Derivative = tuple[int, float | np.ndarray]
# The log of a term, `[B, n]`, and its derivatives.
Term = tuple[np.ndarray, list[Derivative]]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law; `low` and `high` bound the internal value."""

    name: str
    meaning: str
    low: float
    high: float
    log: bool = False  # the reported coefficient is exp(internal value)
    linear: bool = False  # L is linear in it: solved for, not searched
    unit: float = 1.0  # the reported coefficient is the internal value in this unit, where no log
    search: tuple[float, float] | None = None  # range of the starts; default: the whole range
    absent: float | None = None  # reported, of fits made before the law had it; None: it always had

    def report(self, internal: np.ndarray | float) -> np.ndarray:
        """The coefficient in reported units."""
        return np.exp(internal) if self.log else np.asarray(internal) * self.unit

    def found(self, coefficients: Mapping[str, float]) -> float:
        """The reported coefficient among those of a fit; raises KeyError where it lacks one."""
        if self.absent is None:
            return coefficients[self.name]
        return coefficients.get(self.name, self.absent)

    def internal(self, reported: float) -> float:
        """The inverse of `report`."""
        return float(np.log(reported)) if self.log else float(reported) / self.unit


def coefficient(name: str, meaning: str) -> Parameter:
    """A positive coefficient of one additive term; its range is set by the size of the losses."""
    return Parameter(name, meaning, -60.0, 60.0, log=True, linear=True)


def exponent(
    name: str,
    meaning: str,
    low: float = 1e-3,
    high: float = 4.0,
    search: tuple[float, float] = (0.05, 1.2),
) -> Parameter:
    """An exponent, with its range and the range of its starts."""
    return Parameter(name, meaning, low, high, search=search)


LARGEST_LOG = 700.0  # of a float: ln 1.8e308 is 709.8


@dataclass(frozen=True)
class Derived:
    """A quantity computed from the internal parameters: `function(theta [B, K]) -> [B]`.

    `function` returns the log of the quantity where `log` is true (N*, a loss): profiles and
    intervals are more symmetric there.
    """

    name: str
    meaning: str
    function: Callable[[np.ndarray], np.ndarray]
    log: bool = False
    unit: float = 1.0  # `function` returns the quantity in this unit

    def report(self, value: np.ndarray | float) -> np.ndarray:
        """The quantity in natural units, at most e^700 where exponents near 0 put it further."""
        if self.log:
            return np.exp(np.minimum(value, LARGEST_LOG))
        return np.asarray(value) * self.unit


def with_gradient(function: Callable[[np.ndarray], np.ndarray]) -> WithGradient:
    """A quantity and its gradient, by central differences."""

    def both(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = 1e-5
        gradient = np.empty_like(theta)
        for k in range(theta.shape[1]):
            up, down = theta.copy(), theta.copy()
            up[:, k] += step
            down[:, k] -= step
            gradient[:, k] = (function(up) - function(down)) / (2 * step)
        return function(theta), gradient

    return both


class Law:
    """A scaling law: what it needs of the runs, how it is drawn, and the loss that it predicts."""

    name: str
    equation: str
    source: str
    needs: tuple[str, ...]  # columns
    needs_experts = False  # a fit is only worth it with runs of several experts
    needs_repeats = False  # a fit is only worth it with runs of more than one epoch
    needs_curves = False  # fitted to whole training curves, not to the last step of each run
    of_settings = False  # of the best learning rate or batch: every setting that was tried counts
    of_optima = False  # fitted to the best loss of each budget, not to every run
    of_gap = False  # of validation less training loss, not of the loss
    offset = 0.0  # added to what the law predicts, so that it has a logarithm
    figure = "loss_against_params"  # the figure that shows the loss of this law
    routers: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()  # settings that it knows besides

    @classmethod
    def applies(cls, columns: Mapping[str, np.ndarray]) -> bool:
        """Whether the columns are all there and vary enough to be worth a fit."""
        if cls.needs_curves or any(need not in columns for need in cls.needs):
            return False
        if cls.needs_experts and not np.any(columns["experts"] > 1):
            return False
        if cls.needs_repeats:
            return bool(np.any(columns["tokens"] > columns["unique_tokens"] * (1 + 1e-6)))
        return True

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Losses from reported coefficients and columns in natural units, both unrounded."""
        raise NotImplementedError


class SmoothLaw(Law):
    """A law L(inputs; theta) that is a sum of positive terms, one linear coefficient each.

    Subclasses set the class attributes, `terms` and `shift`, and may add `derived` and `penalty`.
    """

    parameters: tuple[Parameter, ...]
    defaults: Mapping[str, float] = {}  # parameters held fixed unless the user says otherwise
    overfitting: int | None = None  # index of the coefficient of the over-fitting term
    dense_pool = False  # routers have effects on runs with experts alone
    linear_rounds = 1  # solves for the linear coefficients; more where they also sit elsewhere
    most_starts = 512

    def __init__(self, routers: tuple[str, ...] = (), cost: Cost = SIX_N_D) -> None:
        self.routers = routers
        self.cost = cost  # of dense runs, for what is best under compute

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def index(self, name: str) -> int:
        return self.names.index(name)

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "SmoothLaw":
        """The law for these runs; laws with router effects add parameters for each router."""
        return cls(cost=cost_of(columns))

    def observe(
        self, columns: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """Columns of the observations, and the index `[n]` of the run behind each of them.

        A run is one observation, unless it counts in several curves of the law.
        """
        return columns, np.arange(np.asarray(columns[self.needs[0]]).size)

    def inputs(self, columns: Mapping[str, np.ndarray], centre: Centre) -> Inputs:
        """Columns in natural units to what `terms` takes."""
        return make_inputs(columns, centre, self.routers, self.dense_pool)

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        raise NotImplementedError

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        """Parameters in centred units `[..., K]` to the same law in natural units."""
        raise NotImplementedError

    def penalty(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Minus the log prior `[B]` and its gradient `[B, K]`, or None where there is no prior."""
        del theta
        return None

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        """Quantities worth an interval, for parameters in the units of `centre`."""
        return self.loss_at(centre, target)

    def loss_at(self, centre: Centre, target: Target) -> list[Derived]:
        """The loss at the target's inputs, where the target has all that the law needs."""
        if not all(name in target for name in self.needs if name != "loss"):
            return []
        x = self.inputs({k: np.array([v]) for k, v in target.items()}, centre)
        loss = Derived("loss", "loss at the target", lambda t: self.log_loss(t, x)[:, 0], log=True)
        return [loss]

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        """ln L `[B, n]` for parameters `[B, K]`."""
        return log_sum([t for t, _ in self.terms(theta, x)])[0]

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        theta = np.array([p.internal(p.found(coefficients)) for p in self.parameters])
        x = self.inputs(columns, Centre())
        return np.exp(self.log_loss(theta[None], x)[0]) - self.offset

    def jacobian(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        """d ln L / d theta, `[B, n, K]`."""
        terms = self.terms(theta, x)
        _, shares = log_sum([t for t, _ in terms])
        out = np.zeros((theta.shape[0], x.size, theta.shape[1]))
        for (_, derivatives), share in zip(terms, shares, strict=True):
            for k, d in derivatives:
                out[:, :, k] += share * d
        return out

    def linear_start(
        self, theta: np.ndarray, x: Inputs, log_loss: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Variable projection: `theta [K]` with its linear coefficients solved for.

        Non-negative least squares of the relative error, which is the error of ln L to first
        order. A term of zero is set to a millionth of the loss, so that its derivative is not
        zero.
        """
        from scipy.optimize import nnls

        columns = [k for k, p in enumerate(self.parameters) if p.linear]
        theta = theta.copy()
        root = np.sqrt(weights)
        for _ in range(self.linear_rounds):
            terms = [t[0] for t, _ in self.terms(theta[None], x)]
            basis = [t - theta[k] - log_loss for t, k in zip(terms, columns, strict=True)]
            scale = np.array([np.max(b) for b in basis])
            if not np.all(np.isfinite(scale)):  # no run has the term: keep its value
                scale = np.where(np.isfinite(scale), scale, 0.0)
            matrix = np.stack([np.exp(b - s) for b, s in zip(basis, scale, strict=True)], axis=1)
            solution, _ = nnls(matrix * root[:, None], root)
            theta[columns] = np.log(np.maximum(solution, 1e-6)) - scale
        return theta


def log_sum(terms: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """ln of the sum of exp(terms), and each term's share of the sum; terms may be -inf."""
    if len(terms) == 1:
        return terms[0], [np.ones_like(terms[0])]
    top = terms[0]
    for t in terms[1:]:
        top = np.maximum(top, t)
    parts = [np.exp(t - top) for t in terms]
    total = parts[0] + parts[1]
    for p in parts[2:]:
        total = total + p
    return top + np.log(total), [p / total for p in parts]


def routers_of(columns: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Names of the routers of runs with experts, sorted; "moe" without a column."""
    chosen = routed(columns)
    names = np.asarray(columns.get("router", np.full(chosen.size, "moe")))
    return tuple(sorted({str(r) for r in names[chosen]}))
