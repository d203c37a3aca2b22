"""Specialisation of experts: planted routing is found, its absence is not; formulas by hand."""

import dataclasses
import json
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_datasets import random_records, write_dataset
from tiny_models import engine, tiny_model

from moe_ablm.data.regions import region_names
from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID
from moe_ablm.evaluation import routing
from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated, Chain
from moe_ablm.evaluation.experts import specialisation as sp
from moe_ablm.evaluation.experts.assignments import Assignments, assigned, groups_of
from moe_ablm.evaluation.experts.findings import (
    cell_numbers,
    information_numbers,
    specialist_numbers,
)
from moe_ablm.evaluation.experts.matching import match, p_value, stability
from moe_ablm.evaluation.experts.slots import TABLES as SLOT_TABLES
from moe_ablm.evaluation.experts.slots import Slots
from moe_ablm.evaluation.experts.traits import (
    ALIGNED,
    CHAIN_AND_RESIDUE,
    FROM_START,
    RESIDUE,
    Trait,
    contrast,
    contrasts,
    strata,
    traits,
    v_genes,
)
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.routing import (
    TABLES,
    Settings,
    bounded,
    evaluate,
    findings,
    load_samples,
    remarks,
)
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.suite import as_json, run_suite
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.route import Choices, Weights
from moe_ablm.model.families import ExpertChoice

EXPERTS = 14
CDRH3 = region_names().index("CDRH3")


def chain(rng, favourites: np.ndarray, gene: str) -> Chain:
    """Regions of varying lengths, each with a composition of its own, and a few mutations."""
    lengths = rng.integers(3, 8, 7)
    region = np.repeat(np.arange(1, 8), lengths).astype(np.uint8)
    letters = "".join(AMINO_ACIDS[rng.choice(20, p=favourites[r - 1])] for r in region)
    mutated = ((rng.random(len(region)) < 0.2) & (region != 6)).astype(np.uint8)
    return Chain(letters, letters, region, mutated, np.zeros_like(region), gene, "")


