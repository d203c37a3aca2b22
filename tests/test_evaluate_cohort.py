"""The antibodies of an evaluation: against the letters that a dataset was written from."""

import numpy as np
import pytest
from planted import StandIn, arbitrary, germline_records, write_germline_dataset
from small_datasets import Record, random_records, write_dataset

from moe_ablm.data.dataset import SPLITS, Dataset
from moe_ablm.data.regions import region_names
from moe_ablm.evaluation.cohort import annotated, mutation_counts, sample_rows
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.subject import Subject, require_regions

TEST = SPLITS.index("test")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Pairs with germline, two of a cluster."""
    records, germline = germline_records(12, 5)
    path = tmp_path_factory.mktemp("cohort") / "data"
    return (
        write_germline_dataset(path, records, germline, np.arange(12) // 2),
        records,
        germline,
    )


def subject(dataset: Dataset | None, path, **options) -> Subject:
    return Subject(StandIn(arbitrary), dataset, path, **options)


def test_antibodies_are_those_that_were_written(written):
    dataset, records, germline = written
    rows = np.array([7, 0, 3])
    for row, found in zip(rows, annotated(dataset, rows), strict=True):
        record = records[row]
        assert (found.name, found.unit, found.key) == (f"r{row}", str(row // 2), dataset.key[row])
        assert found.paired
        assert (found.antibody.heavy, found.antibody.light) == (record.heavy, record.light)
        for name, chain in found.chains():
            assert chain.letters == getattr(record, name)
            assert chain.germline == germline[name][row]
            mutated = getattr(record, f"{name}_mutated")
            assert "".join(map(str, chain.mutated)) == mutated
            assert chain.mutations == mutated.count("1") and len(chain) == len(mutated)
            differ = [a != b for a, b in zip(chain.letters, chain.germline, strict=True)]
            assert differ == chain.mutated.astype(bool).tolist()


def test_regions_of_all_residues_heavy_chain_first(tmp_path):
    record = Record("ACDEFGH", "KLMNP", heavy_cdr="0112033", light_cdr="01230")
    (found,) = annotated(write_dataset(tmp_path / "d", [record]), np.array([0]))
    names = [region_names()[i] for i in found.region_index()]
    assert names == [
        *("FRH1", "CDRH1", "CDRH1", "CDRH2", "FRH3", "CDRH3", "CDRH3"),
        *("FRL1", "CDRL1", "CDRL2", "CDRL3", "FRL4"),
    ]
    assert found.along("region").tolist() == [1, 2, 2, 4, 5, 6, 6, 1, 2, 4, 6, 7]


def test_chains_that_are_not_there_and_regions_that_nobody_knows(tmp_path):
    records = [Record("ACDEF", ""), Record("", "KLMNP", light_cdr="01020")]
    heavy, light = annotated(write_dataset(tmp_path / "d", records), np.arange(2))
    assert not heavy.paired and [name for name, _ in heavy.chains()] == ["heavy"]
    assert heavy.region_index().tolist() == [-1] * 5 and not len(heavy.light)
    assert [name for name, _ in light.chains()] == ["light"]
    names = [region_names()[i] for i in light.region_index()]
    assert names == ["FRL1", "CDRL1", "FRL2", "CDRL2", "FRL4"]


def test_a_draw_is_of_its_split_and_the_same_whatever_its_size(tmp_path):
    split = np.arange(60) % 3
    dataset = write_dataset(tmp_path / "d", random_records(60, 0), split)
    few, many, every = (sample_rows(dataset, "test", n, 4) for n in (5, 12, 1000))
    assert set(few) < set(many) < set(every) and (np.diff(many) > 0).all()
    assert every.tolist() == np.flatnonzero(split == TEST).tolist()
    other = sample_rows(dataset, "test", 5, 5)
    assert not np.array_equal(few, other)
    within = np.array([1, 4, 7, 10, 13])
    assert set(sample_rows(dataset, "test", 3, 4, within)) < set(within.tolist())


def test_every_antibody_is_drawn_as_often_as_others(tmp_path):
    """Rows of 20, five of them drawn with 400 seeds: 100 each, binomial."""
    dataset = write_dataset(tmp_path / "d", random_records(20, 0), TEST)
    times = np.bincount(
        np.concatenate([sample_rows(dataset, "test", 5, seed) for seed in range(400)]), minlength=20
    )
    assert times.sum() == 2000 and abs(times - 100).max() < 4.5 * np.sqrt(400 * 0.25 * 0.75)


def test_mutations_are_counted_without_a_cohort(written):
    dataset, records, _ = written
    rows = np.array([3, 1, 8])
    expected = [
        [getattr(records[r], f"{chain}_mutated").count("1") for r in rows]
        for chain in ("heavy", "light")
    ]
    assert mutation_counts(dataset, rows).tolist() == expected


def test_who_does_not_qualify_is_left_out_with_a_note(tmp_path):
    records = [*random_records(6, 0), Record("ACDEFGHIKL", ""), Record("A" * 200, "C" * 200)]
    given = subject(write_dataset(tmp_path / "d", records, TEST), tmp_path)
    everyone, notes = given.antibodies(100)
    assert len(everyone) == 7 and "1 are longer than the 320 tokens" in notes[0]
    paired, notes = given.antibodies(100, paired=True)
    assert len(paired) == 6 and notes[0] == "1 of 8 have one chain: left out"


@pytest.mark.parametrize("records", [[Record("ACDEFG", "")], [Record("A" * 400, "C" * 40)]])
def test_no_antibody_that_qualifies_is_a_reason_to_skip(records, tmp_path):
    given = subject(write_dataset(tmp_path / "d", records, TEST), tmp_path)
    with pytest.raises(Skipped, match="split test of .* holds no pair that fits"):
        given.antibodies(10, paired=True)
    with pytest.raises(Skipped, match="no dataset was given"):
        subject(None, tmp_path).antibodies(10)
    with pytest.raises(Skipped, match="--data fitness=FILE"):
        given.files_of("fitness")


def test_data_without_annotation_are_told_apart(written, tmp_path):
    dataset, *_ = written
    known = annotated(dataset, np.arange(3))
    require_regions(known)
    bare = write_dataset(tmp_path / "d", [Record("ACDEFG", "KLMN")])
    unknown = annotated(bare, np.arange(1))
    with pytest.raises(Skipped, match="no regions"):
        require_regions(unknown)


def test_random_numbers_are_of_a_purpose_and_a_seed(tmp_path):
    first, again, other = (
        subject(None, tmp_path, seed=seed).generator(purpose).integers(0, 2**60)
        for seed, purpose in ((1, "folds"), (1, "folds"), (1, "partners"))
    )
    assert first == again != other
    assert subject(None, tmp_path, seed=2).generator("folds").integers(0, 2**60) != first
