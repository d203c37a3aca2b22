"""Signs that a column is in another unit: counts against each other, losses among losses."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_ablm.scaling.values import BadValue

THOUSANDFOLD = 1e3  # a count that is off by this factor is in another unit
LN_BITS = math.log(1.0 / math.log(2.0))  # ln of (bits per token / nats per token)


def check_flops(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises BadValue where training FLOPs are a thousandfold off 6 N D."""
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
    """A note where tokens are so few per parameter that a unit may be wrong."""
    if "params" not in columns or "tokens" not in columns:
        return None
    ratio = float(np.median(columns["tokens"] / columns["params"]))
    if ratio >= 0.1:
        return None
    return (
        f"there are {ratio:.2g} tokens for each parameter: are tokens in thousands or millions, or "
        "the columns swapped?"
    )


def mixed_units(log_loss: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows whose loss is in another unit than the others' (bits for nats, or perplexity).

    Compares each ln L `[n]` with a robust prediction. A change from nats to bits moves it by
    ln(1/ln 2) = .367, and a perplexity is exp(loss). Small models and short runs also lie off a
    trend, but not all by one factor. So rows are reported only where the rest scatters by less
    than 2 % and *every* outlier is off by what the unit implies.
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

    Squares and products of the logs are used where there are at least three rows per term.
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