def cohort(n: int, seed: int = 0) -> list[Annotated]:
    rng = np.random.default_rng(seed)
    favourites = np.random.default_rng(99).dirichlet(np.ones(20), 14)
    genes = np.array([f"V{i}" for i in range(4)])
    return [
        Annotated(
            f"a{i}", f"clone{i // 2}", i,
            chain(rng, favourites[:7], f"H{rng.choice(genes)}"),
            chain(rng, favourites[7:], f"K{rng.choice(genes)}"),
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def antibodies() -> list[Annotated]:
    return cohort(120)


def codes(antibody: Annotated) -> np.ndarray:
    letters = antibody.heavy.letters + antibody.light.letters
    return np.array([AMINO_ACIDS.index(letter) for letter in letters])


def analysed(antibodies, rule, experts: int = EXPERTS, most: int = 9) -> dict:
    """Findings by (trait, matched) of routing `rule(antibody) -> [n, M, E]`."""
    compared = contrasts(antibodies)[:most]
    routing = [rule(a).astype(np.float32) for a in antibodies]
    sums = Assignments.empty(antibodies, compared, routing[0].shape[1], experts)
    for i, each in enumerate(routing):
        sums.add(i, each, each)
    layers = range(routing[0].shape[1])
    found = findings(compared, sums.tables, layers)
    return {(f.contrast.trait, f.contrast.matched): f for f in found}


def one_hot(choice: np.ndarray, experts: int = EXPERTS) -> np.ndarray:
    return np.eye(experts)[choice][:, None]


def by_region(antibody):
    return one_hot(antibody.region_index())


def value(numbers, metric, **labels):
    """The one number of a metric with these labels."""
    labels = {k.rstrip("_"): v for k, v in labels.items()}
    found = [n for n in numbers if n.metric == metric and labels.items() <= dict(n.labels).items()]
    assert len(found) == 1, found
    return found[0]


def test_an_expert_a_region_is_found_exactly(antibodies):
    found = analysed(antibodies, by_region)
    finding = found["region", RESIDUE]
    count = np.bincount(np.concatenate([a.region_index() for a in antibodies]))
    share = count / count.sum()
    # of region r with its expert: log2 of 1 / share, smoothed by half an assignment
    own = np.log2((count + 0.5) / (count * share + 0.5))
    enrichment = finding.estimates["enrichment"][0].value
    np.testing.assert_allclose(np.diag(enrichment), own, rtol=1e-12)
    assert (enrichment[~np.eye(14, dtype=bool)] < -4).all()
    composition = finding.estimates["share"][0].value
    np.testing.assert_allclose(composition, np.eye(14), atol=1e-12)
    # information on the region is all there is to know of the expert
    entropy = -(share * np.log2(share)).sum()
    numbers = information_numbers(finding)
    told = value(numbers, "information", trait="region")
    assert told.value == pytest.approx(value(numbers, "expert_entropy").value, abs=1e-9)
    assert told.value == pytest.approx(entropy, abs=5e-3)
    assert value(numbers, "information_share", trait="region").value == pytest.approx(1, abs=1e-6)
    specialists = specialist_numbers(finding)
    assert value(specialists, "specialist_expert", region="CDRH3", layer="0").value == CDRH3
    assert value(specialists, "cdrh3_share").value == pytest.approx(1)
    assert value(specialists, "cdrh3_excess").low > 1
    # every region has its expert: CDRH3's is nothing special
    assert value(specialists, "cdrh3_relative").value == pytest.approx(1, abs=0.05)
    assert abs(value(specialists, "cdrh3_over_others").value) < 0.05


def test_an_expert_for_cdrh3_alone_stands_out(antibodies):
    def rule(antibody):
        rng = np.random.default_rng(antibody.key)
        region = antibody.region_index()
        choice = np.where(region == CDRH3, 3, rng.choice([0, 1, 2], len(region)))
        return one_hot(choice, 4)

    found = analysed(antibodies, rule, 4)
    for matched in (RESIDUE, CHAIN_AND_RESIDUE):
        numbers = specialist_numbers(found["region", matched])
        assert value(numbers, "specialist_expert", region="CDRH3", layer="0").value == 3
        assert value(numbers, "cdrh3_excess").low > 2
        assert value(numbers, "cdrh3_over_others").low > 0.8


GROUP = np.random.default_rng(5).integers(0, 4, 20)  # an expert for each amino acid


@pytest.mark.parametrize("certain", [True, False])
def test_routing_by_residue_exceeds_nothing(antibodies, certain):
    """Regions differ in residues, so that enrichment is there, but no excess over the residue."""

    def rule(antibody):
        expert = GROUP[codes(antibody)]
        if not certain:
            rng = np.random.default_rng(antibody.key)
            other = rng.integers(0, 4, len(expert))
            expert = np.where(rng.random(len(expert)) < 0.5, expert, other)
        return one_hot(expert, 4)

    found = analysed(antibodies, rule, 4)
    for matched in (RESIDUE, CHAIN_AND_RESIDUE):
        finding = found["region", matched]
        assert (finding.adjusted > 0.05).all()
        told = value(specialist_numbers(finding), "cdrh3_excess")
        assert told.low <= 1e-9 and told.high >= -1e-9
        conditional = value(information_numbers(finding), "conditional_information")
        assert conditional.low <= 1e-9 and abs(conditional.value) < 0.02
    assert np.abs(found["region", RESIDUE].estimates["enrichment"][0].value).max() > 0.3
    assert (
        value(information_numbers(found["region", RESIDUE]), "information", trait="region").low > 0
    )
    if certain:
        excess = found["region", RESIDUE].estimates["excess"][0].value
        np.testing.assert_allclose(excess, 0, atol=1e-9)
        # who knows the residue knows the expert
        numbers = information_numbers(found["residue", ALIGNED])
        assert value(numbers, "information_share", trait="residue").value == pytest.approx(1)


def test_routing_by_chain_is_no_specialisation_in_cdrh3(antibodies):
    found = analysed(antibodies, lambda a: one_hot(traits([a])["chain"].codes, 2), 2)
    by_residue = value(specialist_numbers(found["region", RESIDUE]), "cdrh3_excess")
    assert by_residue.low > 0.5
    by_chain = found["region", CHAIN_AND_RESIDUE]
    assert value(specialist_numbers(by_chain), "cdrh3_excess").value == pytest.approx(0, abs=1e-9)
    assert (by_chain.adjusted > 0.05).all()


def test_routing_by_position_exceeds_nothing_at_the_same_position(antibodies):
    def rule(antibody):
        places = [np.arange(len(c)) // 7 % 4 for _, c in antibody.chains()]
        return one_hot(np.concatenate(places), 4)

    found = analysed(antibodies, rule, 4)
    position, residue = found["region", FROM_START], found["region", CHAIN_AND_RESIDUE]
    assert (position.adjusted > 0.05).all()
    assert (residue.adjusted < 0.05).any()
    assert value(specialist_numbers(residue), "cdrh3_excess").low > 0
    near_zero = value(specialist_numbers(position), "cdrh3_excess")
    assert near_zero.value == pytest.approx(0, abs=1e-9)
    told = value(information_numbers(position), "information_share", trait=FROM_START)
    assert told.value == pytest.approx(1, abs=1e-6)


def test_routing_by_mutation_is_found_at_the_same_position(antibodies):
    def rule(antibody):
        return one_hot(antibody.along("mutated").astype(int), 2)

    finding = analysed(antibodies, rule, 2)["germline state", ALIGNED]
    state = finding.contrast.names.index("mutated")
    assert finding.estimates["excess"][0].value[state, 1] > 1.5
    assert finding.adjusted[0, state, 1] < 1e-6


def at_random(antibody):
    """Two of eight experts a residue, three layers."""
    rng = np.random.default_rng([7, antibody.key])
    order = rng.random((antibody.antibody.residues, 3, 8)).argsort(-1)
    return (order < 2).astype(float)


def test_random_routing_has_nothing_to_tell(antibodies):
    found = analysed(antibodies, at_random, 8)
    for finding in found.values():
        assert (finding.adjusted > 0.05).all(), finding.contrast
        p = np.concatenate([e.p_value().reshape(-1) for e in finding.estimates["excess"]])
        assert (p < 0.05).mean() < 0.12
        enough = finding.contrast.residues.sum() >= 2 * 8 * len(finding.contrast.residues)
        for number in information_numbers(finding):
            if number.metric == "information":
                assert abs(number.value) < 0.004, number
            if number.metric == "conditional_information" and enough:
                assert abs(number.value) < 0.02, number
    for number in specialist_numbers(found["region", RESIDUE]):
        if number.metric == "cdrh3_excess":
            assert number.low < 0 < number.high
    notes = remarks(list(found.values()))
    assert "region matched on residue: 0 of 336 excesses are flagged" in notes
    # 8,340 residues are few for 1,400 cells and 8 experts, not for regions by residue
    few = [note.split(":")[0] for note in notes if "take more antibodies" in note]
    assert few[0] == f"residue matched on {ALIGNED}" and "region matched on residue" not in few


def test_choosing_and_measuring_on_the_same_clones_would_find_something(antibodies):
    """Why the clones are halved: the largest of 24 experts' excesses is no estimate of 0."""
    naive, halved = [], []
    for seed in range(12):

        def rule(antibody, seed=seed):
            rng = np.random.default_rng([seed, antibody.key])
            return np.eye(8)[rng.integers(0, 8, (antibody.antibody.residues, 3))]

        finding = analysed(antibodies[:40], rule, 8, most=1)["region", RESIDUE]
        naive.append(max(e.value[CDRH3].max() for e in finding.estimates["excess"]))
        halved.append(value(specialist_numbers(finding), "cdrh3_excess").value)
    assert np.mean(naive) > 0.2
    assert abs(np.mean(halved)) < 3 * np.std(halved, ddof=1) / math.sqrt(len(halved))


def test_expected_counts_by_hand():
    """Two classes, two strata, two experts."""
    trait = Trait(("x", "y"), np.array([0, 0, 1, 1, 1, -1]))
    compared = contrast("t", "s", trait, np.array([0, 1, 0, 0, 1, 1]))
    assert compared.residues.tolist() == [1, 1, 2, 1] and compared.cell.tolist() == [
        0, 1, 2, 2, 3, -1,
    ]  # fmt: skip
    table = np.array([[[1, 0], [0, 1], [1, 1], [1, 0]]], float)
    # P(expert 0): stratum 0: 2/3, stratum 1: 1/2; over all 3/5
    np.testing.assert_allclose(
        sp.matched(table, compared), [[[2 / 3 + 1 / 2, 1 / 3 + 1 / 2], [11 / 6, 7 / 6]]]
    )
    np.testing.assert_allclose(sp.independent(table, compared), [[[1.2, 0.8], [1.8, 1.2]]])
    np.testing.assert_allclose(sp.gain(table, compared)[0, 0], [(1 - 7 / 6) / 2, (1 - 5 / 6) / 2])
    np.testing.assert_allclose(
        sp.excess(table, compared)[0, 1], np.log2([2.5 / (11 / 6 + 0.5), 1.5 / (7 / 6 + 0.5)])
    )
    np.testing.assert_allclose(compared.overlap(), [(2 / 3 + 1 / 2) / 2, (1 / 3 * 2 + 1 / 2) / 3])


def test_information_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    x, z = rng.integers(0, 3, 500), rng.integers(0, 4, 500)
    expert = np.where(rng.random(500) < 0.5, x, z)
    compared = contrast("x", "z", Trait(("a", "b", "c"), x), z)
    table = np.zeros((1, len(compared.label), 4))
    np.add.at(table[0], (compared.cell, expert), 1)
    bits, shares = sp.information(table, compared)[0].T
    within = sum(
        (z == s).mean() * metrics.mutual_info_score(expert[z == s], x[z == s]) for s in range(4)
    )
    expected = [
        stats.entropy(np.bincount(expert)),
        metrics.mutual_info_score(expert, x),
        metrics.mutual_info_score(expert, z),
        within,
    ]
    np.testing.assert_allclose(bits, np.array(expected) / math.log(2), rtol=1e-9)
    np.testing.assert_allclose(shares, bits / bits[0])


def test_correction_is_that_of_miller_and_madow_where_residues_are_independent():
    """MI of independent variables is (X - 1) (E - 1) / 2N nats too large (Miller 1955)."""
    rng = np.random.default_rng(1)
    n, classes, experts, groups = 2000, 6, 5, 100
    plain, corrected = [], []
    for _ in range(20):
        x, e = rng.integers(0, classes, n), rng.integers(0, experts, n)
        compared = contrast("x", "z", Trait(tuple("abcdef"), x), np.zeros(n, int))
        table = np.zeros((groups, classes, experts))
        np.add.at(table, (np.arange(n) % groups, compared.cell, e), 1)
        estimate = sp.jackknife(table, lambda t, c=compared: sp.information(t, c))
        plain.append(estimate.value[1, 0])
        corrected.append(estimate.corrected().value[1, 0])
    miller_madow = (classes - 1) * (experts - 1) / (2 * n) / math.log(2)
    assert np.mean(plain) - np.mean(corrected) == pytest.approx(miller_madow, rel=0.15)
    assert abs(np.mean(corrected)) < 0.15 * miller_madow


@pytest.mark.parametrize("informed", [False, True])
def test_intervals_of_conditional_information_hold_the_truth(antibodies, informed):
    """Few residues for each cell: the correction alone held 0 60 times in 100."""
    some, held = antibodies[:50], {}
    region = np.concatenate([a.region_index() for a in some])
    shares = (
        np.random.default_rng(11).dirichlet(np.ones(4), 14) if informed else np.full((14, 4), 0.25)
    )
    truth = {}
    for c in contrasts(some):
        if c.trait in ("region", "residue"):
            # P(expert | class, stratum) of each cell, from the shares of its regions
            table = np.zeros((1, len(c.label), 4))
            np.add.at(table[0], c.cell[c.cell >= 0], shares[region[c.cell >= 0]])
            truth[c.trait, c.matched] = sp.information(table, c)[0, 3, 0]
    for seed in range(8):

        def rule(antibody, seed=seed):
            rng = np.random.default_rng([seed, antibody.key])
            odds = shares[antibody.region_index()].cumsum(1)
            return one_hot((rng.random(len(odds))[:, None] > odds).sum(1).clip(0, 3), 4)

        found = analysed(some, rule, 4)
        for about, expected in truth.items():
            number = value(information_numbers(found[about]), "conditional_information")
            held.setdefault(about, []).append(number.low <= expected + 1e-9 <= number.high + 1e-9)
            if not informed:
                assert number.low <= 0
    assert len(truth) == 4
    for about, each in held.items():
        assert np.mean(each) >= 7 / 8, (about, each)


def test_jackknife_against_a_loop():
    table = np.random.default_rng(2).random((7, 3, 2))

    def statistic(t):
        return np.log(t[:, 0, 0] / t[:, 2].sum(-1))

    without = [statistic(np.delete(table, i, 0).sum(0)[None])[0] for i in range(7)]
    found = sp.jackknife(table, statistic)
    assert found.error == pytest.approx(math.sqrt(6) * np.std(without))
    assert found.bias == pytest.approx(6 * (np.mean(without) - found.value))
    low, high = found.interval()
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 6) * found.error)
    # of a mean it is the textbook's standard error
    values = np.random.default_rng(3).random(9)
    mean = sp.jackknife(
        np.stack([values, np.ones(9)], 1)[:, :, None], lambda t: t[:, 0, 0] / t[:, 1, 0]
    )
    assert mean.error == pytest.approx(stats.sem(values)) and mean.bias == pytest.approx(0)
    assert mean.p_value() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_one_group_has_no_interval():
    found = sp.jackknife(np.ones((1, 2, 2)), lambda t: t.sum((1, 2)))
    assert found.value == 4 and np.isnan(found.interval()).all() and found.p_value() == 1


def test_discoveries_by_hand():
    """Benjamini & Hochberg: smallest of p m / rank at this rank or above."""
    p = np.array([[0.01, 0.04], [0.03, 0.5]])
    np.testing.assert_allclose(sp.discoveries(p), [[0.04, 0.16 / 3], [0.16 / 3, 0.5]])


def test_groups_keep_clones_together_and_are_even():
    units = [f"c{i // 3}" for i in range(90)]
    found = groups_of(units, 8)
    assert all(len(set(found[i : i + 3])) == 1 for i in range(0, 90, 3))
    assert np.ptp(np.bincount(found)) <= 3 and found.max() == 7
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_array_equal(groups_of([units[i] for i in order], 8), found[order])
    assert groups_of(["a", "b", "a"], 8).max() == 1


def known(letters: str, region: list[int], mutated: list[int], gene: str) -> Chain:
    arrays = (np.array(a, np.uint8) for a in (region, mutated, [0] * len(region)))
    return Chain(letters, letters, *arrays, gene, "")


def test_traits_and_strata_by_hand():
    heavy = known("AXC", [1, 6, 6], [1, 0, 1], "H1")
    pair = Annotated("a", "u", 0, heavy, known("DE", [0, 0], [0, 0], ""))
    single = Annotated("b", "v", 1, NO_CHAIN, known("FG", [1, 1], [0, 0], "L1"))
    found = traits([pair, single])
    names = region_names()
    assert [names[c] if c >= 0 else "" for c in found["region"].codes] == [
        "FRH1", "CDRH3", "CDRH3", "", "", "FRL1", "FRL1",
    ]  # fmt: skip
    assert found["chain"].codes.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (found["residue"].codes[[1, 3]] == [-1, AMINO_ACIDS.index("D")]).all()
    assert found["germline state"].codes.tolist() == [1, 2, 2, -1, -1, 0, 0]
    assert found["V gene"].names == ("H1", "L1")
    assert found["V gene"].codes.tolist() == [0, 0, 0, -1, -1, 1, 1]
    within = strata([pair, single], found)
    aligned = within[ALIGNED]
    assert (aligned[3:5] == -1).all()
    assert [b - a for a, b in pairwise(aligned[[1, 2]])] == [1]
    assert [b - a for a, b in pairwise(aligned[[5, 6]])] == [1]
    starts = within[FROM_START]
    assert (np.diff(starts[:3]) == 1).all() and starts[3] == starts[5] != starts[0]
    assert within[CHAIN_AND_RESIDUE][1] == -1


def test_rare_v_genes_are_one_class():
    chains = [known("A", [1], [0], f"H{min(i, 11)}") for i in range(14)]
    names, found = v_genes([Annotated(str(i), "", i, c, NO_CHAIN) for i, c in enumerate(chains)])
    assert names == ("H11", "H0", "H1", "H10", "H2", "H3", "H4", "H5", "H6", "H7", "other heavy")
    assert found.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 10, 3, 0, 0, 0]


