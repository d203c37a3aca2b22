"""Embeddings of chains: are they ordered by V gene, by mutation?

An antibody is shown to the model as it is, a pair as a pair; the final layer is averaged over the
residues of one chain (Burbach & Briney 2024, Patterns 5:100967, figure 2). The pictures are what
UMAP and t-SNE make of these embeddings; the numbers are of the embeddings themselves, with cosine
distances. `purity` is the share of a chain's nearest neighbours with its V gene, `purity_by_chance`
what it is expected to be of neighbours drawn at random, `purity_at_best` what it could be where a
gene has fewer chains than neighbours are looked at; `purity_above_chance` is (purity - chance) /
(best - chance), by which groups of unequal size can be compared; `silhouette` is of clusters by V
gene. `mutations_by_neighbours` is Spearman's correlation of the mutations of a chain with the mean
of its neighbours', `mutations_by_distance` of the distance of two chains with the difference in
their mutations. Neighbours of the same clonal cluster, or with the same sequence of this chain, are
left out: they are alike whatever the model has learned. Intervals bootstrap the
query antibodies; neighbour sets stay fixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.estimates import (
    Number,
    RankCorrelation,
    Sample,
    derived,
    interval,
    ratio,
    resampled,
)
from moe_ablm.evaluation.neighbours import (
    cosine_distances,
    kin,
    mean_of_neighbours,
    nearest,
    others_like_me,
    share_like_me,
    silhouettes,
)
from moe_ablm.evaluation.outcome import Outcome, Picture, Skipped, Table
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.embed import embed

TITLE = "Embeddings"
KIN = "all are of one clonal cluster or sequence"
COMPARED = 300  # chains whose distances to each other are compared with mutations
TABLES = (
    Table(
        "Neighbours with the same V gene, and silhouette of V genes",
        ("purity", "purity_by_chance", "purity_at_best", "purity_above_chance", "silhouette"),
        ("chain", "group"),
    ),
    Table(
        "Mutations: Spearman's correlation with those of the neighbours, and of distances",
        ("mutations_by_neighbours", "mutations_by_distance"),
        ("chain",),
    ),
)


@dataclass(frozen=True)
class Settings:
    """Antibodies drawn from the test split, and nearest neighbours that are looked at."""

    antibodies: int = 2000
    neighbours: int = 15


@dataclass(frozen=True, eq=False)
class Embedded:
    """Chains of one kind.

    Attributes:
      vectors: float32 `[n, D]`.
      units: clonal clusters as text.
      groups: clonal cluster and sequence of each by number, int64 `[n]` each.
      genes: V genes `[n]`, "" where not known.
      mutations: float64 `[n]`, NaN where not known.
    """

    vectors: np.ndarray
    units: np.ndarray
    groups: tuple[np.ndarray, ...]
    genes: np.ndarray
    mutations: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    def where(self, kept: np.ndarray) -> "Embedded":
        """Some of them; `kept` bool or indices."""
        groups = tuple(group[kept] for group in self.groups)
        rest = (self.vectors, self.units, self.genes, self.mutations)
        vectors, units, genes, mutations = (values[kept] for values in rest)
        return Embedded(vectors, units, groups, genes, mutations)


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Numbers for heavy and light chains, all, unmutated and mutated ones; pictures."""
    if settings.neighbours < 1:
        raise UserError(f"embeddings.neighbours={settings.neighbours}: expected 1 or more")
    everyone, notes = subject.antibodies(settings.antibodies)
    known = any(c.v_gene or c.mutations for a in everyone for _, c in a.chains())
    if not known:
        raise Skipped("the dataset has neither V genes nor germline: prepare it with annotation")
    chains = embedded_chains(subject.engine, everyone)
    samples, numbers = [], []
    for chain, embedded in chains.items():
        for group, members in groups_of(embedded).items():
            about = {"chain": chain, "group": group}
            more, reason = of_genes(members, settings.neighbours, about)
            if reason:
                notes.append(f"{group} {chain} chains: {reason}: no purity")
            samples += more
            numbers += [_above_chance(more, about)] if more else []
        of_mutation, reason = of_mutations(subject, embedded, settings.neighbours, {"chain": chain})
        numbers += of_mutation
        notes += [f"{chain} chains: {reason}: no correlation with mutations"] if reason else []
        notes.append(f"{len(embedded):,} {chain} chains")
    pictures, picture_notes = _pictures(chains, settings.neighbours, subject.seed)
    return Outcome(samples, numbers, TABLES, pictures, [*notes, *picture_notes])


