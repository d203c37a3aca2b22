"""Of several germlines those that fit an antibody best, once it is annotated by each of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.regions import CHAINS

GERMLINES = "germlines"  # the column that names them
SAID_NOTHING = ("wrong_chain", "not_a_v_domain")  # reasons of what other germlines may explain


def best_fitting(
    found: Sequence[tuple[pa.RecordBatch, np.ndarray]],
    germlines: Sequence[str],
    computed: np.ndarray,
) -> tuple[pa.RecordBatch, np.ndarray]:
    """Each row by the germlines of which its chains have the highest V identity, the mean of both;
    of equal ones the first. A row that none annotates has the reason that says most.

    Args:
      found: rows annotated by each of the germlines, and why some are not (object `[rows]`, "" for
        an annotated one).
      germlines: "human" or folders, as many.
      computed: bool `[rows]`: annotation of the others was given, whatever the germlines.

    Returns:
      The rows with a column `germlines`, "" where annotation was given, and the reasons.
    """
    identity = np.stack([_mean_identity(done) for done, _ in found])
    reasons = np.stack([reason for _, reason in found])
    said_nothing = np.array([[r.endswith(SAID_NOTHING) for r in row] for row in reasons.tolist()])
    rank = np.where(reasons == "", 2 + np.nan_to_num(identity), np.where(said_nothing, 0, 1))
    best, rows = rank.argmax(axis=0), np.arange(len(computed))
    every = pa.concat_batches([done for done, _ in found])
    done = every.take(pa.array(best * len(computed) + rows))
    names = np.array([Path(name).resolve().name for name in germlines], object)[best]
    names[~computed] = ""
    return done.append_column(GERMLINES, pa.array(names, pa.string())), reasons[best, rows]


def _mean_identity(done: pa.RecordBatch) -> np.ndarray:
    """V identity of each row, float64 `[rows]`: the mean of its chains, NaN without any."""
    columns = [done[f"v_identity_aa_{chain}"] for chain in CHAINS]
    both = np.stack([column.to_numpy(zero_copy_only=False) for column in columns])
    there = ~np.isnan(both)
    with np.errstate(invalid="ignore"):
        return np.where(there, both, 0).sum(axis=0) / there.sum(axis=0)