def test_without_germline_and_light_chains_their_contrasts_are_left_out(antibodies):
    bare = [
        dataclasses.replace(
            a, light=NO_CHAIN, heavy=dataclasses.replace(a.heavy, mutated=0 * a.heavy.mutated)
        )
        for a in antibodies
    ]
    assert {c.trait for c in contrasts(bare)} == {"region", "residue", "V gene"}


def test_residues_left_to_no_expert():
    experts = np.array([[[0, 1]], [[2, 2]], [[2, 1]]])  # 2: none
    found, gates = assigned(Choices(experts, np.array([[[0.5, 0.2]], [[0, 0]], [[0, 1]]])), 2)
    assert found[:, 0].tolist() == [[1, 1], [0, 0], [0, 1]]
    np.testing.assert_allclose(gates[:, 0], [[0.5, 0.2], [0, 0], [0, 1]])
    pair = Annotated("a", "u", 0, known("ACD", [1, 6, 6], [0] * 3, ""), NO_CHAIN)
    sums = Assignments.empty([pair], contrasts([pair]), 1, 2)
    sums.add(0, found, gates)
    samples = [s.number() for s in load_samples([pair], sums, [3], ExpertChoice(experts=2))]
    assert value(samples, "without_expert", layer="3").value == pytest.approx(1 / 3)
    assert value(samples, "experts_a_residue", region="FRH1").value == 2
    assert value(samples, "experts_a_residue", region="CDRH3").value == 0.5
    assert value(samples, "load", expert="1").value == pytest.approx(2 / 3)
    assert value(samples, "gate_load", expert="1").value == pytest.approx(1.2 / 1.7)


