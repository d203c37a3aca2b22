"""What each router adds to a coefficient: effects that a normal prior shrinks toward 0."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_ablm.scaling.inputs import Inputs, routed
from moe_ablm.scaling.laws import Derivative, Parameter


@dataclass(frozen=True)
class RouterEffects:
    """Consecutive parameters of a law, one a router; a dense run has none.

    Attributes:
      first: index of that of the first router.
      count: of routers; 0 where a law has no effects.
      sd: of the prior.
    """

    first: int
    count: int
    sd: float

    @property
    def mine(self) -> slice:
        """The parameters."""
        return slice(self.first, self.first + self.count)

    def of(self, theta: np.ndarray, x: Inputs) -> tuple[np.ndarray, list[Derivative]]:
        """The effect on each run `[B, n]`, and its derivative by each parameter `[n]`."""
        value = np.zeros((theta.shape[0], x.size))
        here = [(self.first + i, np.asarray(x.router == i, float)) for i in range(self.count)]
        for k, indicator in here:
            value += theta[:, k, None] * indicator
        return value, list(here)

    def penalty(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minus the log prior `[B]` and its gradient `[B, K]`."""
        z = theta[:, self.mine] / self.sd
        gradient = np.zeros_like(theta)
        gradient[:, self.mine] = z / self.sd
        return 0.5 * np.sum(z**2, axis=1), gradient


def effect_parameters(kind: str, routers: tuple[str, ...], meaning: str) -> list[Parameter]:
    """`kind[router]` of each router; starts are at no effect."""
    return [
        Parameter(f"{kind}[{r}]", meaning, -3.0, 3.0, search=(0.0, 0.0), absent=0.0)
        for r in routers
    ]


def only_factor(columns: Mapping[str, np.ndarray], routers: tuple[str, ...]) -> dict[str, float]:
    """`v` held at 0 where all runs are of one router, of which P has the factor; else nothing."""
    if len(routers) == 1 and np.all(routed(columns)):
        return {f"v[{routers[0]}]": 0.0}
    return {}


FACTOR_SD = 1.0  # of ln of a router's factor on over-fitting: a factor of e
FACTOR = "log of this router's factor on the penalty"
