"""Damaged files: a one-line UserError or a counted rejection, never a crash or a silent drop."""

import gzip
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_headers import CHAIN_TABLES, PAIR_TABLES, H, L, table, write_mutated

from moe_ablm.data.readers import open_sources
from moe_ablm.data.readers.fasta import records
from moe_ablm.data.readers.report import Report
from moe_ablm.errors import UserError

HEAVY = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNS"
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYC"
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TABLE = b"sequence_id,sequence_aa_heavy,sequence_aa_light,cdr_mask_aa_heavy\n" + b"".join(
    b"r%d,%s,%s,%s\n" % (i, HEAVY[i:].encode(), LIGHT[i:].encode(), b"0" * (len(HEAVY) - i))
    for i in range(6)
)
AIRR = b"sequence_id\tsequence\tsequence_aa\tv_call\tlocus\tcell_id\tproductive\n" + b"".join(
    b"%d\tACG\t%s\tIGHV1\tIGH\tc%d\tT\n%d\tACG\t%s\tIGKV1\tIGK\tc%d\tT\n"
    % (2 * i, HEAVY[i:].encode(), i, 2 * i + 1, LIGHT[i:].encode(), i)
    for i in range(4)
)
OAS = b'"{""Run"": 1, ""Subject"": ""D1""}"\n' + (
    b"sequence_alignment_aa_heavy,v_call_heavy,sequence_alignment_aa_light,ANARCI_numbering\n"
    + b"".join(
        b"%s,IGHV1,%s,\"{'fwh1': {'1 ': 'E'}}\"\n" % (HEAVY[i:].encode(), LIGHT[i:].encode())
        for i in range(5)
    )
)
JOINED = b"sequence_id,sequence,cdr_mask_aa\n" + b"".join(
    b"r%d,%s<cls><cls>%s,%s\n"
    % (i, HEAVY[i:].encode(), LIGHT.encode(), b"1" * (len(HEAVY) - i + len(LIGHT)))
    for i in range(5)
)
TEN_X = b"barcode,contig_id,chain,productive,fwr1,cdr1,fwr2,cdr2,fwr3,cdr3,fwr4,umis\n" + b"".join(
    b"c%d,c%d_%d,%s,true,%s,,,,,,,%d\n" % (i // 2, i // 2, i, chain, sequence.encode(), i)
    for i in range(6)
    for chain, sequence in [(b"IGH", HEAVY) if i % 2 else (b"IGK", LIGHT)]
)
FASTA = b"".join(
    b">%d|H x\n%s\n%s\n>%d|L\n%s\n"
    % (i, HEAVY[:50].encode(), HEAVY[50:].encode(), i, LIGHT.encode())
    for i in range(4)
)

# What happens to files: cut, joined badly, edited by hand, converted, compressed, fetched in part.
PIECES = st.sampled_from(
    [b"\0", b'"', b'""', b"\r", b"\r\n", b"\n", b"\n\n", b",", b"\t", b"*", b"-", b"X", b"x", b" "]
    + [b">", b"|", b"\xff", "é".encode(), b"{", b"\xef\xbb\xbf", b"A" * 3000, b"A" * 140_000]
)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.floats(0, 1), PIECES),
        st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 200)),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 300)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits) -> bytes:
    for kind, where, what in edits:
        at = int(where * len(data))
        if kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + what :]
        elif kind == "repeat":
            data = data[: at + what] + data[at:]
        else:
            data = data[:at]
    return data


def outcome(path: Path, on_bad_row: str):
    """Rows delivered and the report, or the message of the UserError."""
    try:
        (source,) = open_sources([str(path)], on_bad_row=on_bad_row)
        rows = [row for batch in source.batches() for row in batch.to_pylist()]
    except UserError as error:
        assert "\n" not in str(error) and str(path.name) in str(error)
        return str(error)
    report = source.report
    assert report.read == len(rows) + report.joined + sum(report.rejected.values())
    for row in rows:
        for chain in ("heavy", "light"):
            assert re.fullmatch("[ACDEFGHIKLMNPQRSTVWY]*", row[f"sequence_aa_{chain}"])
    return rows, report


def lines_of(data: bytes) -> int:
    """Non-blank lines after the header, counted without the reader under test."""
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = [line for line in text.split(b"\n") if line.strip()]
    return len(lines) - 1


@pytest.mark.parametrize(
    "data", [TABLE, AIRR, OAS, JOINED, TEN_X], ids=["table", "airr", "oas", "joined", "10x"]
)
@given(edits=EDITS, pack=st.booleans())
@FUZZ
def test_damaged_tables(tmp_path, data, edits, pack):
    damaged = edited(data, edits)
    path = tmp_path / "t.csv"
    path.write_bytes(gzip.compress(damaged) if pack else damaged)
    skipping = outcome(path, "skip")
    failing = outcome(path, "fail")
    if isinstance(skipping, str):
        assert isinstance(failing, str)
        return
    rows, report = skipping
    if report.format == "fasta":  # the first byte became '>'
        return
    header = report.format != "lines"  # which have none
    assert report.read == lines_of(damaged) + (not header) - bool(report.metadata)
    if not isinstance(failing, str):
        assert failing[0] == rows
    else:
        assert report.rejected or not rows
        assert re.search(r"row \d+ \(line \d+\)", failing)


