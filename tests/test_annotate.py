"""Annotation against known antibodies, simulated truth, OAS's columns, and what is no antibody."""

import csv
import gzip
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_ablm.__main__ import main
from moe_ablm.data import complete, usage
from moe_ablm.data.align import REASONS
from moe_ablm.data.annotate import ChainAnnotation, annotate_batch, annotate_chains
from moe_ablm.data.germline import LOCI_OF_CHAIN, JAllele, load_germlines
from moe_ablm.data.germline_scores import (
    AMINO_ACIDS,
    BACKGROUND,
    J_TRIM,
    SCORE_SCALE,
    TRIMMED,
    j_table,
)
from moe_ablm.data.readers.columns import ANY_CHAIN, LINE, ROW
from moe_ablm.data.readers.report import Report
from moe_ablm.data.simulate import simulate
from moe_ablm.errors import UserError

CHAINS = ("heavy", "light")
# Trastuzumab and adalimumab; regions as in IMGT/mAb-DB.
TRASTUZUMAB_VH = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
    "SRWGGDGFYAMDYWGQGTLVTVSS"
)
TRASTUZUMAB_VL = (
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYC"
    "QQHYTTPPTFGQGTKVEIK"
)
ADALIMUMAB_VH = (
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC"
    "AKVSYLSTASSLDYWGQGTLVTVSS"
)
ADALIMUMAB_VL = (
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYC"
    "QRYNRAPYTFGQGTKVEIK"
)
LEADER = {"heavy": "MEFGLSWVFLVALLRGVQC", "light": "MDMRVPAQLLGLLLLWLSGARC"}
CONSTANT = {
    "heavy": "ASTKGPSVFPLAPSSKSTSGGTAALGCLVKDYFPEPVTVSWNSGALTSGVHTFPAVLQSSGLYSLSSVVTVPSSSLGTQTYIC",
    "IGK": "RTVAAPSVFIFPPSDEQLKSGTASVVCLLNNFYPREAKVQWKVDNALQSGNSQESVTEQDSKDSTYSLSSTLTLSKADYEKHK",
    "IGL": "GQPKAAPSVTLFPPSSEELQANKATLVCLISDFYPGAVTVAWKADSSPVKAGVETTTPSKQSNNKYAASSYLSLTPEQWKSH",
}
# Immunoglobulin folds that are no antibody: beta-2 microglobulin, both chains of the A6 T cell
# receptor, CD8 alpha.
OTHER_FOLDS = (
    "MSRSVALAVLALLSLSGLEAIQRTPKIQVYSRHPAENGKSNFLNCYVSGFHPSDIEVDLLKNGERIEKVEHSDLSFSKDWSFYLLYYTEFTPTEKDEYACRVN",
    "NAGVTQTPKFQVLKTGQSMTLQCAQDMNHEYMSWYRQDPGMGLRLIHYSVGAGITDQGEVPNGYNVSRSTTEDFPLRLLSAAPSQTSVYFCASRPGLAGGRPE"
    "QYFGPGTRLTVTEDLKNVFPPEVAVFEPSEAEISHTQKATLVCLATGFYPDHVELSWW",
    "KEVEQNSGPLSVPEGAIASLNCTYSDRGSQSFFWYRQYSGKSPELIMFIYSNGDKEDGRFTAQLNKASQYVSLLIRDSQPSDSATYLCAVTTDSWGKLQFGAG"
    "TQVVVTPDIQNPDPAVYQLRDSKSSDKSVCLFTDFDSQTNVSQSKDSDVYITDKTVLD",
    "SQFRVSPLDRTWNLGETVELKCQVLLSNPTSGCSWLFQPRGAAASPTFLLYLSQNKPKAAEGLDTQRFSGKRLGDTFVLTLSDFRRENEGYYFCSALSNSIMY",
)


def simulated_pairs(pairs: int, seed: int) -> pa.RecordBatch:
    return pa.Table.from_batches(list(simulate(pairs, seed))).combine_chunks().to_batches()[0]


@pytest.fixture(scope="module")
def pairs() -> pa.RecordBatch:
    return simulated_pairs(1500, 2)


@pytest.fixture(scope="module")
def sequences(pairs) -> dict[str, list[str]]:
    return {chain: pairs[f"sequence_aa_{chain}"].to_pylist() for chain in CHAINS}


@pytest.fixture(scope="module")
def annotations(sequences) -> dict[str, list[ChainAnnotation]]:
    return {chain: annotate_chains(sequences[chain], chain) for chain in CHAINS}


def region(sequence: str, mask: str, number: str) -> str:
    return "".join(a for a, m in zip(sequence, mask, strict=True) if m == number)


def cdrs(found: ChainAnnotation) -> list[str]:
    return [region(found.sequence_aa, found.cdr_mask_aa, number) for number in "123"]


def reasons(sequences: list[str], chain: str) -> Counter:
    found = annotate_chains(sequences, chain)
    return Counter(f if isinstance(f, str) else "accepted" for f in found)


# Known antibodies


