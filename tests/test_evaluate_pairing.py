"""Native pairs: a planted preference is found, its absence is not, matching closes a shortcut."""

import numpy as np
import pytest
from small_datasets import random_records, write_dataset
from tiny_models import engine

from moe_ablm.data.dataset import Dataset, DatasetWriter, encode_batch
from moe_ablm.data.simulate import SimulationParams, simulate
from moe_ablm.evaluation import pairing
from moe_ablm.evaluation.cohort import Annotated, annotated
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.pairing import (
    MATCHED,
    PREFERENCES,
    RANDOM,
    SAME_GENE,
    Case,
    Settings,
    baseline_of,
    chain_sums,
    deal,
    groups_of,
    preference,
    strata_of,
)
from moe_ablm.evaluation.scores import score_numbers
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised import baselines
from moe_ablm.evaluation.supervised.folds import cdr3_of, clonal_folds
from moe_ablm.inference.score import score

TEST = 2


def simulated(path, tilt: float, pairs: int = 4000) -> list[Annotated]:
    """Pairs whose V genes prefer each other with a known strength; mutations go together always."""
    params = SimulationParams(pairing_tilt=tilt)
    with DatasetWriter(path) as writer:
        number = 0
        for batch in simulate(pairs, 0, params):
            index = np.arange(number, number + batch.num_rows)
            key = (index + 1).astype(np.uint64)
            fractions = np.zeros(len(index), np.uint32)
            split = np.full(len(index), TEST)
            writer.add(
                encode_batch(batch, key=key, cluster=index, split=split, fraction_key=fractions)
            )
            number += batch.num_rows
        writer.finish({"licence": "none"})
    dataset = Dataset(path)
    return annotated(dataset, dataset.rows("test"))


