"""Repertoire tables as public tools write them, each row delivered or counted under a true reason.

Small copies of exports that lost rows: 10x aggr and contigs, IgBLAST, IMGT/V-QUEST, BD Rhapsody.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from public_headers import coded
from test_annotate import ADALIMUMAB_VH as H2
from test_annotate import ADALIMUMAB_VL as L2
from test_annotate import TRASTUZUMAB_VH as H1
from test_annotate import TRASTUZUMAB_VL as L1

from moe_ablm.data.readers import Reading, open_sources, parse_columns
from moe_ablm.data.readers.repertoire import T_CELL, chain_of
from moe_ablm.errors import UserError

TEN_X = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")


def read(path, on_bad_row="fail", **options):
    (source,) = open_sources([str(path)], on_bad_row=on_bad_row, reading=Reading(**options))
    rows = [row for batch in source.batches() for row in batch.to_pylist()]
    return rows, source.report


def pairs(rows) -> set[tuple[str, str]]:
    return {(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows}


def table(path, header, *rows, comma="\t", before=""):
    text = "\n".join(comma.join(map(str, row)) for row in (header, *rows))
    path.write_text(before + text + "\n")
    return path


AIRR = (
    "sequence_id",
    "locus",
    "productive",
    "v_call",
    "c_call",
    "sequence_alignment_aa",
    "cell_id",
)


@pytest.mark.parametrize(
    ("texts", "chain"),
    [
        (("IGH", ""), "heavy"),
        (("", "Homsap IGKV1-39*01 F, or Homsap IGKV1D-39*01 F"), "light"),
        (("", "IGHV3-23*00(1251.2)"), "heavy"),
        (("", "IGLV2-14*01,IGLV2-23*01"), "light"),
        (("Multi", "", "IGHG1"), "heavy"),
        (("", "", "IGKC"), "light"),
        (("", "", "IgA1"), "heavy"),
        (("k",), "light"),
        (("Lambda",), "light"),
        (("VH",), "heavy"),
        (("TRB", "IGHV1"), T_CELL),
        (("", "TRAV12-2*01"), T_CELL),
        (("", "", ""), ""),
        (("liver",), ""),
        ((), ""),
    ],
)
def test_the_chain_that_calls_name(texts, chain):
    assert chain_of(texts) == chain


def test_an_empty_locus_falls_back_to_calls_and_to_annotation(tmp_path):
    path = table(
        tmp_path / "a.tsv",
        AIRR,
        ("1", "", "T", "IGHV3-23*01", "", H1, "a"),
        ("2", "", "T", "", "IGKC", L1, "a"),
        ("3", "", "T", "", "", H2, "b"),
        ("4", "", "T", "", "", L2, "b"),
        ("5", "", "T", "", "", H2[:60], "b"),
        ("6", "", "T", "", "", H2, ""),
    )
    rows, report = read(path)
    assert pairs(rows) == {(H1, L1), (H2, L2), (H2, "")}
    assert report.read == 6 and report.joined == 2
    assert report.rejected == {"neither heavy nor light chain": 1}


def test_calls_of_imgt_name_the_chain(tmp_path):
    header = ("sequence_id", "productive", "v_call", "sequence_alignment_aa", "cell_id")
    path = table(
        tmp_path / "a.tsv",
        header,
        ("1", "T", "Homsap IGHV3-23*01 F", H1, "a"),
        ("2", "T", "Homsap IGKV1-39*01 F, or Homsap IGKV1D-39*01 F", L1, "a"),
    )
    assert pairs(read(path)[0]) == {(H1, L1)}


def test_rows_without_a_hit_are_counted_and_no_error(tmp_path):
    path = table(
        tmp_path / "a.tsv",
        ("sequence_id", "sequence", "locus", "productive", "v_call", "sequence_alignment_aa"),
        ("1", "GAGG", "IGH", "T", "IGHV3-23*01", H1),
        ("2", "ACGT", "", "", "", ""),
        ("3", "CAGG", "IGH", "T", "IGHV1-69*01", H2),
    )
    rows, report = read(path)
    assert pairs(rows) == {(H1, ""), (H2, "")}
    assert report.rejected == {"no sequence": 1} and report.first["no sequence"] == "row 2 (line 3)"


FLAGS = {
    "productive": "not productive",
    "is_cell": "not a cell",
    "high_confidence": "low confidence",
    "full_length": "not full length",
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("yes", "no"), [("T", "F"), ("true", "false"), ("True", "False"), ("1", "0"), (True, False)]
)
def test_flagged_rows_are_rejects_unless_they_are_asked_for(tmp_path, flag, yes, no):
    columns = {"sequence_id": ["1", "2", "3"], "v_call": ["IGHV1", "IGKV1", "IGHV1"]}
    columns |= {"sequence_aa": [H1, L1, H2], "cell_id": ["a", "a", "b"], flag: [yes, None, no]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    rows, report = read(path)
    assert pairs(rows) == {(H1, L1)} and report.rejected == {FLAGS[flag]: 1}
    rows, report = read(path, keep_flagged=True)
    assert pairs(rows) == {(H1, L1), (H2, "")} and not report.rejected


def contig(barcode, number, chain, sequence, cuts, *more, lack=()):
    """A row of Cell Ranger's contig annotations; `cuts` end its regions."""
    ends = [0, *cuts, len(sequence)]
    parts = [sequence[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    parts = ["" if name in lack else p for name, p in zip(TEN_X, parts, strict=True)]
    return (barcode, f"{barcode}_contig_{number}", chain, *parts, *more)


CUTS_H, CUTS_L = (25, 33, 50, 58, 96, 109), (26, 32, 49, 52, 88, 97)


def test_10x_takes_donors_and_samples_apart(tmp_path):
    header = ("barcode", "contig_id", "chain", *TEN_X, "umis", "donor", "origin", "sample")
    path = table(
        tmp_path / "a.csv",
        header,
        contig("AAA-1", 1, "IGH", H1, CUTS_H, 10, "D1", "PBMC", "s1"),
        contig("AAA-1", 2, "IGK", L1, CUTS_L, 10, "D1", "PBMC", "s1"),
        contig("AAA-1", 1, "IGH", H2, CUTS_H, 10, "", "PBMC", "s2"),  # the barcode again
        comma=",",
    )
    rows, _ = read(path)
    assert {(*p, r["donor"]) for p, r in ((next(iter(pairs([r]))), r) for r in rows)} == {
        (H1, L1, "D1"),
        (H2, "", "s2"),
    }


@pytest.mark.parametrize("lack", [("fwr1",), ("cdr1",), ("fwr4",), TEN_X[:5] + TEN_X[6:]])
def test_10x_contigs_that_lack_a_region_are_rejects(tmp_path, lack):
    path = table(
        tmp_path / "a.csv",
        ("barcode", "contig_id", "chain", *TEN_X),
        contig("A-1", 1, "IGH", H1, CUTS_H, lack=lack),
        contig("A-1", 2, "IGK", L1, CUTS_L),
        contig("A-2", 1, "IGH", H1, CUTS_H, lack=TEN_X),
        comma=",",
    )
    rows, report = read(path)
    assert pairs(rows) == {("", L1)}
    assert report.rejected == {f"region missing: {', '.join(lack)}": 1, "no sequence": 1}


def test_cell_ranger_before_5_needs_the_fasta_of_its_contigs(tmp_path):
    path = table(
        tmp_path / "a.csv",
        ("barcode", "contig_id", "chain", "v_gene", "cdr3", "cdr3_nt", "reads", "umis"),
        ("A-1", "A-1_contig_1", "IGH", "IGHV3-23", "CSRWF", "", 100, 5),
        ("A-1", "A-1_contig_2", "None", "IGKV1-39", "CQQF", "", 100, 5),
        ("A-2", "A-2_contig_1", "IGH", "IGHV3-23", "CSRWF", "", 100, 5),
        comma=",",
    )
    fasta = f">A-1_contig_1\nCATGG{coded(H1)}\n>A-1_contig_2\n{coded(L1)}\n"
    (tmp_path / "filtered_contig.fasta").write_text(fasta)
    with pytest.raises(UserError, match="Cell Ranger before 5.*--contigs filtered_contig.fasta"):
        read(path)
    rows, report = read(path, contigs=tmp_path / "filtered_contig.fasta")
    assert pairs(rows) == {(H1, L1)} and report.rejected == {"no sequence": 1}
    with pytest.raises(UserError, match="--contigs .*no such file"):
        read(path, contigs=tmp_path / "none.fasta")


def test_comments_above_the_header_of_bd_rhapsody(tmp_path):
    comments = "####################\n## BD Targeted Multiplex Rhapsody Analysis Pipeline\n##\n"
    header = ("cell_id", "locus", "v_call", "sequence_alignment_aa", "consensus_count", "umi_count")
    rows = (
        header,
        ("7", "IGH", "IGHV3-23*01", H1, 90, ""),
        ("7", "IGK", "IGKV1-39*01", L1, 80, ""),
    )
    path = table(tmp_path / "a.tsv", *rows, before=comments)
    rows, report = read(path)
    assert pairs(rows) == {(H1, L1)} and report.first == {} and rows[0]["_line"] == 5
    names = "BCR_{}_VDJ_Translation_Trimmed_Dominant"
    header = ("Cell_Index", names.format("Heavy"), names.format("Light"))
    path = table(tmp_path / "b.csv", header, ("7", H1, L1), comma=",", before=comments)
    rows, _ = read(path)
    assert pairs(rows) == {(H1, L1)} and rows[0]["sequence_id"] == "7"


def test_a_count_that_is_blank_falls_through_row_by_row(tmp_path):
    header = ("locus", "v_call", "sequence_aa", "cell_id", "umi_count", "duplicate_count")
    path = table(
        tmp_path / "a.tsv",
        header,
        ("IGH", "", H1, "a", "7", "NA"),
        ("IGK", "", L1, "a", "", "3"),
        ("IGK", "", L2, "a", "5", ""),
    )
    rows, report = read(path)
    assert pairs(rows) == {(H1, L2)}
    assert report.notes == {"cell with several light chains: the most abundant taken": 1}


def test_any_table_is_read_with_columns(tmp_path):
    path = table(
        tmp_path / "a.csv",
        ("read", "who", "protein", "droplet", "gene", "n"),
        ("r1", "me", H1, "x", "IGHV1", "5"),
        ("r2", "me", L1, "x", "IGKV1", "5"),
        ("r3", "me", L2, "x", "IGKV1", "50"),
        comma=",",
    )
    given = "sequence=protein,cell=droplet,locus=gene,umis=n,donor=who,id=read"
    rows, report = read(path, columns=parse_columns(given))
    assert pairs(rows) == {(H1, L2)} and rows[0]["donor"] == "me" and report.joined == 1
    rows, _ = read(path, columns=parse_columns("sequence=protein,id=read"))
    assert [r["sequence_id"] for r in rows] == ["r1", "r2", "r3"] and rows[1]["_any_chain"]
    with pytest.raises(UserError, match="--columns cell=dropplet: no such column.*mean droplet"):
        read(path, columns=parse_columns("sequence=protein,cell=dropplet"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_column_that_is_read_and_stands_there_twice(tmp_path, ending):
    header = ("barcode", "contig_id", "chain", *TEN_X, "productive", "length", "length")
    row = contig("A-1", 1, "IGH", H1, CUTS_H, "true", "9", "9")
    for names in (header, (*header[:-1], "productive")):
        path = tmp_path / f"a.{ending}"
        if ending == "csv":
            table(path, names, row, comma=",")
        else:
            pq.write_table(pa.Table.from_arrays([pa.array([v]) for v in row], list(names)), path)
        if names == header:
            assert pairs(read(path)[0]) == {(H1, "")}
        else:
            with pytest.raises(UserError, match="column productive occurs 2 times"):
                read(path)