@pytest.mark.parametrize(
    ("sequence", "chain", "expected", "v_gene"),
    [
        (TRASTUZUMAB_VH, "heavy", ["GFNIKDTY", "IYPTNGYT", "SRWGGDGFYAMDY"], ""),
        (TRASTUZUMAB_VL, "light", ["QDVNTA", "SAS", "QQHYTTPPT"], ""),
        (ADALIMUMAB_VH, "heavy", ["GFTFDDYA", "ITWNSGHI", "AKVSYLSTASSLDY"], "IGHV3-9"),
        (ADALIMUMAB_VL, "light", ["QGIRNY", "AAS", "QRYNRAPYT"], "IGKV1-27"),
    ],
)
def test_known_antibodies(sequence, chain, expected, v_gene):
    (found,) = annotate_chains([sequence], chain)
    assert cdrs(found) == expected
    assert found.cdr3_aa == expected[2]
    if v_gene:  # trastuzumab's mouse CDRs come from no human gene
        assert v_gene in found.v_call.split("|")
    assert found.start == 0
    assert found.sequence_aa == sequence


def test_strings_fit_together(annotations):
    for chain in CHAINS:
        for found in annotations[chain]:
            strings = (found.germline_aa, found.cdr_mask_aa, found.nongermline_mask_aa)
            assert {len(s) for s in strings} == {len(found.sequence_aa)}
            differs = "".join(
                str(int(a != g)) for a, g in zip(found.sequence_aa, found.germline_aa, strict=True)
            )
            assert differs == found.nongermline_mask_aa
            assert region(found.nongermline_mask_aa, found.cdr_mask_aa, "3").strip("0") == ""
            assert found.cdr3_aa == cdrs(found)[2]
            assert found.v_call.split("|")[0] == found.v_gene
            assert found.j_call.split("|")[0] == found.j_gene


# Simulated truth


def test_accuracy_on_simulated_truth(pairs, annotations):
    for chain in CHAINS:
        truth = {n: pairs[f"{n}_{chain}"].to_pylist() for n in ("v_gene", "cdr3_aa", "cdr_mask_aa")}
        germline = pairs[f"germline_aa_{chain}"].to_pylist()
        found = annotations[chain]
        assert sum(isinstance(f, str) for f in found) <= 0.001 * len(found)
        right = Counter()
        for i, f in enumerate(found):
            if isinstance(f, str):
                continue
            mask = truth["cdr_mask_aa"][i]
            v_end = mask.index("3")
            right["v"] += truth["v_gene"][i] in f.v_call.split("|")
            right["cdr3"] += f.cdr3_aa == truth["cdr3_aa"][i]
            right["cdr1 and 2"] += f.cdr_mask_aa[:v_end] == mask[:v_end]
            right["germline"] += f.germline_aa[:v_end] == germline[i][:v_end]
        share = {name: count / len(found) for name, count in right.items()}
        assert share["v"] >= 0.985
        assert share["cdr3"] >= 0.995
        assert share["cdr1 and 2"] >= 0.995
        assert share["germline"] >= 0.97


def test_ties_are_few(annotations):
    for chain in CHAINS:
        genes = [len(f.v_call.split("|")) for f in annotations[chain]]
        assert np.mean(genes) < 1.25


@pytest.mark.parametrize(
    ("at", "change", "expected"),
    [
        # insertion into CDR1, deletion from CDR2, insertion into framework 3 of adalimumab
        (29, ("", "SGS"), ["GFTFSGSDDYA", "ITWNSGHI"]),
        (53, ("NS", ""), ["GFTFDDYA", "ITWGHI"]),
        (69, ("", "G"), ["GFTFDDYA", "ITWNSGHI"]),
    ],
)
def test_insertions_and_deletions(at, change, expected):
    old, new = change
    assert ADALIMUMAB_VH[at:].startswith(old)
    sequence = ADALIMUMAB_VH[:at] + new + ADALIMUMAB_VH[at + len(old) :]
    (found,) = annotate_chains([sequence], "heavy")
    assert found.sequence_aa == sequence
    assert cdrs(found) == [*expected, "AKVSYLSTASSLDY"]
    assert found.v_gene == "IGHV3-9"


# CH31, an antibody against HIV-1 with nine residues inserted into CDRH1
CH31_VH = (
    "QVQLVQSGAAVRKPGASVTVSCKFAEDDDYSPYWVNPAPEHFIHFLRQAPGQQLEWLAWMNPTNGAVNYAWYLNGRVTATRDRSMTTAFLEVKSLRSDDT"
    "AVYYCARAQKRGRSEWAYAHWGQGTPVVVSS"
)


def test_an_insertion_beside_a_cdr_belongs_to_it():
    (found,) = annotate_chains([CH31_VH], "heavy")
    assert cdrs(found) == ["EDDDYSPYWVNPAPEHF", "MNPTNGAV", "ARAQKRGRSEWAYAH"]
    before, _, behind = found.cdr_mask_aa.partition("1" * 17)
    assert len(before) == 25 and behind.index("2") == 17  # FR1 without a residue 10, FR2 39-55


@pytest.mark.parametrize(("at", "cdr"), [(33, 0), (35, 0), (48, 1), (58, 1)])
def test_framework_2_keeps_its_17_residues(at, cdr):
    """A long insertion at any place near a CDR: FR1, FR2 and FR3 are as long as before."""
    whole = ADALIMUMAB_VH
    (found,) = annotate_chains([whole[:at] + "SDGPNTDSE" + whole[at:]], "heavy")
    lengths = [len(cdrs(found)[i]) for i in range(2)]
    expected = [8, 8]
    expected[cdr] += 9
    assert lengths == expected


# Both chains in one; what can be either


