"""Embeddings in two dimensions, by UMAP and t-SNE."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = ("UMAP", "t-SNE")
NAMED = 10  # genes with a colour of their own
REST = "0.85"
PERPLEXITY = 30


def coordinates(method: str, vectors: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    """Places in the plane by cosine distance, `[n, 2]`; the same seed gives the same ones.

    Args:
      method: of `METHODS`.
      vectors: `[n, D]` with n > `neighbours`.
      neighbours: of UMAP (McInnes et al. 2018).
      seed: of the start and of what is sampled.

    Raises:
      ImportError: the library is not there.
    """
    if method == "UMAP":
        from umap import UMAP  # compiles with numba: seconds

        reducer = UMAP(n_neighbors=max(neighbours, 2), metric="cosine", random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(vectors))
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # a requirement of scikit-learn

    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    reducer = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    with threadpool_limits(1):  # threads wait for each other by spinning
        return np.asarray(reducer.fit_transform(vectors))


def draw_embeddings(
    method: str,
    places: Mapping[str, np.ndarray],
    known: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Figure:
    """A row a chain: the same points by V gene and by number of mutations.

    Args:
      method: for the title.
      places: `[n, 2]` by chain.
      known: V genes, "" where not known, and mutations, NaN where not known, by chain.
    """
    figure, axes = plt.subplots(
        len(places), 2, figsize=(12, 4.8 * len(places)), layout="constrained", squeeze=False
    )
    for row, (chain, points) in zip(axes, places.items(), strict=True):
        genes, mutations = known[chain]
        _by_gene(row[0], points, genes)
        _by_mutations(figure, row[1], points, mutations)
        for axis, what in zip(row, ("V gene", "mutations"), strict=True):
            axis.set(title=f"{chain} chains, {what}", xticks=[], yticks=[])
            axis.set(xlabel=f"{method} 1", ylabel=f"{method} 2")
    return figure


def _by_gene(axis: Axes, points: np.ndarray, genes: np.ndarray) -> None:
    names, counts = np.unique(genes[genes != ""], return_counts=True)
    named = names[np.argsort(-counts, kind="stable")[:NAMED]]
    rest = ~np.isin(genes, named)
    axis.scatter(*points[rest].T, s=4, color=REST, label="others", linewidths=0)
    for colour, name in zip(plt.get_cmap("tab10").colors, named, strict=False):
        axis.scatter(*points[genes == name].T, s=5, color=colour, label=name, linewidths=0)
    axis.legend(fontsize=7, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))


def _by_mutations(figure: Figure, axis: Axes, points: np.ndarray, mutations: np.ndarray) -> None:
    there = np.isfinite(mutations)
    axis.scatter(*points[~there].T, s=4, color=REST, linewidths=0)
    if there.any():
        # the few with very many would leave one colour to all others
        most = max(float(np.quantile(mutations[there], 0.98)), 1.0)
        order = np.flatnonzero(there)[np.argsort(mutations[there], kind="stable")]
        drawn = axis.scatter(
            *points[order].T, s=5, c=mutations[order], vmin=0, vmax=most, linewidths=0
        )
        figure.colorbar(drawn, ax=axis, label="mutated residues", extend="max")