def test_slots_by_hand():
    """Expert 0 reads CDRH3 alone; expert 1 everything alike; special tokens get a fifth."""
    n = 8
    region = [1] * 4 + [6] * 4
    pair = Annotated("a", "u", 0, known("ACDEFGHI", region, [0] * n, ""), NO_CHAIN)
    dispatch = np.zeros((n, 1, 2, 1), np.float32)
    dispatch[4:, 0, 0], dispatch[:, 0, 1] = 0.2, 0.1
    combine = np.full((n, 1, 2, 1), 0.5, np.float32)
    slots = Slots([pair], [3], 2)
    slots.add(0, Weights(dispatch, combine))
    numbers = [*(s.number() for s in slots.samples()), *slots.numbers()]
    half = math.log(4) / math.log(8)
    expected = {
        "dispatch_entropy": (half + 1) / 2,
        "flat_slots": 0.5,
        "combine_entropy": 1,
        "on_residues": 0.8,
        # of the mean (1/16 four times, 3/16 four times) less the mean of log 4 and log 8
        "slot_difference": (
            -(math.log(1 / 16) + 3 * math.log(3 / 16)) / 4 - math.log(32) / 2
        ) / math.log(2),
    }  # fmt: skip
    for metric, truth in expected.items():
        assert value(numbers, metric, layer="3").value == pytest.approx(truth, abs=1e-6), metric
    for expert, region, share, over in [(0, "CDRH3", 1, 2), (0, "FRH1", 0, 0), (1, "FRH1", 0.5, 1)]:
        about = {"expert": str(expert), "region": region}
        assert value(numbers, "dispatch_share", **about).value == pytest.approx(share)
        assert value(numbers, "dispatch_ratio", **about).value == pytest.approx(over)


