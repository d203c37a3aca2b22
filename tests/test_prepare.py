"""From files to a dataset: what is stored, where it goes, and that nothing is left half done."""

import errno
import gzip
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from moe_ablm.__main__ import main
from moe_ablm.data import tokenizer
from moe_ablm.data.clones import nearest_train
from moe_ablm.data.dataset import FRACTIONS, SPLITS, Dataset, DatasetWriter
from moe_ablm.data.intake import COPY, SplitRule
from moe_ablm.data.mixture import Batching, Mixture, parse_regime
from moe_ablm.data.prepare import prepare, prepare_batches
from moe_ablm.data.readers import Report, open_sources
from moe_ablm.data.simulate import simulate
from moe_ablm.data.spill import scratch_beside
from moe_ablm.errors import UserError

PAIRS = 400


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Simulated, annotated pairs."""
    return pa.Table.from_batches(simulate(PAIRS, seed=3)).drop_columns(["source"])


@pytest.fixture(scope="module")
def files(tmp_path_factory, table):
    """The pairs as parquet, as CSV, and as CSV without annotation."""
    folder = tmp_path_factory.mktemp("files")
    pq.write_table(table, folder / "pairs.parquet")
    pacsv.write_csv(table, folder / "pairs.csv")
    bare = table.select(["sequence_id", "sequence_aa_heavy", "sequence_aa_light"])
    pacsv.write_csv(bare, folder / "bare.csv")
    return folder


def run(*arguments) -> int:
    return main(["moe_ablm", "prepare", *map(str, arguments), "--workers", "1"])


def prepared(inputs, out, rule=None, on_bad_row="fail") -> Dataset:
    """Sources with all annotation, without the command line."""
    sources = open_sources([str(i) for i in inputs], on_bad_row=on_bad_row)
    prepare([(s.report, s.batches()) for s in sources], out, licence="test", rule=rule)
    return Dataset(out)


def rows_of(dataset: Dataset, *names) -> list[dict]:
    return [row for b in dataset.batches() for row in b.select(list(names)).to_pylist()]


def left_beside(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))


# --- what is stored -----------------------------------------------------------------------------


def test_stored_rows_are_the_given_ones(table, tmp_path):
    card = prepare_batches(table.to_batches(), tmp_path / "d", source="sim", licence="none")
    dataset = Dataset(tmp_path / "d")
    assert card == dataset.card and len(dataset) == PAIRS
    assert card["sources"][0]["read"] == card["sources"][0]["kept"] == PAIRS
    stored = [row for b in dataset.batches() for row in b.to_pylist()]
    for row, given in zip(stored, table.to_pylist(), strict=True):
        assert row["id"] == given["sequence_id"] and row["source"] == "sim"
        for chain in ("heavy", "light"):
            for column, name in (("tokens", "sequence_aa"), ("germline", "germline_aa")):
                letters = tokenizer.decode(np.array(row[f"{chain}_{column}"], np.uint8))
                assert letters == given[f"{name}_{chain}"]
            mask = "".join(map(str, row[f"{chain}_mutated"]))
            assert mask == given[f"nongermline_mask_aa_{chain}"]
            cdr = "".join("0102030"[r - 1] for r in row[f"{chain}_region"])
            assert cdr.replace("0", ".") == given[f"cdr_mask_aa_{chain}"].replace("0", ".")
            assert row[f"{chain}_v_gene"] == given[f"v_gene_{chain}"]
    assert left_beside(tmp_path / "d") == []


def test_formats_and_batch_sizes_give_the_same_dataset(table, files, tmp_path):
    parquet = prepared([files / "pairs.parquet"], tmp_path / "p")
    csv = prepared([files / "pairs.csv"], tmp_path / "c")
    columns = ("key", "cluster", "split", "fraction_key", "heavy_tokens", "light_region")
    assert rows_of(parquet, *columns) == rows_of(csv, *columns)
    small = prepare_batches(
        table.to_batches(max_chunksize=7), tmp_path / "s", source="x", licence="none"
    )
    large = prepare_batches(table.to_batches(), tmp_path / "l", source="x", licence="none")
    assert small["sha256"] == large["sha256"]


def test_split_and_fraction_counts(files, tmp_path):
    dataset = prepared([files / "pairs.parquet"], tmp_path / "d")
    for code, name in enumerate(SPLITS):
        rows = np.flatnonzero(dataset.split == code)
        assert dataset.card["splits"][name] == len(rows) > 0
        assert dataset.rows(name).tolist() == rows.tolist()
        for fraction, bound in FRACTIONS.items():
            inside = rows[dataset.fraction_key[rows] < bound]
            assert dataset.card["fractions"][name][fraction] == len(inside)
    assert sum(dataset.card["splits"].values()) == PAIRS


def test_bare_sequences_are_annotated(table, files, tmp_path, capsys):
    assert run("--input", files / "bare.csv", "--out", tmp_path / "d") == 0
    dataset = Dataset(tmp_path / "d")
    source = dataset.card["sources"][0]
    assert source["read"] == PAIRS == source["kept"] + sum(source["rejected"].values())
    assert source["kept"] > 0.97 * PAIRS
    truth = {row["sequence_id"]: row for row in table.to_pylist()}
    stored = rows_of(dataset, "id", "heavy_v_gene", "heavy_region", "heavy_tokens")
    genes = [r["heavy_v_gene"] == truth[r["id"]]["v_gene_heavy"] for r in stored]
    assert np.mean(genes) > 0.9
    cdr3 = [
        sum(c == 6 for c in r["heavy_region"]) == len(truth[r["id"]]["cdr3_aa_heavy"])
        for r in stored
    ]
    assert np.mean(cdr3) > 0.98
    assert f"{PAIRS}" in capsys.readouterr().out


def test_fasta_chains_are_told_apart_by_annotation(table, tmp_path):
    rows = table.slice(0, 20).to_pylist()
    with (tmp_path / "c.fasta").open("w") as f:
        for i, row in enumerate(rows):
            f.write(f">{i}\n{row['sequence_aa_heavy' if i % 2 else 'sequence_aa_light']}\n")
        f.write(
            ">not-an-antibody\nMKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPD\n"
        )
    assert run("--input", tmp_path / "c.fasta", "--out", tmp_path / "d") == 0
    dataset = Dataset(tmp_path / "d")
    found = rows_of(dataset, "id", "heavy_v_gene", "light_v_gene")
    assert len(found) >= 19
    for row in found:
        assert bool(row["heavy_v_gene"]) == (int(row["id"]) % 2 == 1)
        assert bool(row["light_v_gene"]) == (int(row["id"]) % 2 == 0)
    assert sum(dataset.card["sources"][0]["rejected"].values()) == 21 - len(found)


def test_proteins_are_stored_without_annotation(tmp_path):
    text = "".join(f">UniRef50_{i}\n{'MKVLAT' * (i + 1)}\n" for i in range(60))
    (tmp_path / "p.fasta.gz").write_bytes(gzip.compress(text.encode()))
    assert run("--input", tmp_path / "p.fasta.gz", "--out", tmp_path / "d") == 0
    dataset = Dataset(tmp_path / "d")
    assert dataset.lengths["heavy"].tolist() == [6 * (i + 1) for i in range(60)]
    assert dataset.lengths["light"].sum() == 0 and dataset.card["clusters"] == 60
    regions = dataset.gather(np.arange(60), "heavy", ("region",))["region"]
    assert not regions.any()
    assert dataset.card["nearest_train_cdrh3"] is None


# --- where records go -----------------------------------------------------------------------


def placed(dataset: Dataset) -> dict[tuple, tuple]:
    columns = ("heavy_tokens", "light_tokens", "split", "fraction_key", "cluster")
    return {
        (bytes(r["heavy_tokens"]), bytes(r["light_tokens"])): (
            r["split"],
            r["fraction_key"],
            r["cluster"],
        )
        for r in rows_of(dataset, *columns)
    }


def neighbours(table: pa.Table) -> pa.Table:
    """Each antibody with one residue of its CDRH3 exchanged: they join clusters of `table`."""
    rows = table.to_pylist()
    rng = np.random.default_rng(1)
    for row in rows:
        at = row["cdr_mask_aa_heavy"].index("3") + int(rng.integers(len(row["cdr3_aa_heavy"])))
        for name in ("sequence_aa_heavy", "germline_aa_heavy"):
            new = "A" if row[name][at] != "A" else "S"
            row[name] = row[name][:at] + new + row[name][at + 1 :]
        row["sequence_id"] += "-n"
    return pa.Table.from_pylist(rows, schema=table.schema)


def test_adding_sources_moves_no_record(table, files, tmp_path):
    near = neighbours(table)
    pq.write_table(near, tmp_path / "near.parquet")
    more = pa.Table.from_batches(simulate(200, seed=9)).drop_columns(["source"])
    pq.write_table(more, tmp_path / "more.parquet")
    alone = placed(prepared([files / "pairs.parquet"], tmp_path / "a"))
    inputs = [files / "pairs.parquet", tmp_path / "near.parquet", tmp_path / "more.parquet"]
    for number, order in enumerate((inputs, inputs[::-1])):
        together = placed(prepared(order, tmp_path / f"b{number}"))
        assert len(together) > 2 * len(alone)
        for record, (split, fraction, _) in alone.items():
            assert together[record][:2] == (split, fraction)
        splits_of = defaultdict(set)
        for split, _, cluster in together.values():
            splits_of[cluster].add(split)
        assert max(map(len, splits_of.values())) == 1
    # The neighbours did join clusters, or the test would show nothing.
    sizes = Counter(cluster for *_, cluster in together.values())
    assert max(sizes.values()) > 1


def test_clusters_of_the_rule_cluster_are_never_divided(table, tmp_path):
    both = pa.concat_tables([table, neighbours(table)])
    rule = SplitRule(by="cluster")
    card = prepare_batches(both.to_batches(), tmp_path / "d", source="s", licence="none", rule=rule)
    dataset = Dataset(tmp_path / "d")
    assert card["clusters"] == len(np.unique(dataset.cluster)) < 2 * PAIRS
    for cluster in np.unique(dataset.cluster):
        assert len(np.unique(dataset.split[dataset.cluster == cluster])) == 1
    assert 0.8 < (dataset.split == 0).mean() < 0.97


def test_a_given_cluster_column_is_trusted(table, tmp_path):
    labels = pa.array([i // 40 for i in range(PAIRS)])
    given = table.append_column("cluster", labels)
    pq.write_table(given, tmp_path / "c.parquet")
    dataset = prepared([tmp_path / "c.parquet"], tmp_path / "d")
    assert dataset.cluster.tolist() == labels.to_pylist() and dataset.card["clusters"] == 10
    for cluster in range(10):
        assert len(np.unique(dataset.split[dataset.cluster == cluster])) == 1
    assert "10 clusters of the `cluster` column" in " ".join(dataset.card["warnings"])
    again = prepared([tmp_path / "c.parquet"], tmp_path / "r", SplitRule(recluster=True))
    assert again.card["clusters"] > 100
    # One source without labels: all are clustered by one rule.
    pq.write_table(table.slice(0, 50), tmp_path / "n.parquet")
    mixed = prepared([tmp_path / "c.parquet", tmp_path / "n.parquet"], tmp_path / "m")
    assert mixed.card["clusters"] == again.card["clusters"]


def test_donors_stay_whole(table, tmp_path):
    donors = [f"d{i % 8}" for i in range(PAIRS)]
    pq.write_table(table.append_column("donor", pa.array(donors)), tmp_path / "t.parquet")
    by_name = SplitRule(by="donor", valid_donors=("d1",), test_donors=("d2", "d3"))
    dataset = prepared([tmp_path / "t.parquet"], tmp_path / "n", by_name)
    where = {d: {SPLITS[s] for s in dataset.split[np.array(donors) == d]} for d in set(donors)}
    expected = {"d1": "valid", "d2": "test", "d3": "test"}
    assert where == {d: {expected.get(d, "train")} for d in where}
    by_hash = prepared([tmp_path / "t.parquet"], tmp_path / "h", SplitRule(by="donor"))
    for donor in set(donors):
        assert len(set(by_hash.split[np.array(donors) == donor])) == 1
    with pytest.raises(UserError, match="row 1.*no donor"):
        prepare_batches(
            table.to_batches(), tmp_path / "x", source="s", licence="", rule=SplitRule(by="donor")
        )
    with pytest.raises(UserError, match="need --split donor"):
        SplitRule(valid_donors=("a",))
    with pytest.raises(UserError, match="'a' is named for"):
        SplitRule(by="donor", valid_donors=("a",), test_donors=("a", "b"))


FAKE_MMSEQS = """#!{python}
import sys
_, verb, fasta, prefix, scratch, *options = sys.argv
assert verb == "easy-cluster" and options[options.index("--min-seq-id") + 1] == "0.8"
if "fail" in fasta: sys.exit("no memory\\nCannot allocate")
names, first = [], {{}}
for name, sequence in zip(*[open(fasta)] * 2):
    names.append((name[1:].strip(), first.setdefault(sequence[:6], name[1:].strip())))
