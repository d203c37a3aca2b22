"""AIRR tables of annotated antibodies: their columns, and what reads them again."""

import csv
from pathlib import Path

from test_annotate import ADALIMUMAB_VL, TRASTUZUMAB_VH, TRASTUZUMAB_VL, run

from moe_ablm.data.readers import open_sources

# AIRR schema 1.4, Rearrangement: what every table must have
REQUIRED = (
    *("sequence_id", "sequence", "rev_comp", "productive", "v_call", "d_call", "j_call"),
    *("sequence_alignment", "germline_alignment", "junction", "junction_aa"),
    *("v_cigar", "d_cigar", "j_cigar"),
)


def written(tmp_path: Path, text: str, *flags: str) -> list[dict[str, str]]:
    (tmp_path / "a.csv").write_text(text)
    assert run("--input", tmp_path / "a.csv", "--out", tmp_path / "out.tsv", *flags) == 0
    with (tmp_path / "out.tsv").open() as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def test_a_row_for_each_chain(tmp_path):
    text = f"id,heavy,light\na,{TRASTUZUMAB_VH},{TRASTUZUMAB_VL}\nb,,{ADALIMUMAB_VL}\n"
    heavy, light, alone = written(tmp_path, text, "--numbering", "imgt")
    assert set(REQUIRED) <= set(heavy)
    assert [row["sequence_id"] for row in (heavy, light, alone)] == ["a_H", "a_L", "b_L"]
    assert [row["cell_id"] for row in (heavy, light, alone)] == ["a", "a", "b"]
    assert [row["locus"] for row in (heavy, light, alone)] == ["IGH", "IGK", "IGK"]
    # IMGT/mAb-DB: adalimumab, trastuzumab
    assert alone["v_call"] == "IGKV1-27" and heavy["v_call"].startswith("IGHV3-")
    assert heavy["cdr1_aa"] == "GFNIKDTY" and heavy["cdr2_aa"] == "IYPTNGYT"
    assert heavy["junction_aa"] == "CSRWGGDGFYAMDYW" and heavy["fwr4_aa"] == "WGQGTLVTVSS"
    names = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")
    assert "".join(heavy[f"{name}_aa"] for name in names) == TRASTUZUMAB_VH
    assert heavy["sequence"] == "" and (heavy["productive"], heavy["rev_comp"]) == ("T", "F")
    assert heavy["numbers"].split()[9] == "11"
    assert "|" not in "".join(light.values())


def test_what_is_written_is_read_again(tmp_path):
    pairs = [(TRASTUZUMAB_VH, TRASTUZUMAB_VL), (TRASTUZUMAB_VH, ADALIMUMAB_VL)]
    pairs += [(TRASTUZUMAB_VH, "")]
    lines = [f"{heavy},{light},d{i % 2}\n" for i, (heavy, light) in enumerate(pairs)]
    text = "heavy,light,donor\n" + "".join(lines)
    rows = written(tmp_path, text)  # without ids: rows have numbers
    assert len({row["sequence_id"] for row in rows}) == 5
    (source,) = open_sources([str(tmp_path / "out.tsv")])
    found = [row for batch in source.batches() for row in batch.to_pylist()]
    assert source.format == "airr"
    assert {(r["sequence_aa_heavy"], r["sequence_aa_light"], r["donor"]) for r in found} == {
        (TRASTUZUMAB_VH, TRASTUZUMAB_VL, "d0"),
        (TRASTUZUMAB_VH, ADALIMUMAB_VL, "d1"),
        (TRASTUZUMAB_VH, "", "d0"),
    }