def test_slots_of_clones_are_summed_before_they_are_divided():
    """Intervals by a loop that leaves out each clone; memory does not grow with antibodies."""
    rng = np.random.default_rng(0)
    cohort_, weights = [], []
    for i in range(200):
        n = int(rng.integers(4, 9))
        region = [1] * (n - 2) + [6] * 2
        chain_ = known("ACDEFGHI"[:n], region, [0] * n, "")
        cohort_.append(Annotated(str(i), f"clone{i // 10}", i, chain_, NO_CHAIN))
        dispatch = rng.random((n, 1, 2, 3)).astype(np.float32)
        weights.append(Weights(dispatch / dispatch.sum(0), np.full_like(dispatch, 1 / 6)))
    slots = Slots(cohort_, [3], 2)
    for i, each in enumerate(weights):
        slots.add(i, each)
    assert len(slots.mass) == 20
    numbers = slots.numbers()
    mass = np.array([w.dispatch[-2:, 0, 1].sum(0).mean() for w in weights])
    plain = np.array([2 / len(w.dispatch) for w in weights])
    clone = np.arange(200) // 10
    for metric, over in (("dispatch_share", np.ones(200)), ("dispatch_ratio", plain)):
        told = value(numbers, metric, expert="1", region="CDRH3")
        assert told.value == pytest.approx(mass.sum() / over.sum(), rel=1e-5)
        left = [mass[clone != c].sum() / over[clone != c].sum() for c in range(20)]
        half = stats.t.ppf(0.975, 19) * math.sqrt(19) * np.std(left)
        assert told.high - told.low == pytest.approx(2 * half, rel=1e-4)
    assert {n.labels["region"] for n in numbers} == {"FRH1", "CDRH3"}


