"""`finetune` and `predict`: from a table to a head, its honest test, and the same numbers again."""

import csv
import json

import numpy as np
import pytest
from scipy import stats
from tiny_models import HEAVY, LIGHT, engine, tiny_model

from moe_ablm.data.antibody import Antibody
from moe_ablm.evaluation.formats.assays import Assay
from moe_ablm.evaluation.formats.protein_tasks import Protein, Split, Task
from moe_ablm.evaluation.proteins import Settings as ProteinSettings
from moe_ablm.evaluation.proteins import evaluate_task
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised.heads import Training
from moe_ablm.evaluation.supervised.tuning import Bench, Settings, tune
from moe_ablm.interop.saved import flat_arrays, read_model, save_model

BEFORE, AFTER = HEAVY[: HEAVY.index("AKDRG")], "FDYWGQGTLVTVSS"
CLONES = 24


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def measured(clones: int = CLONES) -> list[dict]:
    """Pairs of relatives: their affinity is the number of W in CDRH3, and relatives share it."""
    rng, rows = np.random.default_rng(0), []
    for clone in range(clones):
        count = clone % 5
        letters = rng.permutation(list("W" * count) + list(rng.choice(list("AGSTY"), 11 - count)))
        for relative in range(2):
            heavy = BEFORE.replace("VQLVES", "VQLVDS" if relative else "VQLVES")
            heavy += "AK" + "".join(letters) + AFTER
            rows.append(
                {
                    "name": f"c{clone}r{relative}",
                    "heavy": heavy,
                    "light": LIGHT,
                    "kd": count + relative / 10,
                    "binds": "yes" if count > 1 else "no",
                    "part": ("train", "train", "test", "valid")[clone % 4],
                }
            )
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    save_model(dense(), folder / "dense")
    save_model(experts(), folder / "topk")
    table(folder / "assay.csv", measured())
    return folder


def dense():
    return tiny_model(layers=1)


def experts():
    return tiny_model("topk", layers=1)


