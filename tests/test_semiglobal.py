"""Semi-global alignments: NumPy's are parasail's, and those of a table made by hand."""

import numpy as np
import pytest

from moe_ablm.data import semiglobal
from moe_ablm.data.germline_scores import encode, v_table
from moe_ablm.data.semiglobal import AMINO_ACIDS, Profile, aligned_pairs, best_score


def in_numpy(profile: Profile) -> Profile:
    return Profile(profile.codes, None)


def of(letters: str) -> Profile:
    return Profile(encode(letters), None)


@pytest.mark.parametrize(
    ("germline", "chain", "score", "pairs"),
    [
        ("WCW", "WCW", 31, [(0, 0), (1, 1), (2, 2)]),
        ("WCW", "AAWCWAA", 31, [(0, 2), (1, 3), (2, 4)]),  # ends are free
        ("AAWCW", "WCWAA", 31, [(2, 0), (3, 1), (4, 2)]),
        ("WWWW", "WWAWW", 33, [(0, 0), (1, 1), (2, 3), (3, 4)]),  # 4 x 11 less 11
        ("WWAAWW", "WWWW", 32, [(0, 0), (1, 1), (4, 2), (5, 3)]),  # 4 x 11 less 11 + 1
        ("WWHWW", "WWXWW", 43, [(i, i) for i in range(5)]),  # any letter against X: -1
    ],
)
def test_by_hand(germline, chain, score, pairs):
    assert best_score(of(germline), encode(chain))[0] == score
    i, j = aligned_pairs(of(germline), encode(chain))
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == pairs


def changed(rng, codes: np.ndarray) -> np.ndarray:
    """A germline with mutations, an insertion or a deletion, other ends, and unknown residues."""
    codes = np.where(rng.random(len(codes)) < 0.1, rng.integers(0, 21, len(codes)), codes)
    at, size = rng.integers(5, len(codes) - 5), rng.integers(1, 6)
    if rng.random() < 0.5:
        codes = np.insert(codes, at, rng.integers(0, 20, size))
    else:
        codes = np.delete(codes, slice(at, at + size))
    return np.concatenate(
        [
            rng.integers(0, 20, rng.integers(0, 20)),
            codes[rng.integers(0, 20) :],
            rng.integers(0, 20, rng.integers(0, 30)),
        ]
    ).astype(np.uint8)


@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_numpy_finds_what_parasail_finds(chain):
    """Of several best alignments the same one, against the own germline and against others."""
    pytest.importorskip("parasail", reason="no wheel for this machine")
    rng = np.random.default_rng(7)
    profiles = v_table(chain).profiles
    for _ in range(60):
        own, other = (profiles[i] for i in rng.integers(0, len(profiles), 2))
        residues = changed(rng, own.codes)
        for profile in (own, other):
            plain = in_numpy(profile)
            assert best_score(plain, residues) == best_score(profile, residues)
            for a, b in zip(
                aligned_pairs(plain, residues), aligned_pairs(profile, residues), strict=True
            ):
                np.testing.assert_array_equal(a, b)


def test_the_matrix_is_parasails():
    parasail = pytest.importorskip("parasail", reason="no wheel for this machine")
    order = ["ARNDCQEGHILKMFPSTWYVBZX*".index(letter) for letter in AMINO_ACIDS + "X"]
    np.testing.assert_array_equal(
        semiglobal.BLOSUM62, parasail.blosum62.matrix[np.ix_(order, order)]
    )
