"""Laws of the best setting, a learning rate or batch; `tuning.py` fits them."""

from collections.abc import Mapping

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.laws import Law

EXPONENTS = {"by_params": "params", "by_tokens": "tokens"}


class BestSetting(Law):
    """The best value of a setting for each size and number of tokens."""

    setting: str  # the column
    equation = "best value of a cell = k N^by_params D^by_tokens"
    source = "the form of Li et al. 2025, Predictable scale I, arXiv 2503.04715"
    needs = ("params", "loss")
    of_settings = True
    figure = "best_setting"

    @classmethod
    def applies(cls, columns: Mapping[str, np.ndarray]) -> bool:
        """Asked for by name only: for all other laws the best setting of each cell counts."""
        return False

    def predict(
        self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The best setting (not a loss) at sizes and tokens."""
        log = np.log(coefficients["k"])
        for name, role in EXPONENTS.items():
            if coefficients.get(name, 0.0):
                if role not in columns:
                    raise UserError(f"predict: this fit of law {self.name} needs {role}=...")
                log = log + coefficients[name] * np.log(np.asarray(columns[role], float))
        return np.exp(log)


class LearningRate(BestSetting):
    """The best peak learning rate of each cell, at the best batch of each where that varies."""

    name = "learning_rate"
    setting = "lr"


class BatchSize(BestSetting):
    """The best batch, at the best learning rate of each; its unit is that of the column."""

    name = "batch_size"
    setting = "batch"
