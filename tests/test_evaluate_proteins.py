"""Protein tasks: formats of FLIP and TAPE, what is chosen, what is learned, what is refused."""

import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from tiny_models import engine

from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats import tape
from moe_ablm.evaluation.formats.protein_choice import chosen, drawn, fitting, without_common_ends
from moe_ablm.evaluation.formats.protein_files import read_tasks
from moe_ablm.evaluation.formats.protein_tasks import Protein, Split, Task
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.proteins import Settings, compared, evaluate
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised import baselines

QUICK = Settings(steps=400, lr=1e-2, repeats=2)


@pytest.fixture
def subject(tmp_path):
    def made(*paths):
        return Subject(engine(), None, tmp_path / "work", {"proteins": tuple(paths)}, seed=2)

    return made


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        path = tmp_path / "toy" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def sequences(n, seed=0, size=38):
    return ["".join(s) for s in np.random.default_rng(seed).choice(list(AMINO_ACIDS), (n, size))]


def flip_csv(rows):
    return "sequence,target,set,validation\n" + "".join(f"{','.join(map(str, r))}\n" for r in rows)


def split_rows(items, targets, tests=60):
    parts = ["test"] * tests + ["train"] * (len(items) - tests)
    return [(s, t, p, "") for s, t, p in zip(items, targets, parts, strict=True)]


# formats


def test_gb1_as_flip_ships_it(shared_data):
    """Sizes of the splits of FLIP (table 2 of the paper), FASTA and CSV in one archive."""
    (task,) = read_tasks([shared_data / "flip_gb1" / "splits.zip"])
    sizes = {
        n: (len(s.train), len(s.valid), len(t)) for s in task.splits for n, t in s.tests.items()
    }
    assert (task.name, task.kind) == ("flip_gb1", "regression")
    assert sizes == {
        "sampled": (6289, 699, 1745),
        "one_vs_rest": (25, 3, 8705),
        "two_vs_rest": (381, 43, 8309),
        "three_vs_rest": (2691, 299, 5743),
        "low_vs_high": (4580, 509, 3644),
    }
    assert task.splits[0].train[0].target == 1.0 and len(task.splits[0].train[0].sequence) == 265


def test_flip_csv_and_the_fasta_that_goes_before_it(tmp_path):
    path = tmp_path / "toy.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "splits/a.csv", flip_csv([("EVQ", 1, "train", "True"), ("EV", 2, "test", "")])
        )
        fasta = ">1 TARGET=3.5 SET=train VALIDATION=False\nEV\nQL\n>2 SET=test TARGET=-1\nDIQ\n"
        file.writestr("splits/a.fasta", fasta)
        file.writestr(
            "splits/b.csv",
            flip_csv([("W", 1, "train", "True"), *[("CC", 2, p, "") for p in ("train", "test")]]),
        )
    (task,) = read_tasks([path])
    first, second = task.splits
    assert task.name == "toy" and first.train == [Protein("EVQL", 3.5)]
    assert first.tests == {"a": [Protein("DIQ", -1.0)]} and first.valid == []
    assert second.valid == [Protein("W", 1.0)] and list(second.tests) == ["b"]


def test_classes_of_flip(write):
    rows = [("EV", "Nucleus", "train", ""), ("DI", "Cytoplasm", "test", "")]
    (task,) = read_tasks([write("mixed.csv", flip_csv(rows))])
    assert (task.name, task.kind) == ("toy", "classification")
    assert task.splits[0].train == [Protein("EV", "Nucleus")]


def test_labels_of_residues_with_sequences_and_mask_in_files_of_their_own(tmp_path):
    path = tmp_path / "splits.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "sampled.fasta",
            ">a SET=train\nHHE\n>b SET=train VALIDATION=True\nCC\n>c SET=test\nCHC\n",
        )
        file.writestr("sequences.fasta", ">c\nEVQ\n>a\nDIQ\n>b\nWL\n")
        file.writestr("mask.fasta", ">a\n011\n>c\n110\n")
    (task,) = read_tasks([path])
    (split,) = task.splits
    assert task.kind == "residue" and split.train == [Protein("DIQ", " HE")]
    assert split.valid == [Protein("WL", "CC")] and split.tests["sampled"] == [
        Protein("EVQ", "CH ")
    ]


