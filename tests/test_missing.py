"""Words for "missing": no chain, no cell, no id, wherever they are written; never residues."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import HEAVY, LIGHT

from moe_ablm.data.readers import open_sources
from moe_ablm.data.readers.missing import WORDS, is_missing, word_inside
from moe_ablm.errors import UserError

SPELLED = ("ND", "NA", "na", "nan", "NaN", "None", "N/A", "-", "not determined", " nd ", "")


def read(path, on_bad_row="fail"):
    (source,) = open_sources([str(path)], on_bad_row=on_bad_row)
    rows = [row for batch in source.batches() for row in batch.to_pylist()]
    return [(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows], source.report


@pytest.mark.parametrize("word", SPELLED)
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "joined", "fasta"])
def test_a_word_is_no_chain(tmp_path, word, kind):
    path = tmp_path / f"a.{kind}"
    rows = [(HEAVY, word), (word, LIGHT), (word, word), (HEAVY, LIGHT)]
    if kind == "parquet":
        heavy, light = zip(*rows, strict=True)
        pq.write_table(pa.table({"heavy": heavy, "light": light}), path)
    elif kind == "fasta":
        records = [(i, *row) for i, row in enumerate(rows)]
        path.write_text("".join(f">{i}|H\n{h}\n>{i}|L\n{li}\n" for i, h, li in records))
    elif kind == "joined":
        path.write_text("sequence\n" + "".join(f"{h}|{li}\n" for h, li in rows))
    else:
        comma = "," if kind == "csv" else "\t"
        path.write_text("\n".join(comma.join(row) for row in [("heavy", "light"), *rows]) + "\n")
    found, report = read(path)
    if kind == "joined" and not word:  # what stands alone may be of either chain
        assert sorted(found) == sorted([(HEAVY, ""), (LIGHT, ""), (HEAVY, LIGHT)])
    else:
        assert sorted(found) == sorted([(HEAVY, ""), ("", LIGHT), (HEAVY, LIGHT)])
    assert report.rejected == {"no sequence": 4 if kind == "fasta" else 1}


@pytest.mark.parametrize("word", SPELLED)
def test_a_word_is_no_cell_and_no_id(tmp_path, word):
    lines = [("sequence_id", "locus", "v_call", "sequence_aa", "cell_id")]
    lines += [(word, "IGH", "", HEAVY, word), (word, "IGK", "", LIGHT, word)]
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(line) for line in lines) + "\n")
    found, report = read(tmp_path / "a.tsv")
    assert found == [(HEAVY, ""), ("", LIGHT)] and report.joined == 0
    assert report.notes["chain that names no cell: read alone"] == 2


def test_a_label_may_be_a_word(tmp_path):
    (tmp_path / "a.csv").write_text(f"heavy,light,label,donor\n{HEAVY},{LIGHT},None,NA\n")
    (source,) = open_sources([str(tmp_path / "a.csv")])
    (row,) = [row for batch in source.batches() for row in batch.to_pylist()]
    assert (row["label"], row["donor"]) == ("None", "")


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null"])
@pytest.mark.parametrize("kind", ["csv", "fasta"])
def test_a_word_inside_a_sequence_is_refused_with_its_row(tmp_path, word, kind):
    wrong = HEAVY[:9] + word + HEAVY[9:]
    text = {
        "csv": f"heavy,light\n{HEAVY},{LIGHT}\n{wrong},{LIGHT}\n",
        "fasta": f">a|H\n{HEAVY}\n>b|H\n{wrong}\n",
    }[kind]
    (tmp_path / "a").write_text(text)
    with pytest.raises(UserError, match=r"row 2 \(line 3\).*missing value at residue 10"):
        read(tmp_path / "a")
    found, report = read(tmp_path / "a", "skip")
    assert len(found) == 1 and report.rejected == {"nan inside sequence_aa_heavy": 1}


def test_what_is_a_word():
    assert all(is_missing(word.upper()) for word in WORDS)
    assert not any(map(is_missing, ("N", "DNA", "nand", "0", HEAVY)))
    # a sequence in lower case may hold N, A, N
    assert word_inside("evqlnanesg") is None and word_inside("EVQLnanESG") == 4
    assert word_inside("EVQLNANESG") is None
