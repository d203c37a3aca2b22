"""Neighbours, silhouettes and correlations against scikit-learn and scipy, and planted order."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from small_datasets import Record, random_records, write_dataset
from tiny_models import engine

from moe_ablm.data.antibody import Antibody
from moe_ablm.errors import UserError
from moe_ablm.evaluation import embeddings as module
from moe_ablm.evaluation import neighbours
from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated, Chain
from moe_ablm.evaluation.embeddings import (
    Embedded,
    Settings,
    coordinates,
    draw_embeddings,
    embedded_chains,
    evaluate,
    groups_of,
    of_genes,
    of_mutations,
)
from moe_ablm.evaluation.estimates import RankCorrelation
from moe_ablm.evaluation.neighbours import (
    mean_of_neighbours,
    nearest,
    others_like_me,
    share_like_me,
    silhouettes,
)
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.embed import embed

GENES = np.array(["IGKV1-39", "IGKV3-20", "IGLV2-14", "IGLV1-40"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last of them not full."""
    monkeypatch.setattr(neighbours, "BLOCK", 64)


def embedded(n: int, seed: int, **changes) -> Embedded:
    """Vectors of noise, and genes and mutations that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    values = {
        "vectors": rng.standard_normal((n, 12)),
        "units": np.arange(n).astype(str),
        "groups": (np.arange(n), np.arange(n)),
        "genes": rng.choice(GENES, n, p=(0.5, 0.3, 0.15, 0.05)),
        "mutations": rng.poisson(3, n).astype(float),
    }
    return Embedded(**values | changes)


def sampled(found: Embedded, k: int = 10) -> dict:
    return {s.metric: s.number() for s in of_genes(found, k, {})[0]}


def correlated(found: Embedded, tmp_path) -> dict:
    numbers, _ = of_mutations(Subject(None, None, tmp_path), found, 10, {"chain": "light"})
    return {n.metric: n for n in numbers}


def test_neighbours_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.neighbors")
    found = embedded(150, 0)
    mine = nearest(found.vectors, found.groups, 7)
    search = sklearn.NearestNeighbors(n_neighbors=8, metric="cosine").fit(found.vectors)
    theirs = search.kneighbors(found.vectors, return_distance=False)[:, 1:]
    np.testing.assert_array_equal(np.sort(mine), np.sort(theirs))
    regression = sklearn.KNeighborsRegressor(n_neighbors=7, metric="cosine")
    predicted = regression.fit(found.vectors, found.mutations).predict(None)
    np.testing.assert_allclose(mean_of_neighbours(mine, found.mutations), predicted)


def test_silhouettes_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    found = embedded(150, 1)
    genes = found.genes.copy()
    genes[3] = "the only one"
    mine = silhouettes(found.vectors, genes)
    theirs = metrics.silhouette_samples(found.vectors, genes, metric="cosine")
    np.testing.assert_allclose(mine, theirs, atol=1e-12)
    assert mine[3] == 0


def test_kin_are_no_neighbours_and_no_chance():
    """By a loop over all others."""
    rng = np.random.default_rng(2)
    groups = rng.integers(0, 12, 80), rng.integers(0, 40, 80)
    found = embedded(80, 2, groups=groups)
    codes = np.unique(found.genes, return_inverse=True)[1]
    unit = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    mine, (same, rest) = nearest(found.vectors, groups, 5), others_like_me(groups, codes)
    purity = share_like_me(mine, codes)
    for i in range(80):
        others = [j for j in range(80) if all(group[i] != group[j] for group in groups)]
        best = sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[:5]
        assert sorted(mine[i]) == sorted(best)
        assert purity[i] == pytest.approx(np.mean(codes[best] == codes[i]))
        assert (same[i], rest[i]) == (np.sum(codes[others] == codes[i]), len(others))


def test_fewer_neighbours_than_asked_for():
    groups = (np.array([0, 0, 0, 1]),)
    found = nearest(np.eye(4), groups, 3)
    assert [sorted(row) for row in found] == [[-1, -1, 3], [-1, -1, 3], [-1, -1, 3], [0, 1, 2]]
    np.testing.assert_allclose(share_like_me(found, np.array([0, 1, 0, 0])), [1, 0, 1, 2 / 3])
    alone = nearest(np.eye(4), (np.zeros(4, int),), 3)
    assert (alone == -1).all()
    assert np.isnan(share_like_me(alone, np.zeros(4, int))).all()
    assert np.isnan(mean_of_neighbours(alone, np.ones(4))).all()


def test_rank_correlation_is_that_of_the_observations_repeated():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, 60), rng.standard_normal(60)
    y = np.round(y + 0.3 * x, 1)
    correlate = RankCorrelation(x, y)
    assert correlate(np.ones(60, int)) == pytest.approx(spearmanr(x, y).statistic)
    weights = rng.multinomial(60, np.full(60, 1 / 60))
    repeated = spearmanr(np.repeat(x, weights), np.repeat(y, weights)).statistic
    assert correlate(weights) == pytest.approx(repeated)
    assert np.isnan(RankCorrelation(np.ones(60), y)(weights))
    assert np.isnan(correlate(np.zeros(60, int)))


def test_planted_genes_are_found():
    rng = np.random.default_rng(4)
    found = embedded(300, 4)
    means = dict(zip(GENES, 5 * rng.standard_normal((4, 12)), strict=True))
    vectors = found.vectors + np.array([means[gene] for gene in found.genes])
    numbers = sampled(replace(found, vectors=vectors))
    assert numbers["purity"].value > 0.97 and numbers["silhouette"].value > 0.5
    assert numbers["purity_by_chance"].value < 0.45


def test_noise_is_as_pure_as_chance_has_it():
    inside = 0
    for seed in range(5):
        numbers = sampled(embedded(300, 10 + seed))
        purity, chance = numbers["purity"], numbers["purity_by_chance"]
        inside += purity.low < chance.value < purity.high
        assert abs(purity.value - chance.value) < 0.05
        assert numbers["silhouette"].value < 0.05
    assert inside >= 4


def test_purity_above_chance_is_between_chance_and_all():
    rng = np.random.default_rng(5)
    found = embedded(300, 5)
    means = dict(zip(GENES, rng.standard_normal((4, 12)), strict=True))
    vectors = found.vectors + np.array([means[gene] for gene in found.genes])
    samples, _ = of_genes(replace(found, vectors=vectors), 10, {})
    purity, chance, best, _ = (s.number().value for s in samples)
    above = module._above_chance(samples, {})
    assert above.value == pytest.approx((purity - chance) / (best - chance))
    assert 0 < above.low < above.value < above.high < 1


def test_a_gene_of_few_chains_cannot_fill_the_neighbours():
    genes = np.repeat(["IGKV1-39", "IGKV3-20", "IGLV2-14"], (20, 6, 1))
    vectors = np.eye(3)[np.unique(genes, return_inverse=True)[1]]
    vectors = vectors + 0.01 * np.random.default_rng(0).standard_normal(vectors.shape)
    samples, _ = of_genes(replace(embedded(27, 0), genes=genes, vectors=vectors), 10, {})
    by_metric = {s.metric: s.total for s in samples}
    np.testing.assert_allclose(by_metric["purity_at_best"], np.repeat([1, 0.5, 0], (20, 6, 1)))
    np.testing.assert_allclose(by_metric["purity"], by_metric["purity_at_best"])
    assert module._above_chance(samples, {}).value == pytest.approx(1)


def test_planted_mutations_are_found_and_noise_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "COMPARED", 80)
    found = embedded(300, 6)
    noise = correlated(found, tmp_path)
    vectors = found.vectors.copy()
    vectors[:, 0] = 20  # all point the same way but for the mutations
    vectors[:, 1] = 3 * found.mutations
    planted = correlated(replace(found, vectors=vectors), tmp_path)
    for metric, least in (("mutations_by_neighbours", 0.8), ("mutations_by_distance", 0.5)):
        assert planted[metric].low > least
        assert noise[metric].low < 0.03 and noise[metric].high > -0.03


def test_distances_are_compared_by_pairs_that_are_not_kin(tmp_path):
    """The value by a loop over pairs."""
    groups = np.arange(60) // 3, np.arange(60) // 4
    found = embedded(60, 7, groups=groups, units=groups[0].astype(str))
    unit = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    pairs = [
        (1 - unit[i] @ unit[j], abs(found.mutations[i] - found.mutations[j]))
        for i in range(60)
        for j in range(i)
        if all(group[i] != group[j] for group in groups)
    ]
    number = correlated(found, tmp_path)["mutations_by_distance"]
    assert number.value == pytest.approx(spearmanr(*np.array(pairs).T).statistic)
    assert number.low < number.value < number.high


def test_unmutated_chains_are_a_group_of_their_own():
    """Genes are planted in mutated chains alone."""
    rng = np.random.default_rng(8)
    found = embedded(400, 8, mutations=np.repeat([0.0, 2.0, 5.0, np.nan], 100))
    means = dict(zip(GENES, 5 * rng.standard_normal((4, 12)), strict=True))
    shift = np.array([means[gene] for gene in found.genes]) * (found.mutations > 0)[:, None]
    groups = groups_of(replace(found, vectors=found.vectors + shift))
    assert {name: len(group) for name, group in groups.items()} == {
        "all": 400, "unmutated": 100, "mutated": 200
    }  # fmt: skip
    mutated, unmutated = (sampled(groups[name]) for name in ("mutated", "unmutated"))
    assert mutated["purity"].value > 0.95
    assert unmutated["purity"].value < unmutated["purity_by_chance"].value + 0.1


def chain(letters: str, mutated: str = "", gene: str = "") -> Chain:
    n = len(letters)
    code = np.array([int(m) for m in mutated or "0" * n], np.uint8)
    return Chain(letters, letters, np.ones(n, np.uint8), code, np.zeros(n, np.uint8), gene, "")


def test_chains_are_embedded_with_their_partner():
    everyone = [
        Annotated("a", "u1", 1, chain("EVQLV", "01010", "IGHV1-2"), chain("DIQM", "", "IGKV3-20")),
        Annotated("b", "u1", 2, chain("EVQ"), NO_CHAIN),
        Annotated("c", "u2", 3, NO_CHAIN, chain("DIQM", "1000")),
    ]
    found = embedded_chains(engine(), everyone)
    heavy, light = found["heavy"], found["light"]
    residues = embed(engine(), [Antibody("a", "EVQLV", "DIQM")], "residue")[0]
    np.testing.assert_allclose(heavy.vectors[0], residues[:5].mean(0), atol=1e-5)
    np.testing.assert_allclose(light.vectors[0], residues[5:].mean(0), atol=1e-5)
    alone = embed(engine(), [Antibody("c", "", "DIQM")], "residue")[0]
    np.testing.assert_allclose(light.vectors[1], alone.mean(0), atol=1e-5)
    assert heavy.mutations.tolist() == [2, 0] and light.mutations.tolist() == [0, 1]
    assert light.genes.tolist() == ["IGKV3-20", ""]
    assert heavy.groups[0].tolist() == [0, 0] and heavy.groups[1].tolist() == [1, 0]
    assert light.groups[0].tolist() == [0, 1] and light.groups[1].tolist() == [0, 0]


def no_pictures(monkeypatch):
    monkeypatch.setattr(module, "METHODS", ())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Mutations, but no genes."""
    records = random_records(40, seed=0)
    return write_dataset(tmp_path_factory.mktemp("embeddings") / "d", records, split=2)


