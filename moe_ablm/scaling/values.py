"""Checks of one value: a number in the range of its role, or what was found and expected."""

import math

from moe_ablm.scaling.inputs import BELOW_ONE, FROM_ZERO
from moe_ablm.scaling.sheet import Row

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
COUNTS = ("params", "total_params", "tokens", "unique_tokens", "unique_pairs", "flops")
# A smaller count is in a larger unit: 35 for 35 million.
SMALLEST_COUNT = 1e3
LARGEST_COUNT = 1e40
LOSSES = (1e-9, 1e9)  # range of nats, bits and perplexities


class BadValue(Exception):
    """An unusable row; `what` names the column, the value found and the value expected."""

    def __init__(self, what: str, missing_loss: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.missing_loss = missing_loss


def number(row: Row, role: str, name: str) -> float:
    """A finite number in the range of its role; counts may carry a suffix, as 35M or 1.5B.

    Raises:
      BadValue: names the column, the value found and the value expected.
    """
    raw = row.values.get(name)
    text = "" if raw is None else str(raw).strip()
    if text == "":
        raise BadValue(f"column '{name}': empty", missing_loss=role in ("loss", "train_loss"))
    factor = 1.0
    if role in COUNTS and text[-1].lower() in SUFFIXES:
        factor, text = SUFFIXES[text[-1].lower()], text[:-1]
    try:
        value = float(text) * factor
    except ValueError:
        raise BadValue(f"column '{name}': found {str(raw)[:40]!r}, expected a number") from None
    if not math.isfinite(value):
        raise BadValue(f"column '{name}': found {text}, expected a finite number")
    if role in ("step", "seed"):
        return value
    if role in BELOW_ONE and not 0.0 <= value < 1.0:
        raise BadValue(f"column '{name}': found {value:g}, expected 0 <= {role} < 1")
    if role in FROM_ZERO and value == 0.0:
        return value
    if role == "experts" and value == 0.0:
        return 1.0  # our dense runs have no experts
    if value <= 0.0:
        raise BadValue(f"column '{name}': found {value:g}, expected a positive number")
    if role == "experts" and value < 1.0:
        raise BadValue(f"column '{name}': found {value:g}, expected at least one expert")
    if role in ("loss", "train_loss") and not LOSSES[0] <= value <= LOSSES[1]:
        raise BadValue(f"column '{name}': found {value:g}, which is no loss")
    if role in COUNTS and value > LARGEST_COUNT:
        raise BadValue(f"column '{name}': found {value:g} for {role}, which is too many")
    if role in COUNTS and value < SMALLEST_COUNT:
        raise BadValue(
            f"column '{name}': found {value:g} for {role}, which is too few to be a count; if it "
            f"is in millions write {value:g}M"
        )
    return value


def label(row: Row, name: str) -> str:
    """A text cell; empty where there is none."""
    raw = row.values.get(name)
    return "" if raw is None else str(raw).strip()
