"""Numbers of residues against ANARCI's, against IMGT's rules written out, and where masks are.

`fixtures/anarci_numbers.tsv.xz`: 500 pairs of the OAS runs 1279068_1 and SRR10358525 (CC-BY 4.0)
with the IMGT numbers of OAS's `ANARCI_numbering`, and those of ANARCI 2026.2.13.2 with HMMER 3.4 by
the other schemes for the chains to which it gives the IMGT numbers of OAS (others it misplaces: C23
at 24).
"""

import lzma
from pathlib import Path

import numpy as np
import pytest

from moe_ablm.data.numbering import Numbering, imgt_loop, number_chains
from moe_ablm.data.positions import SCHEMES
from moe_ablm.data.regions import REGIONS

FIXTURE = Path(__file__).parent / "fixtures" / "anarci_numbers.tsv.xz"
# Heavy chain of CH31 (Wu et al. 2011), with nine residues more than its germline in CDR1.
CH31 = (
    "QVQLVQSGAAVRKPGASVTVSCKFAEDDDYSPYWVNPAPEHFIHFLRQAPGQQLEWLAWMNPTNGAVNYAWYLNGRVTATRDRSMTTAFLEVKSLRSDDT"
    "AVYYCARAQKRGRSEWAYAHWGQGTPVVVSS"
)


@pytest.fixture(scope="module")
def anarci() -> list[dict[str, str]]:
    header, *lines = lzma.decompress(FIXTURE.read_bytes()).decode().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def residues_that_agree(rows: list[dict[str, str]], scheme: str) -> tuple[int, int, int]:
    """Residues with the reference's number, all residues, and chains without any number."""
    same = total = without = 0
    for chain in ("heavy", "light"):
        rows_here = [row for row in rows if row["chain"] == chain and row[scheme]]
        numbered = number_chains([row["sequence"] for row in rows_here], chain, scheme)
        for row, numbering in zip(rows_here, numbered, strict=True):
            if not isinstance(numbering, Numbering):
                without += 1
                continue
            expected = row[scheme].split()
            found = [""] * numbering.start + list(numbering.numbers)
            total += len(expected)
            same += sum(a == b for a, b in zip(found, expected, strict=False))
    return same, total, without


def test_imgt_numbers_of_500_pairs(anarci):
    """Wanted are .995; what differs are insertions that two alignments place differently."""
    assert len(anarci) == 1000
    same, total, without = residues_that_agree(anarci, "imgt")
    assert same / total >= 0.9999 and total > 110_000
    assert without == 5  # truncated by more than three residues: annotation rejects them


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_other_schemes(anarci, scheme):
    same, total, without = residues_that_agree(anarci, scheme)
    assert same == total > 95_000 and without <= 5


def test_loops_by_imgt_rules():
    """Lefranc et al. 2003, tables 3 and 5: gaps and insertions in the middle, right side first."""
    assert imgt_loop(105, 117, 13) == [str(n) for n in range(105, 118)]
    assert " ".join(imgt_loop(105, 117, 12)) == "105 106 107 108 109 110 112 113 114 115 116 117"
    assert " ".join(imgt_loop(105, 117, 5)) == "105 106 107 116 117"
    assert " ".join(imgt_loop(105, 117, 14)[6:9]) == "111 112A 112"
    assert " ".join(imgt_loop(105, 117, 17)[6:13]) == "111 111A 111B 112B 112A 112 113"
    assert " ".join(imgt_loop(27, 38, 8)) == "27 28 29 30 35 36 37 38"
    assert " ".join(imgt_loop(27, 38, 13)[5:8]) == "32 33A 33"
    assert " ".join(imgt_loop(56, 65, 7)) == "56 57 58 59 63 64 65"
    assert imgt_loop(56, 65, 1) == ["56"] and imgt_loop(56, 65, 0) == []


def test_insertions_in_cdrh1_stand_where_imgt_has_them():
    (found,) = number_chains([CH31], "heavy")
    assert isinstance(found, Numbering)
    at = dict(zip(found.numbers, CH31, strict=True))
    loop = ("27 28 29 30 31 32", "32A 32B 33C 33B 33A", "33 34 35 36 37 38")
    assert "".join(at[n] for n in " ".join(loop).split()) == "EDDDYSPYWVNPAPEHF"
    assert (at["23"], at["41"], at["104"], at["118"]) == ("C", "F", "C", "W")
    assert "".join(at[str(n)] for n in range(39, 56)) == "IHFLRQAPGQQLEWLAW"


def test_the_number_of_a_residue_does_not_depend_on_what_is_around_or_masked(anarci):
    heavy = [row["sequence"] for row in anarci if row["chain"] == "heavy"][:20]
    plain = number_chains(heavy, "heavy")
    around = number_chains([f"MKHLWFFLLLVAAPRWVLS{s}ASTKGPSVFPLAPSS" for s in heavy], "heavy")
    masked = []
    for sequence, numbering in zip(heavy, plain, strict=True):
        assert isinstance(numbering, Numbering)
        cdr3 = numbering.regions == REGIONS.index("CDR3")
        letters = np.array(list(sequence[numbering.start :]))[: len(cdr3)]
        letters[cdr3] = "_"
        masked.append("".join(letters.tolist()))
    blind = number_chains(masked, "heavy", unknown=True)
    for one, two, three in zip(plain, around, blind, strict=True):
        assert isinstance(two, Numbering) and isinstance(three, Numbering)
        assert isinstance(one, Numbering) and one.numbers == two.numbers == three.numbers
        assert two.start == 19 + one.start
        np.testing.assert_array_equal(one.regions, two.regions)
    assert number_chains(masked, "heavy") == ["nonstandard_residue"] * 20


def test_numbers_ascend_in_every_scheme(anarci):
    for scheme in SCHEMES:
        for chain in ("heavy", "light"):
            sequences = [row["sequence"] for row in anarci if row["chain"] == chain][:100]
            for numbering in number_chains(sequences, chain, scheme):
                if isinstance(numbering, Numbering):
                    assert len(set(numbering.numbers)) == len(numbering.numbers)
                    plain = [int(n.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")) for n in numbering.numbers]
                    assert plain == sorted(plain)


def test_no_v_domain_has_no_numbers():
    assert number_chains(["EVQLV", "A" * 120], "heavy") == ["not_a_v_domain"] * 2