def read(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def numbers(directory) -> dict:
    content = json.loads((directory / "results.json").read_text())
    return {(n["metric"], n["labels"]["predictor"]): n for n in content["numbers"]}


QUICK = ("--steps", "40", "--batch", "8", "--lr", "0.01")


@pytest.fixture
def finetune(place, main):
    def run(out, *flags, run="dense", input="assay.csv"):
        paths = "--run", place / run, "--input", place / input, "--out", place / out
        return main("finetune", *paths, *flags)

    return run


def test_values_are_cross_validated_between_clones_and_predicted_again(place, main, finetune):
    pytest.importorskip("sklearn")
    done = finetune("values", "--target", "kd", "--folds", "3", *QUICK)
    assert done.returncode == 0, done.stderr
    rows, found = read(place / "values" / "predictions.csv"), numbers(place / "values")
    assert [row["sequence_id"] for row in rows] == [row["name"] for row in measured()]
    folds = {}
    for row in rows:
        folds.setdefault(row["sequence_id"].partition("r")[0], set()).add(row["fold"])
    assert len(folds) == CLONES and all(len(of) == 1 for of in folds.values())
    assert {fold for of in folds.values() for fold in of} == {"0", "1", "2"}
    held, target = ([float(row[name]) for row in rows] for name in ("held_out", "target"))
    spearman = found["spearman", "model"]
    assert spearman["value"] == pytest.approx(stats.spearmanr(held, target)[0], abs=1e-6)
    assert spearman["low"] < spearman["value"] < spearman["high"]
    error = found["mean absolute error", "model"]
    assert error["value"] == pytest.approx(np.abs(np.subtract(held, target)).mean(), abs=1e-5)
    names = {"model", "ridge on embeddings", "ridge on residues",
             "V genes, mutations, CDRH3 length"}  # fmt: skip
    assert {name for _, name in found} == names
    assert "spearman" in done.stdout and "24 groups (clone)" in done.stdout
    # the same numbers, bit for bit, from disk
    flags = "--run", place / "values", "--input", place / "assay.csv"
    again = main("predict", *flags, "--out", place / "again.csv")
    assert again.returncode == 0, again.stderr
    assert [(r["sequence_id"], r["prediction"]) for r in read(place / "again.csv")] == [
        (r["sequence_id"], r["prediction"]) for r in rows
    ]
    # every other verb reads the directory as the model that it was
    kept = read_model(place / "values")
    for name, array in flat_arrays(kept.params).items():
        np.testing.assert_array_equal(array, flat_arrays(dense().params)[name])


@pytest.mark.parametrize("tune", ["head", pytest.param("lora", marks=pytest.mark.slow)])
def test_classes_on_a_split_and_predicted_again(tune, place, main, finetune):
    model, out = {"head": dense, "lora": experts}[tune](), place / tune
    flags = "--target", "binds", "--split", "part", "--tune", tune, "--steps", "12"
    done = finetune(tune, *flags, run="topk" if tune == "lora" else "dense")
    assert done.returncode == 0, done.stderr
    rows = read(out / "predictions.csv")
    for row, given in zip(rows, measured(), strict=True):
        assert (row["held_out"] != "") == (given["part"] == "test") == (row["fold"] == "0")
        shares = [float(row[f"prediction {name}"]) for name in ("no", "yes")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == ("no", "yes")[int(np.argmax(shares))]
    tested = [row for row in rows if row["fold"]]
    accuracy = np.mean([row["held_out"] == row["target"] for row in tested])
    assert numbers(out)["accuracy", "model"]["value"] == pytest.approx(accuracy)
    # one that was tested is what is kept
    for row in tested:
        assert float(row["held_out yes"]) == pytest.approx(float(row["prediction yes"]), abs=1e-6)
    flags = "--run", out, "--input", place / "assay.csv"
    again = main("predict", *flags, "--out", place / f"again_{tune}.csv")
    assert again.returncode == 0, again.stderr
    kept = [name for name in rows[0] if name == "sequence_id" or name.startswith("prediction")]
    assert [[row[name] for name in kept] for row in rows] == [
        [row[name] for name in kept] for row in read(place / f"again_{tune}.csv")
    ]
    before, after = (flat_arrays(m.params) for m in (model, read_model(out)))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert {name.split("/")[-1] for name in moved} == (
        {"kernel", "router", "up", "down"} if tune == "lora" else set()
    )
    assert not any("head" in name for name in moved), "the language-model head has no part"


RESTRAINED = ("--tune", "whole", "--freeze-routers", "--expert-dropout", "0.3")


@pytest.mark.parametrize("run", ["dense", pytest.param("topk", marks=pytest.mark.slow)])
def test_losses_after_each_pass_are_written(run, place, finetune):
    """Those of the last pass are what the held-out predictions say."""
    out, flags = f"losses_{run}", RESTRAINED if run == "topk" else ()
    few = "--folds", "2", "--steps", "8"
    done = finetune(out, "--target", "binds", "--losses", *few, *flags, run=run)
    assert done.returncode == 0, done.stderr
    lines, rows = (read(place / out / name) for name in ("losses.csv", "predictions.csv"))
    assert [(x["fold"], x["pass"]) for x in lines] == [
        (fold, str(i + 1)) for fold in "01" for i in range(8)
    ]
    held = []
    for fold in "01":
        shares = [float(r[f"held_out {r['target']}"]) for r in rows if r["fold"] == fold]
        held.append(-np.log(shares).mean())
        last = [x for x in lines if x["fold"] == fold][-1]
        assert float(last["held_out"]) == pytest.approx(held[-1], abs=2e-3)  # states of float16
    told = next(line for line in done.stdout.splitlines() if line.startswith("loss after 8 passes"))
    words = told.partition(" what was held out")[0].split()
    assert float(words[-2]) == pytest.approx(np.mean(held), abs=2e-3)
    if flags:
        kept, given = (flat_arrays(m.params) for m in (read_model(place / out), experts()))
        still = {name for name in given if (kept[name] == given[name]).all()}
        assert "layers/0/ffn/router" in still and "layers/0/ffn/up" not in still


def test_the_same_head_on_the_same_split_scores_as_in_evaluate(tmp_path):
    rng = np.random.default_rng(4)
    letters = ["".join(rng.choice(list("ACDWY"), 30)) for _ in range(60)]
    proteins = [Protein(s, float(s.count("W"))) for s in letters]
    split = Split(proteins[:30], proteins[30:40], {"toy": proteins[40:]})
    subject = Subject(engine(), None, tmp_path, seed=3)
    settings = ProteinSettings(steps=30, lr=1e-2, repeats=1)
    expected, _ = evaluate_task(subject, Task("toy", "regression", [split]), settings)
    (evaluated,) = [n for n in expected if n.labels["predictor"] == "model"]
    parts = ("train",) * 30 + ("valid",) * 10 + ("test",) * 20
    targets = np.array([p.target for p in proteins])
    assay = Assay("regression", tuple(p.antibody for p in proteins), targets, parts=parts)
    tuned = tune(engine(), assay, Settings(Training(lr=1e-2, seed=3), steps=30), print)
    (found,) = [
        n for n in tuned.numbers if (n.metric, n.labels["predictor"]) == ("spearman", "model")
    ]
    assert found.value == evaluated.value and found.n == 20


def changed(**columns) -> list[dict]:
    """Rows with other values: of all rows, or of the first by a list."""
    rows = measured(8)
    for name, value in columns.items():
        for i, row in enumerate(rows):
            if not isinstance(value, list):
                row[name] = value
            elif i < len(value):
                row[name] = value[i]
    return rows


WRONG = {
    "column": ({}, ["--target", "kdd"], "--target kdd: no such column; found columns 'name', "),
    "number": ({"kd": ["strong"]}, ["--target", "kd"], "column kd holds 'strong', expected a num"),
    "nan": ({"kd": ["nan"]}, ["--target", "kd"], "no target: column kd holds 'nan'"),
    "infinite": ({"kd": ["inf"]}, ["--target", "kd"], "no number: column kd holds 'inf'"),
    "one class": ({"binds": "yes"}, ["--target", "binds"], "antibodies have the one value 'yes'"),
    "constant": ({"kd": 2}, ["--target", "kd", "--task", "regression"], "have the one value '2'"),
    "letters": ({"heavy": ["EVQ1VES" * 12]}, ["--target", "kd"], "row 1 (line 2)"),
    "nothing": ({"kd": ""}, ["--target", "kd", "--on-bad-row", "skip"], "no antibody is left"),
    "few clones": (
        {},
        ["--target", "binds", "--folds", "7"],
        "class 'no': 8 antibodies are of 4 gro",
    ),
    "part": ({"part": ["rest"]}, ["--target", "kd", "--split", "part"], "part holds 'rest'"),
    "group": (
        {"family": ["x", "", "y"]},
        ["--target", "kd", "--groups", "family"],
        "no group: column family is empty",
    ),
    "no test": ({"part": "train"}, ["--target", "kd", "--split", "part"], "0 rows are test"),
    "rank": ({}, ["--target", "kd", "--rank", "0"], "--rank 0: expected 1 to 1,024"),
    "rate": ({}, ["--target", "kd", "--lr", "1e30", *QUICK[:4]], "--lr: training came to no fin"),
    "frozen": ({}, ["--target", "kd", "--encoder-lr", "1"], "--encoder-lr: the encoder is frozen"),
    "routers": ({}, ["--target", "kd", "--freeze-routers"], "-routers: the encoder is frozen; exp"),
    "all dropped": (
        {},
        ["--target", "kd", "--expert-dropout", "1"],
        "--expert-dropout 1.0: expected 0 to below 1",
    ),
    "dense": (
        {},
        ["--target", "kd", "--tune", "whole", "--expert-dropout", ".1"],
        "is a dense model; expected one with experts",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_learned_from_is_refused_in_a_line(name, place, finetune, tmp_path):
    columns, flags, words = WRONG[name]
    path = table(tmp_path / "wrong.csv", changed(**columns))
    done = finetune("refused", *flags, input=path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    # on a busy machine it is told that something was compiled
    lines = [each for each in done.stderr.splitlines() if "compiled for" not in each]
    assert len(lines) == 1
    assert not [p for p in place.iterdir() if "refused" in p.name]


def test_training_that_comes_to_nothing_is_refused_with_a_split_too(place, finetune):
    flags = ("--split", "part", "--lr", "1e30", *QUICK[:4])
    done = finetune("nothing", "--target", "kd", *flags)
    assert done.returncode == 2 and "--lr: training came to no finite" in done.stderr
    assert not (place / "nothing").exists()


def test_relatives_that_annotation_cannot_find_are_counted():
    """Framework 4 is cut off: no clone is known of these."""
    rows = [*measured(12), *({**row, "heavy": row["heavy"][:-12]} for row in measured())]
    pairs = tuple(Antibody(row["name"], row["heavy"], row["light"]) for row in rows)
    assay = Assay("regression", pairs, np.array([float(row["kd"]) for row in rows]))
    notes = Bench(engine(), assay, Settings(Training())).notes
    assert any("48 of 72 antibodies have no heavy V gene or CDRH3" in note for note in notes)


def test_too_few_rows(finetune, tmp_path):
    path = table(tmp_path / "few.csv", measured(4))
    done = finetune("few", "--target", "kd", input=path)
    assert (
        done.returncode == 2 and "8 antibodies with a target, expected at least 10" in done.stderr
    )


def test_a_model_without_a_head_predicts_nothing(place, main):
    flags = "--run", place / "dense", "--input", place / "assay.csv"
    done = main("predict", *flags)
    assert done.returncode == 2 and "holds no head.json: expected a directory that" in done.stderr
    done = main("predict", "--run", place / "nowhere", *flags[2:])
    assert done.stderr == f"moe_ablm: --run {place / 'nowhere'}: no such directory\n"


def labelled() -> list[dict]:
    """Aromatic residues of both chains are "b"; one residue of each chain has no label."""
    rows = []
    for row in measured(12)[::2]:
        texts = {c: "".join(".ab"[1 + (x in "WYF")] for x in row[c]) for c in ("heavy", "light")}
        named = {f"site_{c}": "." + text[1:] for c, text in texts.items()}
        rows.append(row | named | {"site": "." + texts["heavy"][1:] + texts["light"]})
    return rows


def test_residues_are_labelled_between_clones_and_predicted_again(place, main, finetune):
    metrics = pytest.importorskip("sklearn.metrics")
    given = labelled()
    path = table(place / "residues.csv", given)
    flags = ("--target", "site", "--task", "residue", "--folds", "2")
    done = finetune("residues", *flags, *QUICK, input=path)
    assert done.returncode == 0, done.stderr
    rows, found = read(place / "residues" / "predictions.csv"), numbers(place / "residues")
    letters = [x for row in given for x in row["heavy"] + row["light"]]
    assert [row["residue"] for row in rows] == letters
    expected = [x for row in given for x in row["site_heavy"] + row["site_light"]]
    assert [row["target"] or "." for row in rows] == expected
    assert [row["position"] for row in rows[:2]] == ["1", "2"] and rows[0]["chain"] == "heavy"
    folds = {}
    for row in rows:
        folds.setdefault(row["sequence_id"].partition("r")[0], set()).add(row["fold"])
    assert all(len(of) == 1 for of in folds.values())
    known = [row for row in rows if row["target"]]
    truth = [row["target"] == "b" for row in known]
    share = [float(row["held_out b"]) for row in known]
    area = metrics.roc_auc_score(truth, share)
    assert found["AUC", "model"]["value"] == pytest.approx(area, abs=1e-6) and area > 0.9
    right = np.mean([row["held_out"] == row["target"] for row in known])
    assert found["accuracy", "model"]["value"] == pytest.approx(right)
    names = {"model", "chain and region", "logistic on a window of 15 residues"}
    assert {name for _, name in found} == names
    # a residue's own letter is all: the window knows it, regions do not
    assert found["AUC", "chain and region"]["value"] < 0.9
    assert found["AUC", "logistic on a window of 15 residues"]["value"] > 0.99
    flags = "--run", place / "residues", "--input", path, "--out", place / "residues_again.csv"
    again = main("predict", *flags)
    assert again.returncode == 0, again.stderr
    kept = [n for n in rows[0] if n in ("sequence_id", "chain", "position", "residue")]
    kept += [n for n in rows[0] if n.startswith("prediction")]
    assert [[row[n] for n in kept] for row in rows] == [
        [row[n] for n in kept] for row in read(place / "residues_again.csv")
    ]


def test_labels_that_fit_no_residue_are_refused(finetune, tmp_path):
    short, none = labelled(), labelled()
    short[0]["site_light"] = "ab"
    for chain in ("heavy", "light"):
        none[0][f"site_{chain}"] = "." * len(none[0][chain])
    # one column for both chains is read as well, and its length is that of both
    whole = [{k: v for k, v in row.items() if "site_" not in k} for row in labelled()]
    whole[3]["site"] += "a"
    wrong = {
        "site_light holds 2 letters, the light sequence has 107": short,
        "labels no residue": none,
        f"column site holds {len(whole[3]['site'])} letters, the sequence has": whole,
    }
    for words, rows in wrong.items():
        path = table(tmp_path / "wrong.csv", rows)
        done = finetune("refused", "--target", "site", "--task", "residue", input=path)
        assert done.returncode == 2 and words in done.stderr, done.stderr


FOLD = "hierarchical_cluster_IgG_isotype_stratified_fold"


def gdpa1() -> list[dict]:
    """The columns of GDPa1; some values are missing, as there."""
    rows = []
    for i, row in enumerate(measured(12)):
        known = {"antibody_id": f"GDPa1-{i:03}", "antibody_name": f"mab{i}"}
        assays = {"Titer": 100.5 + i, "HIC": "" if i == 5 else row["kd"], "AC-SINS_pH7.4": 1.25}
        chains = {"vh_protein_sequence": row["heavy"], "hc_protein_sequence": row["heavy"] + "AST"}
        chains |= {"vl_protein_sequence": row["light"], "lc_protein_sequence": row["light"] + "RT"}
        folds = {"hierarchical_cluster_fold": i % 2, "random_fold": i % 5, FOLD: float(i % 3)}
        rows.append(known | assays | chains | folds)
    return rows


def test_gdpa1_is_held_out_by_its_own_folds(place, main, finetune):
    pytest.importorskip("sklearn")
    path = table(place / "gdpa1.csv", gdpa1())
    refused = finetune("hic", "--target", "HIC", input=path)
    assert refused.returncode == 2 and "column HIC holds ''" in refused.stderr
    done = finetune("hic", "--target", "HIC", "--on-bad-row", "skip", *QUICK, input=path)
    assert done.returncode == 0, done.stderr
    rows, given = read(place / "hic" / "predictions.csv"), gdpa1()
    del given[5]
    assert [row["sequence_id"] for row in rows] == [row["antibody_name"] for row in given]
    assert [float(row["fold"]) for row in rows] == [row[FOLD] for row in given]
    assert "folds are those of the table: 0.0, 1.0, 2.0" in done.stdout
    assert "left out 1: no target" in done.stdout
    found = numbers(place / "hic")
    each = []
    for fold in ("0.0", "1.0", "2.0"):
        of = [row for row in rows if row["fold"] == fold]
        held, target = ([float(row[name]) for row in of] for name in ("held_out", "target"))
        each.append(stats.spearmanr(held, target)[0])
    mean = found["spearman, mean of folds", "model"]
    assert mean["value"] == pytest.approx(np.mean(each), abs=1e-6)
    assert mean["low"] <= mean["value"] <= mean["high"]
    assert ("spearman, mean of folds", "ridge on embeddings") in found


FOLDS_WRONG = {
    "none": ({"part": ""}, [], "no fold: column part holds ''"),
    "one": ({"part": "a"}, [], "--fold: 1 different folds, expected 2 to 1,000"),
    "few": ({"part": ["b"] * 8}, [], "--fold: 8 antibodies are in other folds than a, expected"),
    "both": ({}, ["--folds", "3"], "--fold with --split or --folds"),
}


@pytest.mark.parametrize("name", FOLDS_WRONG)
def test_folds_that_leave_nothing_to_train_on_are_refused(name, finetune, tmp_path):
    columns, flags, words = FOLDS_WRONG[name]
    rows = [row | {"part": "a"} for row in measured(8)]
    for column, value in columns.items():
        for i, row in enumerate(rows):
            row[column] = value if not isinstance(value, list) else (value + ["a"] * 8)[i]
    path = table(tmp_path / "wrong.csv", rows)
    done = finetune("refused", "--target", "kd", "--fold", "part", *flags, input=path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
