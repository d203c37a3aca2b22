"""Settings of training as log-linear factors on the over-fitting term of any law that has one."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import Centre, Inputs, Target
from moe_ablm.scaling.laws import Derivative, Derived, Parameter, SmoothLaw, Term

COVARIATES = ("weight_decay", "dropout")
LARGEST = 7.0  # ln of the factor between the smallest and the largest value of the runs


def spread(columns: Mapping[str, np.ndarray], name: str) -> float:
    """Largest less smallest value of a covariate; raises UserError where all are equal."""
    found = float(np.ptp(columns[name]))
    if found == 0.0:
        raise UserError(
            f"--covariates {name}: every run has {columns[name][0]:g}, so that nothing tells what "
            "it does"
        )
    return found


class WithCovariates(SmoothLaw):
    """A law whose over-fitting term has a factor exp(by_x x) for each covariate x.

    0 is the value without effect. Of a gap, dropout moves the other term too, in the same way:
    training losses are measured with dropout, whether a run repeats its data or not.

    Internal values are ln of the factor between the smallest and the largest value of the runs.
    """

    def __init__(self, law: SmoothLaw, spreads: Mapping[str, float]) -> None:
        super().__init__(law.routers, law.cost)
        assert law.overfitting is not None
        self.law, self.covariates = law, tuple(spreads)
        self.name, self.source, self.figure = law.name, law.source, law.figure
        self.needs = (*law.needs, *self.covariates)
        self.needs_experts, self.needs_repeats = law.needs_experts, law.needs_repeats
        self.of_gap, self.offset, self.overfitting = law.of_gap, law.offset, law.overfitting
        self.defaults, self.most_starts = law.defaults, law.most_starts
        self.linear_rounds, self.dense_pool = law.linear_rounds, law.dense_pool
        named = law.parameters[law.overfitting].name
        factor = " + ".join(f"by_{c} {c}" for c in self.covariates)
        self.equation = f"{law.equation}; {named} times exp({factor})"
        self.moved = [(c, law.overfitting, f"by_{c}") for c in self.covariates]
        if law.of_gap and "dropout" in self.covariates:
            self.moved.append(("dropout", 0, "fresh_by_dropout"))
            self.equation += f", {law.parameters[0].name} times exp(fresh_by_dropout dropout)"
        self.units = [1.0 / spreads[c] for c, _, _ in self.moved]
        self.first = len(law.parameters)  # parameter of the covariates
        what = {law.overfitting: "over-fitting", 0: "the gap without repeats, plus one,"}
        self.parameters = (
            *law.parameters,
            *(
                Parameter(
                    name,
                    f"change of ln of {what[term]} with one unit of {c}",
                    -LARGEST,
                    LARGEST,
                    unit=unit,
                    search=(0.0, 0.0),
                )
                for (c, term, name), unit in zip(self.moved, self.units, strict=True)
            ),
        )

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        terms = self.law.terms(theta[:, : self.first], x)
        linear = [k for k, p in enumerate(self.law.parameters) if p.linear]
        for i, (name, coefficient, _) in enumerate(self.moved):
            by: Derivative = (self.first + i, self.units[i] * getattr(x, name))
            j = linear.index(coefficient)
            value, derivatives = terms[j]
            terms[j] = (value + theta[:, by[0], None] * by[1], [*derivatives, by])
        return terms

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        inner = self.law.shift(theta[..., : self.first], centre)
        return np.concatenate([inner, theta[..., self.first :]], axis=-1)

    def penalty(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        found = self.law.penalty(theta[:, : self.first])
        if found is None:
            return None
        gradient = np.zeros_like(theta)
        gradient[:, : self.first] = found[1]
        return found[0], gradient

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        """Those of the law at the target's covariates; what over-fitting moves, only with all."""
        known = target.copy()
        if not all(c in target for c in self.covariates):
            known.pop("unique_tokens", None)  # without which nothing over-fits

        def plain(theta: np.ndarray) -> np.ndarray:
            out = theta[:, : self.first].copy()
            for i, (name, k, _) in enumerate(self.moved):
                value = np.asarray(target.get(name, 0.0), float)
                out[:, k] += theta[:, self.first + i] * self.units[i] * value
            return out

        def of(made: Derived) -> Derived:
            return replace(made, function=lambda theta: made.function(plain(theta)))

        return list(map(of, self.law.derived(centre, known)))