def test_labels_of_residues_that_are_digits_are_no_number(write):
    rows = [("EVQ", "012", "train", ""), ("DIQW", "8800", "test", "")]
    (task,) = read_tasks([write("conservation.csv", flip_csv(rows))])
    assert task.kind == "residue" and task.splits[0].train == [Protein("EVQ", "012")]


@pytest.mark.parametrize("piece", [3, 1 << 20])
@pytest.mark.parametrize("lines", [False, True])
def test_tape_fluorescence_as_array_and_as_lines(write, monkeypatch, piece, lines):
    monkeypatch.setattr(tape, "_PIECE", piece)
    records = [{"id": i, "primary": "EVQ"[: i + 1], "log_fluorescence": [i / 2]} for i in range(3)]
    content = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    paths = [write(f"fluorescence_{part}.json", content) for part in ("train", "valid", "test")]
    (task,) = read_tasks(paths)
    (split,) = task.splits
    assert (task.name, task.kind, list(split.tests)) == ("fluorescence", "regression", ["test"])
    assert split.train == split.valid == [Protein("E", 0), Protein("EV", 0.5), Protein("EVQ", 1)]


def test_tape_remote_homology_and_secondary_structure_have_several_test_sets(write):
    fold = [{"primary": "EV", "fold_label": i, "class_label": 0} for i in (7, 11)]
    parts = ("train", "test_fold_holdout", "test_family_holdout")
    states = [
        {"primary": "EVQ", "ss3": [0, 2, 1], "ss8": [7, 1, 1], "valid_mask": [True, True, False]}
    ]
    other = ("train", "casp12", "cb513")
    paths = [write(f"remote_homology_{p}.json", fold) for p in parts]
    homology, structure = read_tasks(
        paths + [write(f"secondary_structure_{p}.json", states) for p in other]
    )
    assert homology.kind == "classification"
    assert homology.splits[0].train == [Protein("EV", "7"), Protein("EV", "11")]
    assert list(homology.splits[0].tests) == list(parts[1:])
    assert structure.kind == "residue" and structure.splits[0].tests["casp12"] == [
        Protein("EVQ", "02 ")
    ]


def test_flips_own_json_lines(write):
    line = json.dumps({"id": "1es5-A", "sequence": "EVQ", "label": "CCH", "resolved": "001"})
    (task,) = read_tasks([write(f"{name}.jsonl", line) for name in ("train", "val", "new_pisces")])
    assert task.name == "toy" and task.splits[0].tests == {"new_pisces": [Protein("EVQ", "  H")]}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "sequence,set\nEV,train\n", "no column target; found"),
        ("a.csv", "sequence,target,set\n", "no rows below the header"),
        (
            "a.csv",
            flip_csv([("EV", 1, "train", ""), ("EV", 1, "dev", "")]),
            "column SET: found 'dev'",
        ),
        ("a.csv", flip_csv([("EV", 1, "train", "")]), "no test set; give all files"),
        (
            "a.csv",
            flip_csv([("EV", 1.5, "train", ""), ("EV", 2.5, "test", ""), ("EV", "x", "test", "")]),
            "row 3 (line 4): column TARGET: found 'x', expected a number",
        ),
        (
            "a.csv",
            flip_csv(
                [("EV", "HH", "train", ""), ("EV", "CC", "test", ""), ("EV", "C", "test", "")]
            ),
            "row 3 (line 4): column TARGET: 1 labels, but 2 residues",
        ),
        ("a.csv", flip_csv([("E-", 1, "train", "")]), "column sequence: '-' at residue 2"),
        ("a.fasta", ">a SET=train\nHH\n", "line 1: column TARGET: none, and the task has no file"),
        ("a.fasta", ">\nHH\n", "nothing stands behind '>'"),
        ("x_train.json", '[{"primary": "EV"}]', "record 1: expected primary and one of"),
        ("x_train.json", '[{"primary": "EV", "ss3": [1]}]', "column ss3: 1 labels, but 2 residues"),
        ("x_train.json", '[{"primary": "EV", "stability_score": [NaN]}]', "found 'nan', expected"),
        ("x_train.json", '[{"primary": "EV", "stability_score": null}]', "found '', expected"),
        ("x_train.json", '[{"primary": "EV", ', "record 1: no JSON"),
        ("x_train.json", "[3]", "record 1: expected an object"),
        ("x_train.json", '[{"a":' + "[" * 200_000, "record 1: no JSON"),
        ("x_train.json", "[]", "no record"),
        ("fluorescence.json", '[{"primary": "EV"}]', "the name tells no part of a task"),
        ("x_test.json", '[{"primary": "EV", "fold_label": 1}]', "task x: no train set"),
    ],
)
def test_a_malformed_file_is_refused_in_a_line(write, name, content, told):
    with pytest.raises(UserError) as error:
        read_tasks([write(name, content)])
    assert told in str(error.value) and "\n" not in str(error.value)