@pytest.fixture(scope="module")
def repertoires(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("pairing")
    return {tilt: simulated(folder / str(tilt), tilt) for tilt in (0, 3)}


def case_of(pairs: list[Annotated], kind: str) -> Case:
    groups = groups_of(pairs)
    rng = np.random.default_rng(0)
    folds = clonal_folds(groups, np.zeros(len(pairs), np.int64), 3, rng)
    partner = deal(pairs, strata_of(pairs, folds, kind), rng)
    return Case(pairs, partner, groups, folds, {"negatives": kind})


def baseline_auc(case: Case):
    classes, found = baseline_of(case)
    units = np.tile(case.groups[case.kept], 2).astype(str)
    folds = np.tile(case.folds[case.kept], 2)
    numbers = score_numbers(classes, {"b": found[None]}, "b", units, folds[None], {})
    return next(n for n in numbers if n.metric == "AUC")


@pytest.mark.parametrize("kind", [RANDOM, MATCHED, SAME_GENE])
def test_dealt_light_chains_are_a_permutation_without_native_pairs(kind, repertoires):
    pairs = repertoires[0][:1500]
    case = case_of(pairs, kind)
    kept, partner = case.kept, case.partner[case.kept]
    assert len(kept) > (1400 if kind == RANDOM else 800)
    assert sorted(kept.tolist()) == sorted(partner.tolist())
    native = {(a.heavy.letters, a.light.letters) for a in pairs}
    assert not native & {(a.heavy.letters, a.light.letters) for a in case.repaired}
    np.testing.assert_array_equal(case.folds[kept], case.folds[partner])
    for i, j in zip(kept.tolist(), partner.tolist(), strict=True):
        mine, other = pairs[i], pairs[j]
        if kind != RANDOM:
            for chain in ("heavy", "light"):
                counts = [getattr(a, chain).mutations for a in (mine, other)]
                assert len({baselines.mutation_bin(c) for c in counts}) == 1
        if kind == SAME_GENE:
            assert mine.light.v_gene == other.light.v_gene
    again = case_of(pairs, kind)
    np.testing.assert_array_equal(again.partner, case.partner)


def test_no_light_chain_or_clone_is_on_both_sides(repertoires):
    pairs = repertoires[0]
    case = case_of(pairs, RANDOM)
    for key in (lambda a: a.unit, lambda a: a.light.letters, lambda a: a.heavy.letters,
                lambda a: (a.light.v_gene, cdr3_of(a.light))):  # fmt: skip
        seen: dict = {}
        for antibody, fold in zip(pairs, case.folds.tolist(), strict=True):
            assert seen.setdefault(key(antibody), fold) == fold


def test_genes_that_prefer_each_other_are_recognised_and_strangers_are_not(repertoires):
    found = {tilt: baseline_auc(case_of(pairs, MATCHED)) for tilt, pairs in repertoires.items()}
    assert found[3].low > 0.6
    assert found[0].low < 0.5 < found[0].high


def test_matching_closes_the_shortcut_of_mutations(repertoires):
    """Chains of the repertoire share nothing but how far they are mutated."""
    unmatched = baseline_auc(case_of(repertoires[0], RANDOM))
    matched = baseline_auc(case_of(repertoires[0], MATCHED))
    assert unmatched.low > 0.6
    assert matched.low < 0.5 < matched.high


def test_few_light_chains_are_dealt_as_far_as_they_go(repertoires):
    """Seven of ten pairs have the same light chain: three of them and the three others remain."""
    pairs = repertoires[0][:10]
    common = pairs[0].light
    pairs = [Annotated(a.name, a.unit, a.key, a.heavy, common if i < 7 else a.light)
             for i, a in enumerate(pairs)]  # fmt: skip
    partner = deal(pairs, np.zeros(10, np.int64), np.random.default_rng(0))
    assert (partner[7:] >= 0).all() and (partner[:7] >= 0).sum() == 3
    assert (deal(pairs[:7], np.zeros(7, np.int64), np.random.default_rng(0)) == -1).all()


def test_bins_of_mutations():
    bins = [baselines.mutation_bin(n) for n in (0, 1, 2, 3, 4, 7, 8, 15, 16, 90)]
    assert bins == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    write_dataset(path / "data", random_records(40, 1, 15, 16), TEST)
    return Subject(engine(), Dataset(path / "data"), path)


@pytest.fixture(scope="module")
def outcome(subject):
    pytest.importorskip("sklearn")
    return pairing.evaluate(subject, Settings(folds=2, repeats=2, epochs=2))


def test_all_numbers_are_there(outcome):
    accuracies = [s for s in outcome.samples if s.metric == "accuracy"]
    assert {(s.labels["negatives"], s.labels["predictor"]) for s in accuracies} == {
        (kind, who)
        for kind in (RANDOM, MATCHED)
        for who in (pairing.HEAD, baselines.PAIRED_BASELINE)
    }
    assert all(0 <= n.value <= 1 for n in outcome.numbers if n.metric == "AUC")
    assert any(note.startswith("negatives random: 40 of 40") for note in outcome.notes)
    assert outcome.pictures[0].draw().axes


def test_chains_without_a_bond_have_no_preference(outcome):
    """Random letters: neither partner can be likelier."""
    rates = [s for s in outcome.samples if s.metric == PREFERENCES[0]]
    assert len(rates) == 4
    for sample in rates:
        number = sample.number()
        assert number.low < 0.5 < number.high


def test_the_preference_is_of_one_chain_before_and_after(subject):
    """Against a loop over chains, each with its own partner and where it was dealt to."""
    pairs, _ = subject.antibodies(12, paired=True)
    partner = np.array([3, 2, 1, 0, -1, 6, 5, -1, 9, 8, 11, 10])
    case = Case(pairs, partner, np.arange(12), np.zeros(12, np.int64), {})
    natives = score(subject.engine, [a.antibody for a in pairs], one_pass=True)
    found = {(s.metric, s.labels["chain"]): s for s in preference(subject, case, natives)}
    repaired = score(subject.engine, [a.antibody for a in case.repaired], one_pass=True)
    for row, i in enumerate(case.kept.tolist()):
        j = int(partner[i])
        for chain, owner in (("heavy", i), ("light", j)):
            part = slice(None, len(pairs[owner].heavy)) if chain == "heavy" else None
            mine = part or slice(len(pairs[owner].heavy), None)
            other = part or slice(len(pairs[i].heavy), None)
            gain = natives[owner][mine].sum() - repaired[row][other].sum()
            sample = found[PREFERENCES[1], chain]
            assert sample.total[row] == pytest.approx(gain, abs=1e-3)
            assert sample.weight[row] == len(getattr(pairs[owner], chain))
            assert sample.units[row] == f"group {owner}"
            assert found[PREFERENCES[0], chain].total[row] == (gain > 0)


def test_sums_leave_out_what_has_no_likelihood(subject):
    pairs, _ = subject.antibodies(12, paired=True)
    n = len(pairs[0].heavy)
    scores_of = np.arange(n + len(pairs[0].light), dtype=np.float32)
    scores_of[[0, n]] = np.nan
    heavy, light = chain_sums(pairs[:1], [scores_of])[0]
    assert heavy.tolist() == [np.arange(1, n).sum(), n - 1]
    assert light[1] == len(pairs[0].light) - 1


def test_what_cannot_be_done_is_said(tmp_path, subject):
    with pytest.raises(Skipped, match="too few for 5 folds"):
        pairing.evaluate(subject, Settings(antibodies=9))
    records = [
        type(r)(r.heavy, r.light, r.heavy_cdr, r.light_cdr) for r in random_records(40, 2, 15, 16)
    ]
    write_dataset(tmp_path / "plain", records, TEST)
    plain = Subject(engine(), Dataset(tmp_path / "plain"), tmp_path)
    outcome = pairing.evaluate(plain, Settings(folds=2, repeats=1, epochs=1))
    assert any("not matched" in note for note in outcome.notes)
    assert {s.labels["negatives"] for s in outcome.samples} == {RANDOM}
