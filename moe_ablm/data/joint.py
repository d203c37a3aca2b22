"""A split that keeps both chains apart: no clone and no identical chain on two sides.

Clones joined by identical light chains make one giant component, a third of the 319,124 pairs of
one donor: clones that hold several light chains connect the common ones, germline genes without
mutation. It cannot be divided, so it goes to train. What is left are small components - a light
chain with the clones that have it - and of these the held-out sets are drawn. So no row is lost;
the price is that held-out sets are less like the whole, and of fewer independent parts.
"""

from typing import NamedTuple

import numpy as np

from moe_ablm.data.masking import mix
from moe_ablm.data.split import SHARES

# a component that is larger than this share of a held-out set would decide what the set is like
LARGEST = 0.1
# of the rows that can be held out, train keeps at least this share
KEPT = 0.5


class Joint(NamedTuple):
    """A split into train, valid and test.

    Attributes:
      split: uint8 `[n]`, indices of `dataset.SPLITS`.
      giant: rows of the largest component.
      candidates: rows of the components that are small enough to be held out.
    """

    split: np.ndarray
    giant: int
    candidates: int


def components(*labels: np.ndarray) -> np.ndarray:
    """Components of rows that are connected by an equal label, directly or through others.

    Args:
      labels: each `[n]`, of any type; 0 connects nothing.

    Returns:
      int64 `[n]`, the number of each row's component.
    """
    n, at = len(labels[0]), len(labels[0])
    rows, nodes = [], []
    for each in labels:
        there = np.flatnonzero(each != 0)
        names, which = np.unique(each[there], return_inverse=True)
        rows.append(there)
        nodes.append(at + which)
        at += len(names)
    ends = np.concatenate(rows), np.concatenate(nodes)
    # here: it takes longer to import than all else that most commands need
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(ends[0]), bool), ends), shape=(at, at))
    number = connected_components(graph, directed=False)[1][:n]
    return np.unique(number, return_inverse=True)[1]


def joint_split(
    cluster: np.ndarray, heavy: np.ndarray, light: np.ndarray, key: np.ndarray
) -> Joint:
    """Draws held-out sets of 5 % each from small components of clones and identical chains.

    A component is drawn by a hash of its least key, so the order of the rows does not matter;
    adding rows moves components that grow or join, and the share that is drawn.

    Args:
      cluster: clonal cluster of each row, `[n]`, any number.
      heavy, light: uint64 `[n]`, hashes of the chains, 0 for none.
      key: uint64 `[n]`, identity of each row.
    """
    n = len(key)
    number = components(np.unique(cluster, return_inverse=True)[1] + 1, heavy, light)
    size = np.bincount(number)
    least = np.full(len(size), np.iinfo(np.uint64).max)
    np.minimum.at(least, number, key)
    held = np.diff(SHARES)  # of all rows, valid and test
    small = size <= max(1, LARGEST * held.min() * n + 1e-6)  # a bound that is whole is reached
    candidates = int(size[small].sum())
    share = np.minimum(held * n / max(candidates, 1), (1 - KEPT) / len(held))
    # as `split.split_of`: the upper ends of the draw are held out
    bounds = ((1 - np.cumsum(share[::-1])[::-1]) * 2**64).astype(np.uint64)
    drawn = np.searchsorted(bounds, mix(least), side="right").astype(np.uint8)
    return Joint(np.where(small, drawn, 0).astype(np.uint8)[number], int(size.max()), candidates)
