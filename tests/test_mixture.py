"""Regimes: who is shown with whom, how often, and in which share."""

import numpy as np
import pytest
from small_datasets import Record, random_records, write_dataset

from moe_ablm.data import sequences as forms
from moe_ablm.data.mixture import (
    CURRICULUM,
    Batching,
    Mixture,
    Regime,
    dataset_weights,
    parse_regime,
    rows_before,
)
from moe_ablm.data.sequences import NONE
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError


def mixture(datasets, regime="paired", kind="padded", rows=8, length=64, steps=100, **more):
    buckets = more.pop("buckets", ())
    return Mixture(
        datasets,
        [d.rows("train") for d in datasets],
        parse_regime(regime),
        Batching(kind, rows, length, "esm", buckets),
        seed=more.pop("seed", 0),
        steps=steps,
        **more,
    )


def shown(m: Mixture, steps: range) -> list[tuple[int, int, int, int]]:
    """(stream, heavy row, light row, epoch) of every sequence of some steps, in order."""
    found = []
    for step in steps:
        streams, positions = m.rows(step)
        for number, position in zip(streams, positions, strict=True):
            stream = m.streams[number]
            drawn = stream.draw(np.array([position]))
            heavy, light = (
                x[drawn.sequence] for x in (stream.sequences.heavy, stream.sequences.light)
            )
            found += [
                (int(number), int(h), int(x), int(e))
                for h, x, e in zip(heavy, light, drawn.epoch, strict=True)
            ]
    return found


@pytest.fixture(scope="module")
def antibodies(tmp_path_factory):
    records = random_records(50, seed=1)
    return write_dataset(tmp_path_factory.mktemp("data") / "antibodies", records)


@pytest.fixture(scope="module")
def chains_alone(tmp_path_factory):
    records = [Record(r.heavy, "", r.heavy_cdr) for r in random_records(30, seed=2)]
    return write_dataset(tmp_path_factory.mktemp("data") / "chains", records)


# --- names


def test_names_of_regimes():
    assert parse_regime("paired") == Regime("paired")
    assert parse_regime("unpaired:doubled") == Regime("unpaired", doubled=True)
    assert parse_regime("mixed:.625").curve == (0.625, 0, 0, 0)
    assert parse_regime("curriculum:sigmoid").curve == CURRICULUM
    assert parse_regime("curriculum:sigmoid(0.9,0.5,10,0.5)").curve == (0.9, 0.5, 10, 0.5)


@pytest.mark.parametrize(
    "text", ["", "pairs", "mixed", "mixed:", "mixed:0", "mixed:1", "mixed:1.5", "mixed:-1",
             "mixed:nan", "mixed:.5,.5", "unpaired:double", "curriculum", "curriculum:linear",
             "curriculum:sigmoid()", "curriculum:sigmoid(1,2,3)", "curriculum:sigmoid(.3,.4,15,.8)",
             "curriculum:sigmoid(1.2,.4,15,.8)", "curriculum:sigmoid(.7,.4,15,.8)x"],
)  # fmt: skip
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_regime(text)


# --- paired and unpaired


def test_every_pair_once_an_epoch(antibodies):
    m = mixture([antibodies])
    found = shown(m, range(100))
    for epoch in range(16):
        rows = [h for _, h, light, e in found if e == epoch]
        assert sorted(rows) == list(range(50))
    assert all(h == light for _, h, light, _ in found)
    assert [r[1] for r in found[:50]] != [r[1] for r in found[50:100]]


def test_unpaired_shows_every_chain_once_an_epoch(antibodies):
    m = mixture([antibodies], "unpaired")
    found = shown(m, range(25))  # 200 rows: two epochs of 100 chains
    for epoch in (0, 1):
        its = [(h, light) for _, h, light, e in found if e == epoch]
        assert sorted(h for h, light in its if light == NONE) == list(range(50))
        assert sorted(light for h, light in its if h == NONE) == list(range(50))
    keys = m.streams[0].sequences.key
    assert len(np.unique(keys)) == 100  # the chains of an antibody have masks of their own
    assert m.epochs(25) == pytest.approx(2)


def test_seeds_differ(antibodies):
    one, again, other = (shown(mixture([antibodies], seed=s), range(3)) for s in (0, 0, 1))
    assert one == again != other


# --- shuffled


def sequences_of(records, heavy, light):
    return [(records[h].heavy, records[x].light) for h, x in zip(heavy, light, strict=True)]


def test_too_few_light_chains_are_told(tmp_path):
    records = random_records(40, seed=3)
    # two thirds of the light chains are the same: chance meets native pairs again and again
    records = [
        Record(r.heavy, records[0].light if i % 3 else r.light, r.heavy_cdr)
        for i, r in enumerate(records)
    ]
    d = write_dataset(tmp_path / "d", records)
    native = {(r.heavy, r.light) for r in records}
    # 27 antibodies have the common light chain, and only 13 others are there to replace it
    s, met, left = forms.repaired(d, d.rows("train"), seed=0)
    pairs = sequences_of(records, s.heavy, s.light)
    assert left == sum(p in native for p in pairs) == 14
    assert met >= left
    assert sorted(s.heavy.tolist()) == sorted(s.light.tolist()) == list(range(40))


