"""The parts below annotation against plain references: scores, ungapped and gapped placement, J."""

import math

import numpy as np
import pyarrow as pa
import pytest

from moe_ablm.data import align
from moe_ablm.data.align import ACCEPTED, place
from moe_ablm.data.annotate import annotate_chains
from moe_ablm.data.domains import MAX_CDR3, MIN_CDR3, find_junction
from moe_ablm.data.germline import CODON_TABLE, LOCI_OF_CHAIN, load_germlines
from moe_ablm.data.germline_scores import (
    AMINO_ACIDS,
    BACKGROUND,
    CODES,
    OTHER,
    SCORE_SCALE,
    encode,
    j_table,
    log_odds,
    replacement_probabilities,
    v_table,
    words,
)
from moe_ablm.data.simulate import simulate


@pytest.fixture(scope="module")
def simulated() -> dict:
    return pa.Table.from_batches(list(simulate(400, 11))).to_pydict()


def test_replacements_are_mostly_one_nucleotide_away():
    table = replacement_probabilities()
    np.testing.assert_allclose(table.sum(axis=1), 1.0)
    codon = 2 * 16 + 2 * 4 + 0  # GGA, glycine
    neighbours = {
        "R": 2 + 1,
        "E": 2,
        "A": 1,
        "V": 1,
    }  # AGA (transition), CGA, GAA, GCA, GTA; not TGA
    total = sum(neighbours.values())
    for residue, weight in neighbours.items():
        expected = 0.8 * weight / total + 0.2 / 19
        assert table[codon, AMINO_ACIDS.index(residue)] == pytest.approx(expected)
    assert table[codon, AMINO_ACIDS.index("G")] == 0.0
    assert table[codon, AMINO_ACIDS.index("W")] == pytest.approx(0.2 / 19)


def test_log_odds_of_a_codon():
    codon = 3 * 16 + 2 * 4 + 2  # TGG, tryptophan
    assert CODON_TABLE[codon] == "W"
    scores = log_odds(np.array([codon]), np.array([0.9]), BACKGROUND)[0]
    w, a = AMINO_ACIDS.index("W"), AMINO_ACIDS.index("A")
    kept = 0.9 + 0.1 * BACKGROUND[w]
    assert scores[w] == round(SCORE_SCALE * math.log(kept / BACKGROUND[w]))
    assert scores[a] == round(SCORE_SCALE * math.log(0.1))
    assert scores[OTHER] == 0


def test_words_are_numbers_in_base_21():
    assert words(encode("ACDx")).tolist() == [0 * 441 + 1 * 21 + 2, 1 * 441 + 2 * 21 + OTHER]
    assert words(encode("YYY"))[0] == 19 * (441 + 21 + 1) < CODES**3


@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_ungapped_scores_are_sums_over_residues(chain, simulated):
    table = v_table(chain)
    sequence = simulated[f"sequence_aa_{chain}"][0]
    seen = encode(sequence)[: table.residues.shape[1]]
    found = align._ungapped_scores(seen[None], table)[0]
    for g in (0, len(table.genes) // 2, len(table.genes) - 1):
        assert found[g] == sum(int(table.scores[i, code, g]) for i, code in enumerate(seen))


@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_every_germline_finds_itself(chain):
    # An unmutated allele with a neutral CDR3 and a J must come back exactly, without mutations.
    tails = {"IGH": "ARGGGGGFDYWGQGTLVTVSS", "IGK": "TFGQGTKVEIK", "IGL": "VFGGGTKLTVL"}
    alleles = load_germlines().v_of(*LOCI_OF_CHAIN[chain])
    before = [allele.amino_acids[: allele.c104 + 1] for allele in alleles]
    ends = ["" if a.locus == "IGH" else a.amino_acids[a.c104 + 1 :].split("*")[0] for a in alleles]
    whole = [v + e + tails[a.locus] for v, e, a in zip(before, ends, alleles, strict=True)]
    for allele, v, found in zip(alleles, before, annotate_chains(whole, chain), strict=True):
        assert allele.gene in found.v_call.split("|"), allele.name
        assert found.germline_aa.startswith(v), allele.name
        assert found.v_identity_aa == 1.0
        assert "1" not in found.nongermline_mask_aa
        cdr1, fr2, cdr2, fr3, cdr3 = allele.region_starts()
        mask = "0" * cdr1 + "1" * (fr2 - cdr1) + "0" * (cdr2 - fr2) + "2" * (fr3 - cdr2)
        assert found.cdr_mask_aa.startswith(mask + "0" * (cdr3 - fr3) + "3"), allele.name


@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_gapped_and_ungapped_placement_agree(chain, simulated, monkeypatch):
    sequences = simulated[f"sequence_aa_{chain}"]
    fast = annotate_chains(sequences, chain)
    monkeypatch.setattr(align, "_place_ungapped", lambda codes, *_: np.zeros(len(codes), bool))
    assert annotate_chains(sequences, chain) == fast


def test_junction_is_the_best_place_of_a_framework_4(simulated):
    # Against loops over every CDR3 length and J.
    table = j_table("light")
    sequences = simulated["sequence_aa_light"][:40]
    lengths = np.array([len(s) for s in sequences])
    codes = np.full((len(sequences), lengths.max()), OTHER, np.uint8)
    for row, sequence in enumerate(sequences):
        codes[row, : len(sequence)] = encode(sequence)
    placement = place(codes, lengths, v_table("light"), v_table("heavy"))
    assert (placement.reason == ACCEPTED).all()
    after = placement.start + placement.c104 + 1
    found = find_junction(codes, lengths, after, placement.locus, table)
    for row in range(len(sequences)):
        best = (-math.inf, None)
        for k in range(MIN_CDR3, MAX_CDR3 + 1):
            for j in np.flatnonzero(table.locus == placement.locus[row]):
                observed = codes[row, after[row] + k :][: table.fr4_length[j]]
                if len(observed) < table.fr4_length[j] - align.MAX_MISSING:
                    continue
                score = sum(int(table.fr4_scores[i, c, j]) for i, c in enumerate(observed))
                best = max(best, (score, -k))
        assert found.cdr3_length[row] == -best[1]
        assert found.found[row]
