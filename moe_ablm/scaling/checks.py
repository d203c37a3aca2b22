"""Checks of single values and of the loss column: what a wrong unit looks like."""

import math
from collections.abc import Mapping

import numpy as np

from moe_ablm.scaling.readers import Row

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
COUNTS = ("params", "total_params", "tokens", "unique_tokens", "unique_pairs", "flops")
# A count below this is a count of something larger: 35 for 35 million.
SMALLEST_COUNT = 1e3
LARGEST_COUNT = 1e40
LOSSES = (1e-9, 1e9)  # nats, bits or perplexities: none is outside
THOUSANDFOLD = 1e3  # a count that is off by this factor is in another unit
LN_BITS = math.log(1.0 / math.log(2.0))  # ln of (bits per token / nats per token)


class BadValue(Exception):
    """A row that cannot be used; `what` says the column, what was found and what was expected."""

    def __init__(self, what: str, missing_loss: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.missing_loss = missing_loss


def number(row: Row, role: str, name: str) -> float:
    """A finite number in the range of its role; counts may carry a suffix, as 35M or 1.5B.

    Raises:
      BadValue: names the column, what was found and what was expected.
    """
    raw = row.values.get(name)
    text = "" if raw is None else str(raw).strip()
    if text == "":
        raise BadValue(f"column '{name}': empty", missing_loss=role == "loss")
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
    if role == "sparsity":
        if not 0.0 <= value < 1.0:
            raise BadValue(f"column '{name}': found {value:g}, expected 0 <= sparsity < 1")
        return value
    if role == "experts" and value == 0.0:
        return 1.0  # our dense runs have no experts
    if value <= 0.0:
        raise BadValue(f"column '{name}': found {value:g}, expected a positive number")
    if role == "experts" and value < 1.0:
        raise BadValue(f"column '{name}': found {value:g}, expected at least one expert")
    if role == "loss" and not LOSSES[0] <= value <= LOSSES[1]:
        raise BadValue(f"column '{name}': found {value:g}, which is no loss")
    if role in COUNTS and value > LARGEST_COUNT:
        raise BadValue(f"column '{name}': found {value:g} for {role}, which is too many")
    if role in COUNTS and value < SMALLEST_COUNT:
        raise BadValue(
            f"column '{name}': found {value:g} for {role}, which is too few to be a count; if it "
            f"is in millions write {value:g}M"
        )
    return value


def check_flops(values: Mapping[str, object], names: Mapping[str, str]) -> None:
    """Training FLOPs are some 6 N D: raises BadValue where they are a thousandfold off."""
    if not all(role in values for role in ("flops", "params", "tokens")):
        return
    expected = 6.0 * values["params"] * values["tokens"]
    if not 1 / THOUSANDFOLD < values["flops"] / expected < THOUSANDFOLD:
        raise BadValue(
            f"column '{names['flops']}': found {values['flops']:g} FLOPs, and 6 times "
            f"'{names['params']}' times '{names['tokens']}' is {expected:g}: is one of them in "
            "another unit?"
        )


def few_tokens(columns: Mapping[str, np.ndarray]) -> str | None:
    """A note where tokens are so few beside the parameters that a unit may be wrong."""
    if "params" not in columns or "tokens" not in columns:
        return None
    ratio = float(np.median(columns["tokens"] / columns["params"]))
    if ratio >= 0.1:
        return None
    return (
        f"there are {ratio:.2g} tokens for each parameter: are tokens in thousands or millions, or "
        "the columns swapped?"
    )


def label(row: Row, name: str) -> str:
    """A text cell; empty where there is none."""
    raw = row.values.get(name)
    return "" if raw is None else str(raw).strip()


def mixed_units(log_loss: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows whose loss is in another unit than the others' (bits for nats, or perplexity).

    Compares each ln L `[n]` with a robust prediction of it: a change from nats to bits moves it
    by ln(1/ln 2) = .367, and a perplexity is exp(loss). Small models and short runs also lie
    off a trend, but not all by one factor: rows are called odd only where the rest scatters by
    less than 2 % and *every* row far off is off by what the unit says.
    """
    residual = log_loss - predicted
    sd = max(1.4826 * float(np.median(np.abs(residual))), 1e-3)
    far = np.abs(residual) > max(5.0 * sd, 0.1)
    none = np.array([], int), ""
    if sd > 0.02 or not far.any():
        return none
    near = max(3.0 * sd, 0.02)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        is_perplexity = np.abs(np.log(np.maximum(log_loss, 1e-9)) - predicted) < near
        is_log = np.abs(np.exp(log_loss) / predicted - 1.0) < near
    candidates = (
        ("perplexities where the others are losses", (residual > 0) & is_perplexity),
        ("losses where the others are perplexities", (residual < 0) & is_log),
        ("bits where the others are nats", np.abs(residual - LN_BITS) < near),
        ("nats where the others are bits", np.abs(residual + LN_BITS) < near),
    )
    for unit, explained in candidates:
        if np.all(explained[far]):
            return np.flatnonzero(far), unit
    return none


def smooth_prediction(columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Least absolute deviations of ln L `[n]` on the logs of the inputs; None where rows are few.

    Squares and products of the logs join where there are at least three rows for each term.
    """
    log_loss = np.log(columns["loss"])
    logs = []
    for role in ("params", "tokens", "unique_tokens", "experts"):
        if role in columns and np.ptp(columns[role]) > 0:
            x = np.log(columns[role].astype(float))
            logs.append((x - x.mean()) / x.std())
    products = [a * b for i, a in enumerate(logs) for b in logs[i:]]
    ones = np.ones_like(log_loss)
    if log_loss.size >= 3 * (1 + len(logs) + len(products)):
        matrix = np.stack([ones, *logs, *products], axis=1)
    elif log_loss.size >= len(logs) + 5:
        matrix = np.stack([ones, *logs], axis=1)
    else:
        return None
    weights = ones
    for _ in range(50):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(matrix * root[:, None], log_loss * root, rcond=None)[0]
        residual = log_loss - matrix @ solution
        weights = 1.0 / np.maximum(np.abs(residual), 1e-4)
    return matrix @ solution