def annotated_rows(sequences: list[str], chain: str = "") -> tuple[list[dict], Report]:
    """Rows with one sequence, in the column of a chain, or that may be either."""
    report = Report("t", read=len(sequences))
    columns = {f"sequence_aa_{c}": [""] * len(sequences) for c in CHAINS}
    columns[f"sequence_aa_{chain or 'heavy'}"] = sequences
    columns |= {"_any_chain": [not chain] * len(sequences), "_line": [0] * len(sequences)}
    columns["_row"] = list(range(1, len(sequences) + 1))
    batches = complete.annotated([pa.record_batch(columns)], report, all_columns=True)
    rows = [row for batch in batches for row in batch.to_pylist()]
    report.settle(len(rows))
    return rows, report


def test_a_single_chain_fv_gives_both_domains():
    linker, order = "GGGGS" * 3, [(TRASTUZUMAB_VH, TRASTUZUMAB_VL), (ADALIMUMAB_VL, ADALIMUMAB_VH)]
    sequences = [first + linker + second for first, second in order]
    sequences += [TRASTUZUMAB_VH, TRASTUZUMAB_VH + CONSTANT["heavy"], TRASTUZUMAB_VL]
    rows, report = annotated_rows(sequences)
    found = {(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows}
    assert found == {
        (TRASTUZUMAB_VH, TRASTUZUMAB_VL),
        (ADALIMUMAB_VH, ADALIMUMAB_VL),
        (TRASTUZUMAB_VH, ""),
        ("", TRASTUZUMAB_VL),
    }
    assert len(rows) == 5 and report.notes == {"single-chain Fv: both domains": 2}
    (one,) = [r for r in rows if r["sequence_aa_light"] == ADALIMUMAB_VL]
    assert one["cdr3_aa_light"] == "QRYNRAPYT" and one["v_gene_light"] == "IGKV1-27"


@pytest.mark.parametrize("chain", CHAINS)
def test_a_single_chain_fv_in_the_column_of_a_chain_gives_both_domains(chain):
    """One that holds two domains of a chain, or a constant domain, gives that chain's alone."""
    linker, own, other = "GGGGS" * 3, ADALIMUMAB_VH, ADALIMUMAB_VL
    if chain == "light":
        own, other = other, own
    both = [own + linker + other, other + linker + own]
    constant = CONSTANT["heavy" if chain == "heavy" else "IGK"]
    rows, report = annotated_rows([*both, own + linker + own, own + constant], chain)
    assert [(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows] == (
        [(ADALIMUMAB_VH, ADALIMUMAB_VL)] * 2
        + [(ADALIMUMAB_VH, "") if chain == "heavy" else ("", ADALIMUMAB_VL)] * 2
    )
    assert report.notes == {"single-chain Fv: both domains": 2}


def test_the_reason_of_a_chain_that_may_be_either_is_that_of_its_kind():
    wrong = [TRASTUZUMAB_VH[19:], TRASTUZUMAB_VL[19:], TRASTUZUMAB_VH[:-12], "QVQ"]
    wrong += [OTHER_FOLDS[1], CONSTANT["IGK"]]
    rows, report = annotated_rows(wrong)
    assert not rows
    assert report.rejected == {
        "annotation: heavy: truncated_start": 1,
        "annotation: light: truncated_start": 1,
        "annotation: heavy: truncated_end": 1,
        "annotation: not_a_v_domain": 1,
        "annotation: t_cell_receptor": 1,
        "annotation: constant_region": 1,
    }


# Other species


def test_chains_of_another_species_are_noted():
    """Of murine 4D5, the parent of trastuzumab (Carter et al. 1992); humanised it is not."""
    murine = (
        "EVQLQQSGPELVKPGASLKLSCTASGFNIKDTYIHWVKQRPEQGLEWIGRIYPTNGYTRYDPKFQDKATITADTSSNTAYLQVSRLTSEDT"
        "AVYYCSRWGGDGFYAMDYWGQGASVTVSS"
    )
    rows, report = annotated_rows([murine, TRASTUZUMAB_VH, ADALIMUMAB_VH], "heavy")
    assert len(rows) == 3 and rows[0]["v_identity_aa_heavy"] < 0.75
    assert report.notes == {"heavy: less than 75% V identity: another species?": 1}
    assert report.first["heavy: less than 75% V identity: another species?"] == "row 1"


# OAS


def oas_rows(shared_data: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(shared_data / "oas" / f"{name}.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("chain", "least"), [("heavy", 0.96), ("light", 0.985)])
def test_agreement_with_oas(shared_data, chain, least):
    rows = oas_rows(shared_data, "1279068_1")
    found = annotate_chains([row[f"sequence_alignment_aa_{chain}"] for row in rows], chain)
    both = [(r, f) for r, f in zip(rows, found, strict=True) if isinstance(f, ChainAnnotation)]
    assert len(both) >= 0.99 * len(rows)
    genes = [row[f"v_call_{chain}"].split("*")[0] in f.v_call.split("|") for row, f in both]
    assert np.mean(genes) >= least
    assert np.mean([row[f"cdr3_aa_{chain}"] == f.cdr3_aa for row, f in both]) >= 0.995
    # of genes with one protein the one without D is named first
    first = [row[f"v_call_{chain}"].split("*")[0] == f.v_gene for row, f in both]
    assert np.mean(first) >= {"heavy": 0.98, "light": 0.99}[chain]


def most_alike(found: ChainAnnotation) -> str:
    """The J with most residues as the chain has them, counted from the CDR3's end; of equally many
    the one used most (`usage.py`)."""
    locus, end = found.v_gene[:3], found.cdr_mask_aa.rindex("3") + 1

    def alike(j: JAllele) -> tuple[int, int]:
        pairs = zip(j.amino_acids[j.motif :], found.sequence_aa[end:], strict=False)
        before = zip(j.amino_acids[: j.motif][::-1], found.cdr3_aa[::-1], strict=False)
        return sum(a == b for a, b in (*pairs, *before)), usage.J_USAGE[locus].get(j.gene, 0)

    return max(load_germlines().j_of(locus), key=alike).gene


@pytest.mark.parametrize(
    ("name", "chain", "first", "named"),
    [
        ("1279068_1", "heavy", 0.915, 0.967),
        ("1279068_1", "light", 0.9, 0.978),
        ("SRR10358525", "heavy", 0.987, 0.993),
        ("SRR10358525", "light", 0.938, 0.996),
    ],
)
def test_j_genes_of_oas(shared_data, name, chain, first, named):
    """OAS calls J by nucleotides. Counting equal residues names fewer of them."""
    rows = oas_rows(shared_data, name)
    found = annotate_chains([row[f"sequence_alignment_aa_{chain}"] for row in rows], chain)
    both = [
        (row[f"j_call_{chain}"].split("*")[0], f)
        for row, f in zip(rows, found, strict=True)
        if isinstance(f, ChainAnnotation)
    ]
    right = np.mean([f.j_gene == true for true, f in both])
    assert right >= first
    assert right > np.mean([most_alike(f) == true for true, f in both]) + 0.01
    assert np.mean([true in f.j_call.split("|") for true, f in both]) >= named
    assert np.mean([len(f.j_call.split("|")) for _, f in both]) < 1.3


@pytest.mark.parametrize("chain", CHAINS)
def test_the_prior_of_a_trimmed_j_is_a_negative_binomial(chain):
    """Of every J, by the number of whole codons that are left of it before W/F118."""
    table, seen = j_table(chain), 0
    for j in load_germlines().j_of(*LOCI_OF_CHAIN[chain]):
        places = [i for i, (gene,) in enumerate(table.genes) if gene == j.gene]
        mean, dispersion = J_TRIM[j.locus]
        lost = stats.nbinom(dispersion, dispersion / (dispersion + mean))
        n = j.motif_nucleotide
        whole, part = [], []
        for left in range(j.motif + 1):
            at = n - 3 * left  # so many nucleotides are lost, or one or two fewer
            whole.append(math.log(lost.pmf(at) if at < n else lost.sf(n - 1)))
            cut = sum(lost.pmf(t) for t in (at - 1, at - 2) if t >= 0)
            part.append(math.log(cut) if cut else TRIMMED / SCORE_SCALE)
        for prior, expected in ((table.whole_prior, whole), (table.cut_prior, part)):
            given = prior[: j.motif + 1, places] / SCORE_SCALE
            error = np.abs(given - np.array(expected)[:, None]).max(axis=0)
            assert error.min() <= 0.5 / SCORE_SCALE + 1e-9
            assert (prior[j.motif + 1 :, places[error.argmin()]] == TRIMMED).all()
            seen += 1
    assert seen == 2 * len(table.genes)


@pytest.mark.parametrize(
    ("cdr3", "fr4", "gene"),
    [
        # J2 with L124 replaced explains Y116 and T117; J1 only after it lost its W
        ("QQSYSAPMYT", "FGQGTKVEIK", "IGKJ2"),
        # J1 as it is in the germline
        ("QQSYSAPMWT", "FGQGTKVEIK", "IGKJ1"),
    ],
)
def test_a_j_is_not_trimmed_for_nothing(cdr3, fr4, gene):
    (found,) = annotate_chains([ADALIMUMAB_VL[:88] + cdr3 + fr4], "light")
    assert found.cdr3_aa == cdr3 and gene in found.j_call.split("|")
    assert found.j_gene == gene


# What lies around a V domain


@pytest.mark.parametrize("chain", CHAINS)
def test_leader_and_constant_region_are_cut(chain, sequences, annotations):
    for sequence, bare in list(zip(sequences[chain], annotations[chain], strict=True))[:200]:
        constant = CONSTANT.get(bare.v_gene[:3], CONSTANT["heavy"])
        (found,) = annotate_chains([LEADER[chain] + sequence + constant], chain)
        assert found.start == len(LEADER[chain])
        assert (found.sequence_aa, found.germline_aa) == (bare.sequence_aa, bare.germline_aa)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_v_gene_does_not_depend_on_what_stands_around_it(shared_data, chain):
    """Real chains, many of them mutated, with and without leader and constant region."""
    bare: list[ChainAnnotation] = []
    for name in ("1279068_1", "SRR10358525"):
        with gzip.open(shared_data / "oas" / f"{name}.csv.gz", "rt", newline="") as file:
            texts = [row[f"sequence_alignment_aa_{chain}"] for row in csv.DictReader(file)]
        found = annotate_chains(texts, chain)
        bare += [f for f in found if isinstance(f, ChainAnnotation)]
    constant = [CONSTANT.get(f.v_gene[:3], CONSTANT["heavy"]) for f in bare]
    whole = [LEADER[chain] + f.sequence_aa + c for f, c in zip(bare, constant, strict=True)]
    in_context = annotate_chains(whole, chain)
    # framework 4 of two light chains is cut short: a constant region there is no framework 4
    assert sum(f == "no_fr4" for f in in_context) <= 2
    for alone, f in zip(bare, in_context, strict=True):
        if f != "no_fr4":
            # where first residues lack, those of the leader may stand for them
            assert f.v_call == alone.v_call and 0 <= len(LEADER[chain]) - f.start <= 3


def test_single_chain_fv_has_both_domains():
    for order in ((TRASTUZUMAB_VH, TRASTUZUMAB_VL), (TRASTUZUMAB_VL, TRASTUZUMAB_VH)):
        whole = ("GGGGS" * 3).join(order)
        assert annotate_chains([whole], "heavy")[0].sequence_aa == TRASTUZUMAB_VH
        assert annotate_chains([whole], "light")[0].sequence_aa == TRASTUZUMAB_VL


def test_case_is_ignored():
    (lower,) = annotate_chains([TRASTUZUMAB_VH.lower()], "heavy")
    assert lower == annotate_chains([TRASTUZUMAB_VH], "heavy")[0]


# What is no V domain


@pytest.mark.parametrize("chain", CHAINS)
def test_no_antibody_is_never_accepted(chain, sequences):
    rng = np.random.default_rng(0)
    letters = list(AMINO_ACIDS)
    random = ["".join(rng.choice(letters, n, p=BACKGROUND)) for n in rng.integers(1, 700, 300)]
    scrambled = ["".join(rng.permutation(list(s))) for s in sequences[chain][:300]]
    backwards = [s[::-1] for s in sequences[chain][:300]]
    for negatives in (random, scrambled, backwards):
        assert reasons(negatives, chain) == {"not_a_v_domain": len(negatives)}
    # two T-cell receptor chains, CD8 alpha, beta-2 microglobulin
    assert reasons(OTHER_FOLDS, chain) == {"t_cell_receptor": 2, "not_a_v_domain": 2}


@pytest.mark.parametrize(("chain", "other"), [CHAINS, CHAINS[::-1]])
def test_swapped_chains(chain, other, sequences):
    assert reasons(sequences[other], chain) == {"wrong_chain": len(sequences[other])}


@pytest.mark.parametrize("chain", CHAINS)
def test_truncated_domains(chain, sequences):
    # up to 3 residues may lack; what is cut further is named by the end where it is cut
    some = sequences[chain][:150]
    for cut in (1, 3):
        assert reasons([s[cut:] for s in some], chain)["accepted"] == len(some)
        assert reasons([s[:-cut] for s in some], chain)["accepted"] >= len(some) - 2
    for cut in (4, 10, 30):
        assert set(reasons([s[cut:] for s in some], chain)) == {"truncated_start"}
        assert set(reasons([s[:-cut] for s in some], chain)) == {"truncated_end"}
    for cut in (70, 100):
        assert "accepted" not in reasons([s[cut:] for s in some] + [s[:-cut] for s in some], chain)


def test_missing_residues_are_not_invented():
    (found,) = annotate_chains([TRASTUZUMAB_VH[2:-1]], "heavy")
    (whole,) = annotate_chains([TRASTUZUMAB_VH], "heavy")
    assert found.germline_aa == whole.germline_aa[2:-1]
    assert found.cdr_mask_aa == whole.cdr_mask_aa[2:-1]


@pytest.mark.parametrize(
    ("sequence", "chain", "reason"),
    [
        ("", "heavy", "not_a_v_domain"),
        ("QVQ", "heavy", "not_a_v_domain"),
        (TRASTUZUMAB_VH[:60] + "X" + TRASTUZUMAB_VH[61:], "heavy", "nonstandard_residue"),
        (TRASTUZUMAB_VH[:95] + "X" + TRASTUZUMAB_VH[96:], "heavy", "nonstandard_residue"),
        (TRASTUZUMAB_VL[:40] + "*" + TRASTUZUMAB_VL[41:], "light", "nonstandard_residue"),
        (TRASTUZUMAB_VL[:40] + "é" + TRASTUZUMAB_VL[41:], "light", "nonstandard_residue"),
        (TRASTUZUMAB_VH[:95] + "Y" + TRASTUZUMAB_VH[96:], "heavy", "no_c104"),
        (TRASTUZUMAB_VH[:109] + CONSTANT["heavy"], "heavy", "no_fr4"),
        (TRASTUZUMAB_VH[:40] + TRASTUZUMAB_VH[65:], "heavy", "large_indel"),
        ("A" * 1900 + TRASTUZUMAB_VH, "heavy", "too_long"),
        (TRASTUZUMAB_VL, "heavy", "wrong_chain"),
    ],
)
def test_reasons(sequence, chain, reason):
    assert annotate_chains([sequence], chain) == [reason]
    assert reason in REASONS


def test_letters_outside_the_domain_do_not_matter():
    (found,) = annotate_chains(["XX*" + TRASTUZUMAB_VH + "X*"], "heavy")
    assert found.sequence_aa == TRASTUZUMAB_VH


def test_chain_must_be_known():
    with pytest.raises(ValueError, match="expected one of"):
        annotate_chains([TRASTUZUMAB_VH], "kappa")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_anything_is_annotated_or_rejected(data):
    # a damaged antibody, or any text at all
    base = data.draw(st.sampled_from([TRASTUZUMAB_VH, ADALIMUMAB_VL, ""]))
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(base))] * 2)))
    middle = data.draw(st.text(max_size=40) | st.text(AMINO_ACIDS, max_size=40))
    sequence = base[:a] + middle + base[b:]
    for chain in CHAINS:
        (found,) = annotate_chains([sequence], chain)
        if isinstance(found, str):
            assert found in REASONS[1:]
            continue
        assert found.sequence_aa in sequence.upper()
        assert set(found.sequence_aa) <= set(AMINO_ACIDS)
        assert len(found.germline_aa) == len(found.cdr_mask_aa) == len(found.sequence_aa)
        assert 0.5 < found.v_identity_aa <= 1