@pytest.mark.parametrize("name", [*CHAIN_TABLES, *PAIR_TABLES])
def test_public_tables_are_read_as_they_are(tmp_path, name):
    header, rows = table(name)
    path = tmp_path / "t.tsv"
    path.write_text("\n".join("\t".join(row) for row in (header, *rows)) + "\n")
    found, report = outcome(path, "fail")
    assert report.rejected.total() == 0 and report.read == len(rows)
    alone = name in ("igblast", "oas-unpaired", "nanobodies")
    pairs = {(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in found}
    assert pairs == (
        {(H, "")} | ({("", L)} if name != "nanobodies" else set()) if alone else {(H, L)}
    )


PIECES_OF_FUZZ, INPUTS_A_PIECE = 100, 1_000  # 10^5 inputs, some 30 seconds a piece


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        pytest.param(0, 100, id="default"),
        *(
            pytest.param(seed, INPUTS_A_PIECE, id=f"piece{seed:03}", marks=pytest.mark.slow)
            for seed in range(1, PIECES_OF_FUZZ + 1)
        ),
    ],
)
def test_mutated_public_tables_lose_nothing(tmp_path, seed, count):
    """The equation holds (`Report.settle` raises where it does not), or one line says why not.

    Pieces can be run one by one, or a few at once: `pytest tests/test_readers_fuzz.py --slow -n 0
    -k "piece001 or piece002"`; all that begin with piece01 are ten of them.
    """
    rng, names = np.random.default_rng(seed), [*CHAIN_TABLES, *PAIR_TABLES]
    told: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for number in range(count):
        path = tmp_path / f"t{number}.csv"
        kind, rows = write_mutated(rng, path, str(rng.choice(names)))
        seen[kind] += 1
        found = outcome(path, "skip")
        if isinstance(found, str):
            told[kind] += 1
        else:
            report = found[1]
            header = kind == "text" and report.format != "lines"  # which have none
            assert report.read + header in rows, (seed, number)
            if number % 10 == 0:
                stops = isinstance(outcome(path, "fail"), str)
                assert stops or not malformed(report), (seed, number)
        path.unlink()
    assert told["text"] < seen["text"] / 2 and told["parquet"] < seen["parquet"] / 2


def malformed(report: Report) -> list[str]:
    """Reasons that only malformed rows have, at which `--on-bad-row=fail` stops."""
    return [reason for reason in report.rejected if reason.startswith(("letter ", "nan inside"))]


@given(edits=EDITS, pack=st.booleans())
@FUZZ
def test_damaged_fasta(tmp_path, edits, pack):
    damaged = edited(FASTA, edits)
    path = tmp_path / "t.fasta"
    path.write_bytes(gzip.compress(damaged) if pack else damaged)
    skipping, failing = outcome(path, "skip"), outcome(path, "fail")
    if isinstance(skipping, str):
        assert isinstance(failing, str)
    elif skipping[1].format == "fasta":
        text = damaged.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n")
        assert skipping[1].read == len(re.findall(rb"(?m)^>", text))


@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255))))
@FUZZ
def test_damaged_gzip(tmp_path, cut, flips):
    whole = gzip.compress(TABLE, mtime=0)
    data = bytearray(whole[: int(cut * len(whole))])
    for where, mask in flips:
        if data:
            data[int(where * len(data))] ^= mask
    path = tmp_path / "t.csv.gz"
    path.write_bytes(bytes(data))
    found = outcome(path, "skip")
    # CRC-32 and the length at the end of the stream: damage to the content does not go unseen.
    if not isinstance(found, str) and found[1].format == "table":
        intact = [r for r in found[0] if r["sequence_aa_heavy"] in HEAVY]
        assert len(intact) == 6


@given(flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=3))
@FUZZ
def test_damaged_parquet(tmp_path, flips):
    sink = pa.BufferOutputStream()
    columns = {"heavy": [HEAVY] * 20, "light": [LIGHT[i:] for i in range(20)]}
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    data = bytearray(sink.getvalue().to_pybytes())
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    path = tmp_path / "t.parquet"
    path.write_bytes(bytes(data))
    outcome(path, "skip")


def test_metadata_that_contradict_the_schema(tmp_path):
    """A type that the footer has twice, once wrong: pyarrow ends the process if asked of it."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"heavy": [HEAVY] * 3, "light": [LIGHT] * 3}), path)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in range(footer, min(footer + 60, len(whole) - 8)):  # of the schema
        for mask in (4, 16, 64):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            outcome(path, "skip")


@given(st.binary(max_size=400))
@FUZZ
def test_arbitrary_bytes(tmp_path, data):
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    outcome(path, "skip")


@given(st.binary(max_size=300).map(lambda b: b.replace(b"\0", b"")))
@FUZZ
def test_fasta_records_are_all_seen(tmp_path, data):
    path = tmp_path / "t.fasta"
    path.write_bytes(b">first\nACD\n" + data)
    report = Report("t.fasta", "skip")
    try:
        found = list(records(path, report))
    except UserError:
        return
    assert report.read == len(found) + sum(report.rejected.values())