def test_malformed_rows_are_left_out_and_told_where_that_is_asked_for(write):
    """Also those of FASTA and JSON; what is left is as if they had never been there."""
    good = [("EVQLV", 1.5, "train", ""), ("EVA", 2, "test", ""), ("EVD", 3, "valid", "")]
    bad = [("EVQ", "x", "train", ""), ("E-Q", 1, "train", ""), ("EVQ", 1, "dev", "")]
    text = flip_csv([good[0], *bad, *good[1:]]) + "EVQ,1\n"
    (task,) = read_tasks([write("a.csv", text)], "skip")
    (clean,) = read_tasks([write("a.csv", flip_csv(good))])
    assert [s.everyone() for s in task.splits] == [s.everyone() for s in clean.splits]
    assert task.left_out == (
        "a: 1 row left out: wrong number of columns",
        "a: 3 rows left out: malformed",
    )
    records = [("a", "train", "HHH"), ("b", "test", "HHC"), ("c", "test", "CC"), ("d", "", "CCC")]
    lines = [f">{name} SET={part}\n{labels}\n" for name, part, labels in records]
    write("sequences.fasta", ">a\nEVQ\n>b\nEVD\n>c\nEVA\n>d\nEVA\n")
    paths = [write("s.fasta", "".join([*lines, ">\nEV\n"])), write("a.csv", flip_csv(good))]
    residues, _ = read_tasks([*paths[:1], paths[0].parent / "sequences.fasta", paths[1]], "skip")
    assert [p.target for p in residues.splits[0].everyone()] == ["HHH", "HHC"]
    assert residues.left_out == ("s: 3 rows left out: malformed",)
    found = [{"primary": s, "stability_score": v} for s, v in [("EV", 1), ("EV", "y"), ("E1", 2)]]
    parts = [write(f"x_{part}.json", found) for part in ("train", "test")]
    (task,) = read_tasks(parts, "skip")
    assert [p.target for p in task.splits[0].everyone()] == [1.0, 1.0]
    assert task.left_out == tuple(f"{p}: 2 rows left out: malformed" for p in ("train", "test"))


# what is chosen


def test_draws_depend_on_the_sequences_alone():
    some = [Protein(s, 0) for s in sequences(50)]
    first = drawn(some, 10, seed=1)
    assert len(first) == 10 and drawn(some[::-1], 10, seed=1) == first[::-1]
    assert set(drawn(first + some[:5], 10, seed=1)) <= {*first, *some[:5]}
    assert drawn(some, 10, seed=2) != first and drawn(some, 99, seed=1) == some


def test_ends_that_all_share_are_cut_only_as_far_as_needed():
    items = [Protein("MK" + s + "A" * 9, i) for i, s in enumerate(("EVQ", "DIQL"))]
    (split,), (note,) = without_common_ends([Split(items, [], {"t": items})], room=8)
    assert [p.sequence for p in split.tests["t"]] == ["MKEVQAA", "MKDIQLAA"]
    assert "the first 0 and last 7 residues" in note
    (split,), _ = without_common_ends([Split(items, [], {"t": items})], room=5)
    assert [p.sequence for p in split.train] == ["KEVQ", "KDIQL"]
    (split,), notes = without_common_ends([Split(items, [], {"t": items})], room=15)
    assert split.train == items and notes == []


