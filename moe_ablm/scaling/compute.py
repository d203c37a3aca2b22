"""Training FLOPs of the runs: what a token costs, for each kind of model and size.

6 N D counts a multiply and an add of every parameter, forward and twice backward. Small models
spend more (attention, the output layer), and soft-MoE of E experts spends a share of its active
parameters on a token. Where the runs have FLOPs these are believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

EXACT = 1e-3  # of ln C: below it FLOPs are 6 N D times a constant


@dataclass(frozen=True)
class Cost:
    """C = 6 N D c with ln c = log_factor + slope ln N."""

    log_factor: float = 0.0
    slope: float = 0.0

    def log_tokens(self, flops: float | np.ndarray, log_params: np.ndarray) -> np.ndarray:
        """ln of the tokens that so many FLOPs pay for."""
        return np.log(np.asarray(flops) / 6.0) - self.log_factor - (1.0 + self.slope) * log_params

    def flops(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Training FLOPs of models of this cost."""
        return 6.0 * params * tokens * np.exp(self.log_factor + self.slope * np.log(params))

    def __str__(self) -> str:
        if self == Cost():
            return "C = 6 N D"
        if not self.slope:
            return f"C = {6 * np.exp(self.log_factor):.4g} N D"
        return f"C = {6 * np.exp(self.log_factor):.4g} N^{1 + self.slope:.4g} D"


SIX_N_D = Cost()


def cost_of(columns: Mapping[str, np.ndarray]) -> Cost:
    """The cost of dense runs (of all, where none is dense): a power law through their FLOPs."""
    found = excess(columns)
    if found is None:
        return Cost()
    log_c, log_n = found, np.log(np.asarray(columns["params"], float))
    if "experts" in columns and np.any(np.asarray(columns["experts"]) <= 1):
        dense = np.asarray(columns["experts"]) <= 1
        log_c, log_n = log_c[dense], log_n[dense]
    if np.ptp(log_c) < EXACT or np.ptp(log_n) < EXACT:
        middle = float(np.median(log_c))
        return Cost(middle if abs(middle) >= EXACT else 0.0)
    slope, log_factor = np.polyfit(log_n, log_c, 1)
    return Cost(float(log_factor), float(slope))


def excess(columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """ln(C / 6ND) of each run `[n]`; None where the runs have no FLOPs."""
    if not all(role in columns for role in ("flops", "params", "tokens")):
        return None
    flops, params, tokens = (np.asarray(columns[k], float) for k in ("flops", "params", "tokens"))
    return np.log(flops / (6.0 * params * tokens))


def along_sizes(log_n: np.ndarray, log_c: np.ndarray, at: np.ndarray) -> np.ndarray:
    """ln c at sizes `at`, linear between the sizes that were run and constant beyond."""
    sizes = np.unique(log_n)
    middle = np.array([np.median(log_c[log_n == s]) for s in sizes])
    return np.interp(at, sizes, middle)
