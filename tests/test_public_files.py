"""The files of public tools that docs/data.md lists: what it says of each of them is what happens.

Each file has columns that are not used, filled with what would do harm, and a row for each reason
to leave one out. Right are the chains that were put in.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from public_headers import CUTS, REGIONS, H, L, coded
from test_annotate import ADALIMUMAB_VH as H2
from test_annotate import ADALIMUMAB_VL as L2

from moe_ablm.data.readers import Reading, open_sources, parse_columns
from moe_ablm.errors import UserError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "data.md"
NT = "ACGT" * 90  # of a column that is not used
WRONG = "IGHV9-99*99"


class File(NamedTuple):
    """A file, the beginning of its row in the table of docs/data.md, and what is in it."""

    tool: str
    name: str
    text: str
    pairs: list[tuple[str, str]]
    rejected: dict[str, int] = {}
    donors: tuple[str, ...] = ("",)
    notes: tuple[str, ...] = ()
    columns: str | None = None


def lines(header: str, *rows: str, comma: str = "\t", before: str = "") -> str:
    """A table of words apart by spaces; `.` is a blank."""
    table = [["" if cell == "." else cell for cell in row.split()] for row in (header, *rows)]
    assert len({len(row) for row in table}) == 1
    return before + "".join(comma.join(row) + "\n" for row in table)


def parts(chain: str) -> list[str]:
    """The seven regions of a chain."""
    return [chain[a:b] for a, b in zip(CUTS[chain][:-1], CUTS[chain][1:], strict=True)]


TEN_X = (
    "barcode is_cell contig_id high_confidence length chain v_gene d_gene j_gene c_gene "
    "full_length productive "
    + " ".join(f"{r} {r}_nt" for r in REGIONS)
    + " reads umis raw_clonotype_id "
    "raw_consensus_id exact_subclonotype_id donor origin sample"
)


def contig(cell: str, chain: str, sequence: str, **more: str) -> str:
    """A row of `filtered_contig_annotations.csv`."""
    regions = dict(zip(REGIONS, parts(sequence), strict=True))
    row = dict.fromkeys(TEN_X.split(), ".") | regions | {f"{r}_nt": NT for r in REGIONS}
    row |= {"barcode": cell, "contig_id": f"{cell}_contig_1", "chain": chain, "umis": "7"}
    row |= dict.fromkeys(("is_cell", "high_confidence", "full_length", "productive"), "true")
    row |= {"raw_clonotype_id": "c1", "d_gene": WRONG, "j_gene": WRONG, "length": "500"}
    row |= {"donor": "D1", "origin": "PBMC", "sample": "s1", "reads": "90"}
    return " ".join((row | more).values())


CONTIGS = [
    contig("A-1", "IGH", H),
    contig("A-1", "None", L, v_gene="IGKV1-39"),
    contig("A-1", "None", L, c_gene="IGKC", umis="6", fwr4="GQGTKVEIR"),
    contig("A-2", "IGH", H, cdr1="."),
    contig("A-3", "IGH", H, is_cell="false"),
    contig("A-4", "IGH", H, high_confidence="False"),
    contig("A-5", "IGH", H, full_length="false"),
    contig("A-6", "IGH", H, productive="None"),
    contig("A-7", "TRB", H),
]
COUNTED_10X = {
    "region missing: cdr1": 1,
    "not a cell": 1,
    "low confidence": 1,
    "not full length": 1,
    "not productive": 1,
    "T-cell receptor": 1,
    "further light chain of a cell": 1,
}


def as_json(row: str) -> dict:
    """A contig of `all_contig_annotations.json`."""
    of = dict(zip(TEN_X.split(), (v if v != "." else None for v in row.split()), strict=True))
    flags = ("is_cell", "high_confidence", "full_length", "productive")
    found: dict = {name: {"true": True, "None": None}.get(of[name], False) for name in flags}
    found |= {"barcode": of["barcode"], "contig_name": of["contig_id"], "sequence": NT}
    found |= {r: of[r] and {"aa_seq": of[r], "nt_seq": NT} for r in REGIONS}
    found |= {"umi_count": int(of["umis"]), "read_count": int(of["reads"]), "clonotype": "c1"}
    genes = {"L-REGION+V-REGION": of["v_gene"], "C-REGION": of["c_gene"]}
    features = [
        {"feature": {"region_type": kind, "gene_name": gene, "chain": of["chain"]}}
        for kind, gene in genes.items()
    ]
    return found | {"annotations": features}


AIRR = "sequence_id sequence productive locus v_call j_call c_call sequence_alignment"
CHANGE_O = "SEQUENCE_ID SEQUENCE_INPUT FUNCTIONAL V_CALL SEQUENCE_VDJ SEQUENCE_IMGT CELL"
OAS = '"{""Species"": ""human"", ""Author"": ""Doe"", ""Subject"": ""S1""}"\n'
STOP = coded(H)[:150] + "TAA" + coded(H)[153:]
SHIFT = coded(H)[:150] + coded(H)[151:]
GAPPED = coded(H)[:75] + "............" + coded(H)[75:]
RHAPSODY = "#####\n## BD Rhapsody\n##\n"
BD_CELLS = "BCR_Heavy_VDJ_Translation_Trimmed_Dominant BCR_Light_VDJ_Translation_Trimmed_Dominant"

FILES = [
    File(
        *("Cell Ranger 5", "filtered_contig_annotations.csv"),
        lines(TEN_X, *CONTIGS, comma=","),
        *([(H, L)], COUNTED_10X, ("D1",)),
    ),
    File(
        *("Cell Ranger 5", "all_contig_annotations.json"),
        json.dumps([as_json(row) for row in CONTIGS]),
        *([(H, L)], COUNTED_10X),
    ),
    File(
        *("Cell Ranger: `airr", "airr_rearrangement.tsv"),
        lines(
            "cell_id sequence_id sequence sequence_aa productive v_call c_call sequence_alignment "
            "consensus_count duplicate_count is_cell",
            f"A-1 1 {NT} {H} T IGHV3-23 IGHM {NT} 90 7 T",
            f"A-1 2 {NT} {L} T IGKV1-39 IGKC {NT} 80 2 T",
            f"A-1 3 {NT} {L2} T IGKV1-27 IGKC {NT} 10 5 T",
            f"A-2 4 {NT} {H2} F IGHV3-9 IGHM {NT} 90 7 T",
            f"A-3 5 {NT} {H2} T IGHV3-9 IGHM {NT} 90 7 F",
            f"A-3 6 {NT} {H2} T TRBV2 TRBC1 {NT} 90 7 T",
        ),
        [(H, L2)],
        {
            "not productive": 1,
            "not a cell": 1,
            "T-cell receptor": 1,
            "further light chain of a cell": 1,
        },
    ),
    File(
        *("IgBLAST", "igblast.tsv"),
        lines(
            f"{AIRR} sequence_alignment_aa sequence_aa",
            f"1 {NT} T IGH {WRONG} {WRONG} . {NT} {H} M{H}",
            f"2 {NT} T . IGKV1-39*01 {WRONG} . {NT} . M{L}",
            f"3 {NT} T . . . IGKC {NT} {L2} .",
            f"4 {NT} T . . . . {NT} {H2} .",
            f"5 {NT} . . . . . . . .",
            f"6 {NT} F IGH {WRONG} . . {NT} {H[:50]}*{H[51:]} .",
        ),
        [(H, ""), ("", f"M{L}"), ("", L2), (H2, "")],
        {"no sequence": 1, "not productive": 1},
    ),
    File(
        *("MiXCR", "mixcr_airr.tsv"),
        lines(
            f"{AIRR} v_sequence_start v_germline_start umi_count",
            f"1 {NT} T . IGHV3-23*00(1251.2) {WRONG} . {coded(H)} 1 1 5",
            f"2 KKK{coded(L)} T . IGKV1-39*00(903) {WRONG} . . 4 1 5".replace("KKK", "AAA"),
            f"3 {NT} T IGH . . . {SHIFT} 1 1 5",
            f"4 {NT} T IGH . . . {STOP} 1 1 5",
        ),
        [(H, ""), ("", L)],
        {
            "nucleotides: frameshift": 1,
            "nucleotides: stop codon or unknown nucleotide in the V domain": 1,
        },
    ),
    File(
        *("IMGT/HighV-QUEST", "vquest_airr.tsv"),
        lines(
            f"{AIRR} sequence_alignment_aa v_score",
            f"1 {NT} T . IGHV3-23*01_F {WRONG} . {GAPPED} {H[:25]}....{H[25:]} 1251",
            f"2 {NT} F . IGHV3-23*01_F {WRONG} . {GAPPED} {H} 1251",
        ).replace("IGHV3-23*01_F", "Homsap IGHV3-23*01 F"),
        [(H, "")],
        {"not productive": 1},
    ),
    File(
        *("TRUST4", "sample_barcode_airr.tsv"),
        lines(
            f"{AIRR} cdr3 cell_id complete_vdj consensus_count",
            f"1 {NT} T . IGHV3-23*01 {WRONG} IGHM {GAPPED} {NT[:30]} A-1 1 9",
            f"2 {NT} T . IGKV1-39*01 {WRONG} IGKC {coded(L)} {NT[:30]} A-1 1 9",
            f"3 {NT} F . IGHV3-9*01 {WRONG} IGHM {coded(H2)} {NT[:30]} A-2 1 9",
            f"4 {NT} T . IGHV3-9*01 {WRONG} IGHM . {NT[:30]} A-3 0 9",
        ),
        [(H, L)],
        {"not productive": 1, "nucleotides: no open reading frame is a V domain": 1},
    ),
    File(
        *("Immcantation", "db-pass.tab"),
        lines(
            f"{CHANGE_O} UMICOUNT CONSCOUNT V_GERM_START_IMGT",
            f"1 {NT} T IGHV3-23*01 {NT} {GAPPED} A 7 90 1",
            f"2 {NT} T IGKV1-39*01 {coded(L)} . A 2 90 1",
            f"3 {coded(L2)} T IGKV1-27*01 . . A 5 10 1",
            f"4 {NT} F IGHV3-9*01 {NT} {coded(H2)} B 1 1 1",
            f"5 {NT} T IGHV3-9*01 {NT} {SHIFT} C 1 1 1",
            f"6 {NT} T IGHV3-9*01 {NT} {STOP} D 1 1 1",
        ),
        [(H, L2)],
        {
            "not productive": 1,
            "nucleotides: frameshift": 1,
            "nucleotides: stop codon or unknown nucleotide in the V domain": 1,
            "further light chain of a cell": 1,
        },
    ),
    File(
        *("BD Rhapsody", "VDJ_Dominant_Contigs_AIRR.tsv"),
        lines(
            "cell_id locus v_call sequence_alignment_aa sequence productive umi_count "
            "high_confidence",
            f"7 IGH {WRONG} {H} {NT} T 7 true",
            f"7 IGK {WRONG} {L} {NT} T 7 true",
            f"8 IGH {WRONG} {H2} {NT} T 7 false",
            before=RHAPSODY,
        ),
        [(H, L)],
        {"low confidence": 1},
    ),
    File(
        *("BD Rhapsody", "VDJ_perCell.csv"),
        lines(
            f"Cell_Index {BD_CELLS} BCR_Heavy_CDR3_Nucleotide_Dominant",
            *(f"7 {H} {L} {NT}", f"8 {H2} . {NT}", f"9 . . {NT}"),
            **{"comma": ",", "before": RHAPSODY},
        ),
        *([(H, L), (H2, "")], {"no sequence": 1}),
    ),
    File(
        *("OAS", "oas_paired.csv"),
        lines(
            "sequence_heavy v_call_heavy productive_heavy sequence_alignment_aa_heavy "
            "productive_light sequence_alignment_aa_light ANARCI_numbering_light",
            *(f"{NT} {WRONG} T {H[:9]}-{H[9:]} T {L} .", f"{NT} {WRONG} T {H2} F {L2} ."),
            **{"comma": ",", "before": OAS},
        ),
        *([(H, L)], {"not productive (light chain)": 1}, ("Doe: S1",)),
    ),
    File(
        *("OAS", "oas_unpaired.csv"),
        lines(
            "sequence locus v_call productive sequence_alignment_aa Redundancy",
            *(f"{NT} H {WRONG} T {H} 3", f"{NT} K {WRONG} T {L} 3", f"{NT} H {WRONG} F {H2} 3"),
            **{"comma": ",", "before": OAS},
        ),
        *([(H, ""), ("", L)], {"not productive": 1}, ("Doe: S1",)),
    ),
    File(
        *("CoV-AbDab", "CoV-AbDab.csv"),
        lines(
            "Name Ab_or_Nb VHorVHH VL CDRH3 Heavy_V_Gene",
            *(f"a Ab {H} {L} {H2} {WRONG}", f"b Nb {H2} ND {H2} ND", f"c Ab ND nd {H2} ND"),
            comma=",",
        ),
        *([(H, L), (H2, "")], {"no sequence": 1}),
    ),
    File(
        *("CoV-AbDab", "TheraSAbDab.csv"),
        lines(
            "Therapeutic Format HeavySequence LightSequence HeavySequence(ifbispec) "
            "LightSequence(ifbispec)",
            *(f"a mAb {H} {L} na na", f"b bispec {H2} {L2} {H} {L}", "c mAb na na na na"),
            comma=",",
        ),
        [(H, L), (H2, L2)],
        {"no sequence": 1},
        notes=("bispecific: the other arm (HeavySequence(ifbispec)) is not read",),
    ),
    File(
        *("FLAb", "flab.csv"),
        lines("heavy light fitness", f"{H} {L} 1.5", f"{H2} {L2} .", comma=","),
        [(H, L), (H2, L2)],
    ),
    File(
        *("FLAb", "classes.csv"),
        lines("name h_sequence l_sequence label note", f"a {H} {L} none {H2}", comma=","),
        [(H, L)],
    ),
    File(
        *("FLAb", "nanobodies.csv"),
        lines("VHH_sequence fitness", f"{H} 2", comma=","),
        [(H, "")],
    ),
    *(
        File("other tables", "t.csv", lines(f"{names} x", f"{H} {L} {H2}", comma=","), [(H, L)])
        for names in ("VH VL", "vh_sequence VL-sequence", "Heavy_Chain light_chain")
    ),
    File(
        *("MiXCR's own", "clones.tsv"),
        lines(
            "cloneId readCount uniqueMoleculeCount allVHitsWithScore aaSeqVDJRegion tagValueCELL",
            f"0 90 7 IGHV3-23*00(1251.2) {H} A",
            f"1 90 7 IGKV1-39*00(903) {L} A",
        ),
        [(H, L)],
        columns="sequence=aaSeqVDJRegion,locus=allVHitsWithScore,cell=tagValueCELL,id=cloneId,"
        "umis=uniqueMoleculeCount,reads=readCount",
    ),
]


@pytest.mark.parametrize("file", FILES, ids=[f"{file.tool}-{file.name}" for file in FILES])
def test_what_the_table_says_of_a_file(tmp_path, file):
    path = tmp_path / file.name
    path.write_text(file.text)
    if file.columns:
        with pytest.raises(UserError, match=r"name the chains with --columns"):
            open_sources([str(path)])
    (source,) = open_sources([str(path)], reading=Reading(columns=parse_columns(file.columns)))
    rows = [row for batch in source.batches() for row in batch.to_pylist()]
    report = source.report
    assert report.rejected == file.rejected
    found = [(row["sequence_aa_heavy"], row["sequence_aa_light"]) for row in rows]
    assert sorted(found) == sorted(file.pairs)
    assert {row.get("donor") or "" for row in rows} == set(file.donors)
    assert set(file.notes) <= set(report.notes)


def rows_of_the_docs() -> list[str]:
    """The first cells of the table."""
    text = DOCS.read_text().split("### Files of public tools")[1].split("\n#")[0]
    return [line.split(" | ")[0].strip("| ") for line in text.split("\n") if line.startswith("| ")][
        1:
    ]


# rows that other tests are of: two files at once, what annotate wrote, what is no table
ELSEWHERE = {
    "Cell Ranger before 5": ("test_repertoire.py", "before_5"),
    "`annotate`": ("test_rearrangements.py", "what_is_written_is_read_again"),
    "AnnData": ("test_readers.py", "files_of_other_programs_say_what_to_do"),
}


def test_every_row_of_the_table_has_a_file():
    rows = rows_of_the_docs()
    known = [*(file.tool for file in FILES), *ELSEWHERE]
    assert len(rows) > 10
    for row in rows:
        assert any(row.startswith(name) for name in known), row
    for name in known:
        assert any(row.startswith(name) for row in rows), name
    for name, test in ELSEWHERE.values():
        assert re.search(rf"def test_\w*{test}", (Path(__file__).parent / name).read_text())
