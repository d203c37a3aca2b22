"""Runs to their train-valid gaps: the response of laws of over-fitting."""

from dataclasses import replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.laws_gap import OFFSET
from moe_ablm.scaling.runs import Runs


def gaps(runs: Runs) -> Runs:
    """The runs with `OFFSET` plus validation less training loss, in nats, in place of the loss.

    A gap may be zero or negative, so that it has no logarithm itself. Near a gap of 0 an error of
    ln(1 + gap) is one in nats.

    Raises:
      UserError: there is no training loss, or a gap is below minus one.
    """
    runs.require(("train_loss", "loss"), "gap")
    value = OFFSET + runs["loss"] - runs["train_loss"]
    low = np.flatnonzero(value <= 0.0)
    if low.size:
        i = low[0]
        raise UserError(
            f"{runs.source[i]}: a validation loss of {runs['loss'][i]:g} is more than {OFFSET:g} "
            f"below the training loss of {runs['train_loss'][i]:g}: are the columns swapped, or in "
            "other units?"
        )
    columns = {k: v for k, v in runs.columns.items() if k != "train_loss"} | {"loss": value}
    note = "L is 1 + validation - training loss, in nats, in what is said of ln L"
    return replace(runs, columns=columns, notes=(*runs.notes, note))
