"""How well scores rank what is true before what is not, with weights, so that draws are quick.

Definitions of scikit-learn: area under the ROC curve with ties counted half, and average precision
as the sum of precision times the gain of recall over distinct thresholds, without interpolation.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores in order, made once for many weightings.

    Attributes:
      truth: bool `[n]`.
      group: int64 `[n]`, rank of the score among distinct ones, the highest first.
      groups: how many distinct ones there are.
    """

    truth: np.ndarray
    group: np.ndarray
    groups: int

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> "Ranking":
        """Args: truth bool `[n]`; scores `[n]`, higher for what is more likely true."""
        distinct, rank = np.unique(scores, return_inverse=True)
        return cls(np.asarray(truth, bool), len(distinct) - 1 - rank, len(distinct))

    def _counts(self, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        weights = np.ones(len(self.truth)) if weights is None else np.asarray(weights, float)
        return tuple(
            np.bincount(self.group[at], weights[at], self.groups)
            for at in (self.truth, ~self.truth)
        )

    def auroc(self, weights: np.ndarray | None = None) -> float:
        """Probability that a true one scores higher than another; NaN if there is one kind only."""
        true, false = self._counts(weights)
        pairs = true.sum() * false.sum()
        beaten = false.sum() - false.cumsum() + false / 2
        return float(true @ beaten / pairs) if pairs else float("nan")

    def average_precision(self, weights: np.ndarray | None = None) -> float:
        """Mean precision over the true ones; NaN where there are none."""
        true, false = self._counts(weights)
        chosen = (true + false).cumsum()
        precision = true.cumsum() / np.where(chosen > 0, chosen, 1)
        return float(true @ precision / true.sum()) if true.sum() else float("nan")