def test_too_many_numbers_are_told_in_part(antibodies, monkeypatch):
    found = analysed(antibodies[:20], at_random, 8)
    cells = [n for finding in found.values() for n in cell_numbers(finding)]
    assert bounded(cells) == (cells, [])
    monkeypatch.setattr(routing, "MOST", len(cells) - 1)
    kept, (note,) = bounded(cells)
    # regions: share, enrichment, excess, q; residues: enrichment
    assert len(kept) == 3 * 8 * (4 * 14 + 20) and f"told are {len(kept):,}" in note
    everything = stability(*({"numbers": [as_json(n) for n in each]} for each in (cells, cells)))
    part = stability(*({"numbers": [as_json(n) for n in each]} for each in (kept, kept)))
    assert part == everything and len(part) == 6


def test_a_shuffled_copy_is_matched_and_strangers_are_not():
    rng = np.random.default_rng(0)
    a, order = rng.normal(size=(8, 34)), rng.permutation(8)
    copy = match(a, a[order] + 0.3 * rng.normal(size=a.shape))
    assert (order[copy.pairs[:, 1]] == copy.pairs[:, 0]).all()
    strangers = [match(a, rng.normal(size=a.shape)).correlation.mean() for _ in range(20)]
    assert copy.correlation.mean() > 0.9 > max(strangers)
    assert copy.unmatched < 0.3
    fewer = match(a[:5], a)
    np.testing.assert_array_equal(fewer.pairs, np.stack([np.arange(5)] * 2, 1))
    assert match(np.zeros((2, 34)), a[:2]).correlation.tolist() == [0, 0]