@pytest.mark.parametrize("seed", range(5))
def test_coincidences_are_drawn_again(tmp_path, seed):
    records = random_records(60, seed=4)
    # 20 light chains, each of three antibodies
    records = [Record(r.heavy, records[i // 3].light, r.heavy_cdr) for i, r in enumerate(records)]
    d = write_dataset(tmp_path / "d", records)
    native = {(r.heavy, r.light) for r in records}
    s, met, left = forms.repaired(d, d.rows("train"), seed)
    pairs = sequences_of(records, s.heavy, s.light)
    assert left == sum(p in native for p in pairs) == 0
    assert sorted(s.light.tolist()) == list(range(60))
    assert met > 0 or seed != 0  # about 2 of 60 are expected


def test_shuffled_through_the_regime(antibodies):
    m = mixture([antibodies], "shuffled")
    found = shown(m, range(100))
    first = {h: light for _, h, light, e in found if e == 0}
    assert sorted(first) == sorted(first.values()) == list(range(50))
    assert all(h != light for h, light in first.items())
    assert first == {h: light for _, h, light, e in found if e == 1}  # partners stay
    assert "0 native pairs remain" in m.notes[0]


def test_two_antibodies_swap_and_one_cannot(tmp_path):
    records = random_records(2, seed=5)
    d = write_dataset(tmp_path / "two", records)
    assert forms.repaired(d, np.arange(2), 0)[0].light.tolist() == [1, 0]
    with pytest.raises(UserError, match="at least two antibodies"):
        forms.repaired(d, np.arange(1), 0)


def test_single_chains_stay_single(tmp_path):
    records = random_records(6, seed=6)
    records[2] = Record("", records[2].light)
    records[4] = Record(records[4].heavy, "")
    d = write_dataset(tmp_path / "d", records)
    s, _, left = forms.repaired(d, np.arange(6), 0)
    assert left == 0
    found = set(zip(s.heavy.tolist(), s.light.tolist(), strict=True))
    assert {(NONE, 2), (4, NONE)} <= found
    assert len(found) == 6


# --- mixed and curriculum


def is_pair(row) -> bool:
    return row[1] != NONE and row[2] != NONE


def test_mixed_keeps_its_share_in_every_batch(antibodies):
    m = mixture([antibodies], "mixed:0.625", rows=10, steps=200)
    found = [is_pair(r) for r in shown(m, range(200))]
    unpaired = 10 - np.array(found).reshape(200, 10).sum(1)
    assert set(unpaired.tolist()) == {6, 7}  # 6.25 of 10
    assert abs(unpaired.sum() - 1250) <= 2


def test_mixed_shows_everything_once_an_epoch_of_its_form(antibodies):
    m = mixture([antibodies], "mixed:0.5", rows=10, steps=100)
    found = shown(m, range(100))
    for stream, size in ((0, 100), (1, 50)):
        its = [r for r in found if r[0] == stream]
        for epoch in range(len(its) // size):
            drawn = [(h, light) for _, h, light, e in its if e == epoch]
            assert len(drawn) == len(set(drawn)) == size


def test_streams_lie_in_one_anothers_midst(antibodies):
    m = mixture([antibodies], "mixed:0.5", rows=16, steps=400)
    first_row = [m.rows(t)[0][0] for t in range(400)]
    assert 0.4 < np.mean(first_row) < 0.6


def test_curriculum_is_the_published_curve():
    curve = parse_regime("curriculum:sigmoid")
    # by hand: sigmoid(0) = 1/2; sigmoid(-12.249) = 4.79e-6; sigmoid(2.751) = .93996
    np.testing.assert_allclose(curve.unpaired_share(np.array([0.8166])), 0.5)
    np.testing.assert_allclose(curve.unpaired_share(np.array([0.0, 1.0])), [0.7, 0.324], atol=1e-4)
    mean = curve.unpaired_share((np.arange(10_000) + 0.5) / 10_000).mean()
    assert mean == pytest.approx(0.625, abs=0.005)


def test_curriculum_over_a_run(antibodies):
    m = mixture([antibodies], "curriculum:sigmoid", rows=100, steps=50)
    found = np.array([is_pair(r) for r in shown(m, range(50))]).reshape(50, 100)
    share = parse_regime("curriculum:sigmoid").unpaired_share(np.arange(50) / 50)
    assert np.abs((1 - found.mean(1)) - share).max() <= 0.01 + 1e-6


def test_pairs_are_needed_where_pairs_are_shown(chains_alone):
    with pytest.raises(UserError, match="no antibody with both chains of the train split"):
        mixture([chains_alone], "mixed:0.5")


# --- several datasets


def test_datasets_by_weight_and_by_size(antibodies, chains_alone):
    by_weight = mixture([antibodies, chains_alone], rows=10, weights=(1, 3))
    assert {(by_weight.rows(t)[0] == 1).sum() for t in range(100)} <= {7, 8}
    by_size = mixture([antibodies, chains_alone], rows=8)
    assert {(by_size.rows(t)[0] == 0).sum() for t in range(100)} == {5}  # 50 of 80


def test_pairs_come_from_the_dataset_that_has_them(antibodies, chains_alone):
    m = mixture([chains_alone, antibodies], "mixed:0.5", weights=(1, 0))
    assert [s.dataset for s in m.streams] == [chains_alone, antibodies]
    found = shown(m, range(20))
    assert all(is_pair(r) == (r[0] == 1) for r in found)


def test_shares_of_datasets():
    np.testing.assert_allclose(dataset_weights(None, [30, 10]), [0.75, 0.25])
    np.testing.assert_allclose(dataset_weights((1, 1), [30, 10]), [0.5, 0.5])
    np.testing.assert_allclose(dataset_weights((1, 1), [30, 0]), [1, 0])
    np.testing.assert_allclose(dataset_weights((1, 0), [0, 9]), [0, 1])
    with pytest.raises(UserError, match="config.data.weights"):
        dataset_weights((0, 0, 1), [5, 5, 0])


# --- batchings


def test_buckets(antibodies):
    sizes = forms.stored(antibodies, np.arange(50)).tokens(antibodies, LAYOUTS["esm"])
    edges = (26, 30, 64)
    m = mixture([antibodies], kind="bucketed", rows=4, buckets=edges, steps=400)
    assert [s.length for s in m.streams] == list(edges)
    steps_of = np.zeros(3)
    found = {}
    for step in range(400):
        stream, position = m.rows(step)
        assert len(set(stream.tolist())) == 1
        steps_of[stream[0]] += 1
        drawn = m.streams[stream[0]].draw(position)
        for e, s in zip(drawn.epoch, drawn.sequence, strict=True):
            row = int(m.streams[stream[0]].sequences.heavy[s])
            found.setdefault((stream[0], int(e)), []).append(row)
    for i, (below, edge) in enumerate(zip((0, *edges), edges, strict=False)):
        expected = np.flatnonzero((sizes > below) & (sizes <= edge)).tolist()
        assert sorted(found[i, 0]) == sorted(found[i, 1]) == expected
        assert abs(steps_of[i] - 400 * len(expected) / 50) <= 3


def test_packed_shows_every_pair_once_an_epoch(antibodies):
    m = mixture([antibodies], kind="packed", rows=3, length=100, steps=60)
    rows = m.streams[0].rows
    assert rows < 50 / 2
    found = shown(m, range(60))
    for epoch in range(60 * 3 // rows):
        its = [h for _, h, _, e in found if e == epoch]
        assert sorted(its) == list(range(50))
    assert m.epochs(60) == pytest.approx(60 * 3 / rows)


def test_packed_mixture_keeps_the_share_of_sequences(antibodies):
    m = mixture([antibodies], "mixed:0.5", kind="packed", rows=20, length=100, steps=300)
    found = [is_pair(r) for r in shown(m, range(300))]
    assert np.mean(found) == pytest.approx(0.5, abs=0.01)
    half = np.mean([m.streams[0].size.mean(), m.streams[1].size.mean()])
    length, tokens, sequences = m.row_means
    assert length == 100 and tokens / sequences == pytest.approx(half, rel=0.01)


def test_rows_before_by_hand():
    before = rows_before(np.tile([[1.0, 1.0, 2.0]], (8, 1)), 4, seed=0)
    np.testing.assert_array_equal(np.diff(before, axis=0), np.tile([[1, 1, 2]], (8, 1)))


@pytest.mark.parametrize("units", [1, 7, 32])
def test_rows_before_stays_near_its_shares(units):
    shares = np.tile([[0.05, 0.35, 0.6]], (2000, 1))
    before = rows_before(shares, units, seed=3)
    counts = np.diff(before, axis=0)
    assert (counts >= 0).all() and (counts.sum(1) == units).all()
    expected = np.arange(2001)[:, None] * units * shares[0]
    assert np.abs(before - expected).max() < 5


def test_no_share_is_no_row():
    before = rows_before(np.tile([[0.0, 1.0, 0.0]], (500, 1)), 3, seed=1)
    assert before[-1].tolist() == [0, 1500, 0]


# --- what fits


def test_long_antibodies_are_left_out_and_counted(antibodies):
    tokens = forms.stored(antibodies, np.arange(50)).tokens(antibodies, LAYOUTS["esm"])
    m = mixture([antibodies], length=28)
    assert m.left_out == (tokens > 28).sum() > 0
    assert m.sequences == 50 - m.left_out
    assert m.corpus_tokens == tokens[tokens <= 28].sum()
    assert {h for _, h, _, _ in shown(m, range(50))} == set(np.flatnonzero(tokens <= 28).tolist())


def test_nothing_fits(antibodies):
    with pytest.raises(UserError, match="fits in config.data.length=12") as error:
        mixture([antibodies], length=12)
    assert str(antibodies.path) in str(error.value)


def test_the_larger_form_counts_for_corpus_tokens(antibodies):
    one, both = mixture([antibodies]), mixture([antibodies], "mixed:0.5")
    assert both.corpus_tokens == one.corpus_tokens  # esm: four special tokens a pair either way
    assert mixture([antibodies]).epochs(100) == pytest.approx(16)
