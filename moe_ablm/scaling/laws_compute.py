"""Laws of the best loss at each compute: what compute leaves, and what a router is worth in it."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.scaling.inputs import Centre, Inputs, Target
from moe_ablm.scaling.laws import Derived, Parameter, SmoothLaw, Term, coefficient, exponent

L_INF, A, ALPHA = range(3)
FIRST = 3  # parameters of every kind; those of the others follow
REFERENCE = "dense"  # the kind that others are measured by, where it was run


class Compute(SmoothLaw):
    """Losses at the best size of each budget: a floor and a power law of compute.

    Henighan et al. 2020, eq. 1.1. A kind of model whose loss at C is that of the reference at
    gain times C has a gain in effective compute, the same at every budget (Davidson et al. 2023,
    the compute-equivalent gain). The reference is dense, else the first kind by name.
    """

    name = "compute"
    equation = "L = L_inf + A (gain C)^-alpha, gain 1 for the reference kind"
    source = "Henighan et al. 2020, eq. 1.1; Davidson et al. 2023, compute-equivalent gain"
    needs = ("flops", "loss")
    of_optima = True
    figure = "loss_against_compute"

    def __init__(self, routers: tuple[str, ...] = ()) -> None:
        super().__init__(routers)
        self.parameters = (
            coefficient("L_inf", "loss that no compute removes"),
            coefficient("A", "size of the term in compute"),
            exponent("alpha", "exponent of compute", search=(0.02, 0.8)),
            *self._of_kinds(),
        )

    def _of_kinds(self) -> list[Parameter]:
        """Parameters of the kinds other than the reference."""
        meaning = "times the compute that the reference needs for the same loss"
        return [
            Parameter(f"gain[{r}]", meaning, -7.0, 7.0, True, search=(-1.5, 1.5))
            for r in self.routers
        ]

    @classmethod
    def for_runs(cls, columns: Mapping[str, np.ndarray]) -> "Compute":
        names = sorted(set(np.asarray(columns.get("router", [])).astype(str).tolist()))
        reference = REFERENCE if REFERENCE in names else "".join(names[:1])
        return cls(tuple(name for name in names if name != reference))

    @classmethod
    def applies(cls, columns: Mapping[str, np.ndarray]) -> bool:
        """Unasked only where there is nothing else: losses of runs are not of the best sizes."""
        return super().applies(columns) and "params" not in columns

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        floor, a, alpha = (theta[:, k, None] for k in range(FIRST))
        log_c = np.broadcast_to(x.c, (theta.shape[0], x.size))
        for i in range(len(self.routers)):
            log_c = log_c + theta[:, FIRST + i, None] * (x.router == i)
        gains = [(FIRST + i, -alpha * (x.router == i)) for i in range(len(self.routers))]
        return [
            (np.broadcast_to(floor, log_c.shape), [(L_INF, 1.0)]),
            (a - alpha * log_c, [(A, 1.0), (ALPHA, -log_c), *gains]),
        ]

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        out[..., A] += out[..., ALPHA] * centre.log_flops
        return out


class ComputeSlopes(Compute):
    """The same floor for all kinds, and an exponent of each: gains that change with compute.

    `gain[r]` is at the target's FLOPs, else at the geometric mean of the budgets.
    """

    name = "compute_slopes"
    equation = "L = L_inf + A_r C^-alpha_r, a kind r; A_r C^-alpha_r = A (gain C)^-alpha"

    @classmethod
    def applies(cls, columns: Mapping[str, np.ndarray]) -> bool:
        """Of one kind it is law compute."""
        told = [columns[name] for name in ("router", "experts") if name in columns]
        several = "router" in columns and len(set(zip(*told, strict=True))) > 1
        return super().applies(columns) and several

    def _of_kinds(self) -> list[Parameter]:
        return [
            made
            for r in self.routers
            for made in (
                coefficient(f"A[{r}]", "size of the term in compute of this kind"),
                exponent(f"alpha[{r}]", "exponent of compute of this kind", search=(0.02, 0.8)),
            )
        ]

    def terms(self, theta: np.ndarray, x: Inputs) -> list[Term]:
        floor = np.broadcast_to(theta[:, L_INF, None], (theta.shape[0], x.size))
        out: list[Term] = [(floor, [(L_INF, 1.0)])]
        for i in range(-1, len(self.routers)):
            k = FIRST + 2 * i if i >= 0 else A
            value = theta[:, k, None] - theta[:, k + 1, None] * x.c
            mine = x.router == i
            out.append((np.where(mine, value, -np.inf), [(k, 1.0), (k + 1, -x.c)]))
        return out

    def shift(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        out = np.array(theta)
        for k in range(A, len(self.parameters), 2):
            out[..., k] += out[..., k + 1] * centre.log_flops
        return out

    def derived(self, centre: Centre, target: Target) -> list[Derived]:
        at = np.log(target["flops"]) - centre.log_flops if "flops" in target else 0.0

        def gain(i: int) -> Derived:
            k = FIRST + 2 * i

            def log_gain(t: np.ndarray) -> np.ndarray:
                excess = t[:, A] - t[:, k] + t[:, k + 1] * at
                return excess / t[:, ALPHA] - at

            where = f"at {np.exp(at + centre.log_flops):.3g} FLOPs"
            meaning = f"times the compute that the reference needs for the same loss, {where}"
            return Derived(f"gain[{self.routers[i]}]", meaning, log_gain, log=True)

        return [*map(gain, range(len(self.routers))), *self.loss_at(centre, target)]
