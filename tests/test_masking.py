"""Masking: the hash against plain integers, shares and replacements against their probabilities."""

import math

import numpy as np
import pytest

from moe_ablm.data import masking
from moe_ablm.data.masking import MaskPolicy
from moe_ablm.data.tokenizer import MASK, is_amino_acid

M64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix_plain(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
    return x ^ (x >> 31)


def within(share: float, p: float, n: int, sigmas: float = 4.5) -> bool:
    """Whether an observed share of n independent draws is that of probability p."""
    return abs(share - p) < sigmas * math.sqrt(p * (1 - p) / n)


def records(n: int, size: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Bits of n records and their starts, `size` places each."""
    keys = np.arange(n, dtype=np.uint64) * np.uint64(77)
    return masking.record_bits(seed, keys, np.zeros(n, np.int64)), np.arange(n) * size


def test_bits_equal_those_of_plain_integers():
    key, epoch, seed = [3, 2**63 + 5, M64], [0, 1, 70_000], 2**32 - 1
    record = masking.record_bits(seed, np.array(key, np.uint64), np.array(epoch))
    plain = [
        mix_plain((k + mix_plain((seed * GOLDEN + e) & M64)) & M64)
        for k, e in zip(key, epoch, strict=True)
    ]
    assert record.tolist() == plain
    bits = masking.position_bits(record, np.array([0, 4, 5]), 9)
    place = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert bits.tolist() == [mix_plain((plain[r] + (p + 1) * GOLDEN) & M64) for r, p in place]


def test_mixing_does_not_change_its_argument():
    x = np.arange(5, dtype=np.uint64)
    masking.mix(x)
    assert x.tolist() == [0, 1, 2, 3, 4]


def uniform(tokens: np.ndarray, n: int, size: int, mean: float = 0.15):
    record, start = records(n, size)
    residue = is_amino_acid(tokens)
    bits = masking.position_bits(record, start, n * size)
    rates = masking.record_rates(MaskPolicy("uniform"), mean, residue, None, start)
    selected, rate = masking.select(bits, residue, rates, start)
    return masking.corrupt(tokens, selected, bits, rate), selected


def test_shares_of_bert():
    n, size = 2_000, 200
    tokens = np.tile(np.array([0, 2] + [4 + i % 20 for i in range(size - 2)], np.uint8), n)
    corrupted, selected = uniform(tokens, n, size)
    residues = int(is_amino_acid(tokens).sum())
    assert not selected[~is_amino_acid(tokens)].any()
    assert (corrupted[~selected] == tokens[~selected]).all()
    assert within(selected.sum() / residues, 0.15, residues)
    new, old = corrupted[selected], tokens[selected]
    assert (is_amino_acid(new) | (new == MASK)).all()
    n_selected = len(new)
    assert within((new == MASK).mean(), 0.8, n_selected)
    # a random amino acid is the old one in one of 20 cases
    assert within(((new != MASK) & (new != old)).mean(), 0.1 * 19 / 20, n_selected)
    assert within((new == old).mean(), 0.1 + 0.1 / 20, n_selected)
    letters = np.bincount(new[(new != MASK) & (new != old)], minlength=24)[4:]
    expected = letters.sum() / 20
    chi2 = ((letters - expected) ** 2 / expected).sum()
    assert chi2 < 50  # 19 degrees of freedom: p < 1e-4


def test_other_seeds_epochs_and_records_have_other_masks():
    key = np.array([1, 2], np.uint64)
    base = masking.record_bits(0, key, np.array([0, 0]))
    assert base[0] != base[1]
    assert not np.isin(masking.record_bits(1, key, np.array([0, 0])), base).any()
    assert not np.isin(masking.record_bits(0, key, np.array([1, 1])), base).any()


def test_preferred_residues_have_the_policys_rate_and_the_mean_stays():
    residue = np.array([0] + [1] * 20 + [0] + [1] * 10, bool)
    preferred = np.zeros(32, bool)
    preferred[3:7] = True  # 4 of 20; the second record has none
    start = np.array([0, 21])
    r = masking.record_rates(MaskPolicy("cdr3", 0.25), 0.15, residue, preferred, start)
    f = 4 / 20
    np.testing.assert_allclose(r.high[0], 0.25)
    np.testing.assert_allclose(r.low, [(0.15 - f * 0.25) / (1 - f), 0.15], rtol=1e-6)
    np.testing.assert_allclose(f * r.high[0] + (1 - f) * r.low[0], 0.15, rtol=1e-6)


@pytest.mark.parametrize("f", [0.59, 0.61, 0.9, 1.0])
def test_the_mean_stays_where_nearly_all_residues_are_preferred(f):
    residue = np.ones(100, bool)
    preferred = np.arange(100) < 100 * f
    start = np.array([0])
    r = masking.record_rates(MaskPolicy("cdr3", 0.25), 0.15, residue, preferred, start)
    share = preferred.mean()
    assert 0 <= r.low[0] <= r.high[0] <= 0.25 + 1e-6 or share == 1
    np.testing.assert_allclose(share * r.high[0] + (1 - share) * r.low[0], 0.15, rtol=1e-5)


def test_preferred_residues_are_selected_at_their_rate():
    n, size = 2_000, 120
    record, start = records(n, size)
    residue = np.ones(n * size, bool)
    preferred = np.tile(np.arange(size) >= 100, n)
    bits = masking.position_bits(record, start, n * size)
    rates = masking.record_rates(MaskPolicy("nongermline", 0.4), 0.15, residue, preferred, start)
    selected, rate = masking.select(bits, residue, rates, start)
    assert within(selected[preferred].mean(), 0.4, n * 20)
    assert within(selected[~preferred].mean(), (0.15 - 0.4 / 6) / (5 / 6), n * 100)
    np.testing.assert_array_equal(rate == np.float32(0.4), preferred[selected])
    tokens = np.full(n * size, 4, np.uint8)
    corrupted = masking.corrupt(tokens, selected, bits, rate)
    for group in (preferred, ~preferred):  # 80/10/10 in both
        assert within((corrupted[selected & group] == MASK).mean(), 0.8, (selected & group).sum())


def test_spans_cover_every_residue_alike():
    n, size = 40_000, 24
    record, _ = records(n, size)
    covered, of = masking.select_spans(record, np.full(n, size), 0.15)
    np.testing.assert_array_equal(of, np.repeat(np.arange(n), size))
    by_place = covered.reshape(n, size).mean(0)
    assert all(within(share, 0.15, n) for share in by_place)


def test_spans_are_contiguous():
    n, size = 4_000, 100
    covered = masking.select_spans(records(n, size)[0], np.full(n, size), 0.15)[0]
    grid = np.pad(covered.reshape(n, size), ((0, 0), (1, 1))).astype(int)
    runs = (np.diff(grid) == 1).sum()
    # by chance runs would be 1 / .85 = 1.18 long; the mean of a geometric length cut at 10 is 4.46,
    # ends cut spans and overlaps join them
    assert 4.0 < covered.sum() / runs < 6.0


def test_spans_of_a_chain_do_not_depend_on_its_neighbours():
    record, _ = records(50, 1)
    size = np.arange(1, 51)
    covered, of = masking.select_spans(record, size, 0.15)
    for i in (0, 7, 49):
        alone, _ = masking.select_spans(record[i : i + 1], size[i : i + 1], 0.15)
        np.testing.assert_array_equal(covered[of == i], alone)


@pytest.mark.parametrize(
    "text, policy",
    [
        ("uniform", MaskPolicy("uniform")),
        ("span", MaskPolicy("span")),
        ("cdr3:0.25", MaskPolicy("cdr3", 0.25)),
        ("nongermline:.5", MaskPolicy("nongermline", 0.5)),
    ],
)
def test_names_of_policies(text, policy):
    assert masking.parse_policy(text) == policy


@pytest.mark.parametrize(
    "text", ["", "cdr3", "cdr3:", "cdr3:0", "cdr3:0.0", "cdr3:1", "cdr3:1.5", "cdr3:-.2",
             "cdr3:nan", "cdr3:0.25 ", "cdr3:0.2;span", "span:3", "Uniform", "fwr1:0.2"],
)  # fmt: skip
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="expected one of uniform, cdr3:RATE"):
        masking.parse_policy(text)