def test_long_proteins_and_empty_splits_are_told(subject):
    fine, long = [Protein(s, float(i)) for i, s in enumerate(sequences(8))], Protein("W" * 400, 1.0)
    good, poor = Split([*fine, long], [], {"a": fine}), Split(fine[:1], [], {"b": fine})
    kept, notes = fitting(subject(), Task("t", "regression", [good, poor]), 100, 5)
    assert len(kept) == 1 and kept[0].train == fine and len(kept[0].tests["a"]) == 5
    assert "a: 1 of 14 proteins are longer than the 320 tokens" in notes[0]
    assert "b: skipped: 1 proteins to train on" in notes[1]


def test_one_class_of_residues_is_skipped(subject):
    same = [Protein(s, "H" * len(s)) for s in ("EV", "DIQ", "WLC")]
    kept, notes = fitting(subject(), Task("t", "residue", [Split(same, [], {"a": same})]), 9, 9)
    assert kept == [] and "3 proteins to train on, with 1 different targets" in notes[0]


def test_splits_by_name():
    fine = [Protein("EV", 1.0)]
    task = Task(
        "t", "regression", [Split(fine, [], {"a": fine, "b": fine}), Split(fine, [], {"c": fine})]
    )
    (found,) = chosen([task], "b")
    assert [list(s.tests) for s in found.splits] == [["b"]]
    assert chosen([task], "all") == [task]
    with pytest.raises(UserError, match="proteins.splits='b,d': expected all, or of a, b, c"):
        chosen([task], "b,d")


# what is learned


def test_a_linear_target_is_learned_and_a_shuffled_one_is_not(subject, write):
    pytest.importorskip("sklearn")
    items = sequences(260)
    weight = dict(zip(AMINO_ACIDS, np.random.default_rng(1).standard_normal(20), strict=True))
    target = np.array([np.mean([weight[a] for a in s]) for s in items])
    mixed = np.random.default_rng(2).permutation(target)
    paths = [
        write("planted.csv", flip_csv(split_rows(items, target))),
        write("shuffled.csv", flip_csv(split_rows(items, mixed))),
    ]
    outcome = evaluate(subject(*paths), QUICK)
    found = {(n.labels["split"], n.labels["predictor"]): n for n in outcome.numbers}
    assert found["planted", "model"].value > 0.7 and found["planted", "model"].n == 60
    assert found["planted", "model"].low > 0.5
    for predictor in ("model", "ridge on residues"):
        wrong = found["shuffled", predictor]
        assert wrong.low < 0 < wrong.high
    assert outcome.samples == [] and len(outcome.pictures) == 1
    assert any("200 proteins to train on" in note for note in outcome.notes)


def test_labels_that_follow_from_the_residue_are_learned(subject, write):
    pytest.importorskip("sklearn")
    items = sequences(90)
    labels = ["".join("HE"[a in "DEKRHQN"] if a != "W" else "C" for a in s) for s in items]
    records = [{"primary": s, "ss3": list(x)} for s, x in zip(items, labels, strict=True)]
    parts = {"train": records[30:], "cb513": records[:10], "casp12": records[10:30]}
    paths = [write(f"secondary_structure_{part}.json", some) for part, some in parts.items()]
    outcome = evaluate(subject(*paths), QUICK)
    found = {(s.labels["split"], s.labels["predictor"]): s.number() for s in outcome.samples}
    for test, size in (("cb513", 10), ("casp12", 20)):
        assert found[test, "model"].value > 0.85 and found[test, "model"].n == size * 38
        assert found[test, baselines.NAMES["residue"]].value > 0.95


