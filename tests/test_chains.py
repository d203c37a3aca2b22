"""Equal chains, different ones counted once, and those seen in training: sets of strings."""

from itertools import product

import numpy as np
import pytest
from small_datasets import Record, random_records, write_dataset

from configs.base import get_config
from moe_ablm import config as configs
from moe_ablm.data.chains import (
    ELSEWHERE,
    NOVEL,
    SEEN,
    different,
    hash_sequences,
    levels,
    seen_places,
)
from moe_ablm.data.tokenizer import encode
from moe_ablm.feed import Feed

CHAINS = ("heavy", "light")


def hashed(letters: list[str]) -> list[int]:
    offsets = np.cumsum([0, *map(len, letters)])
    tokens = encode(np.frombuffer("".join(letters).encode(), np.uint8))
    return hash_sequences(tokens, offsets).tolist()


def test_hashes_are_equal_where_sequences_are():
    rng = np.random.default_rng(0)
    words = ["".join(letters) for n in range(7) for letters in product("AC", repeat=n)]
    letters = [words[i] for i in rng.integers(0, 127, 40_000)]
    values = hashed(letters)
    assert len(set(letters)) == 127 == len(set(zip(letters, values, strict=True)))
    assert len(set(values)) == 127
    assert {v == 0 for s, v in zip(letters, values, strict=True) if not s} == {True}
    assert 0 not in hashed(["A", "AA", "C"])


def test_different_ones_count_once_with_their_largest_size():
    hashes = np.array([5, 7, 5, 0, 7, 9], np.uint64)
    assert different(hashes, np.array([10, 20, 11, 99, 20, 3])) == (3, 11 + 20 + 3)


def test_levels_are_those_of_sets():
    part, whole = np.array([1, 2], np.uint64), np.array([1, 2, 3, 0], np.uint64)
    found = levels(np.array([2, 3, 4, 0, 1], np.uint64), part, whole)
    assert found.tolist() == [SEEN, ELSEWHERE, NOVEL, NOVEL, SEEN]


def test_levels_go_to_the_places_of_their_chain():
    segment = np.array([[1, 1, 2, 0], [2, 2, 0, 0]], np.uint8)
    found = seen_places(segment, np.array([[SEEN, ELSEWHERE], [NOVEL, SEEN]], np.uint8))
    assert found.tolist() == [[2, 2, 1, 0], [2, 2, 0, 0]]


# runs on a small dataset that shares chains between its splits


def config(**data):
    c = get_config()
    c.train.batch, c.train.steps, c.train.warmup, c.eval.pairs = 4, 10, 0, 100
    c.data.length = 64
    for key, value in data.items():
        c.data[key] = value
    return configs.from_mapping(c)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """24 training and 12 validation antibodies: light chains of 8 kinds, and some heavy ones twice.

    The fraction key rises with the row, so that a quarter holds the first 9 rows.
    """
    made = random_records(36, 4)
    kinds = made[:8]
    out = []
    for i, r in enumerate(made):
        light = kinds[i % 6] if i < 24 else kinds[i % 8] if i % 3 else r
        heavy = made[i - 24] if i in (24, 33) else r
        out.append(Record(heavy.heavy, light.light, heavy.heavy_cdr, light.light_cdr))
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("chains") / "d"
    return write_dataset(path, records, np.repeat([0, 1], [24, 12]))


@pytest.mark.parametrize("fraction, rows", [("quarter", 9), ("half", 18), ("full", 24)])
def test_seen_is_what_the_runs_own_part_has(dataset, records, fraction, rows):
    feed = Feed(config(fraction=fraction), dataset)
    assert len(feed.train_rows) == rows
    by_letters = {(r.heavy, r.light): r for r in records[24:]}
    expected = {}
    for column, chain in enumerate(CHAINS):
        own = {getattr(r, chain) for r in records[:rows]}
        whole = {getattr(r, chain) for r in records[:24]}
        for i, r in enumerate(records[24:]):
            letters = getattr(r, chain)
            expected[i, column] = (
                SEEN if letters in own else ELSEWHERE if letters in whole else NOVEL
            )
    assert len(by_letters) == 12
    assert {SEEN, NOVEL} <= set(expected.values())
    assert (ELSEWHERE in expected.values()) == (fraction == "quarter")
    (sample,) = (s for _, s in feed._valid)
    found = {
        (int(row) - 24, column): int(feed.valid_levels[n, column])
        for n, row in enumerate(sample.heavy)
        for column in (0, 1)
    }
    assert found == expected
    for column, chain in enumerate(CHAINS):
        share = np.mean([expected[i, column] == SEEN for i in range(12)])
        assert feed.seen_shares[chain] == pytest.approx(share)