def embedded_chains(engine: Engine, everyone: Sequence[Annotated]) -> dict[str, Embedded]:
    """Mean final-layer embeddings by chain; a chain that none has is left out."""
    vectors = embed(engine, [a.antibody for a in everyone], "chain")
    by_chain = {}
    for name in CHAINS:
        rows = [
            (vector, a.unit, chain)
            for a, parts in zip(everyone, vectors, strict=True)
            for (kind, chain), vector in zip(a.chains(), parts, strict=True)
            if kind == name
        ]
        if rows:
            parts, units, members = zip(*rows, strict=True)
            numbered = (units, [chain.letters for chain in members])
            # without annotation nothing is known to be unmutated
            counts = [float(c.mutations) if c.region.any() else np.nan for c in members]
            by_chain[name] = Embedded(
                np.stack(parts),
                np.array(units),
                tuple(np.unique(texts, return_inverse=True)[1] for texts in numbered),
                np.array([chain.v_gene for chain in members]),
                # a dataset without germline has no mutations at all
                np.array(counts) if np.nansum(counts) > 0 else np.full(len(rows), np.nan),
            )
    return by_chain


def groups_of(embedded: Embedded) -> dict[str, Embedded]:
    """All, and where mutations are known those with none and those with some."""
    groups = {"all": embedded}
    if not np.isnan(embedded.mutations).all():
        groups["unmutated"] = embedded.where(embedded.mutations == 0)
        groups["mutated"] = embedded.where(embedded.mutations > 0)
    return groups


def of_genes(embedded: Embedded, k: int, about: dict[str, str]) -> tuple[list[Sample], str]:
    """Purity, what it is by chance and at best, and silhouettes; or why there are none."""
    embedded = embedded.where(embedded.genes != "")
    genes, codes = np.unique(embedded.genes, return_inverse=True)
    if not len(genes):
        return [], "no V gene is known"
    if len(embedded) <= k:
        return [], f"{len(embedded)} with a V gene, more than {k} are needed"
    if len(genes) == 1:
        return [], f"{genes[0]} is the only V gene"
    purity = share_like_me(nearest(embedded.vectors, embedded.groups, k), codes)
    same, others = others_like_me(embedded.groups, codes)
    parts = {
        "purity": purity,
        "purity_by_chance": ratio(same, others),
        "purity_at_best": ratio(np.minimum(same, k), np.minimum(others, k)),
        "silhouette": silhouettes(embedded.vectors, codes),
    }
    known = np.isfinite(purity)
    if not known.any():
        return [], KIN
    units = embedded.units[known]
    return [
        Sample(metric, units, values[known], np.ones(len(units)), about, unit="share")
        for metric, values in parts.items()
    ], ""


def _above_chance(samples: Sequence[Sample], about: dict[str, str]) -> Number:
    purity, chance, best = (s.total for s in samples[:3])
    sums = np.stack([purity - chance, best - chance], axis=1)
    units = samples[0].units
    return derived("purity_above_chance", units, sums, lambda s: ratio(s[..., 0], s[..., 1]), about)


