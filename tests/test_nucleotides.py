"""Chains written in nucleotides: never residues; translated where asked, or there is nothing else.

The reference is the protein itself, written in codons of the standard genetic code.
"""

import pyarrow as pa
import pytest
from public_headers import coded
from tiny_models import HEAVY, LIGHT

from moe_ablm.data.readers import Reading, open_sources
from moe_ablm.data.readers.nucleotides import are_nucleotides, v_domains
from moe_ablm.errors import UserError

UTR = "GGGAGAGGAGCCCAGCACTAGAAGTCGGCGGTGTTTCCATTCGG"  # 45 bases


def reverse(bases: str) -> str:
    return bases[::-1].translate(str.maketrans("ACGT", "TGCA"))


NT_HEAVY, NT_LIGHT = coded(HEAVY), coded(LIGHT)


def read(path, on_bad_row="fail", format=None, **options):
    (source,) = open_sources(
        [str(path)], on_bad_row=on_bad_row, format=format, reading=Reading(**options)
    )
    rows = [row for batch in source.batches() for row in batch.to_pylist()]
    return [(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows], source.report


def test_what_are_nucleotides():
    yes = [NT_HEAVY, NT_HEAVY.lower(), NT_HEAVY.replace("T", "U"), "N" * 31, NT_HEAVY[:90] + "RY"]
    no = [HEAVY, LIGHT, "ACGT" * 7, "", NT_HEAVY + HEAVY, "GGGGSGGGGSGGGGSGGGGSGGGGSGGGGSGGGGS"]
    assert are_nucleotides(pa.array(yes + no)).tolist() == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize("before", ["", "A", "CA", UTR])
@pytest.mark.parametrize("strand", [str, reverse])
@pytest.mark.parametrize("chain", ["heavy", ""])
def test_any_frame_and_strand(before, strand, chain):
    read_ = strand(before + NT_HEAVY + coded("ASTKGPSVFPLAP"))
    assert v_domains([read_, NT_LIGHT], [chain, ""]) == [(HEAVY, ""), (LIGHT, "")]


@pytest.mark.parametrize(
    ("bases", "chain", "reason"),
    [
        (NT_HEAVY[:150] + NT_HEAVY[151:], "heavy", "frameshift"),
        (NT_HEAVY[:150] + "TAA" + NT_HEAVY[153:], "", "stop codon or unknown nucleotide"),
        (NT_HEAVY[:150] + "NNN" + NT_HEAVY[153:], "heavy", "stop codon or unknown nucleotide"),
        (NT_HEAVY[60:], "heavy", "truncated_start"),
        (NT_LIGHT, "heavy", "wrong_chain"),
        ("ACGT" * 100, "", "no open reading frame is a V domain"),
        ("ACGT" * 2000, "", "too long"),
    ],
)
def test_why_a_read_has_no_v_domain(bases, chain, reason):
    ((domain, found),) = v_domains([bases], [chain])
    assert domain == "" and found.startswith(reason)


@pytest.mark.parametrize("format", [None, "fasta"])
def test_a_fasta_of_nucleotides_is_translated(tmp_path, format):
    shifted = NT_HEAVY[:150] + NT_HEAVY[151:]
    text = f">a|H\n{UTR}{NT_HEAVY}\n>a|L\n{NT_LIGHT}\n>b\n{NT_LIGHT.lower()}\n>c\n{shifted}\n"
    (tmp_path / "a.fasta").write_text(text)
    found, report = read(tmp_path / "a.fasta", format=format)
    assert sorted(found) == sorted([(HEAVY, LIGHT), (LIGHT, "")])
    assert report.rejected == {"nucleotides: frameshift": 1} and report.joined == 1
    assert report.notes["nucleotides translated to the V domain"] == 3
    with pytest.raises(UserError, match=r"nucleotides, expected amino acids \(--nucleotides tr"):
        read(tmp_path / "a.fasta", nucleotides="refuse")


def test_a_record_of_nucleotides_among_proteins_is_refused(tmp_path):
    (tmp_path / "a.fasta").write_text(f">a\n{HEAVY}\n>b\n{NT_HEAVY}\n")
    with pytest.raises(UserError, match=r"row 2 \(line 3\).*nucleotides"):
        read(tmp_path / "a.fasta")
    found, report = read(tmp_path / "a.fasta", "skip")
    assert len(found) == 1 and report.rejected == {"nucleotides in sequence_aa_heavy": 1}
    assert read(tmp_path / "a.fasta", nucleotides="translate")[0] == [(HEAVY, "")] * 2


def test_tables_are_translated_where_that_is_asked(tmp_path):
    (tmp_path / "a.csv").write_text(f"heavy,light\n{NT_HEAVY},{NT_LIGHT}\n{NT_LIGHT},\n")
    with pytest.raises(UserError, match=r"row 1 \(line 2\): column sequence_aa_heavy: nucleotides"):
        read(tmp_path / "a.csv")
    found, report = read(tmp_path / "a.csv", nucleotides="translate")
    assert found == [(HEAVY, LIGHT)] and report.rejected == {"nucleotides: wrong_chain": 1}


@pytest.mark.parametrize(
    "header",
    [
        ("sequence_id", "v_call", "sequence", "sequence_alignment", "cell_id", "productive"),
        ("SEQUENCE_ID", "V_CALL", "SEQUENCE_INPUT", "SEQUENCE_IMGT", "CELL", "FUNCTIONAL"),
    ],
)
def test_repertoires_without_amino_acids_are_translated(tmp_path, header):
    gapped = NT_HEAVY[:75] + "......" + NT_HEAVY[75:]  # IMGT's gaps
    rows = [
        header,
        ("1", "Homsap IGHV3-23*01 F", UTR + NT_HEAVY, gapped, "c", "T"),
        ("2", "", UTR + NT_LIGHT, NT_LIGHT, "c", "T"),  # which chain it is, annotation finds out
        ("3", "Homsap IGHV3-23*01 F", NT_HEAVY, NT_HEAVY, "d", "F"),
    ]
    text = "\n".join("\t".join(row) for row in rows) + "\n"
    (tmp_path / "a.tab").write_text(text)
    found, report = read(tmp_path / "a.tab")
    assert report.format == "airr" and found == [(HEAVY, LIGHT)]
    assert report.rejected == {"not productive": 1} and report.joined == 1
