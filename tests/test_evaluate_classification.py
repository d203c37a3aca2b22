"""Specificity: a motif is found and a V gene is known for a shortcut; files as people have them."""

import csv
import gzip

import numpy as np
import pytest
from tiny_models import engine

from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError
from moe_ablm.evaluation import classification
from moe_ablm.evaluation.classification import FROZEN, TUNED, Settings
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised import baselines, folds
from moe_ablm.evaluation.supervised.folds import drawn, read_labelled

QUICK = Settings(repeats=1, epochs=10, batch=32, lr=2e-2)
MOTIF = "WHWHW"


def row(rng, label: str, motif: bool = False, v_gene: str = "IGHV1-2", **changes) -> dict:
    """Chains of random residues as if they were annotated; the motif is in CDRH3."""
    letters = [x for x in AMINO_ACIDS if x not in "WH"]
    heavy, light = ("".join(rng.choice(letters, n)) for n in (24, 16))
    if motif:
        heavy = heavy[:9] + MOTIF + heavy[9 + len(MOTIF) :]
    values = {"name": f"{label}-{rng.integers(1 << 40)}", "label": label}
    masks = ("heavy", heavy, "0102000" + "3" * 12 + "0" * 5), ("light", light, "0102000333333000")
    for chain, sequence, cdr in masks:
        values |= {
            f"sequence_aa_{chain}": sequence,
            f"germline_aa_{chain}": sequence,
            f"cdr_mask_aa_{chain}": cdr,
            f"nongermline_mask_aa_{chain}": "0" * len(sequence),
            f"v_gene_{chain}": v_gene if chain == "heavy" else "IGKV1-5",
            f"j_gene_{chain}": "IGHJ4" if chain == "heavy" else "IGKJ1",
        }
    return values | changes


def write(path, rows: list[dict]):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def subject(path, router: str = "dense", seed: int = 0) -> Subject:
    return Subject(engine(router), None, path.parent, {"specificity": (path,)}, seed)


def by_name(outcome) -> dict:
    numbers = [sample.number() for sample in outcome.samples] + list(outcome.numbers)
    return {(n.metric, n.labels["task"], n.labels["predictor"]): n for n in numbers}


