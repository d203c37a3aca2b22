"""A split without a chain or clone on two sides, against components found by hand."""

import numpy as np
import pyarrow as pa
import pytest
from small_datasets import random_records, table

from moe_ablm.data.dataset import SPLITS, Dataset
from moe_ablm.data.intake import SplitRule
from moe_ablm.data.joint import components, joint_split
from moe_ablm.data.prepare import prepare_batches
from moe_ablm.data.regions import CHAINS


def brute_force(*labels) -> set[frozenset[int]]:
    """Components, grown a row at a time."""
    left, found = set(range(len(labels[0]))), set()
    while left:
        component, border = set(), {left.pop()}
        while border:
            here = border.pop()
            component.add(here)
            near = {i for i in left if any(x[i] == x[here] != 0 for x in labels)}
            left -= near
            border |= near
        found.add(frozenset(component))
    return found


def as_sets(labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == v).tolist()) for v in np.unique(labels)}


def test_components_equal_brute_force():
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 30, 60):
        labels = [rng.integers(0, n, n) for _ in range(3)]
        assert as_sets(components(*labels)) == brute_force(*labels)


def repertoire(n: int, rng) -> tuple[np.ndarray, ...]:
    """Clones of one or two rows; 70 % of the light chains are of 20 kinds, the others are alone."""
    cluster = np.arange(n) + 9 - (rng.random(n) < 0.1)
    light = np.where(rng.random(n) < 0.7, rng.integers(1, 21, n), np.arange(n) + 100)
    heavy = np.arange(n) + 1
    key = rng.integers(0, 2**64, n, np.uint64)
    return cluster, heavy.astype(np.uint64), light.astype(np.uint64), key


def test_held_out_sets_are_5_percent_and_share_nothing():
    rows = repertoire(20_000, np.random.default_rng(2))
    found = joint_split(*rows)
    shares = np.bincount(found.split, minlength=3) / 20_000
    # 30 % are alone: of some 5,400 components 1,000 each, as a binomial
    assert shares[1:] == pytest.approx([0.05, 0.05], abs=4 * np.sqrt(0.05 / 20_000))
    for label in rows[:3]:
        parts = [set(label[found.split == code].tolist()) for code in range(3)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    sizes = sorted(map(len, brute_force(*(x[:400] for x in rows[:3]))))
    part = joint_split(*(x[:400] for x in rows))
    assert part.giant == sizes[-1]
    assert part.candidates == sum(s for s in sizes if s <= 2)  # a tenth of 5 % of 400


def test_the_split_does_not_depend_on_the_order_or_on_names():
    rng = np.random.default_rng(3)
    rows = repertoire(3_000, rng)
    order = rng.permutation(3_000)
    first, shuffled = joint_split(*rows), joint_split(*(x[order] for x in rows))
    np.testing.assert_array_equal(shuffled.split, first.split[order])
    renamed = joint_split(rows[0] - 77, rows[1] * np.uint64(3), rows[2] * np.uint64(5), rows[3])
    np.testing.assert_array_equal(renamed.split, first.split)


def test_one_component_is_not_divided():
    n = 50
    ones, rows = np.ones(n, np.uint64), np.arange(n)
    found = joint_split(rows, rows.astype(np.uint64) + 1, ones, rows.astype(np.uint64))
    assert not found.split.any() and (found.giant, found.candidates) == (n, 0)


def shared_lights(n: int) -> pa.RecordBatch:
    """`n` antibodies of which every second one has one of three light chains."""
    rng = np.random.default_rng(4)
    records = random_records(n, 4, longest=16)
    batch = table(records).to_pydict()
    for i in range(0, n, 2):
        common = 1 + 2 * int(rng.integers(3))
        for name in ("sequence_aa", "cdr_mask_aa", "nongermline_mask_aa"):
            batch[f"{name}_light"][i] = batch[f"{name}_light"][common]
    return pa.RecordBatch.from_pydict(batch | {"cluster": [str(i) for i in range(n)]})


@pytest.mark.parametrize("recluster", [False, True])
def test_prepared_jointly_no_chain_is_on_two_sides(tmp_path, recluster):
    batch = shared_lights(600)
    rule = SplitRule("joint", recluster=recluster)
    card = prepare_batches([batch], tmp_path / "d", source="made", licence="none", rule=rule)
    assert card["rows"] == 600 and "no chain is on two sides" in card["split_rule"]
    dataset = Dataset(tmp_path / "d")
    for chain in CHAINS:
        letters = np.array(batch[f"sequence_aa_{chain}"].to_pylist())
        parts = [set(letters[dataset.rows(s)].tolist()) for s in SPLITS]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert 10 < card["splits"]["valid"] < 60 and 10 < card["splits"]["test"] < 60
    assert not card["warnings"]


def test_too_few_rows_that_can_be_held_out_are_warned_of(tmp_path):
    batch = shared_lights(60).to_pydict()
    for name in ("sequence_aa", "cdr_mask_aa", "nongermline_mask_aa"):
        batch[f"{name}_light"] = [batch[f"{name}_light"][i // 57] for i in range(60)]
    rows = pa.RecordBatch.from_pydict(batch)
    rule = SplitRule("joint")
    card = prepare_batches([rows], tmp_path / "d", source="made", licence="none", rule=rule)
    assert any("only 0 of 60" in w and "57 in the largest" in w for w in card["warnings"])
    assert card["splits"]["train"] == 60
