"""A dataset in words and pictures."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from small_datasets import Record, random_records, write_dataset

from moe_ablm.__main__ import main
from moe_ablm.data.dataset import SPLITS, Dataset
from moe_ablm.data.prepare import prepare_batches
from moe_ablm.data.simulate import simulate
from moe_ablm.data.summary import IDENTITY_BINS, LONGEST_CDR3, summarise
from moe_ablm.verbs.describe import _draw_identity, _draw_lengths

PAIRS = 300


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pa.Table.from_batches(simulate(PAIRS, seed=5))


@pytest.fixture(scope="module")
def path(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("describe") / "d"
    prepare_batches(table.to_batches(), path, source="simulated", licence="free to use")
    return path


def test_summary_equals_the_table(path, table):
    dataset = Dataset(path)
    summary = summarise(dataset)
    lengths = np.array([len(c) for c in table["cdr3_aa_heavy"].to_pylist()])
    for code in range(len(SPLITS)):
        expected = np.bincount(lengths[dataset.split == code], minlength=41)
        assert summary.cdrh3_length[code].tolist() == expected.tolist()
    for chain in ("heavy", "light"):
        genes = table[f"v_gene_{chain}"].to_pylist()
        assert summary.v_genes[chain] == {g: genes.count(g) for g in set(genes)}
        identity = table[f"v_identity_aa_{chain}"].to_numpy()
        assert abs(summary.means[chain]["v_identity"] - identity.mean()) < 1e-9
        assert abs(summary.means[chain]["unmutated"] - (identity == 1).mean()) < 1e-9
        assert summary.identity[chain].sum() == PAIRS == summary.chains[chain]
        top = (identity >= IDENTITY_BINS[-2] - 1e-12).sum()
        assert summary.identity[chain][-1] == top


def test_seen_chains_and_different_ones_are_those_of_sets_of_strings(tmp_path, table):
    # a third of the antibodies get the light chain of one of five others
    donor = np.where(np.arange(PAIRS) % 3 == 0, np.arange(PAIRS) % 5, np.arange(PAIRS))
    names = [n for n in table.column_names if n.endswith("_light")]
    for name in names:
        at = table.column_names.index(name)
        table = table.set_column(at, name, table[name].take(pa.array(donor)))
    prepare_batches(table.combine_chunks().to_batches(), tmp_path / "d", source="s", licence="none")
    dataset = Dataset(tmp_path / "d")
    summary = summarise(dataset)
    for chain in ("heavy", "light"):
        letters = np.array(table[f"sequence_aa_{chain}"].to_pylist())
        plain = table[f"v_identity_aa_{chain}"].to_numpy() == 1
        train = {f: set(letters[dataset.rows("train", f)]) for f in ("quarter", "half", "full")}
        assert summary.different[chain] == len(train["full"])
        for split in ("valid", "test"):
            rows = dataset.rows(split)
            found = summary.seen[split, chain]
            for fraction, known in train.items():
                share = np.mean([letters[r] in known for r in rows])
                assert found[fraction] == pytest.approx(share)
            if plain[rows].any():
                share = np.mean([letters[r] in train["full"] for r in rows if plain[r]])
                assert found["unmutated"] == pytest.approx(share)
    assert 0.1 < summary.seen["valid", "light"]["full"] < 0.8


def test_describe_tells_which_chains_train_has(tmp_path, capsys):
    a, b, c, d = random_records(4, 1)
    records = [a, b, Record(c.heavy, a.light), Record(d.heavy, d.light)]
    write_dataset(tmp_path / "d", records, np.array([0, 0, 1, 1]))
    assert main(["moe_ablm", "describe", "--input", str(tmp_path / "d")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    # fraction keys rise with the row: a quarter is the first record
    assert ["valid", "light", "50.0%", "50.0%", "50.0%", "-"] in lines
    assert ["valid", "heavy", "0.0%", "0.0%", "0.0%", "-"] in lines
    assert ["different", "ones", "in", "train", "2", "2"] in lines


def test_describe_prints_the_card_and_draws(path, tmp_path, capsys, table):
    assert main(["moe_ablm", "describe", "--input", str(path), "--out", str(tmp_path / "f")]) == 0
    text = capsys.readouterr().out
    for expected in ("free to use", "simulated", "300", "train", "IGHV", "0.9"):
        assert expected in text
    names = {"cdrh3_length.png", "v_usage.png", "v_identity.png"}
    assert {p.name for p in (tmp_path / "f").iterdir()} == names
    for name in names:
        data = (tmp_path / "f" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
        assert str(tmp_path / "f" / name) in text.replace("\n", "")


def test_the_card_says_what_was_rejected_and_prints_brackets_as_they_are(tmp_path, table, capsys):
    rows = table.slice(0, 40).to_pylist()
    rows[3]["sequence_aa_heavy"] = "[" + rows[3]["sequence_aa_heavy"][1:]
    file, out = tmp_path / "a[red]:smile:.csv", tmp_path / "d"
    pacsv.write_csv(pa.Table.from_pylist(rows), file)
    arguments = ["--input", str(file), "--out", str(out), "--on-bad-row", "skip"]
    assert main(["moe_ablm", "prepare", *arguments, "--licence", "[/i] mine"]) == 0
    assert "a[red]:smile:.csv" in "".join(capsys.readouterr().out.split())
    assert main(["moe_ablm", "describe", "--input", str(out)]) == 0
    text = capsys.readouterr().out
    for expected in ("[/i] mine", "40 read", "39 kept", "1 rejected: letter [ in"):
        assert expected in text


def test_default_place_of_the_figures(path):
    assert main(["moe_ablm", "describe", "--input", str(path)]) == 0
    assert (path / "figures" / "v_usage.png").is_file()
    assert len(Dataset(path)) == PAIRS


def test_proteins_have_nothing_to_draw_but_do_not_fail(tmp_path):
    (tmp_path / "p.fasta").write_text(
        "".join(f">UniRef50_{i}\n{'MKVL' * (i + 1)}\n" for i in range(30))
    )
    out = tmp_path / "d"
    arguments = ["--input", str(tmp_path / "p.fasta"), "--out", str(out)]
    assert main(["moe_ablm", "prepare", *arguments]) == 0
    assert main(["moe_ablm", "describe", "--input", str(out)]) == 0
    assert summarise(Dataset(out)).cdrh3_length.sum() == 0


def test_no_dataset_is_one_line(tmp_path, capsys):
    assert main(["moe_ablm", "describe", "--input", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "is not there" in error and error.count("\n") == 1


def test_bins_that_hold_the_rest_say_so():
    identity = dict.fromkeys(("heavy", "light"), np.ones(len(IDENTITY_BINS) - 1, np.int64))
    lengths = np.ones((3, LONGEST_CDR3 + 1), np.int64)
    summary = SimpleNamespace(identity=identity, cdrh3_length=lengths)
    for draw, place, name in (
        (_draw_identity, IDENTITY_BINS[0], "below 0.71"),
        (_draw_lengths, LONGEST_CDR3, "40 or more"),
    ):
        (axis,) = draw(summary).axes
        names = [label.get_text() for label in axis.get_xticklabels()]
        assert names[list(axis.get_xticks()).index(place)] == name