@pytest.fixture(scope="module")
def antigens(tmp_path_factory):
    """HD and CoV differ by a motif alone, Flu by its V gene alone."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    rows = [row(rng, "HD") for _ in range(60)]
    rows += [row(rng, "CoV", motif=True) for _ in range(70)]
    rows += [row(rng, "Flu", v_gene="IGHV6-1") for _ in range(50)]
    path = tmp_path_factory.mktemp("specificity") / "antigens.csv"
    write(path, [rows[i] for i in rng.permutation(len(rows))])
    return path


@pytest.fixture(scope="module")
def outcome(antigens):
    return classification.evaluate(subject(antigens), QUICK)


def test_a_motif_is_found_that_the_baseline_cannot_know(outcome):
    found = by_name(outcome)
    assert found["AUC", "HD-CoV", FROZEN].low > 0.8
    baseline = found["AUC", "HD-CoV", baselines.BASELINE]
    assert baseline.low <= 0.5 <= baseline.high
    assert found["AUC over baseline", "HD-CoV", FROZEN].low > 0.2
    assert found["accuracy", "HD-CoV", FROZEN].n == 120


def test_a_v_gene_that_gives_the_class_away_shows_in_the_baseline(outcome):
    found = by_name(outcome)
    assert found["AUC", "CoV-Flu", baselines.BASELINE].value == 1
    assert found["AUC over baseline", "CoV-Flu", FROZEN].value <= 0
    three = found["accuracy", "CoV-Flu-HD", baselines.BASELINE]
    assert three.value > 0.55 and three.n == 150  # Flu is known, of the others half


def test_all_is_there_and_told(outcome):
    assert len(outcome.samples) == 6
    metrics = {n.metric for n in outcome.numbers}
    assert metrics == {
        *(m for m in classification.METRICS if m != "accuracy"),
        *(f"{m}, sd of folds" for m in classification.METRICS),
        *(f"{m} over baseline" for m in classification.METRICS),
    }
    assert any("one donor" in note for note in outcome.notes)
    assert any("HD-CoV: 60 antibodies of each class" in note for note in outcome.notes)
    figure = outcome.pictures[0].draw()
    assert len(figure.axes[0].get_yticklabels()) == 3


def test_the_order_of_the_file_has_no_part(antigens, tmp_path, outcome):
    with antigens.open() as file:
        rows = list(csv.DictReader(file))
    again = write(tmp_path / "turned.csv", rows[::-1])
    assert classification.evaluate(subject(again), QUICK).numbers == outcome.numbers


def test_all_weights_can_be_trained(tmp_path, monkeypatch):
    """Beside the frozen encoder; what `full` does is tested with the heads."""
    pytest.importorskip("sklearn")
    rng, asked, drawn = np.random.default_rng(1), [], []

    def guessed(engine, inputs, classes, folds, training):
        asked.append((training.full, inputs.states is None, training.encoder_lr))
        drawn.append((training.seed, folds.tolist()))
        return np.eye(2)[classes] if training.full else np.full((len(classes), 2), 0.5)

    monkeypatch.setattr(classification, "cross_validated", guessed)
    path = write(tmp_path / "two.csv", [row(rng, label) for label in ("HD", "CoV") * 15])
    settings = Settings(folds=2, repeats=3, encoder_lr=1e-5, full=True)
    found = by_name(classification.evaluate(subject(path), settings))
    assert asked == [(False, False, 1e-5)] * 3 + [(True, True, 1e-5)] * 3
    # each repeat has a seed and folds of its own, the same ones for both predictors
    assert drawn[:3] == drawn[3:] and [seed for seed, _ in drawn[:3]] == [0, 1, 2]
    assert len({str(folds) for _, folds in drawn}) == 3
    assert found["AUC", "HD-CoV", TUNED].value == 1 > found["AUC", "HD-CoV", FROZEN].value


def test_what_cannot_be_done_is_said(tmp_path, antigens):
    with pytest.raises(Skipped, match="--data specificity=FILE"):
        classification.evaluate(Subject(engine(), None, tmp_path), QUICK)
    rng = np.random.default_rng(2)
    one = write(tmp_path / "one.csv", [row(rng, "HD") for _ in range(20)])
    with pytest.raises(Skipped, match="found HD 20"):
        classification.evaluate(subject(one), QUICK)
    other = [row(rng, f"class {i % 2}") for i in range(20)]
    with pytest.raises(Skipped, match="expected CoV, Flu, HD"):
        classification.evaluate(subject(write(tmp_path / "other.csv", other)), QUICK)
    alike = row(rng, "CoV")
    clone = [alike | {"sequence_aa_light": f"{'ACDEFGHIKL'[i]}" * 16} for i in range(10)]
    for each in clone:
        each["germline_aa_light"] = each["sequence_aa_light"]
    rows = clone + [row(rng, "HD") for _ in range(20)]
    with pytest.raises(Skipped, match="5 clones"):
        classification.evaluate(subject(write(tmp_path / "clone.csv", rows)), QUICK)


def test_without_scikit_learn_it_is_skipped(monkeypatch, antigens):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(Skipped, match="moe_ablm\\[eval\\]"):
        classification.evaluate(subject(antigens), Settings(epochs=1))


def test_rows_that_are_no_use_are_counted(tmp_path):
    rng = np.random.default_rng(3)
    good = [row(rng, "HD") for _ in range(3)]
    rows = [*good, good[0] | {"name": "twice"}, good[1] | {"label": "CoV"}]
    rows += [row(rng, ""), row(rng, "HD", sequence_aa_heavy="EVQ1")]
    antibodies, notes = read_labelled([write(tmp_path / "rows.csv", rows)])
    assert [a.name for a in antibodies] == [good[0]["name"], good[2]["name"]]
    assert notes == [
        "1 of 7 rows are malformed or without annotation: left out",
        "2 of 7 rows are equal to another one: left out",
        "2 of 7 rows are without a label, or with several: left out",
    ]


def test_a_file_without_labels_is_an_error_of_the_user(tmp_path):
    rows = [row(np.random.default_rng(4), "HD")]
    del rows[0]["label"]
    with pytest.raises(UserError, match="no column label"):
        read_labelled([write(tmp_path / "plain.csv", rows)])


def test_fewer_are_the_first_of_more(antigens):
    antibodies, _ = read_labelled([antigens])
    some, more = (drawn(antibodies, n, 0) for n in (20, 60))
    assert [a.key for a in some] == [a.key for a in more[:20]]
    assert [a.key for a in drawn(antibodies, 20, 1)] != [a.key for a in some]


def test_real_antibodies_are_read_with_their_genes_and_mutations(shared_data, tmp_path):
    path = shared_data / "specificity.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} not found")
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))[::20]
    antibodies, _ = read_labelled([write(tmp_path / "some.csv", rows)])
    known = {r["name"]: r for r in rows}
    assert len(antibodies) > 0.97 * len(rows)
    same_gene = [a.heavy.v_gene == known[a.name]["v_gene_heavy"] for a in antibodies]
    mutations = [(a.heavy.mutations, int(known[a.name]["mutations_heavy"])) for a in antibodies]
    assert np.mean(same_gene) > 0.98
    assert np.mean([x == y for x, y in mutations]) > 0.95


def test_one_fold_is_refused():
    one = np.zeros(4, np.int64)
    with pytest.raises(UserError, match="folds=1: expected 2 or more"):
        folds.clonal_folds(np.arange(4), one, 1, np.random.default_rng(0))