def test_what_is_not_known_is_said(monkeypatch, dataset, tmp_path):
    no_pictures(monkeypatch)
    outcome = evaluate(Subject(engine(), dataset, tmp_path), Settings(neighbours=5))
    assert "all heavy chains: no V gene is known: no purity" in outcome.notes
    assert "40 light chains" in outcome.notes
    assert not outcome.samples
    assert {(n.metric, n.labels["chain"]) for n in outcome.numbers} == {
        (metric, kind)
        for metric in ("mutations_by_neighbours", "mutations_by_distance")
        for kind in ("heavy", "light")
    }
    again = evaluate(Subject(engine(), dataset, tmp_path), Settings(neighbours=5))
    assert again.numbers == outcome.numbers
    few = evaluate(Subject(engine(), dataset, tmp_path), Settings(antibodies=4))
    assert not few.numbers and not few.pictures
    assert any("more than 15 are needed" in note for note in few.notes)


def test_reasons_for_no_purity(tmp_path):
    found = embedded(30, 9)
    one = replace(found, genes=np.full(30, "IGKV1-39"))
    assert of_genes(one, 5, {}) == ([], "IGKV1-39 is the only V gene")
    assert of_genes(found, 30, {}) == ([], "30 with a V gene, more than 30 are needed")
    same = replace(found, groups=(np.zeros(30, int), np.arange(30)))
    assert of_genes(same, 5, {}) == ([], "all are of one clonal cluster or sequence")
    about = {"chain": "light"}
    assert of_mutations(Subject(None, None, tmp_path), same, 5, about) == ([], module.KIN)