def test_a_class_that_was_never_seen_is_missed_and_one_that_was_is_found(subject, write):
    pytest.importorskip("sklearn")
    items = sequences(160)
    for i in range(0, 160, 2):
        items[i] = items[i][:18] + "W" * 20
    labels = ["tail" if i % 2 == 0 else "none" for i in range(160)]
    labels[:4] = ["new"] * 4
    outcome = evaluate(subject(write("scl.csv", flip_csv(split_rows(items, labels, 40)))), QUICK)
    sample = next(s for s in outcome.samples if s.labels["predictor"] == "model")
    assert sample.total[:4].sum() == 0 and sample.total[4:].mean() > 0.9
    assert outcome.tables[0].metrics == ("accuracy",)


def test_accuracy_counts_known_residues_by_protein():
    members = [Protein("EV", "HE"), Protein("DIQ", "H  ")]
    truth = [np.array([0, 1]), np.array([0, -1, -1])]
    found = [np.array([0, 0]), np.array([1, 1, 0])]
    sample = compared("residue", members, truth, [found], {})
    np.testing.assert_array_equal(sample.total, [1, 0])
    np.testing.assert_array_equal(sample.weight, [2, 1])
    assert sample.number().value == pytest.approx(1 / 3) and list(sample.units) == ["EV", "DIQ"]
    # of two heads the mean, and what each has
    other = [np.array([0, 1]), np.array([0, 0, 0])]
    sample = compared("residue", members, truth, [found, other], {})
    np.testing.assert_array_equal(sample.total, [1.5, 0.5])
    assert sample.repeats == pytest.approx((1 / 3, 1.0))


def test_nothing_given_and_nothing_that_fits_are_skipped(subject, write):
    with pytest.raises(Skipped, match="--data proteins=FILE"):
        evaluate(subject(), Settings())
    items = sequences(9, size=400)
    with pytest.raises(Skipped, match="longer than the 320 tokens"):
        evaluate(subject(write("a.csv", flip_csv(split_rows(items, range(9), 4)))), Settings())


# baselines


def test_the_ridge_is_that_of_one_hot_residues_or_of_composition():
    linear = pytest.importorskip("sklearn.linear_model")
    train, test = sequences(40, 1, 6), sequences(10, 2, 6)
    target = np.random.default_rng(0).standard_normal(40)

    def columns(items):
        return np.array([[s[i] == a for i in range(6) for a in AMINO_ACIDS] for s in items], float)

    model = linear.RidgeCV(np.logspace(-3, 3, 13)).fit(columns(train), target)
    expected = model.predict(columns(test))
    np.testing.assert_allclose(baselines.regression(train, target, test), expected, atol=1e-6)

    train = [s[: 3 + i % 3] for i, s in enumerate(train)]
    counts = [
        np.array([[*(s.count(a) / len(s) for a in AMINO_ACIDS), np.log(len(s))] for s in items])
        for items in (train, test)
    ]
    expected = linear.RidgeCV(np.logspace(-3, 3, 13)).fit(counts[0], target).predict(counts[1])
    np.testing.assert_allclose(baselines.regression(train, target, test), expected, atol=1e-6)


def test_the_window_sees_neighbours():
    """Labels that follow from the residue three before."""
    pytest.importorskip("sklearn")
    train, test = sequences(60, 3), sequences(20, 4)

    def labels(items):
        return [
            np.array([i > 2 and s[i - 3] in "EVQLDI" for i in range(len(s))], int) for s in items
        ]

    found = baselines.residue(train, labels(train), test, seed=0)
    right = np.concatenate([a == b for a, b in zip(found, labels(test), strict=True)])
    assert right.mean() > 0.98 and [len(f) for f in found] == [38] * 20


def test_without_scikit_learn_there_are_no_baselines_and_a_note(subject, write, monkeypatch):
    monkeypatch.setattr(baselines, "has_sklearn", lambda: False)
    rows = split_rows(sequences(40), range(40), 10)
    outcome = evaluate(subject(write("a.csv", flip_csv(rows))), Settings(steps=1))
    assert Counter(n.labels["predictor"] for n in outcome.numbers) == {"model": 1}
    assert "pip install 'moe_ablm[eval]'" in outcome.notes[-1]
