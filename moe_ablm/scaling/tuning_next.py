"""What a sweep of a setting still has to try: values beside the lowest loss of each cell.

The minimum of a cell is known by the values next to it (`tuning.NEAR`). Those further away need not
be run.
"""

from collections.abc import Sequence

import numpy as np

SIDES = 2  # values below and above the lowest one: the five that a parabola takes at least
SAME = 0.01  # of a log: a value that is tried


def to_try(tried: np.ndarray, loss: np.ndarray, step: float) -> list[float]:
    """Values that decide a cell and have not been tried, ascending; empty where it is decided.

    Args:
      tried: values of the setting, in any order.
      loss: the lowest at each.
      step: ratio of two neighbouring values of the sweep.
    """
    values, at = np.log(tried), int(np.argmin(loss))
    steps = [k for k in range(-SIDES, SIDES + 1) if k]
    beside = {k: values[at] + k * np.log(step) for k in steps}
    sides = {sign: np.sum(sign * (values - values[at]) > SAME) for sign in (-1, 1)}
    return [
        float(np.exp(value))
        for k, value in beside.items()
        if sides[1 if k > 0 else -1] < SIDES and np.min(np.abs(values - value)) > SAME
    ]


def step_of(cells: Sequence[np.ndarray]) -> float:
    """Ratio of neighbouring values: the median over all cells; 2 where no cell has two."""
    gaps = [gap for tried in cells for gap in np.diff(np.sort(np.log(tried))) if gap > SAME]
    return float(np.exp(np.median(gaps))) if gaps else 2.0