def of_mutations(
    subject: Subject, embedded: Embedded, k: int, about: dict[str, str]
) -> tuple[list[Number], str]:
    """Correlations of mutations with those of neighbours and with distances; or why not."""
    embedded = embedded.where(np.isfinite(embedded.mutations))
    if len(np.unique(embedded.mutations)) < 2:
        return [], "mutations are not known or all the same"
    if len(embedded) <= k:
        return [], f"{len(embedded)} with known mutations, more than {k} are needed"
    predicted = mean_of_neighbours(
        nearest(embedded.vectors, embedded.groups, k), embedded.mutations
    )
    known = np.isfinite(predicted)
    if not known.any():
        return [], KIN
    units = embedded.units[known]
    by_neighbours = _correlation(
        "mutations_by_neighbours", (predicted[known], embedded.mutations[known]), units, about
    )
    rng = subject.generator(f"distances of {about['chain']} chains")
    drawn = np.sort(rng.permutation(len(embedded))[:COMPARED])
    return [by_neighbours, _by_distance(embedded.where(drawn), about)], ""


def _by_distance(embedded: Embedded, about: dict[str, str]) -> Number:
    """Of all pairs of chains that are not kin; a draw counts a pair as often as both chains."""
    distances = np.concatenate([part for _, part in cosine_distances(embedded.vectors)])
    first, second = np.nonzero(np.triu(~kin(embedded.groups, slice(None))))
    pairs = distances[first, second], np.abs(embedded.mutations[first] - embedded.mutations[second])
    return _correlation("mutations_by_distance", pairs, embedded.units, about, (first, second))


def _correlation(
    metric: str,
    pairs: tuple[np.ndarray, np.ndarray],
    units: np.ndarray,
    about: dict[str, str],
    ends: tuple[np.ndarray, ...] | None = None,
) -> Number:
    """Spearman's correlation of observations of one chain each, or of the two `ends` of each."""
    correlate = RankCorrelation(*pairs)
    unit, counts = resampled(units)
    ends = ends or (np.arange(len(units)),)
    values = [correlate(np.prod([drawn[unit[end]] for end in ends], axis=0)) for drawn in counts]
    value = correlate(np.ones(len(pairs[0]), int))
    low, high = interval(np.array(values))
    return Number(metric, value, about, low, high, len(units))


def _pictures(
    chains: dict[str, Embedded], neighbours: int, seed: int
) -> tuple[list[Picture], list[str]]:
    pictures, notes = [], []
    for method in METHODS:
        try:
            places = {
                chain: coordinates(method, embedded.vectors, neighbours, seed)
                for chain, embedded in chains.items()
                if len(embedded) > neighbours
            }
        except ImportError as error:
            notes.append(f"no picture by {method} ({error}): pip install 'moe_ablm[eval]'")
            continue
        if places:
            known = {chain: (chains[chain].genes, chains[chain].mutations) for chain in places}
            caption = f"{method} of chain embeddings, by V gene and by mutations"
            name = method.lower().replace("-", "")
            draw = partial(draw_embeddings, method, places, known)
            pictures.append(Picture(name, caption, draw))
    return pictures, notes


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
    figure = Figure(figsize=(12, 4.8 * len(places)), layout="constrained")
    axes = figure.subplots(len(places), 2, squeeze=False)
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
    axis.scatter(points[rest, 0], points[rest, 1], s=4, color=REST, label="others", linewidths=0)
    for number, name in enumerate(named):
        x, y = points[genes == name].T
        axis.scatter(x, y, s=5, color=colormaps["tab10"](number), label=name, linewidths=0)
    axis.legend(fontsize=7, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))


def _by_mutations(figure: Figure, axis: Axes, points: np.ndarray, mutations: np.ndarray) -> None:
    there = np.isfinite(mutations)
    axis.scatter(points[~there, 0], points[~there, 1], s=4, color=REST, linewidths=0)
    if there.any():
        # the few with very many would leave one colour to all others
        most = max(float(np.quantile(mutations[there], 0.98)), 1.0)
        order = np.flatnonzero(there)[np.argsort(mutations[there], kind="stable")]
        x, y = points[order].T
        drawn = axis.scatter(x, y, s=5, c=mutations[order], vmin=0, vmax=most, linewidths=0)
        figure.colorbar(drawn, ax=axis, label="mutated residues", extend="max")