def test_validation_batches_say_it_at_every_place(dataset):
    feed = Feed(config(), dataset)
    batches = list(feed.valid_batches())
    seen, segment = (np.concatenate([b[name] for b in batches]) for name in ("seen", "segment"))
    assert seen.shape == segment.shape == (12, 64)
    for code, column in ((1, 0), (2, 1)):
        for row in range(12):
            inside = set(seen[row][segment[row] == code].tolist())
            assert inside == {int(feed.valid_levels[row, column])}
    assert not seen[segment == 0].any()
    assert "seen" not in next(feed.train_batches(0))


def test_training_sequences_that_are_left_out_are_not_seen(tmp_path):
    long, short = "ACDEFGHIKL" * 6, "ACDEFGHIKL"
    records = [Record(short, short[:9]), Record(long, short[:8]), Record(short[:7], short[:8])]
    data = write_dataset(tmp_path / "d", records, np.array([0, 0, 1]))
    feed = Feed(config(), data)  # 64 tokens: the second is longer
    assert feed.left_out == 1
    assert feed.valid_levels.tolist() == [[NOVEL, ELSEWHERE]]


def test_several_datasets_are_one_training_set(tmp_path):
    kinds = random_records(4, 9)
    first = write_dataset(tmp_path / "a", [kinds[0], kinds[1]], np.array([0, 1]))
    shared = Record(kinds[2].heavy, kinds[1].light)  # trains in b on the light chain held out in a
    second = write_dataset(tmp_path / "b", [shared, kinds[3]], np.array([0, 1]))
    feed = Feed(config(path=("a", "b")), first, second)
    assert feed.valid_levels.tolist() == [[NOVEL, SEEN], [NOVEL, NOVEL]]
    alone = Feed(config(), first)
    assert alone.valid_levels.tolist() == [[NOVEL, NOVEL]]


# different chains counted once


def by_hand(records: list[Record]) -> int:
    """Tokens of <cls>H<cls> and <cls>L<eos> of all different chains."""
    return sum(len(x) + 2 for chain in CHAINS for x in {getattr(r, chain) for r in records})


def test_unique_tokens_count_different_chains_once(dataset, records):
    feed = Feed(config(), dataset)
    corpus = sum(len(r.heavy) + len(r.light) + 4 for r in records[:24])
    assert feed.corpus_tokens == corpus
    assert feed.mixture.unique_tokens() == by_hand(records[:24]) < corpus
    mixed = Feed(config(regime="mixed:0.5"), dataset)
    assert mixed.mixture.unique_tokens() == by_hand(records[:24])


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
def test_unique_tokens_of_a_short_run_are_of_what_it_was_shown(dataset, records, batching):
    feed = Feed(config(batching=batching, buckets=(32, 64), regime="unpaired"), dataset)
    shown: set[tuple[int, bytes]] = set()
    for step in range(5):
        assert feed.mixture.unique_tokens(step) == sum(len(x) + 2 for _, x in shown)
        batch = next(feed.train_batches(step))
        number = batch.get("antibody", (batch["segment"] > 0).astype(np.uint8))
        for row in range(len(number)):
            for n in range(1, number[row].max() + 1):
                mine = number[row] == n
                # without its special tokens, one at either end
                letters = batch["targets"][row][mine][1:-1].tobytes()
                shown.add((int(batch["segment"][row][mine][0]), letters))
    assert 0 < feed.mixture.unique_tokens(4) <= feed.mixture.unique_tokens()


@pytest.mark.parametrize("layout, special", [("esm", 4), ("balm", 3), ("sep", 3)])
def test_corpus_and_unique_tokens_agree_where_all_chains_differ(tmp_path, layout, special):
    records = random_records(9, 12)
    data = write_dataset(tmp_path / layout, records, np.repeat([0, 1], [8, 1]))
    feed = Feed(config(layout=layout), data)
    assert feed.corpus_tokens == sum(len(r.heavy) + len(r.light) + special for r in records[:8])
    assert feed.mixture.unique_tokens() == feed.corpus_tokens


def test_cropped_proteins_count_with_what_fits(tmp_path):
    protein = "ACDEFGHIKL" * 10
    records = [Record(protein, ""), Record(protein, ""), Record("", protein[:20])]
    data = write_dataset(tmp_path / "p", records, np.array([0, 0, 1]))
    feed = Feed(config(), data)
    assert (feed.corpus_tokens, feed.mixture.unique_tokens()) == (128, 64)