with open(prefix + "_cluster.tsv", "w") as f:
    for name, representative in sorted(names, key=lambda n: (n[1], n[0])):
        f.write(f"{{representative}}\\t{{name}}\\n")
"""


def test_mmseqs_clusters(table, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="no program `mmseqs` on PATH"):
        SplitRule(by="mmseqs")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mmseqs"
    program.write_text(FAKE_MMSEQS.format(python=sys.executable))
    program.chmod(0o755)
    rule = SplitRule(by="mmseqs", identity=0.8)
    prepare_batches(table.to_batches(), tmp_path / "d", source="s", licence="", rule=rule)
    dataset = Dataset(tmp_path / "d")
    starts = [s[:6] for s in table["sequence_aa_heavy"].to_pylist()]
    assert dataset.card["clusters"] == len(set(starts)) == len(np.unique(dataset.cluster))
    for start in set(starts):
        mine = np.array([s == start for s in starts])
        assert len(np.unique(dataset.cluster[mine])) == len(np.unique(dataset.split[mine])) == 1
    with pytest.raises(UserError, match="exit code 1: Cannot allocate"):
        prepare_batches(table.to_batches(), tmp_path / "fail", source="s", licence="", rule=rule)
    assert not (tmp_path / "fail").exists() and left_beside(tmp_path / "fail") == []


def test_nearest_train_of_a_hand_made_table():
    cdr3 = [b"AAAAAAAAAA", b"AAAAAAAAAC", b"AAAAAAAACC", b"WWWWW", b"AAAAAAAAAA", b""]
    part = pa.table(
        {
            "row": np.arange(6),
            "member": np.array([9, 8, 7, 6, 5, 4], np.uint64),
            "cdr3": pa.array(cdr3, pa.large_binary()),
        }
    )
    split = np.array([0, 2, 2, 2, 1, 2])  # train, test, test, test, valid, test without CDRH3
    found = nearest_train(lambda: [part.slice(0, 2), part.slice(2)], split)
    assert found == {"sampled": 3, "median": 0.8, "share": {"1": 0.0, "0.9": 0.3333, "0.8": 0.6667}}
    assert nearest_train(lambda: [part], np.zeros(6)) is None


# --- bad input and interruptions ------------------------------------------------------------


def test_duplicated_ids_within_a_source(table, tmp_path):
    twice = pa.concat_tables([table.slice(0, 30), table.slice(10, 1)])
    pq.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"row 31: sequence_id 'sim-3-10' was used before"):
        prepared([tmp_path / "t.parquet"], tmp_path / "d")
    assert not (tmp_path / "d").exists()
    dataset = prepared([tmp_path / "t.parquet"], tmp_path / "d", on_bad_row="skip")
    source = dataset.card["sources"][0]
    assert source["rejected"] == {"duplicated id": 1} and source["kept"] == 30 == len(dataset)
    pq.write_table(table.slice(5, 9), tmp_path / "u.parquet")
    both = prepared([tmp_path / "t.parquet", tmp_path / "u.parquet"], tmp_path / "b", None, "skip")
    assert len(both) == 39


def test_copies_under_other_ids(table, tmp_path, capsys):
    """30 pairs, then 12 of them again under other ids and 5 new ones: noted, or left out."""
    pq.write_table(table.slice(0, 30), tmp_path / "a.parquet")
    again = table.slice(8, 27).take(pa.array([*range(26, 21, -1), *range(12)]))
    other = pa.array([f"other-{i}" for i in range(17)])
    i = again.schema.get_field_index("sequence_id")
    pq.write_table(again.set_column(i, "sequence_id", other), tmp_path / "b.parquet")
    inputs = ["--input", tmp_path / "a.parquet", "--input", tmp_path / "b.parquet"]
    assert run(*inputs, "--out", tmp_path / "all") == 0
    assert "12 of 47 rows have the chains of an earlier row" in " ".join(
        capsys.readouterr().out.split()
    )
    assert run(*inputs, "--out", tmp_path / "once", "--deduplicate") == 0
    both, once = Dataset(tmp_path / "all"), Dataset(tmp_path / "once")
    first, second = both.card["sources"]
    assert (first["notes"], second["notes"]) == ({}, {COPY: 12})
    assert second["first"] == {COPY: "row 6"} and second["kept"] == 17
    first, second = once.card["sources"]
    assert (first["rejected"], second["rejected"]) == ({}, {COPY: 12})
    assert (len(both), len(once), second["kept"]) == (47, 35, 5)
    kept = rows_of(once, "heavy_tokens", "light_tokens")
    assert len({str(row) for row in kept}) == 35
    # what a law is fitted to counts a chain once, however often it is there
    batching = Batching("padded", 8, 320, "esm")
    counted = [
        Mixture([d], [np.arange(len(d))], parse_regime("paired"), batching, seed=0, steps=4)
        for d in (both, once)
    ]
    assert counted[0].corpus_tokens > counted[1].corpus_tokens
    assert counted[0].unique_tokens() == counted[1].unique_tokens()


def test_bad_input_ends_in_one_line_and_exit_code_2(files, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("sequence_id,sequence_aa_heavy,sequence_aa_light\na,EV*,DI\n")
    (tmp_path / "there").mkdir()
    good = files / "pairs.parquet"
    out = tmp_path / "d"
    cases = (
        (("--input", tmp_path / "bad.csv", "--out", out), "row 1 (line 2)"),
        (("--input", tmp_path / "none.csv", "--out", out), "no such file"),
        (("--input", good, "--out", tmp_path / "there"), "exists already"),
        (("--input", good, "--out", out, "--identity", "7"), "expected a share"),
        (("--input", good, "--out", out, "--split", "donor"), "no donor"),
        (("--input", tmp_path / "bad.csv", "--out", out, "--on-bad-row", "skip"), "is left"),
        (("--input", good, "--out", out, "--columns", "VH"), "--columns VH"),
    )
    for arguments, text in cases:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1 and "Traceback" not in error
        assert not out.exists() and left_beside(out) == []


def test_a_second_process_on_the_same_output_says_so(table, tmp_path):
    with (
        scratch_beside(tmp_path / "d"),
        pytest.raises(UserError, match=f"another process .pid {os.getpid()}. is writing it"),
    ):
        prepare_batches(table.to_batches(), tmp_path / "d", source="s", licence="")
    prepare_batches(table.to_batches(), tmp_path / "d", source="s", licence="")
    assert left_beside(tmp_path / "d") == []


KILLED = """
import os, signal, sys
from pathlib import Path
from moe_ablm.data import dataset, intake, prepare
from moe_ablm.data.readers import open_sources