def test_p_of_a_match_by_hand():
    """Two of four pairs of the one null are as alike, one of three of the other."""
    assert p_value(0.5, [np.array([0.1, 0.5, 0.6, 0.2]), np.array([0.4, 0.9, 0.1])]) == 3 / 5
    assert p_value(0.95, [np.array([0.1, 0.5, 0.6, 0.2])]) == 1 / 5


def routed_by_residue(router_scale: float = 1.0):
    """A model of one layer whose router sees the amino acid, as group of four, and no context."""
    model = tiny_model("topk", layers=1)
    moe = dataclasses.replace(model.spec.moe, k=1)
    params = jax.tree.map(lambda x: x, model.params)
    layer = params["layers"][0]
    embedding = np.zeros((33, 16), np.float32)
    for i, group in enumerate(GROUP):
        embedding[FIRST_AMINO_ACID + i, group] = 1
    kernel = np.zeros((16, 4), np.float32)
    kernel[:4] = router_scale * np.eye(4)
    zero = [layer["attention"]["out"][name] for name in ("kernel", "bias")]
    for leaf in zero:
        leaf[...] = jnp.zeros_like(leaf[...])
    params["embedding"][...] = jnp.asarray(embedding)
    layer["ffn_norm"]["scale"][...] = jnp.ones(16)
    layer["ffn_norm"]["bias"][...] = jnp.zeros(16)
    layer["ffn"]["router"][...] = jnp.asarray(kernel)
    spec = dataclasses.replace(model.spec, moe=moe)
    return dataclasses.replace(model, spec=spec, params=params)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    records = random_records(60, seed=4, shortest=11, longest=14)
    return write_dataset(tmp_path_factory.mktemp("routing") / "data", records, split=2)


def test_a_model_that_routes_by_residue_is_seen_through(dataset, tmp_path):
    subject = Subject(Engine(routed_by_residue()), dataset, tmp_path)
    outcome = evaluate(subject, Settings())
    numbers = [s.number() for s in outcome.samples] + list(outcome.numbers)
    members, _ = subject.antibodies(1000)
    experts = np.concatenate([GROUP[codes(a)] for a in members])
    load = np.bincount(experts, minlength=4) / len(experts)
    for e in range(4):
        assert value(numbers, "load", expert=str(e)).value == pytest.approx(load[e])
    region = np.concatenate([a.region_index() for a in members])
    for e in range(4):
        told = value(numbers, "share", expert=str(e), trait="region", class_="CDRH3")
        assert told.value == pytest.approx((region[experts == e] == CDRH3).mean())
    for number in outcome.numbers:
        matched = number.labels.get("matched")
        if number.metric == "excess" and number.labels["trait"] == "region" and matched == RESIDUE:
            assert number.value == pytest.approx(0, abs=1e-9)
    assert value(numbers, "cdrh3_excess", matched=RESIDUE).value == pytest.approx(0, abs=1e-9)
    told = value(numbers, "information_share", trait="residue", layer="0")
    assert told.value == pytest.approx(1, abs=1e-6)
    assert value(numbers, "expert_entropy").value == pytest.approx(
        stats.entropy(load, base=2), abs=5e-3
    )
    assert any("region matched on residue: 0 of" in note for note in outcome.notes)


