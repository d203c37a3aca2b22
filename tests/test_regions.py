"""Region and segment codes against tables written out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ablm.data.regions import (
    REGIONS,
    region_names,
    regions_from_cdr_mask,
    segments_from_mask,
)


def codes(*masks: str) -> list[list[str]]:
    """Names of the regions of each mask, computed for all masks together."""
    offsets = np.cumsum([0] + [len(m) for m in masks])
    found = regions_from_cdr_mask(np.frombuffer("".join(masks).encode(), np.uint8), offsets)
    assert found.dtype == np.uint8
    return [[REGIONS[c] for c in found[a:b]] for a, b in zip(offsets, offsets[1:], strict=False)]


WHOLE = "00110022003300"
WHOLE_NAMES = "FR1 FR1 CDR1 CDR1 FR2 FR2 CDR2 CDR2 FR3 FR3 CDR3 CDR3 FR4 FR4"


@pytest.mark.parametrize(
    "mask, names",
    [
        (WHOLE, WHOLE_NAMES),
        ("110033", "CDR1 CDR1 FR3 FR3 CDR3 CDR3"),  # begins in CDR1, lacks CDR2, no FR4
        ("0003", "FR3 FR3 FR3 CDR3"),
        ("30", "CDR3 FR4"),
        ("0000", "none none none none"),  # not annotated
        ("", ""),
    ],
)
def test_regions_of_one_row(mask, names):
    assert codes(mask) == [names.split()]


def test_rows_do_not_see_their_neighbours():
    masks = ["000", WHOLE, "", "00", WHOLE, "30", "0"]
    assert codes(*masks) == [codes(m)[0] for m in masks]


def region_by_hand(mask: str) -> list[str]:
    """The definition, a residue at a time."""
    if set(mask) <= {"0"}:
        return ["none"] * len(mask)
    names = []
    for i, letter in enumerate(mask):
        following = mask[i:].lstrip("0")[:1]
        names.append(f"CDR{letter}" if letter != "0" else f"FR{following or 4}")
    return names


@given(st.lists(st.text("00000123", max_size=9), max_size=6))
def test_any_rows_equal_a_plain_loop(masks):
    assert codes(*masks) == [region_by_hand(m) for m in masks]


def test_no_rows():
    assert len(regions_from_cdr_mask(np.zeros(0, np.uint8), np.zeros(1, np.int64))) == 0


def test_names_of_the_regions_of_a_pair():
    assert region_names() == (
        "FRH1", "CDRH1", "FRH2", "CDRH2", "FRH3", "CDRH3", "FRH4",
        "FRL1", "CDRL1", "FRL2", "CDRL2", "FRL3", "CDRL3", "FRL4",
    )  # fmt: skip


def test_segments():
    letters = np.frombuffer(b"VVNDNJ0?", np.uint8)
    assert segments_from_mask(letters).tolist() == [1, 1, 2, 3, 2, 4, 0, 0]
