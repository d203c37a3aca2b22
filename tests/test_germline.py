from importlib import resources

import numpy as np
import pytest

from moe_ablm.data.germline import (
    encode_nucleotides,
    load_germlines,
    parse_fasta,
    parse_germlines,
    parse_j_allele,
    parse_v_allele,
    translate,
)
from moe_ablm.errors import UserError


@pytest.fixture(scope="module")
def germlines():
    return load_germlines()


def by_name(alleles, name):
    return next(allele for allele in alleles if allele.name == name)


def test_translation_is_the_standard_genetic_code():
    # NCBI translation table 1, bases in the order T, C, A, G
    table = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
    codons = [a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG"]
    assert translate("".join(codons) + "AC") == table


def test_other_letters_have_no_code():
    assert encode_nucleotides("ACGTN").tolist() == [0, 1, 2, 3, -1]


def test_every_locus_is_there(germlines):
    assert (len(germlines.v), len(germlines.d), len(germlines.j)) == (328, 31, 23)
    assert [len(germlines.j_of(locus)) for locus in ("IGH", "IGK", "IGL")] == [7, 7, 9]
    assert [v.name for v in germlines.v] == sorted(v.name for v in germlines.v)


def test_v_alleles_have_the_conserved_residues(germlines):
    for v in germlines.v:
        at = dict(zip(v.imgt.tolist(), v.amino_acids, strict=True))
        assert (at[1], at[23], at[41], at[104]) == (v.amino_acids[0], "C", "W", "C")
        assert v.amino_acids[v.c104] == "C" and v.imgt[v.c104] == 104
        assert "*" not in v.amino_acids[: v.c104]
        assert (np.diff(v.imgt) > 0).all()


def test_ighv3_23_is_numbered_as_imgt_does(germlines):
    v = by_name(germlines.v, "IGHV3-23*01")
    assert (v.gene, v.locus) == ("IGHV3-23", "IGH")
    cdr1, fr2, cdr2, fr3, cdr3 = v.region_starts()
    assert v.amino_acids[:cdr1] == "EVQLLESGGGLVQPGGSLRLSCAAS"
    assert v.amino_acids[cdr1:fr2] == "GFTFSSYA"
    assert v.amino_acids[fr2:cdr2] == "MSWVRQAPGKGLEWVSA"
    assert v.amino_acids[cdr2:fr3] == "ISGSGGST"
    assert v.amino_acids[fr3:cdr3] == "YYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    assert v.amino_acids[cdr3:] == "AK"


@pytest.mark.parametrize(
    ("name", "amino_acids", "motif"),
    [
        ("IGHJ4*02", "YFDYWGQGTLVTVSS", "W"),
        ("IGHJ6*02", "YYYYYGMDVWGQGTTVTVSS", "W"),
        ("IGKJ1*01", "WTFGQGTKVEIK", "F"),
        ("IGLJ3*02", "WVFGGGTKLTVL", "F"),
    ],
)
def test_j_alleles_are_in_frame(germlines, name, amino_acids, motif):
    j = by_name(germlines.j, name)
    assert j.amino_acids == amino_acids
    assert j.amino_acids[j.motif] == motif
    assert translate(j.nucleotides[j.motif_nucleotide :]) == amino_acids[j.motif :]


def gapped_v(**codons: str) -> str:
    """106 codons of alanine with C23, W41 and C104; `p50="TAA"` sets position 50."""
    codon = ["GCT"] * 106
    codon[22], codon[40], codon[103] = "TGT", "TGG", "TGC"
    for position, value in codons.items():
        codon[int(position[1:]) - 1] = value
    return "".join(codon)


def test_gaps_are_skipped_but_counted():
    v = parse_v_allele("IGHV0*01", gapped_v(p10="...", p30="...", p31="..."))
    assert len(v.amino_acids) == 103
    assert v.c104 == 100
    assert v.imgt[8:10].tolist() == [9, 11]
    assert v.region_starts() == [25, 35, 52, 62, 101]


@pytest.mark.parametrize(
    "change", [{"p23": "GCT"}, {"p41": "GCT"}, {"p104": "GCT"}, {"p50": "TAA"}, {"p50": "NNN"}]
)
def test_v_alleles_that_are_not_functional_are_left_out(change):
    assert parse_v_allele("IGHV0*01", gapped_v()) is not None
    assert parse_v_allele("IGHV0*01", gapped_v(**change)) is None


def test_j_without_a_motif_is_left_out():
    assert parse_j_allele("IGHJ0*01", "GCTGCTGCTGCTGCTGCT") is None


def test_fasta_records_may_span_lines():
    assert parse_fasta(">IGHV1*01__homo_sapiens\nACG\ntt\n>B\nA\n") == {
        "IGHV1*01": "ACGTT",
        "B": "A",
    }


def folder_with(tmp_path, **texts):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.fasta").write_text(text)
    return str(folder)


def test_a_folder_of_the_packaged_files_is_the_package(tmp_path, germlines):
    packaged = resources.files("moe_ablm.data").joinpath("germlines", "human")
    texts = {x: packaged.joinpath(f"{x}.fasta").read_text() for x in "vdj"}
    texts["v"] = texts["v"].replace("__homo_sapiens", "|Homo sapiens").replace(".", "-")
    found = load_germlines(folder_with(tmp_path, **texts, c=">IGHM*01\nACGT\n>IGHG1*01\nACGT\n"))
    for one, other in ((found.v, germlines.v), (found.d, germlines.d), (found.j, germlines.j)):
        assert [(a.name, a.nucleotides) for a in one] == [(a.name, a.nucleotides) for a in other]


V, J = f">IGHV1-1*01\n{gapped_v()}\n", ">IGHJ1*01\nTACTGGGGTCAAGGTACC\n"


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({}, "no V and J alleles in 0 FASTA files"),
        ({"x": ">TRBV1*01\nACGT\n"}, "no V and J alleles in 1 FASTA files.*FASTA gapped"),
        ({"x": f">IGHV1-1*01\n{'GCT' * 98}\n{J}"}, "of 1 V alleles none has C23, W41 and C104"),
        ({"x": J}, "of 0 V alleles none has"),
        ({"x": V}, "V alleles of IGH and no J allele of it"),
        ({"x": V + J, "y": V.replace("GCT", "GCC")}, r"IGHV1-1\*01 is there twice.*y\.fasta"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, texts, told):
    folder = folder_with(tmp_path, **texts)
    with pytest.raises(UserError, match=f"--germlines {folder}: {told}") as error:
        parse_germlines(f"human,{folder}")
    assert "\n" not in str(error.value)


def test_germlines_are_named_once(tmp_path):
    folder = folder_with(tmp_path, x=V + J, y=V + J)  # the same twice is there once
    assert parse_germlines(f"human, {folder}") == ("human", folder)
    assert len(load_germlines(folder).v) == 1
    with pytest.raises(UserError, match="two are called the same"):
        parse_germlines(f"{folder},{folder}/")
    with pytest.raises(UserError, match="--germlines mouse: no such folder"):
        parse_germlines("mouse")
