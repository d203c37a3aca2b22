"""Neighbours among embeddings: cosine distances, nearest neighbours, silhouettes.

Computed in blocks of rows in float64: memory grows with the number of antibodies, not its square.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moe_ablm.evaluation.estimates import ratio

BLOCK = 1024  # rows


def cosine_distances(vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, distances `[rows, n]` to all), 1 - cosine, float64; a vector of zeros is 1 from all.

    Args:
      vectors: `[n, D]`.
    """
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    for first in range(0, len(unit), BLOCK):
        rows = slice(first, min(first + BLOCK, len(unit)))
        yield rows, np.maximum(1 - unit[rows] @ unit.T, 0)


def kin(groups: Sequence[np.ndarray], rows: slice) -> np.ndarray:
    """Who shares a group with whom, bool `[rows, n]`; all share with themselves.

    Args:
      groups: integers `[n]` each: numbers of the clonal cluster, of the sequence, ...
      rows: of the result.
    """
    return np.any([group[rows, None] == group for group in groups], axis=0)


def nearest(vectors: np.ndarray, groups: Sequence[np.ndarray], k: int) -> np.ndarray:
    """The `k` nearest by cosine that share no group, int64 `[n, k]`, in no order; -1: no more."""
    indices = np.full((len(vectors), k), -1)
    for rows, distances in cosine_distances(vectors):
        distances[kin(groups, rows)] = np.inf
        take = min(k, len(vectors))
        chosen = np.argpartition(distances, take - 1, axis=1)[:, :take]
        reachable = np.isfinite(np.take_along_axis(distances, chosen, axis=1))
        indices[rows, :take] = np.where(reachable, chosen, -1)
    return indices


def share_like_me(neighbours: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Share of each one's neighbours with the same code, float64 `[n]`; NaN without neighbours."""
    there = neighbours >= 0
    same = (codes[neighbours] == codes[:, None]) & there
    return ratio(same.sum(1), there.sum(1))


def others_like_me(
    groups: Sequence[np.ndarray], codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Those who share no group with each: how many have its code, and how many there are, `[n]`."""
    counts = []
    for first in range(0, len(codes), BLOCK):
        rows = slice(first, first + BLOCK)
        others = ~kin(groups, rows)
        same = (codes[rows, None] == codes) & others
        counts.append((same.sum(1), others.sum(1)))
    same, others = (np.concatenate(parts) for parts in zip(*counts, strict=True))
    return same, others


def mean_of_neighbours(neighbours: np.ndarray, values: np.ndarray) -> np.ndarray:
    """k-nearest-neighbour regression, float64 `[n]`; NaN without neighbours."""
    there = neighbours >= 0
    return ratio((values[neighbours] * there).sum(1), there.sum(1))


def silhouettes(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How much nearer each is to its own cluster than to the next one, -1 to 1, float64 `[n]`.

    (b - a) / max(a, b) with the mean distances a to the others of its cluster and b to the nearest
    other cluster (Rousseeuw 1987, J. Comput. Appl. Math. 20:53); 0 for the only one of a cluster.

    Args:
      vectors: `[n, D]`.
      codes: clusters, at least two of them.
    """
    _, codes, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    members = np.eye(len(sizes))[codes]
    values = np.empty(len(codes))
    for rows, distances in cosine_distances(vectors):
        own = codes[rows]
        distances[np.arange(len(own)), np.arange(rows.start, rows.stop)] = 0
        sums, at = distances @ members, np.arange(len(own))
        a = sums[at, own] / np.maximum(sizes[own] - 1, 1)
        means = sums / sizes
        means[at, own] = np.inf
        b = means.min(1)
        larger = np.maximum(a, b)
        silhouette = (b - a) / np.where(larger > 0, larger, 1)
        values[rows] = np.where(sizes[own] > 1, silhouette, 0)
    return values
