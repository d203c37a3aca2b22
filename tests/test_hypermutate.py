import numpy as np
import pytest

from moe_ablm.data.germline import encode_nucleotides, translate_codes
from moe_ablm.data.hypermutate import TRANSITION_SHARE, fivemer_rates, hypermutate

KEEP_ALL = np.ones(7)


def repeat(sequence: str, n: int):
    """n copies of a sequence in frame, their lengths, and region codes (all FR1)."""
    codes = np.tile(encode_nucleotides(sequence), (n, 1))
    residues = len(sequence) // 3
    return codes, np.full(n, residues), np.ones((n, residues), np.uint8)


@pytest.mark.parametrize(
    ("fivemer", "rate"),
    [
        ("AACCG", 5.0),  # WRCY: A A C C
        ("TGCTA", 5.0),
        ("CAGCT", 5.0),  # RGYW at the G: A G C T
        ("CTAGG", 2.5),  # WA
        ("GGTAC", 1.2),  # TW
        ("GTCAA", 0.25),  # SYC
        ("TTGGC", 0.25),  # GRS
        ("CCTCC", 1.0),
        ("GAACG", 2.5),  # WA again, from an A
    ],
)
def test_rates_of_motifs(fivemer, rate):
    index = int("".join(str("ACGT".index(a)) for a in fivemer), 4)
    assert fivemer_rates()[index] == rate


def test_targets_follow_the_rates():
    sequence = "GCAGCTCCCGCTGGG"
    codes, length, region = repeat(sequence, 40_000)
    rng = np.random.default_rng(0)
    mutated = hypermutate(codes, length, region, np.ones(40_000, int), KEEP_ALL, rng)
    hit = (mutated != codes).mean(0)
    padded = "AA" + sequence + "AA"  # beyond the ends the context counts as A
    rates = [
        fivemer_rates()[int("".join(str("ACGT".index(a)) for a in padded[i : i + 5]), 4)]
        for i in range(len(sequence))
    ]
    assert max(rates) / min(rates) == 20
    np.testing.assert_allclose(hit, np.array(rates) / sum(rates), atol=0.006)


def test_transitions_have_their_share():
    codes, length, region = repeat("GCAGCTGCCGCG", 20_000)
    rng = np.random.default_rng(0)
    mutated = hypermutate(codes, length, region, np.ones(20_000, int), KEEP_ALL, rng)
    step = (mutated - codes)[mutated != codes] % 4
    assert len(step) == 20_000
    assert (step == 2).mean() == pytest.approx(TRANSITION_SHARE, abs=0.012)


def test_cysteine_tryptophan_and_stops():
    codes, length, region = repeat("TGTTGGTATTGCCAA", 5000)
    rng = np.random.default_rng(0)
    mutated = hypermutate(codes, length, region, np.full(5000, 6), KEEP_ALL, rng)
    protein = translate_codes(mutated)
    assert (protein[:, [0, 1, 3]] == np.frombuffer(b"CWC", np.uint8)).all()
    assert not (protein == ord("*")).any()
    assert len(np.unique(protein[:, 2])) > 4


def test_the_first_residue_of_framework_4_is_kept():
    codes, length, region = repeat("GCATTTTTT", 2000)
    region[:] = [6, 7, 7]
    rng = np.random.default_rng(0)
    mutated = hypermutate(codes, length, region, np.full(2000, 4), KEEP_ALL, rng)
    changed = (translate_codes(mutated) != translate_codes(codes)).mean(0)
    assert changed[1] == 0
    assert changed[[0, 2]].min() > 0.3


def test_survival_is_by_region():
    codes, length, region = repeat("GCAGATGCAGAT", 20_000)
    region[:, 2:] = 2  # CDR1
    survival = np.array([0.0, 0.5, 1, 1, 1, 1, 1])
    before = translate_codes(codes)
    changed = []
    for s in (survival, KEEP_ALL):
        rng = np.random.default_rng(0)
        after = translate_codes(hypermutate(codes, length, region, np.full(20_000, 3), s, rng))
        changed.append((after != before).mean(0))
    assert (changed[0][:2] == 0).all()
    np.testing.assert_allclose(changed[0][2:] / changed[1][2:], 0.5, atol=0.03)


def test_nothing_changes_without_mutations_or_beyond_the_end():
    codes, _, region = repeat("GCAGCTGCCGCG", 100)
    codes[:, 6:] = -1
    length = np.full(100, 2)
    rng = np.random.default_rng(0)
    same = hypermutate(codes, length, region, np.zeros(100, int), KEEP_ALL, rng)
    assert (same == codes).all()
    mutated = hypermutate(codes, length, region, np.full(100, 6), KEEP_ALL, rng)
    assert (mutated[:, 6:] == -1).all()
    assert (mutated[:, :6] != codes[:, :6]).any()
