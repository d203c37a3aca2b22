"""Masked-language-model loss on a fixed, fixedly masked set of antibodies."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_ablm.parallel.mesh import global_batch


class Evaluation(NamedTuple):
    """Sums over the whole set, float64: `sums` by region cell, `routed [M, E, CELLS]` or None."""

    sums: tuple[np.ndarray, np.ndarray, np.ndarray]
    routed: np.ndarray | None


def evaluate(eval_step: Callable, params, batches: Iterable[dict], mesh: Mesh) -> Evaluation:
    """Adds up `training.step.make_eval_step` over `batches` (this process's rows of each)."""
    total = None
    for batch in batches:
        found = jax.tree.map(
            lambda x: np.asarray(x, np.float64), eval_step(params, global_batch(batch, mesh))
        )
        total = found if total is None else jax.tree.map(np.add, total, found)
    return Evaluation(tuple(total.sums), total.routed)