def test_neighbours_do_not_matter(sequences, annotations):
    rng = np.random.default_rng(1)
    for chain in CHAINS:
        order = rng.permutation(len(sequences[chain]))[:300]
        mixed = [sequences[chain][i] for i in order] + [LEADER[chain] * 20, *OTHER_FOLDS]
        assert annotate_chains(mixed, chain)[:300] == [annotations[chain][i] for i in order]
        assert annotate_chains([sequences[chain][7]], chain) == [annotations[chain][7]]


# Tables


def bare(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.select(["sequence_id", "sequence_aa_heavy", "sequence_aa_light"])


def table(heavy: list[str], light: list[str], **columns: list) -> pa.RecordBatch:
    ids = [f"r{i}" for i in range(len(heavy))]
    columns = {"sequence_aa_heavy": heavy, "sequence_aa_light": light} | columns
    return pa.record_batch({"sequence_id": ids} | columns)


def test_batch_has_what_chains_have(pairs, annotations):
    done, rejected = annotate_batch(bare(pairs))
    assert done.num_rows + sum(rejected.values()) == pairs.num_rows
    kept = set(done["sequence_id"].to_pylist())
    rows = [i for i, name in enumerate(pairs["sequence_id"].to_pylist()) if name in kept]
    for chain in CHAINS:
        for name in ChainAnnotation.__dataclass_fields__:
            if name != "start":
                expected = [getattr(annotations[chain][i], name) for i in rows]
                assert done[f"{name}_{chain}"].to_pylist() == expected


def test_processes_and_slices_do_not_matter(pairs):
    batch = bare(pairs)
    done, rejected = annotate_batch(batch)
    assert annotate_batch(batch, workers=2) == (done, rejected)
    parts = [annotate_batch(batch.slice(first, 333))[0] for first in range(0, 1500, 333)]
    assert pa.concat_batches(parts).equals(done)


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_keep_rows_and_order(pairs, monkeypatch, workers):
    """Batches of pairs, complete pairs, and heavy or light chains that do not say which."""
    monkeypatch.setattr(complete, "ROWS_PER_BATCH", 1)  # as far ahead as can be
    rows, light = 1100, pairs["sequence_aa_light"]
    either = pc.if_else(pa.array(np.arange(1500) % 2 == 0), light, pairs["sequence_aa_heavy"])
    alone = pa.record_batch({"sequence_aa_heavy": either, ANY_CHAIN: pa.array([True] * 1500)})
    stream = [numbered(b.slice(0, rows)) for b in (bare(pairs), alone, pairs, alone)]
    report = Report("s")
    done = list(complete.annotated(iter(stream), report, workers=workers))
    heavy, rejected = annotate_batch(bare(pairs).slice(0, rows))
    assert done[0]["germline_aa_heavy"].equals(heavy["germline_aa_heavy"])
    # of each batch of single chains first the heavy ones, then the light ones
    assert [len(set(b["sequence_aa_light"].to_pylist()) - {""}) > 1 for b in done] == [
        *(True, False, True, True, False, True)
    ]
    assert all(b[ROW].to_pylist() == sorted(b[ROW].to_pylist()) for b in done)
    assert sum(b.num_rows for b in done) == 4 * rows - sum(report.rejected.values())
    assert sum(report.rejected.values()) < 8


def numbered(batch: pa.RecordBatch) -> pa.RecordBatch:
    """With the row and line numbers that readers give."""
    numbers = pa.array(np.arange(1, batch.num_rows + 1))
    if "sequence_aa_light" not in batch.schema.names:
        batch = batch.append_column("sequence_aa_light", pa.array([""] * batch.num_rows))
    return batch.append_column(ROW, numbers).append_column(LINE, numbers)


KILLED = """
import multiprocessing, os, sys, time
import pyarrow.parquet as pq
from moe_ablm.data.annotate import start_annotation

finish = start_annotation(pq.read_table(sys.argv[1]).to_batches()[0], reannotate=True, workers=2)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_killed_process(pairs, tmp_path):
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    command = [sys.executable, "-c", KILLED, tmp_path / "pairs.parquet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_rejected_rows_are_counted_once():
    vh, vl = TRASTUZUMAB_VH, TRASTUZUMAB_VL
    batch = table(
        [vh, vl, vh[20:], "", "", vh, ""],
        [vl, vh, "A" * 50, vl, "", "", vl[:-20]],
        donor=list("abcdefg"),
    )
    done, rejected = annotate_batch(batch)
    assert done["donor"].to_pylist() == ["a", "d", "f"]
    assert rejected == {
        "heavy: wrong_chain": 1,
        "heavy: truncated_start": 1,
        "light: truncated_end": 1,
        "no_sequence": 1,
    }
    assert done["cdr3_aa_light"].to_pylist() == ["QQHYTTPPT", "QQHYTTPPT", ""]
    assert done["v_identity_aa_light"].to_pylist()[2] is None


def test_one_chain_is_enough():
    batch = table([TRASTUZUMAB_VH], [""]).drop_columns(["sequence_aa_light"])
    done, _ = annotate_batch(batch)
    assert done["sequence_aa_light"].to_pylist() == [""]
    assert done["cdr3_aa_heavy"].to_pylist() == ["SRWGGDGFYAMDY"]


def test_columns_that_are_there_are_trusted(pairs):
    done, rejected = annotate_batch(pairs)
    assert not rejected
    for name in pairs.schema.names:
        assert done[name].to_pylist() == pairs[name].to_pylist(), name
    # even where they are odd, unless told otherwise
    odd = pairs.set_column(
        pairs.schema.get_field_index("v_gene_heavy"), "v_gene_heavy", pa.array(["IGHV9-9"] * 1500)
    )
    assert set(annotate_batch(odd)[0]["v_gene_heavy"].to_pylist()) == {"IGHV9-9"}
    again = annotate_batch(odd, reannotate=True)[0]
    assert "IGHV9-9" not in again["v_gene_heavy"].to_pylist()
    assert again["v_gene_heavy"].equals(annotate_batch(bare(pairs))[0]["v_gene_heavy"])


def test_missing_values_are_computed_and_given_ones_cut_with_the_domain():
    leader = LEADER["heavy"]
    (whole,) = annotate_chains([TRASTUZUMAB_VH], "heavy")
    given = whole.nongermline_mask_aa[::-1]
    batch = table(
        [leader + TRASTUZUMAB_VH],
        [""],
        nongermline_mask_aa_heavy=["0" * len(leader) + given],
        v_gene_heavy=["IGHV3-23"],
        j_gene_heavy=[None],
        v_identity_aa_heavy=[0.5],
        cdr3_aa_heavy=[""],
    )
    row = annotate_batch(batch)[0].to_pylist()[0]
    assert row["sequence_aa_heavy"] == TRASTUZUMAB_VH
    assert row["nongermline_mask_aa_heavy"] == given
    assert row["germline_aa_heavy"] == whole.germline_aa
    assert (row["v_gene_heavy"], row["v_call_heavy"]) == ("IGHV3-23", "IGHV3-23")
    assert row["j_gene_heavy"] == whole.j_gene
    assert row["v_identity_aa_heavy"] == 0.5
    assert row["cdr3_aa_heavy"] == whole.cdr3_aa


def test_cdr3_and_identity_follow_from_given_masks(pairs):
    lacking = pairs.drop_columns(["cdr3_aa_heavy", "v_identity_aa_heavy"])
    done, _ = annotate_batch(lacking)
    assert done["cdr3_aa_heavy"].equals(pairs["cdr3_aa_heavy"])
    np.testing.assert_allclose(
        done["v_identity_aa_heavy"].to_numpy(), pairs["v_identity_aa_heavy"].to_numpy()
    )


def test_columns_that_disagree_are_rejected():
    vh, vl = TRASTUZUMAB_VH, TRASTUZUMAB_VL
    short_mask = table([vh], [vl], cdr_mask_aa_light=["000"])
    assert annotate_batch(short_mask)[1] == {"light: columns_disagree": 1}
    other_cdr3 = table([vh], [vl], cdr3_aa_heavy=["AR"])
    assert annotate_batch(other_cdr3)[1] == {"heavy: columns_disagree": 1}
    assert not annotate_batch(other_cdr3, reannotate=True)[1]


def test_wrong_tables():
    with pytest.raises(UserError, match="no column sequence_aa_heavy or sequence_aa_light"):
        annotate_batch(pa.record_batch({"sequence": ["A"]}))
    with pytest.raises(UserError, match="column sequence_aa_heavy holds int64"):
        annotate_batch(pa.record_batch({"sequence_aa_heavy": [1]}))
    with pytest.raises(UserError, match="column v_identity_aa_heavy: expected numbers"):
        annotate_batch(table([TRASTUZUMAB_VH], [""], v_identity_aa_heavy=["high"]))
    with pytest.raises(UserError, match="0 workers"):
        annotate_batch(table([TRASTUZUMAB_VH], [""]), workers=0)


def test_empty_batch():
    done, rejected = annotate_batch(bare(simulated_pairs(1, 0))[0:0])
    assert done.num_rows == 0
    assert "v_call_light" in done.schema.names
    assert not rejected


@pytest.mark.parametrize(
    ("residue", "gene"),
    [*[(r, "IGLJ3") for r in "WRG"], *[(r, "IGLJ2") for r in "VLM"]],
)
def test_codons_that_a_j_is_trimmed_in_tell_it_from_another(residue, gene):
    """IGLJ2 begins (T) GTG GTA TTC, IGLJ3 (T) TGG GTG TTC: of one that lost bases of its first
    codon .GG (arginine, glycine, tryptophan) or .TG (leucine, methionine, valine) is left."""
    chain = (
        "SYELTQPPSVSVSPGQTASITCSGDKLGDKYACWYQQKPGQSPVLVIYQDSKRPSGIPERFSGSNSGNTATLTISGTQAMDEADYYC"
        f"QAWDSST{residue}VFGGGTKLTVL"
    )
    (found,) = annotate_chains([chain], "light")
    assert isinstance(found, ChainAnnotation) and found.j_gene == gene
    assert {"IGLJ2", "IGLJ3"} >= set(found.j_call.split("|"))


# The verb


def run(*arguments: str) -> int:
    return main(["moe_ablm", "annotate", *map(str, arguments), "--workers", "1"])


def test_verb_writes_the_study_columns(tmp_path, pairs):
    source, out = tmp_path / "pairs.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table(bare(pairs)), source)
    assert run("--input", source, "--out", out) == 0
    done = pq.read_table(out)
    expected, rejected = annotate_batch(bare(pairs))
    assert done.num_rows == pairs.num_rows - sum(rejected.values())
    for name in expected.schema.names:
        assert done[name].to_pylist() == expected[name].to_pylist()
    assert not list(tmp_path.glob(".*partial*"))


def test_verb_joins_sources_with_different_columns(tmp_path):
    fasta, csv_file = tmp_path / "a.fasta", tmp_path / "b.csv"
    fasta.write_text(f">a|H\n{LEADER['heavy']}{TRASTUZUMAB_VH}\n>a|L\n{TRASTUZUMAB_VL}\n")
    csv_file.write_text(
        "sequence_id,sequence_aa_heavy,sequence_aa_light,label\n"
        f"b,{ADALIMUMAB_VH},{ADALIMUMAB_VL},flu\nc,{ADALIMUMAB_VL},{ADALIMUMAB_VH},flu\n"
    )
    out = tmp_path / "out.parquet"
    assert run("--input", fasta, "--input", csv_file, "--out", out) == 0
    rows = pq.read_table(out).to_pylist()
    assert [(r["sequence_id"], r["label"]) for r in rows] == [("a", ""), ("b", "flu")]
    assert [r["sequence_aa_heavy"] for r in rows] == [TRASTUZUMAB_VH, ADALIMUMAB_VH]


def test_verb_counts_every_row(tmp_path, capsys, pairs):
    # complete rows are not annotated again, but one whose CDR3 contradicts its mask is not kept
    cdr3 = pairs["cdr3_aa_heavy"].to_pylist()
    odd = pairs.slice(0, 20).set_column(
        pairs.schema.get_field_index("cdr3_aa_heavy"),
        "cdr3_aa_heavy",
        pa.array([*cdr3[:3], "AR", *cdr3[4:20]]),
    )
    source, out = tmp_path / "pairs.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table(odd), source)
    assert run("--input", source, "--out", out) == 0
    assert pq.read_metadata(out).num_rows == 19
    printed = capsys.readouterr().out
    assert "columns_disagree" in "".join(printed.split())
    assert "row 4" in printed


def test_verb_writes_csv_and_numbers(tmp_path, capsys):
    source = tmp_path / "a.csv"
    source.write_text(
        f"id,heavy,light\na,{TRASTUZUMAB_VH},{TRASTUZUMAB_VL}\n" + f"b,,{ADALIMUMAB_VL}\n"
    )
    outs = [tmp_path / "out.csv", tmp_path / "out.parquet"]
    for out in outs:
        assert run("--input", source, "--out", out, "--numbering", "kabat") == 0
    with outs[0].open() as lines:
        written = list(csv.DictReader(lines))
    for line, row in zip(written, pq.read_table(outs[1]).to_pylist(), strict=True):
        assert {**line, "v_identity_aa_heavy": 0, "v_identity_aa_light": 0} == {
            **row, "v_identity_aa_heavy": 0, "v_identity_aa_light": 0
        }  # fmt: skip
        assert float(line["v_identity_aa_light"]) == row["v_identity_aa_light"]
    at = dict(zip(written[0]["numbers_heavy"].split(), TRASTUZUMAB_VH, strict=True))
    # Carter et al. 1992, table 1: CDRH2 begins RIYPTNGY (50-56), CDRH3 is WGGDGFYAMDY (95-102)
    assert "".join(at[n] for n in ("50", "51", "52", "52A", "53", "54", "55", "56")) == "RIYPTNGY"
    end = ("95", "96", "97", "98", "99", "100", "100A", "100B", "100C", "101", "102")
    assert "".join(at[n] for n in end) == "WGGDGFYAMDY"
    assert written[1]["numbers_heavy"] == "" and written[1]["v_identity_aa_heavy"] == ""
    plain = tmp_path / "plain.csv"
    assert run("--input", source, "--out", plain) == 0
    assert "numbers_heavy" not in plain.read_text()


def test_verb_notes_what_has_no_numbers(tmp_path, capsys):
    source, out = tmp_path / "a.csv", tmp_path / "out.csv"
    given = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
    source.write_text(
        ",".join(["sequence_aa_heavy", *(f"{name}_heavy" for name in given)])
        + "\nACDEFGHIKL,ACDEFGHIKL,0011022033,0000000000,IGHV1-2,IGHJ4\n"
    )
    assert run("--input", source, "--out", out, "--numbering", "imgt") == 0
    assert "heavy: no V domain to number" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["out.json", "out.csv.gz", "folder.parquet"])
def test_verb_refuses_wrong_outputs(tmp_path, capsys, name):
    (tmp_path / "folder.parquet").mkdir()
    source = tmp_path / "a.csv"
    source.write_text(f"heavy,light\n{TRASTUZUMAB_VH},{TRASTUZUMAB_VL}\n")
    assert run("--input", source, "--out", tmp_path / name) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_verb_leaves_nothing_when_it_fails(tmp_path, capsys):
    source, out = tmp_path / "a.csv", tmp_path / "out.parquet"
    source.write_text(f"heavy,light\n{TRASTUZUMAB_VL},{TRASTUZUMAB_VH}\n")
    assert run("--input", source, "--out", out) == 2
    error = capsys.readouterr().err
    assert "no antibody is left" in error and error.count("\n") == 1
    assert "1 row read, 1 rejected: annotation: heavy: wrong_chain (first: row 1" in error
    source.write_text(f"heavy,light\n{TRASTUZUMAB_VH},{TRASTUZUMAB_VL}\n")
    assert run("--input", source, "--out", source / "out.parquet") == 2
    error = capsys.readouterr().err
    assert "a.csv is not a directory" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
