"""Packing against a plain first-fit, and who sits where."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ablm.data import packing
from moe_ablm.data.packing import first_fit_decreasing, seat


def plain_first_fit_decreasing(sizes: list[int], length: int, most: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        for row in rows:
            if sum(row) + size <= length and len(row) < most:
                row.append(size)
                break
        else:
            rows.append([size])
    return rows


def rows_of(packed: packing.PackedRows) -> list[list[int]]:
    return [packed.size[a:b].tolist() for a, b in zip(packed.first, packed.first[1:], strict=False)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 64), st.integers(2, 9))
def test_equals_plain_first_fit_decreasing(sizes, length, most):
    before, packing.MOST_IN_A_ROW = packing.MOST_IN_A_ROW, most
    try:
        packed = first_fit_decreasing(np.array(sizes, np.int64), length)
    finally:
        packing.MOST_IN_A_ROW = before
    assert rows_of(packed) == plain_first_fit_decreasing(sizes, length, most)
    assert sorted(packed.size.tolist()) == sorted(sizes)
    for a, b in zip(packed.first, packed.first[1:], strict=False):
        starts = np.cumsum([0] + packed.size[a:b].tolist())
        assert packed.start[a:b].tolist() == starts[:-1].tolist()
        assert starts[-1] <= length


def test_a_table_by_hand():
    packed = first_fit_decreasing(np.array([3, 5, 2, 7, 2, 5]), 10)
    # 7 + 3, 5 + 5, 2 + 2
    assert rows_of(packed) == [[7, 3], [5, 5], [2, 2]]
    assert packed.start.tolist() == [0, 7, 0, 5, 0, 2]
    assert len(packed) == 3


def test_a_row_holds_at_most_255_sequences():
    packed = first_fit_decreasing(np.ones(600, np.int64), 1000)
    assert np.diff(packed.first).tolist() == [255, 255, 90]


def test_no_sequences():
    assert len(first_fit_decreasing(np.zeros(0, np.int64), 10)) == 0


@pytest.mark.parametrize("sizes", [[11], [0, 3], [-1]])
def test_sizes_that_fit_no_row(sizes):
    with pytest.raises(ValueError, match="in rows of 10"):
        first_fit_decreasing(np.array(sizes), 10)


def test_every_sequence_has_one_place_of_its_size():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 9, 500)
    packed = first_fit_decreasing(sizes, 20)
    seated = [seat(packed, sizes, rng.permutation(500)) for _ in range(2)]
    for its in seated:
        assert sorted(its.tolist()) == list(range(500))
        np.testing.assert_array_equal(sizes[its], packed.size)
    # neighbours are drawn anew: of about 500 places few hold the same sequence twice
    assert (seated[0] == seated[1]).mean() < 0.05
