"""The report of an intake says of every row what became of it."""

import json

import pytest
from public_headers import H, L

from moe_ablm.page import lines_html, table_html, text_html

TABLE = f"id,heavy,light\na,{H},{L}\nb,{H[:50]}*,{L}\nc,ND,{L}\nd,,\ne,{H[30:]},{L}\n"


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "p.csv").write_text(TABLE)
    return tmp_path / "p.csv"


@pytest.mark.parametrize("verb", ["annotate", "prepare"])
def test_rows_by_source_and_reason(tmp_path, pairs, main, verb):
    other = tmp_path / "q.fasta"
    other.write_text(f">x|H\n{H}\n>x|L\n{L}\n")
    options = ["--input", pairs, "--input", other, "--on-bad-row", "skip", "--workers", "1"]
    report = tmp_path / "new" / "intake.json"
    out = tmp_path / ("a.parquet" if verb == "annotate" else "dataset")
    done = main(verb, *options, "--out", out, "--report", report)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(report.read_text())["sources"]
    assert (first["format"], first["read"], first["kept"], first["joined"]) == ("table", 5, 2, 0)
    assert (second["format"], second["read"], second["kept"], second["joined"]) == (
        "fasta",
        2,
        1,
        1,
    )
    reasons = {row["reason"]: row for row in first["rejected"]}
    assert {reason: row["rows"] for reason, row in reasons.items()} == {
        "letter * in sequence_aa_heavy": 1,
        "no sequence": 1,
        "annotation: heavy: truncated_start": 1,
    }
    star = reasons["letter * in sequence_aa_heavy"]
    assert star["first"] == "row 2 (line 3)" and "'*' at residue 51" in star["example"]
    notes = {row["reason"]: row["first"] for row in first["notes"]}
    assert notes["sequence_aa_heavy: a word for missing read as none"] == "row 3 (line 4)"


def test_a_page_and_names_that_are_refused(tmp_path, pairs, main):
    options = ["--input", pairs, "--on-bad-row", "skip", "--workers", "1"]
    report = tmp_path / "intake.html"
    assert (
        main("annotate", *options, "--out", tmp_path / "a.parquet", "--report", report).returncode
        == 0
    )
    page = report.read_text()
    assert "rejected: annotation: heavy: truncated_start" in page and "row 2 (line 3)" in page
    for path, told in ((report, "exists already"), (tmp_path / "r.txt", "ends in .html or .json")):
        done = main("annotate", *options, "--out", tmp_path / "b.parquet", "--report", path)
        assert done.returncode == 2 and told in done.stderr
        assert not (tmp_path / "b.parquet").exists()


def test_backticks_become_code_and_nothing_else_html():
    assert text_html("a `x<y` & `b") == "a <code>x&lt;y</code> &amp; `b"
    assert "<td>column <code>cluster</code></td>" in table_html(["h"], [["column `cluster`"]])
    assert lines_html(["`a`"]) == "<ul><li><code>a</code></li></ul>"
