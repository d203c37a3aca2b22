"""Chains written in nucleotides: never residues; translated where asked, or there is nothing else.

The reference is the protein itself, written in codons of the standard genetic code.
"""

import csv
import gzip
from itertools import islice

import pyarrow as pa
import pytest
from public_headers import coded
from tiny_models import HEAVY, LIGHT

from moe_ablm.data.readers import Reading, open_sources
from moe_ablm.data.readers.nucleotides import UNKNOWN, are_nucleotides, first_codons, v_domains
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


def test_a_column_of_nucleotides_holds_nucleotides():
    yes = ["ACGT", "NNNN", "A", NT_HEAVY[:40] + "S" * 40]
    assert are_nucleotides(pa.array(yes)).tolist() == [False] * 4
    both = are_nucleotides(pa.array([*yes, "", HEAVY, "ACGTE"]), said=True)
    assert both.tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    ("read", "aligned", "sequence_start", "germline_start", "codon"),
    [
        ("CCGAGGTG", False, "3", "1", 2),  # GAG is the first codon
        ("CCAGGTGCAG", False, "3", "2", 4),  # the alignment begins at its second nucleotide
        ("CCGGTGCAG", False, "3", "3", 3),
        ("CCGTGCAG", False, "3", "4", 2),
        ("CCGTGCAG", False, "3.0", "4.0", 2),  # pandas' whole numbers beside blanks
        ("CCGTGCAG", False, "3", "", UNKNOWN),
        ("CCGTGCAG", False, "x", "1", UNKNOWN),
        ("GAGGTG", True, "", "", UNKNOWN),
        ("AGGTGCAG", True, "9", "2", 2),
        ("GAG...GTG", True, "", "", 0),  # IMGT's gaps
        (".AG...GTG", True, "9", "2", 2),
        ("NNNNGG...GTG", True, "", "", 6),  # what is not known is padded, here in the second codon
        ("......GTG", True, "9", "7", 0),
        ("AGGTG...CAG", True, "", "2", 2),  # gaps, and what is not known is not padded
    ],
)
def test_the_first_codon_by_the_alignment(read, aligned, sequence_start, germline_start, codon):
    assert first_codons([read], [aligned], [sequence_start], [germline_start]) == [codon]


def test_the_alignment_says_where_the_domain_is():
    """Two domains in a read, and a primer that an open frame would take for residues."""
    longer = coded("MEFGLSWVFLVALLRGVQC" + HEAVY)
    both = NT_LIGHT + "TAA" + NT_HEAVY + "TAA" + longer[:-9] + coded("AAA")
    primer = coded("KKR") + NT_HEAVY[6:]
    codons = [len(NT_LIGHT) + 3, 9]
    assert v_domains([both, primer], ["heavy"] * 2, codons) == [(HEAVY, ""), (HEAVY[2:], "")]
    without = [domain for domain, _ in v_domains([both, primer], ["heavy"] * 2)]
    assert without[0] != HEAVY and without[1] == "KR" + HEAVY[2:]
    # what is before the alignment is not of the V gene, also where it resembles one
    late = [coded(HEAVY[:2] + "KKKK") + NT_HEAVY[18:]]
    assert v_domains(late, ["heavy"])[0][0].endswith(HEAVY[6:])
    assert v_domains(late, ["heavy"], [18]) == [("", "truncated_start")]
    # a wrong place is no reason to lose a read
    assert v_domains([NT_HEAVY, NT_LIGHT], ["", ""], [1, 9999]) == [(HEAVY, ""), (LIGHT, "")]


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


@pytest.mark.parametrize(
    ("start", "germline"),
    [("v_sequence_start", "v_germline_start"), ("V_SEQ_START", "V_GERM_START_VDJ")],
)
def test_the_alignment_of_a_table_tells_the_frame(tmp_path, start, germline):
    primer = coded("KKR")
    short = NT_HEAVY[:40] + "S" * 60
    rows = [
        ("sequence_id", "v_call", "sequence", "sequence_alignment", start, germline),
        ("1", "IGHV3-23*01", primer + NT_HEAVY[6:], "", "10", "7"),
        ("2", "IGHV3-23*01", UTR + NT_HEAVY, NT_HEAVY[4:], "50", "5"),
        ("3", "IGKV1-39*01", UTR + NT_LIGHT, NT_LIGHT, "", ""),
        ("4", "", NT_HEAVY[:25], "", "", ""),  # no hit, and too short to be told from a protein
        ("5", "", short, "", "NA", "NA"),
        ("6", "", "", "", "", ""),
        ("7", "IGHV3-23*01", "", NT_HEAVY[:150] + "-" + NT_HEAVY[151:], "1", "1"),
        ("8", "IGHV3-23*01", "", NT_HEAVY[:150] + "TAG" + NT_HEAVY[153:], "1", "1"),
    ]
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    found, report = read(tmp_path / "a.tsv")
    assert found == [(HEAVY[2:], ""), (HEAVY[2:], ""), ("", LIGHT)]
    assert report.rejected == {
        "nucleotides: no open reading frame is a V domain": 2,
        "nucleotides: stop codon or unknown nucleotide in the V domain": 1,
        "no sequence": 1,
        "nucleotides: frameshift": 1,
    }
    assert report.first["nucleotides: frameshift"] == "row 7 (line 8)"


@pytest.mark.parametrize("column", ["sequence", "sequence_alignment"])
def test_the_nucleotides_of_oas_give_its_proteins(tmp_path, shared_data, column):
    """500 real reads, aligned by IgBLAST, with leaders and constant regions around the domain."""
    names = ("sequence_id", "v_call", column, "v_sequence_start", "v_germline_start")
    proteins, lines = {}, [names]
    with gzip.open(shared_data / "oas" / "1279068_1.csv.gz", "rt") as f:
        for row in islice(csv.DictReader(f), 250):
            for chain in ("heavy", "light"):
                lines.append(tuple(row[f"{name}_{chain}"] for name in names))
                protein = row[f"sequence_alignment_aa_{chain}"].replace("-", "").replace(".", "")
                proteins[row[f"sequence_id_{chain}"]] = protein
    (tmp_path / "a.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    (source,) = open_sources([str(tmp_path / "a.tsv")])
    rows = [row for batch in source.batches() for row in batch.to_pylist()]
    assert len(rows) == source.report.read - source.report.rejected.total() >= 0.99 * 500
    equal = 0
    for row in rows:
        found = row["sequence_aa_heavy"] or row["sequence_aa_light"]
        protein = proteins[row["sequence_id"]]
        # the end may differ: an alignment ends where the J gene's does, a domain where FR4 does
        assert found[:-5] == protein[: len(found) - 5]
        equal += found == protein
    assert equal >= 0.9 * 500
