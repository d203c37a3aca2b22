"""Readers: every format gives the study's columns, and every row is delivered or accounted for."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_ablm.data.readers import Reading, Report, open_sources, parse_columns
from moe_ablm.data.readers import stream as stream_module
from moe_ablm.data.readers.stream import line_blocks
from moe_ablm.errors import UserError

HEAVY = (
    "EVQLVESGGKLVQSGGSLRLSCAASGLIFDSYVMSWVRQAPGKGPEWVSAISGRGDRTYYADAVKGRFTISRDNSKNTLFLLLSNLRVEDTAVYYC"
    "ANNYYDNSGPDYWGQGTLVTVSS"
)
LIGHT = (
    "QSVLTQARSVSESPGKTVTISCTRSSGSIASNFVQWFQQRPGRAPTNVIYENYRRPSGVPDRFSGSIDTSSNSASLTISRLKSEDEADYYCQSNDG"
    "SPSWVFGGGTKLTVL"
)
PAIR = f"{HEAVY},{LIGHT}"
HEADER = "sequence_id,sequence_aa_heavy,sequence_aa_light\n"


def read(path, *, on_bad_row="fail", format=None, **options):
    """Rows and report of a single source, with the accounting checked."""
    reading = Reading(**options)
    (source,) = open_sources([str(path)], on_bad_row=on_bad_row, format=format, reading=reading)
    rows = [row for batch in source.batches() for row in batch.to_pylist()]
    report = source.report
    assert report.read == len(rows) + report.joined + sum(report.rejected.values())
    return rows, report


def written(tmp_path, name, content) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path, **options) -> str:
    with pytest.raises(UserError) as raised:
        read(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_table_of_chains(tmp_path, pack, end, delimiter):
    text = f"{HEADER}a,{HEAVY},{LIGHT}\nb,{HEAVY},{LIGHT[3:]}\n"
    text = "\ufeff" + text.replace(",", delimiter).replace("\n", end)
    rows, report = read(written(tmp_path, "t.csv", pack(text.encode())))
    assert [(r["sequence_id"], r["sequence_aa_light"]) for r in rows] == [
        ("a", LIGHT),
        ("b", LIGHT[3:]),
    ]
    assert [(r["_row"], r["_line"]) for r in rows] == [(1, 2), (2, 3)]
    assert report.read == 2


def test_names_of_published_sets_and_given_columns(tmp_path):
    for names in ("h_sequence,l_sequence", "heavy,light"):
        rows, _ = read(written(tmp_path, "t.csv", f"name,{names},label\nx,{HEAVY},{LIGHT},Flu\n"))
        assert rows[0]["sequence_aa_heavy"] == HEAVY and rows[0]["sequence_aa_light"] == LIGHT
        assert rows[0]["sequence_id"] == "x" and rows[0]["label"] == "Flu"
    path = written(tmp_path, "t.csv", f"mab,VH,VL,who\nx,{HEAVY},{LIGHT},me\n")
    columns = parse_columns("heavy=VH,light=VL,id=mab,donor=who")
    rows, _ = read(path, columns=columns)
    assert rows[0]["sequence_id"] == "x" and rows[0]["donor"] == "me"
    rows, _ = read(path, columns=parse_columns("light=VL"))
    assert rows[0]["sequence_aa_heavy"] == "" and rows[0]["sequence_aa_light"] == LIGHT


def test_parquet_equals_csv(tmp_path):
    table = {"sequence_id": ["a", "b"], "sequence_aa_heavy": [HEAVY, HEAVY[2:]]}
    table["sequence_aa_light"] = pa.array([LIGHT, None]).dictionary_encode()
    table["cluster"] = [7, 8]
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    rows, report = read(tmp_path / "t.parquet")
    csv = f"{HEADER[:-1]},cluster\na,{HEAVY},{LIGHT},7\nb,{HEAVY[2:]},,8\n"
    expected, _ = read(written(tmp_path, "t.csv", csv))
    assert [r | {"_line": 0} for r in expected] == rows
    assert rows[1]["sequence_aa_light"] == ""


def test_missing_columns_name_what_was_found_and_what_is_near(tmp_path):
    path = written(tmp_path, "t.csv", f"id,sequence_aa_hevy,sequence_aa_light\na,{HEAVY},{LIGHT}\n")
    message = error_of(path)
    assert "'sequence_aa_hevy'" in message and "nearest: sequence_aa_hevy" in message
    assert "--columns heavy=sequence_aa_hevy,light=sequence_aa_light" in message
    assert "'x', 'y'" in error_of(written(tmp_path, "t.csv", "x,y\n1,2\n"))
    assert "did you mean VH1" in error_of(
        written(tmp_path, "t.csv", "VH1,VL1\nA,A\n"), columns={"heavy": "VH2"}
    )
    assert "2 times" in error_of(written(tmp_path, "t.csv", "heavy,light,light\nA,A,A\n"))
    # no column of nucleotides or names is proposed for a chain
    text = f"clone,heavy_nt,light_nt,vh_protein\nx,{'ACGT' * 80},{'ACGT' * 80},{HEAVY}\n"
    message = error_of(written(tmp_path, "n.csv", text))
    assert "amino-acid chains stand in columns 'vh_protein'" in message
    assert "nearest" not in message and "--columns heavy=COLUMN,light=COLUMN" in message
    # neither the id nor one column twice is proposed for the chains
    message = error_of(written(tmp_path, "t.csv", "sequence_id,sequence_aa\na,A\n"))
    assert "--columns heavy=COLUMN,light=COLUMN" in message
    assert "sequence_id)" not in message
    for text in ("heavy", "heavy=", "hevy=a", "id=a", "heavy=a,cell=b", "heavy=a,sequence=b"):
        with pytest.raises(UserError, match="--columns"):
            parse_columns(text)


def test_a_named_format_needs_its_columns(tmp_path):
    table = written(tmp_path, "t.csv", f"{HEADER}a,{HEAVY},{LIGHT}\n")
    for name, column in {
        "oas-paired": "sequence_alignment_aa_heavy",
        "oas-unpaired": "sequence_aa",
        "airr": "sequence_aa",
        "10x": "barcode",
        "joined": "sequence",
    }.items():
        expected = f"no column {column}; found columns 'sequence_id', 'sequence_aa_heavy'"
        assert expected in error_of(table, format=name)
    for name in ("fasta", "protein"):
        assert "text before the first '>'" in error_of(table, format=name)
    fasta = written(tmp_path, "t.fasta", f">a\n{HEAVY}\n")
    assert "found columns '>a'" in error_of(fasta, format="table")


def test_missing_and_empty_files(tmp_path):
    written(tmp_path, "pairs.csv", HEADER)
    assert f"did you mean {tmp_path / 'pairs.csv'}" in error_of(tmp_path / "pair.csv")
    assert error_of(tmp_path / "assay.csv").endswith("no such file")  # like pairs.csv in .csv alone
    assert f"did you mean {tmp_path / 'pairs.csv'}" in error_of(tmp_path / "pairs.parquet")
    assert "not a file" in error_of(tmp_path)
    assert "0 bytes" in error_of(written(tmp_path, "e.csv", ""))
    assert "no rows" in error_of(tmp_path / "pairs.csv")
    assert "no header" in error_of(written(tmp_path, "e.csv.gz", gzip.compress(b"")))
    with pytest.raises(UserError, match="did you mean airr"):
        open_sources([str(tmp_path / "pairs.csv")], format="air")


@pytest.mark.parametrize(
    ("letter", "where"),
    [("*", "heavy"), ("-", "light"), ("X", "heavy"), ("é", "light"), ("1", "heavy")],
)
def test_letters_that_are_no_amino_acids(tmp_path, letter, where):
    chains = {"heavy": HEAVY, "light": LIGHT}
    chains[where] = chains[where][:4] + letter + chains[where][5:]
    text = f"{HEADER}a,{HEAVY},{LIGHT}\nb,{chains['heavy']},{chains['light']}\nc,{HEAVY},{LIGHT}\n"
    path = written(tmp_path, "t.csv", text)
    message = error_of(path)
    assert "row 2 (line 3)" in message and f"sequence_aa_{where}" in message
    assert repr(letter) in message and "residue 5" in message and "--on-bad-row=skip" in message
    rows, report = read(path, on_bad_row="skip")
    assert [r["sequence_id"] for r in rows] == ["a", "c"]
    assert sum(report.rejected.values()) == 1 and "row 2 (line 3)" in report.first.values()


def test_lower_case_and_spaces_are_tidied_and_noted(tmp_path):
    path = written(tmp_path, "t.csv", f"{HEADER}a, {HEAVY.lower()} ,{LIGHT}\n")
    rows, report = read(path)
    assert rows[0]["sequence_aa_heavy"] == HEAVY
    assert report.notes == {"sequence_aa_heavy: lower case or spaces tidied": 1}
    # what is noted is kept
    bad = (f"{HEAVY.lower()}*", f"{HEAVY[:9]}nan{HEAVY[9:]}")
    text = HEADER + "".join(f"a,{heavy},{LIGHT}\n" for heavy in (*bad, HEAVY))
    _, report = read(written(tmp_path, "t.csv", text), on_bad_row="skip")
    assert report.rejected.total() == 2 and not report.notes


def test_one_chain_is_kept_and_no_chain_is_a_bad_row(tmp_path):
    path = written(tmp_path, "t.csv", f"{HEADER}a,{HEAVY},\nb,,{LIGHT}\nc,,\n")
    rows, report = read(path)
    assert len(rows) == 2 and report.first["no sequence"] == "row 3 (line 4)"
    assert report.rejected == {"no sequence": 1}
    remark = "row without {} chain: the other read alone"
    assert report.notes == {remark.format("light"): 1, remark.format("heavy"): 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (f"b,{HEAVY}", "wrong number of columns"),
        (f"b,{HEAVY},{LIGHT},x", "wrong number of columns"),
        (f'b,"{HEAVY},{LIGHT}', "wrong quoting"),
        (f"b,{HEAVY}\0,{LIGHT}", "NUL byte"),
        (f"b,{'E' * 5_000},{LIGHT}", "sequence too long"),
        (f"b,{'A' * 200_000},{LIGHT}", "field too large"),
    ],
)
def test_malformed_rows_are_named_or_counted(tmp_path, bad, reason):
    lines = [f"a,{HEAVY},{LIGHT}", "", bad, f"c,{HEAVY},{LIGHT}"]
    path = written(tmp_path, "t.csv", HEADER + "\n".join(lines) + "\n")
    assert "row 2 (line 4)" in error_of(path)
    rows, report = read(path, on_bad_row="skip")
    assert [r["sequence_id"] for r in rows] == ["a", "c"]
    assert report.rejected == {reason: 1}


def test_undecodable_text_is_named_or_counted(tmp_path):
    path = written(tmp_path, "t.csv", HEADER.encode() + f"\xff,{HEAVY},{LIGHT}\n".encode("latin1"))
    assert "row 1 (line 2): column 1 is not UTF-8" in error_of(path)
    assert "UTF-8" in error_of(written(tmp_path, "u.csv", (HEADER + "a,A,A\n").encode("utf-16")))


def test_masks_must_fit(tmp_path):
    header = f"{HEADER[:-1]},cdr_mask_aa_heavy\n"
    good, short, letter = "0" * len(HEAVY), "0" * 5, "7" * len(HEAVY)
    for mask, text in ((short, "found 5 characters, expected 119"), (letter, "letters other than")):
        path = written(tmp_path, "t.csv", f"{header}a,{HEAVY},{LIGHT},{mask}\n")
        assert text in error_of(path) and "cdr_mask_aa_heavy" in error_of(path)
        assert read(path, on_bad_row="skip")[1].rejected == {"cdr_mask_aa_heavy does not fit": 1}
    assert read(written(tmp_path, "t.csv", f"{header}a,{HEAVY},{LIGHT},{good}\n"))[1].read == 1
    assert read(written(tmp_path, "t.csv", f"{header}a,{HEAVY},{LIGHT},\n"))[1].read == 1


# --- bytes ------------------------------------------------------------------------------------


def test_truncated_and_damaged_gzip(tmp_path):
    data = bytearray(gzip.compress((HEADER + f"a,{HEAVY},{LIGHT}\n" * 50).encode()))
    assert "truncated after line" in error_of(written(tmp_path, "t.csv.gz", bytes(data[:-20])))
    data[len(data) // 2] ^= 0xFF
    assert "gzip data damaged" in error_of(written(tmp_path, "d.csv.gz", bytes(data)))
    assert "zip archive" in error_of(written(tmp_path, "z.csv", b"PK\x03\x04" + bytes(40)))


@pytest.mark.parametrize("end", ["\n", ""], ids=["ended", "open"])
def test_a_line_that_is_too_long_is_named(tmp_path, end):
    text = HEADER + f"a,{HEAVY},{LIGHT}\n" * 7 + "b," + "A" * (1 << 20) + end
    assert "line 9 is longer than" in error_of(written(tmp_path, "t.csv", text))


@pytest.mark.parametrize("blank", ["\n", "\n\r\n", " \n", "\n" * 70_000])
def test_blank_lines_before_the_first_one(tmp_path, blank):
    rows, _ = read(written(tmp_path, "t.csv", blank + f"{HEADER}a,{HEAVY},{LIGHT}\n"))
    assert [r["_row"] for r in rows] == [1]
    rows, report = read(written(tmp_path, "t.fa", blank + f">a|H\n{HEAVY}\n>a|L\n{LIGHT}\n"))
    assert report.format == "fasta"
    assert [(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows] == [(HEAVY, LIGHT)]


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    endless = gzip.compress(HEADER.encode() + bytes(3 << 20))
    assert "longer than" in error_of(written(tmp_path, "l.csv.gz", endless))
    monkeypatch.setattr(stream_module, "_RATIO_APPLIES_FROM", 1 << 20)
    many = gzip.compress((HEADER + f"a,{HEAVY},{LIGHT}\n" * 20_000).encode())
    assert "decompression bomb" in error_of(written(tmp_path, "b.csv.gz", many))


def test_parquet_bombs_are_refused(tmp_path):
    huge = pa.DictionaryArray.from_arrays(np.zeros(8192, np.int32), ["A" * (2 << 20)])
    table = pa.table({"heavy": huge, "light": huge})  # 32 GiB when written out
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "b.parquet").stat().st_size < 100_000
    assert "2097152 bytes" in error_of(tmp_path / "b.parquet")


def test_damaged_parquet(tmp_path):
    pq.write_table(pa.table({"heavy": [HEAVY] * 99, "light": [LIGHT] * 99}), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    assert "damaged" in error_of(written(tmp_path, "d.parquet", data[:-30]))
    assert "damaged" in error_of(written(tmp_path, "d.parquet", data[:40] + bytes(60) + data[100:]))
    pq.write_table(pa.table({"heavy": [[1]], "light": [[1]]}), tmp_path / "l.parquet")
    assert "expected text" in error_of(tmp_path / "l.parquet")


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_line_blocks_do_not_depend_on_the_block_size(tmp_path, block):
    path = written(tmp_path, "t", b"\xef\xbb\xbfa\r\nb\rc\n\r\nd")
    blocks = list(line_blocks(path, Report("t"), block=block))
    assert b"".join(b for _, b in blocks) == b"a\nb\nc\n\nd\n"
    starts = np.cumsum([1] + [b.count(b"\n") for _, b in blocks])
    assert [line for line, _ in blocks] == starts[:-1].tolist()


# --- chains in one string ---------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["<cls><cls>", "</s>", "<sep>", "|"])
def test_joined_sequences(tmp_path, separator):
    h, n = len(HEAVY), len(LIGHT)
    mask, filled = "1" * h + "2" * n, "1" * h + "0" * len(separator) + "2" * n
    text = f"sequence_id,sequence,cdr_mask_aa\na,{HEAVY}{separator}{LIGHT},{mask}\n"
    text += f"b,{HEAVY}{separator}{LIGHT},{filled}\nc,{LIGHT},{'3' * n}\n"
    text += f"d,<s>{HEAVY}</s>{LIGHT}</s>,{'0' * 3}{'1' * h}{'0' * 4}{'2' * n}{'0' * 4}\n"
    rows, _ = read(written(tmp_path, "t.csv", text))
    for row in (rows[0], rows[1], rows[3]):
        assert (row["sequence_aa_heavy"], row["sequence_aa_light"]) == (HEAVY, LIGHT)
        assert (row["cdr_mask_aa_heavy"], row["cdr_mask_aa_light"]) == ("1" * h, "2" * n)
        assert not row["_any_chain"]
    assert rows[2]["_any_chain"] and rows[2]["cdr_mask_aa_heavy"] == "3" * n
    three = f"sequence_id,sequence\na,{HEAVY}|{LIGHT}|{LIGHT}\n"
    assert "'|'" in error_of(written(tmp_path, "t.csv", three))


SPACED = f"{' '.join(HEAVY)} [SEP] {' '.join(LIGHT)}"  # as IgBert takes them
LAYOUTS = [f"{HEAVY}{between}{LIGHT}" for between in ("|", ":", "</s>", "<cls><cls>", ",", "\t")]


@pytest.mark.parametrize("line", [*LAYOUTS, SPACED, f"[CLS] {SPACED} [SEP]"])
def test_lines_without_a_header(tmp_path, line):
    text = f"{line}\n\n{line.replace(HEAVY[:9], 'Q' * 9)}\n{LIGHT}\n"
    rows, report = read(written(tmp_path, "t.txt", text))
    assert report.format == "lines" and report.read == 3
    assert (rows[0]["sequence_aa_heavy"], rows[0]["sequence_aa_light"]) == (HEAVY, LIGHT)
    assert rows[2]["sequence_aa_heavy"] == LIGHT and rows[2]["_any_chain"]
    assert [r["_line"] for r in rows] == [1, 3, 4]
    path = written(tmp_path, "t.txt", f"{line}\nEVQ1|DIQ\n")
    assert "row 2 (line 2)" in error_of(path)


@pytest.mark.parametrize(
    ("header", "fields", "pair", "name"),
    [
        ("Name,Ab or Nb,VHorVHH,VL,CDRH3", f"m1,Ab,{HEAVY},{LIGHT},AR", (HEAVY, LIGHT), "m1"),
        ("Name,Ab or Nb,VHorVHH,VL,CDRH3", f"n1,Nb,{HEAVY},ND,AR", (HEAVY, ""), "n1"),
        ("Therapeutic,HeavySequence,LightSequence", f"t,{HEAVY},na", (HEAVY, ""), "t"),
        ("Therapeutic,Heavy Sequence,Light Sequence", f"t,{HEAVY},{LIGHT}", (HEAVY, LIGHT), "t"),
        ("heavy,light,fitness", f"{HEAVY},{LIGHT},1.5", (HEAVY, LIGHT), None),
        ("VHH_sequence,fitness", f"{HEAVY},1.5", (HEAVY, ""), None),
        ("id,vh,vl", f"a,{HEAVY},{LIGHT}", (HEAVY, LIGHT), "a"),
        ("id,heavy", f"a,{HEAVY}", (HEAVY, ""), "a"),
        ("id,light_chain", f"a,{LIGHT}", ("", LIGHT), "a"),
    ],
)
def test_headers_of_public_sets(tmp_path, header, fields, pair, name):
    rows, report = read(written(tmp_path, "t.csv", f"{header}\n{fields}\n"))
    assert report.format == "table"
    assert (rows[0]["sequence_aa_heavy"], rows[0]["sequence_aa_light"]) == pair
    assert rows[0].get("sequence_id") == name


def test_a_second_chain_under_another_name_is_not_passed_over(tmp_path):
    path = written(tmp_path, "t.csv", f"id,heavy,kappa_protein\na,{HEAVY},{LIGHT}\n")
    assert "amino-acid chains stand in columns 'heavy', 'kappa_protein'" in error_of(path)
    path = written(tmp_path, "t.csv", f"id,heavy,germline_heavy\na,{HEAVY},{HEAVY}\n")
    assert len(read(path)[0]) == 1  # another heavy chain is none that is lost


@pytest.mark.parametrize(
    ("name", "start", "told"),
    [
        ("a.xlsx", b"PK\x03\x04", "Excel workbook; save the sheet as CSV"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "Excel workbook"),
        ("a.h5ad", b"\x89HDF\r\n", "AnnData.*scirpy.io.write_airr"),
    ],
)
def test_files_of_other_programs_say_what_to_do(tmp_path, name, start, told):
    message = error_of(written(tmp_path, name, start + bytes(40)))
    assert re.search(told, message)


# --- FASTA ------------------------------------------------------------------------------------


def test_fasta_of_suffixed_chains(tmp_path):
    text = f">a|H some words\n{HEAVY[:60]}\n{HEAVY[60:]}\n\n>b|H\n{HEAVY}\n"
    text += f">a|L\n{LIGHT.lower()}\n>d\n{LIGHT}\n"
    rows, report = read(written(tmp_path, "t.fasta", text))
    found = {r["sequence_id"]: r for r in rows}
    assert (found["a"]["sequence_aa_heavy"], found["a"]["sequence_aa_light"]) == (HEAVY, LIGHT)
    assert (found["b"]["sequence_aa_heavy"], found["b"]["sequence_aa_light"]) == (HEAVY, "")
    assert found["d"]["_any_chain"] and not found["a"]["_any_chain"]
    assert report.read == 4 and report.joined == 1
    assert report.notes["cell without light chain: read alone"] == 1
    assert report.notes["chain that names no cell: read alone"] == 1


@pytest.mark.parametrize(
    "end", ["|H |L", "_H _L", "|IGH |IGK", "_VH _VL", ":heavy :light", "|H |K"]
)
def test_fasta_of_chains_named_in_other_ways(tmp_path, end):
    heavy, light = end.split()
    text = f">a{heavy}\n{HEAVY}\n>b{light} x\n{LIGHT[1:]}\n>b{heavy}\n{HEAVY}\n>a{light}\n{LIGHT}\n"
    rows, report = read(written(tmp_path, "t.fasta", text))
    found = {r["sequence_id"]: (r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows}
    assert found == {"a": (HEAVY, LIGHT), "b": (HEAVY, LIGHT[1:])} and report.joined == 2


def test_fasta_records_called_only_by_their_chain_are_paired_in_order(tmp_path):
    text = f">H\n{HEAVY}\n>L\n{LIGHT}\n>L\n{LIGHT[1:]}\n>H\n{HEAVY[1:]}\n>H\n{HEAVY[2:]}\n"
    rows, report = read(written(tmp_path, "t.fasta", text))
    found = {(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows}
    assert found == {(HEAVY, LIGHT), (HEAVY[1:], LIGHT[1:]), (HEAVY[2:], "")}
    assert report.joined == 2


def test_two_fasta_files_in_one_order(tmp_path):
    heavy = written(tmp_path, "h.fasta", f">a_H\n{HEAVY}\n>b_H\n{HEAVY[1:]}\n")
    light = written(tmp_path, "l.fasta", f">a_L\n{LIGHT}\n>b_L\n{LIGHT[1:]}\n")
    for inputs in ([str(heavy), str(light)], [f"heavy={heavy},light={light}"]):
        (source,) = open_sources(inputs)
        rows = [r for b in source.batches() for r in b.to_pylist()]
        assert [r["sequence_id"] for r in rows] == ["a", "b"]
        assert rows[1]["sequence_aa_heavy"] == HEAVY[1:]
        assert rows[1]["sequence_aa_light"] == LIGHT[1:]
        assert len(source.report.files) == 2
    unrelated = written(tmp_path, "u.fasta", f">x\n{LIGHT}\n>y\n{LIGHT}\n")
    assert len(open_sources([str(heavy), str(unrelated)])) == 2
    short = written(tmp_path, "s.fasta", f">a_L\n{LIGHT}\n")
    swapped = written(tmp_path, "w.fasta", f">b_L\n{LIGHT}\n>a_L\n{LIGHT}\n")
    for other, text in ((short, "ends after 1 records"), (swapped, "different ids")):
        (source,) = open_sources([f"heavy={heavy},light={other}"])
        with pytest.raises(UserError, match=text):
            list(source.batches())


def test_protein_fasta(tmp_path):
    text = f">UniRef50_P1 Protein n=2\n{'MKV' * 900}\n>UniRef50_P2\nMXV\n"
    rows, report = read(written(tmp_path, "p.fasta", text), on_bad_row="skip")
    assert report.format == "protein" and report.rejected == {"letter X in sequence_aa_heavy": 1}
    assert rows[0]["sequence_aa_heavy"] == "MKV" * 900 and rows[0]["sequence_id"] == "UniRef50_P1"


def test_malformed_fasta(tmp_path):
    assert "line 2: text before" in error_of(
        written(tmp_path, "t", "\nACD\n>a\nACD\n"), format="fasta"
    )
    path = written(tmp_path, "t.fasta", ">a\n>b\nACD\n>\nACD\n>c\nA\0CD\n")
    assert "row 3 (line 4): nothing stands behind" in error_of(path)
    rows, report = read(path, on_bad_row="skip")
    assert [r["sequence_id"] for r in rows] == ["b"]
    assert report.rejected == {"no sequence": 1, "no id": 1, "NUL byte": 1}


# --- repertoires ------------------------------------------------------------------------------

METADATA = {"Run": 7, "Author": "Doe et al., 2020", "Subject": "D1", "Species": "human"}


def oas_paired(productive="T") -> str:
    names = ["sequence_id", "productive", "v_call", "sequence_alignment_aa"]
    header = ",".join(f"{n}_{c}" for c in ("heavy", "light") for n in names)
    gapped = HEAVY[:5] + "--" + HEAVY[5:] + "."
    return f"{header}\nh1,{productive},IGHV1,{gapped},l1,T,IGLV1,{LIGHT}\n"


@pytest.mark.parametrize("style", ["none", "bare", "quoted"])
def test_oas_paired_with_and_without_metadata(tmp_path, style):
    line = json.dumps(METADATA)
    quoted = '"' + line.replace('"', '""') + '",,,,\n'
    first = {"none": "", "bare": line + "\n", "quoted": quoted}[style]
    path = written(tmp_path, "o.csv.gz", gzip.compress((first + oas_paired()).encode()))
    rows, report = read(path)
    assert report.format == "oas-paired"
    assert (rows[0]["sequence_aa_heavy"], rows[0]["sequence_aa_light"]) == (HEAVY, LIGHT)
    assert rows[0]["sequence_id"] == "h1" and rows[0]["_row"] == 1
    assert rows[0]["_line"] == (2 if style == "none" else 3)
    if style != "none":
        assert report.metadata == METADATA and rows[0]["donor"] == "Doe et al., 2020: D1"


def test_oas_unproductive_is_rejected_and_counted(tmp_path):
    rows, report = read(written(tmp_path, "o.csv", oas_paired("F")))
    assert rows == [] and report.rejected == {"not productive (heavy chain)": 1}


def test_oas_unpaired(tmp_path):
    text = f"sequence,locus,v_call,productive,sequence_alignment_aa\nACG,H,IGHV1,T,{HEAVY}\n"
    text += f"ACG,K,IGKV1,T,-{LIGHT}\nACG,,IGLV1,T,{LIGHT}\n"
    rows, report = read(written(tmp_path, "o.csv", json.dumps(METADATA) + "\n" + text))
    assert report.format == "oas-unpaired"
    chains = [(r["sequence_aa_heavy"], r["sequence_aa_light"], r["_any_chain"]) for r in rows]
    assert chains == [(HEAVY, "", False), ("", LIGHT, False), ("", LIGHT, False)]
    assert {r["donor"] for r in rows} == {"Doe et al., 2020: D1"}


def airr(rows) -> str:
    names = [
        "sequence_id",
        "sequence",
        "v_call",
        "sequence_aa",
        "locus",
        "cell_id",
        "productive",
        "umi_count",
    ]
    return "\n".join("\t".join(map(str, r)) for r in [names, *rows]) + "\n"


def test_airr_joins_cells_and_reports_what_it_does(tmp_path):
    rows = [
        ("1", "ACG", "IGHV1", HEAVY, "IGH", "c1", "T", 5),
        ("2", "ACG", "IGLV1", LIGHT[1:], "IGL", "c1", "T", 3),
        ("3", "ACG", "IGHV1", HEAVY, "IGH", "c2", "T", 1),
        ("4", "ACG", "TRBV1", HEAVY, "TRB", "c2", "T", 1),
        ("5", "ACG", "IGHV1", HEAVY, "IGH", "c3", "F", 1),
        ("6", "ACG", "IGHV1", HEAVY, "IGH", "", "T", 1),
        ("7", "ACG", "IGHV1", HEAVY, "IGH", "c4", "T", 1),
        ("8", "ACG", "IGHV1", HEAVY[1:], "IGH", "c4", "T", 1),
        ("9", "ACG", "IGKV1", LIGHT, "IGK", "c4", "T", 1),
        ("10", "ACG", "IGKV1", LIGHT, "IGK", "c1", "T", 9),
    ]
    found, report = read(written(tmp_path, "t.tsv", airr(rows)))
    assert report.format == "airr"
    antibodies = {r["sequence_id"]: (r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in found}
    assert antibodies == {"c1": (HEAVY, LIGHT), "c2": (HEAVY, ""), "6": (HEAVY, "")}
    assert report.joined == 1
    assert report.rejected == {
        "T-cell receptor": 1,
        "not productive": 1,
        "cell with several heavy chains": 3,
        "further light chain of a cell": 1,
    }
    assert report.notes["cell with several light chains: the most abundant taken"] == 1


def test_airr_cells_of_different_samples_stay_apart(tmp_path):
    names = ["sequence_id", "sequence_aa", "v_call", "locus", "cell_id", "sample_id", "subject_id"]
    rows = [names, ("1", HEAVY, "", "IGH", "c", "s1", "p"), ("2", LIGHT, "", "IGL", "c", "s2", "p")]
    text = "\n".join("\t".join(r) for r in rows) + "\n"
    found, report = read(written(tmp_path, "t.tsv", text))
    assert sorted(r["sequence_id"] for r in found) == ["s1|p|c", "s2|p|c"]
    assert {r["donor"] for r in found} == {"p"} and report.joined == 0


def test_10x_contigs(tmp_path):
    regions = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")
    header = ",".join(("barcode", "contig_id", "chain", "productive", *regions, "umis"))

    def parts(sequence):
        cuts = [0, 25, 33, 50, 58, 90, 100, len(sequence)]
        return ",".join(sequence[a:b] for a, b in pairwise(cuts))

    text = f"{header}\nAAC-1,AAC-1_1,IGH,true,{parts(HEAVY)},4\n"
    text += f"AAC-1,AAC-1_2,IGL,true,{parts(LIGHT)},4\nAAC-2,AAC-2_1,IGL,None,,,,,,,,1\n"
    rows, report = read(written(tmp_path, "filtered_contig_annotations.csv", text))
    assert report.format == "10x" and len(rows) == 1 and rows[0]["sequence_id"] == "AAC-1"
    assert (rows[0]["sequence_aa_heavy"], rows[0]["sequence_aa_light"]) == (HEAVY, LIGHT)


def test_real_files_are_recognised(shared_data):
    for name, form, count in (
        ("oas/1279068_1.csv.gz", "oas-paired", 843),
        ("oas/SRR10358525.csv.gz", "oas-paired", 624),
        ("specificity.csv.gz", "table", 9843),
    ):
        rows, report = read(shared_data / name)
        assert report.format == form and len(rows) == report.read == count


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (f"heavy,light,Species\n{PAIR},human\n{PAIR},Mus musculus\n{PAIR},\n", 1),
        (f"organism,heavy,light\n9606,{PAIR}\n10090,{PAIR}\nhouse mouse,{PAIR}\n", 2),
        (f"heavy,light\n{PAIR}\n", 0),
        (
            '"{""Species"": ""mouse_C57BL/6""}"\nsequence_alignment_aa_heavy,v_call_heavy,'
            f"sequence_alignment_aa_light\n{HEAVY},IGHV1,{LIGHT}\n{HEAVY},IGHV1,{LIGHT}\n",
            2,
        ),
        (
            '"{""Species"": ""human""}"\nsequence_alignment_aa_heavy,v_call_heavy,'
            f"sequence_alignment_aa_light\n{HEAVY},IGHV1,{LIGHT}\n",
            0,
        ),
    ],
)
def test_rows_said_to_be_of_another_species_are_noted(tmp_path, text, rows):
    path = tmp_path / "a.csv"
    path.write_text(text)
    (source,) = open_sources([str(path)])
    found = [row for batch in source.batches() for row in batch.to_pylist()]
    remark = "said to be of another species than man: germlines are human"
    assert source.report.notes[remark] == rows
    assert len(found) == source.report.read and "_species" not in found[0]
