"""The dataset on disk: what goes in comes out, and nothing damaged is taken for data."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from small_datasets import random_records, stored_rows, table, write_dataset

from moe_ablm.data import dataset as module
from moe_ablm.data.dataset import CHAINS, FRACTIONS, Dataset, DatasetWriter, encode_batch
from moe_ablm.data.regions import regions_from_cdr_mask
from moe_ablm.data.tokenizer import decode, encode
from moe_ablm.errors import UserError


def codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Record batches of 5 rows, shards of 2 batches: 23 rows become 5 batches in 3 shards."""
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 5)
    monkeypatch.setattr(module, "BATCHES_PER_SHARD", 2)


def test_round_trip(tmp_path, tiny_chunks):
    records = random_records(23, seed=1)
    found = write_dataset(tmp_path / "d", records)
    assert len(found) == 23
    assert [s["rows"] for s in found.card["shards"]] == [10, 10, 3]
    for chain in CHAINS:
        rows = np.arange(23)
        got = found.gather(rows, chain, ("tokens", "region", "mutated", "germline", "segment"))
        letters = [getattr(r, chain) for r in records]
        cdr = [getattr(r, f"{chain}_cdr") for r in records]
        offsets = np.cumsum([0] + [len(s) for s in letters])
        assert decode(got["tokens"]) == "".join(letters)
        np.testing.assert_array_equal(
            got["region"], regions_from_cdr_mask(codes("".join(cdr)), offsets)
        )
        mutated = "".join(getattr(r, f"{chain}_mutated") for r in records)
        np.testing.assert_array_equal(got["mutated"], codes(mutated) - ord("0"))
        np.testing.assert_array_equal(got["germline"], got["tokens"])  # no germline column given
        assert not got["segment"].any()
        np.testing.assert_array_equal(found.lengths[chain], np.diff(offsets))
    assert found.column("id", np.array([22, 4])) == ["r22", "r4"]
    assert sum(b.num_rows for b in found.batches()) == 23


def test_gather_in_any_order_across_record_batches(tmp_path, tiny_chunks):
    records = random_records(23, seed=2)
    found = write_dataset(tmp_path / "d", records)
    rows = np.array([22, 0, 7, 7, 4, 5, 14, 10, 9])
    got = found.gather(rows, "heavy", ("tokens",))["tokens"]
    assert decode(got) == "".join(records[r].heavy for r in rows)
    assert len(found.gather(rows[:0], "heavy", ("tokens",))["tokens"]) == 0


def test_copying_parts_of_rows(tmp_path, tiny_chunks):
    records = random_records(23, seed=3)
    found = write_dataset(tmp_path / "d", records)
    into = {"tokens": np.zeros(12, np.uint8), "region": np.full(12, 99, np.uint8)}
    found.copy_residues(
        "light", np.array([21, 3]), into,
        at=np.array([6, 1]), skip=np.array([2, 0]), count=np.array([4, 3]),
    )  # fmt: skip
    expected = np.zeros(12, np.uint8)
    expected[6:10] = encode(codes(records[21].light[2:6]))
    expected[1:4] = encode(codes(records[3].light[:3]))
    np.testing.assert_array_equal(into["tokens"], expected)
    assert (into["region"] == 99).sum() == 12 - 7


def test_rows_of_splits_and_nested_fractions(tmp_path):
    split = np.arange(40) % 4 // 2 * (np.arange(40) % 2 + 1)  # 0 0 1 2 ...
    found = write_dataset(tmp_path / "d", random_records(40, seed=4), split)
    for code, name in enumerate(("train", "valid", "test")):
        rows = {fraction: found.rows(name, fraction) for fraction in FRACTIONS}
        np.testing.assert_array_equal(rows["full"], np.flatnonzero(split == code))
        assert set(rows["quarter"]) < set(rows["half"]) < set(rows["full"])
        assert found.card["splits"][name] == len(rows["full"])
        for fraction, its in rows.items():
            assert found.card["fractions"][name][fraction] == len(its)