def test_soft_moe_in_a_suite(dataset, tmp_path):
    """Pictures drawn, JSON written; other batches give the same numbers."""
    subject = Subject(engine("soft"), dataset, tmp_path)
    kept = run_suite(subject, {"routing": Settings()}, tmp_path, print)["routing"]
    assert kept["status"] == "done" and json.dumps(kept)
    assert len(kept["pictures"]) == 3
    for picture in kept["pictures"]:
        assert (tmp_path / "routing" / picture["file"]).stat().st_size > 1000
    metrics = {x["metric"] for x in kept["numbers"]}
    assert {metric for table in TABLES + SLOT_TABLES for metric in table.metrics} <= metrics
    again = evaluate(
        dataclasses.replace(subject, engine=engine("soft", batch_tokens=256)), Settings()
    )
    others = [as_json(number) for number in again.numbers]
    assert len(others) > 300
    for x, y in zip(kept["numbers"][-len(others) :], others, strict=True):
        assert (x["metric"], x["labels"]) == (y["metric"], y["labels"])
        for key in ("value", "low", "high"):
            known = None if y[key] is None else pytest.approx(y[key], abs=2e-3)
            assert x[key] == known, x
    # the same experts as in another evaluation of the same model
    same = stability(kept, {"numbers": others})
    assert {n.labels["layer"] for n in same} == {"0", "1"}
    for layer in "01":
        assert value(same, "matched_correlation", layer=layer).value == pytest.approx(1, abs=1e-3)
        assert value(same, "matched_p", layer=layer).value < 0.02


def test_expert_choice_tells_how_many_experts_a_residue_has(dataset, tmp_path):
    outcome = evaluate(Subject(engine("expert_choice"), dataset, tmp_path), Settings(20))
    assert not any("one clonal cluster" in note for note in outcome.notes)
    numbers = [s.number(10) for s in outcome.samples]
    alone = value(numbers, "without_expert", layer="0").value
    assert 0.2 < alone < 1  # a quarter of two experts a residue
    mean = [n for n in numbers if n.metric == "experts_a_residue" and n.labels["layer"] == "0"]
    assert len(mean) >= 10 and 0 < np.mean([n.value for n in mean]) < 1
    assert "gate_share" in {n.metric for n in outcome.numbers}


def test_one_antibody_has_no_intervals_and_says_so(dataset, tmp_path):
    outcome = evaluate(Subject(engine("expert_choice"), dataset, tmp_path), Settings(1))
    assert any("one clonal cluster" in note for note in outcome.notes)
    assert all(math.isnan(n.low) for n in outcome.numbers)


def test_stability_without_results_is_empty():
    assert stability({"numbers": []}, {"numbers": []}) == []


def test_what_cannot_be_evaluated_is_skipped(dataset, tmp_path):
    with pytest.raises(Skipped, match="dense"):
        evaluate(Subject(engine(), dataset, tmp_path), Settings())
    plain = [dataclasses.replace(r, heavy_cdr="", light_cdr="") for r in random_records(4, seed=0)]
    without = write_dataset(tmp_path / "plain", plain, split=2)
    with pytest.raises(Skipped, match="no regions"):
        evaluate(Subject(engine("topk"), without, tmp_path), Settings())


def test_every_number_is_told_once(antibodies):
    """Numbers of two models are compared by metric and labels."""
    found = analysed(antibodies[:20], at_random, 8)
    numbers = []
    for finding in found.values():
        numbers += cell_numbers(finding) + information_numbers(finding)
        numbers += specialist_numbers(finding) if finding.contrast.trait == "region" else []
    keys = [(n.metric, *sorted(n.labels.items())) for n in numbers]
    assert len(keys) == len(set(keys))