def test_without_genes_and_germline_it_is_skipped(tmp_path):
    records = [Record(r.heavy, r.light) for r in random_records(6, seed=1)]
    bare = write_dataset(tmp_path / "d", records, 2)
    with pytest.raises(Skipped, match="neither V genes nor germline"):
        evaluate(Subject(engine(), bare, tmp_path), Settings())
    with pytest.raises(UserError, match="embeddings.neighbours=0"):
        evaluate(Subject(engine(), bare, tmp_path), Settings(neighbours=0))


def test_a_missing_library_takes_its_picture_alone(monkeypatch, dataset, tmp_path):
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    outcome = evaluate(Subject(engine(), dataset, tmp_path), Settings(neighbours=5))
    assert len(outcome.numbers) == 4 and not outcome.pictures
    for method in ("UMAP", "t-SNE"):
        told = [note for note in outcome.notes if note.startswith(f"no picture by {method}")]
        assert len(told) == 1 and "pip install 'moe_ablm[eval]'" in told[0]


def planes_apart(method: str) -> None:
    """Two groups of vectors stay apart, and the same seed gives the same picture."""
    rng = np.random.default_rng(0)
    side = np.arange(40) % 2
    vectors = rng.standard_normal((40, 8)) * 0.1 + np.eye(8)[side]
    places = coordinates(method, vectors, 8, seed=1)
    np.testing.assert_array_equal(places, coordinates(method, vectors, 8, seed=1))
    assert silhouettes(np.c_[places, np.ones(40)] - np.r_[places.mean(0), 0], side).mean() > 0.3


def test_t_sne_keeps_groups_apart():
    pytest.importorskip("sklearn")
    planes_apart("t-SNE")


@pytest.mark.slow
def test_umap_keeps_groups_apart():
    pytest.importorskip("umap")
    planes_apart("UMAP")


def test_pictures_show_chains_by_gene_and_mutations():
    n = 60
    rng = np.random.default_rng(1)
    genes = np.array([f"IGHV1-{i % 12}" if i < 50 else "" for i in range(n)])
    mutations = np.where(np.arange(n) % 7 == 0, np.nan, np.arange(n) % 5)
    places = {kind: rng.standard_normal((n, 2)) for kind in ("heavy", "light")}
    unknown = np.full(n, ""), np.full(n, np.nan)
    figure = draw_embeddings("UMAP", places, {"heavy": (genes, mutations), "light": unknown})
    legends = [[t.get_text() for t in a.get_legend().get_texts()] for a in figure.axes[:4:2]]
    assert len(legends[0]) == 11 and legends[0][0] == "others"  # the ten most frequent
    assert legends[1] == ["others"]
    coloured = figure.axes[1].collections[1]
    assert len(coloured.get_offsets()) == np.isfinite(mutations).sum()