def test_identity_is_that_of_the_rows(tmp_path):
    records = random_records(6, seed=5)
    one, two = (write_dataset(tmp_path / name, records).identity for name in "ab")
    other = write_dataset(tmp_path / "c", records[::-1]).identity
    assert one == two != other


def test_columns_of_unequal_length_are_refused():
    batch = table(random_records(3, seed=6))
    i = batch.schema.get_field_index("cdr_mask_aa_light")
    batch = batch.set_column(i, "cdr_mask_aa_light", pa.array(["00", "0", ""]))
    zero = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="cdr_mask_aa_light must be as long"):
        encode_batch(batch, key=zero, cluster=zero, split=zero, fraction_key=zero)


def test_unchecked_letters_are_refused():
    batch = table(random_records(1, seed=6))
    i = batch.schema.get_field_index("sequence_aa_heavy")
    batch = batch.set_column(i, "sequence_aa_heavy", pa.array(["AX"]))
    zero = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="must be checked"):
        encode_batch(batch, key=zero, cluster=zero, split=zero, fraction_key=zero)


def test_a_crash_while_writing_leaves_nothing(tmp_path, tiny_chunks):
    with pytest.raises(ZeroDivisionError), DatasetWriter(tmp_path / "d") as writer:
        writer.add(stored_rows(random_records(23, seed=7)))
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_without_finish_nothing_appears(tmp_path):
    with DatasetWriter(tmp_path / "d") as writer:
        writer.add(stored_rows(random_records(3, seed=7)))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    write_dataset(tmp_path / "d", random_records(3, seed=8))
    before = (tmp_path / "d" / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        DatasetWriter(tmp_path / "d")
    with (
        pytest.raises(UserError, match="appeared meanwhile"),
        DatasetWriter(tmp_path / "e") as writer,
    ):
        writer.add(stored_rows(random_records(3, seed=9)))
        shutil.copytree(tmp_path / "d", tmp_path / "e")
        writer.finish({})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e"]
    assert (tmp_path / "e" / "dataset.json").read_bytes() == before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "is not there; make one with"),
        (lambda p: p.mkdir(), "has no dataset.json"),
        (lambda p: p.write_text("a file"), "has no dataset.json"),
    ],
)
def test_a_missing_dataset(tmp_path, make, message):
    make(tmp_path / "d")
    with pytest.raises(UserError, match=message) as error:
        Dataset(tmp_path / "d")
    assert str(tmp_path / "d") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        ('{"rows": 1}', "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "sha256": "", "shards": []}', "names no shards"),
        ('{"schema": 1, "sha256": "", "shards": [{"file": "x"}]}', "damaged"),
        ('{"schema": 2}', "schema version 2, this moe_ablm reads 1"),
        ('{"schema": "1"}', "schema version '1'"),
    ],
)
def test_a_damaged_or_unknown_card(tmp_path, text, message):
    write_dataset(tmp_path / "d", random_records(3, seed=9))
    (tmp_path / "d" / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Dataset(tmp_path / "d")
    assert "dataset.json" in str(error.value)


@pytest.mark.parametrize("what", ["truncated", "one bit", "missing", "longer"])
def test_an_altered_shard_is_named(tmp_path, tiny_chunks, what):
    write_dataset(tmp_path / "d", random_records(23, seed=10))
    shard = tmp_path / "d" / "shard-00001.arrow"
    content = shard.read_bytes()
    if what == "missing":
        shard.unlink()
    elif what == "one bit":
        middle = len(content) // 2
        altered = bytes([content[middle] ^ 1])
        shard.write_bytes(content[:middle] + altered + content[middle + 1 :])
    else:
        shard.write_bytes(content[:-1] if what == "truncated" else content + b"\0")
    with pytest.raises(UserError, match="shard-00001.arrow") as error:
        Dataset(tmp_path / "d")
    assert "prepare it again" in str(error.value)