owner = {"Intake": intake.Intake, "DatasetWriter": dataset.DatasetWriter}[sys.argv[1]]
original = getattr(owner, sys.argv[2])

def dying(self, *arguments):
    result = original(self, *arguments) if sys.argv[3] == "after" else None
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, sys.argv[2], dying)
(source,) = open_sources([sys.argv[4]])
prepare.prepare([(source.report, source.batches())], Path(sys.argv[5]), licence="")
"""


@pytest.mark.parametrize(
    "where",
    [
        ("Intake", "add", "after"),
        ("Intake", "decide", "after"),
        ("DatasetWriter", "add", "after"),
        ("DatasetWriter", "_close_shard", "after"),
    ],
    ids=lambda w: ".".join(w[:2]),
)
def test_killed_at_any_time_leaves_no_half_dataset(files, tmp_path, where):
    out = tmp_path / "d"
    source = files / "pairs.parquet"
    command = [sys.executable, "-c", KILLED, *where, str(source), str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert left_beside(out) != []
    assert len(prepared([source], out)) == PAIRS  # starts over
    assert left_beside(out) == []


def test_an_error_in_the_middle_leaves_nothing(table, tmp_path):
    def breaking():
        yield from table.to_batches(max_chunksize=100)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        prepare_batches(breaking(), tmp_path / "d", source="s", licence="")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(table, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DatasetWriter, "add", full)
    with pytest.raises(UserError, match="the disk is full; nothing was written"):
        prepare_batches(table.to_batches(), tmp_path / "d", source="s", licence="")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*directory"):
        prepare_batches(table.to_batches(), tmp_path / "file" / "d", source="s", licence="")


# --- real sources -----------------------------------------------------------------------------


def test_real_sources(shared_data, tmp_path):
    parquet = pq.ParquetFile(shared_data / "pairs.parquet")
    head = pa.Table.from_batches([next(parquet.iter_batches(2000))])
    pq.write_table(head, tmp_path / "pairs.parquet")
    with gzip.open(shared_data / "specificity.csv.gz", "rt") as f:
        lines = f.readlines()[:300]
    (tmp_path / "specificity.csv").write_text("".join(lines))
    inputs = [tmp_path / "pairs.parquet", tmp_path / "specificity.csv"]
    inputs.append(shared_data / "oas" / "SRR10358525.csv.gz")
    arguments = [a for path in inputs for a in ("--input", path)]
    assert run(*arguments, "--out", tmp_path / "d") == 0
    dataset = Dataset(tmp_path / "d")
    for source, rows in zip(dataset.card["sources"], (2000, 299, 624), strict=True):
        assert source["read"] == rows == source["kept"] + sum(source["rejected"].values())
        assert source["kept"] > 0.95 * rows
    stored = pa.Table.from_batches(dataset.batches())
    given = head["sequence_id"].to_pylist()
    assert stored["id"].to_pylist()[:2000] == given
    labels = pc.value_counts(stored["label"].combine_chunks()).to_pylist()
    assert "CoV" in {c["values"] for c in labels}
    near = dataset.card["nearest_train_cdrh3"]
    assert near["sampled"] > 50 and 0.3 < near["median"] < 1


def test_reports_hold_together_after_skipping(tmp_path, table):
    bare = table.select(["sequence_id", "sequence_aa_heavy", "sequence_aa_light"]).to_pylist()[:40]
    bare[3]["sequence_aa_light"] = bare[3]["sequence_aa_light"][:20] + "*"
    bare[5]["sequence_id"] = bare[4]["sequence_id"]
    bare[7]["sequence_aa_heavy"], bare[7]["sequence_aa_light"] = "E" * 60, ""
    pacsv.write_csv(pa.Table.from_pylist(bare), tmp_path / "t.csv")
    out = tmp_path / "d"
    assert run("--input", tmp_path / "t.csv", "--out", out, "--on-bad-row", "skip") == 0
    source = Dataset(out).card["sources"][0]
    assert source["read"] == 40 == source["kept"] + sum(source["rejected"].values())
    assert source["rejected"]["duplicated id"] == 1
    assert source["rejected"]["letter * in sequence_aa_light"] == 1
    assert any(reason.startswith("annotation: ") for reason in source["rejected"])
    assert set(source["first"]) >= set(source["rejected"])


def test_report_refuses_by_default():
    report = Report("f")
    with pytest.raises(UserError, match="f: row 1: bad; .*--on-bad-row=skip"):
        report.bad_row("row 1", "reason", "bad")
    report.reject("other", "row 2", 3)
    report.note("remark", "row 2", 0)
    assert report.rejected == {"other": 3} and not report.notes
