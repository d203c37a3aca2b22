"""Positions and regions as people write them, and the residues that they choose."""

import numpy as np
import pytest

from moe_ablm.data.positions import selection
from moe_ablm.errors import UserError

IMGT = [
    *("104", "105", "106", "107", "108", "109", "110", "111", "111A"),
    *("112B", "112A", "112", "113", "117", "118"),
]
KABAT = ["92", "93", "95", "99", "100", "100A", "100B", "101", "102", "103"]


def chosen(numbers: list[str], positions: str, scheme: str, chain: str = "heavy") -> str:
    found = selection(None, positions, scheme)
    assert found is not None
    here = found.chosen(chain, numbers, [""] * len(numbers))
    return " ".join(np.array(numbers)[here].tolist())


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("H105-H107", "105 106 107"),
        ("H105", "105"),
        ("H111", "111"),
        ("H111A", "111A"),
        ("H111-H112A", "111 111A 112B 112A"),
        ("H112B-H113", "112B 112A 112 113"),
        ("H117 , H105", "105 117"),
        ("L105-L117", ""),
        ("H114-H116", ""),
    ],
)
def test_insertions_stand_before_112_in_imgt(positions, expected):
    assert chosen(IMGT, positions, "imgt") == expected


def test_insertions_stand_behind_their_number_elsewhere():
    assert chosen(KABAT, "H95-H100", "kabat") == "95 99 100"
    assert chosen(KABAT, "H95-H100A", "kabat") == "95 99 100 100A"
    assert chosen(KABAT, "H100-H102", "kabat") == "100 100A 100B 101 102"


def test_what_has_no_number_is_not_chosen():
    assert chosen(["", "1", "2", ""], "L1-L9", "imgt", "light") == "1 2"
    assert chosen([], "H1-H9", "imgt") == ""


def test_regions_and_positions_together():
    found = selection("CDRH3,FRL1", ["H1"], "imgt")
    assert found is not None
    names = ["FRH1", "FRH1", "CDRH3", ""]
    here = found.chosen("heavy", ["1", "2", "105", ""], names)
    assert here.tolist() == [True, False, True, False]
    assert selection(None, None, "imgt") is None


@pytest.mark.parametrize(
    ("regions", "positions", "words"),
    [
        ("CDR3", None, "--regions CDR3: expected some of FRH1, .* .did you mean"),
        ("", None, "--regions : expected at least one"),
        (None, "105", "'105' is no position: expected H105, L27A or H105-H117"),
        (None, "H105-117", "'H105-117' is no position"),
        (None, "H105-L117", "is no position"),
        (None, " ,", "expected at least one"),
    ],
)
def test_what_is_none_is_refused(regions, positions, words):
    with pytest.raises(UserError, match=words):
        selection(regions, positions, "imgt")
    with pytest.raises(UserError, match="numbering"):
        selection(regions, positions, "eu")
