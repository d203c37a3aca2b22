"""Scores against scikit-learn, also weighted and with ties; intervals; folds without relatives."""

import math

import numpy as np
import pytest

from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated, Chain
from moe_ablm.evaluation.estimates import DRAWS, Sample, interval, repeated_interval
from moe_ablm.evaluation.scores import METRICS, accuracy_sample, score_numbers, scores
from moe_ablm.evaluation.supervised.folds import clonal_folds, clones, joined, numbered, out_of_fold


def predictions(classes: int, n: int, seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    logits = rng.standard_normal((n, classes)) + 1.5 * np.eye(classes)[truth]
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return truth, np.round(found, 1) if ties else found


def reference(truth, found, weight) -> dict[str, float]:
    metrics = pytest.importorskip("sklearn.metrics")
    guess, given = found.argmax(1), {"sample_weight": weight}
    asked = [1] if found.shape[1] == 2 else range(found.shape[1])

    def ranked(metric):
        return np.mean([metric(truth == c, found[:, c], **given) for c in asked])

    return {
        "accuracy": metrics.accuracy_score(truth, guess, **given),
        "F1": metrics.f1_score(truth, guess, average="macro", zero_division=0, **given),
        "AUC": ranked(metrics.roc_auc_score),
        "AUPR": ranked(metrics.average_precision_score),
        "MCC": metrics.matthews_corrcoef(truth, guess, **given),
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_those_of_scikit_learn(classes, ties):
    truth, found = predictions(classes, 80, classes, ties)
    weights = np.random.default_rng(9).integers(0, 4, (6, 80)).astype(float)
    weights[0] = 1
    ours = scores(truth, found, weights)
    assert set(ours) == set(METRICS)
    for i, weight in enumerate(weights):
        for metric, value in reference(truth, found, weight).items():
            assert ours[metric][i] == pytest.approx(value, abs=1e-12), metric
    for metric, value in scores(truth, found).items():
        assert value[0] == ours[metric][0]


def test_scores_of_a_table_worked_out_by_hand():
    """Two of three right; the only positive is ranked second of three."""
    truth, found = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    ours = {name: value[0] for name, value in scores(truth, found).items()}
    assert ours["accuracy"] == pytest.approx(2 / 3)
    assert ours["F1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert ours["AUC"] == pytest.approx(0.5)
    assert ours["AUPR"] == pytest.approx(0.5)
    assert ours["MCC"] == pytest.approx((1 * 1 - 1 * 0) / math.sqrt(2 * 1 * 2 * 1))


def test_guessing_one_class_has_no_correlation_and_a_lacking_class_no_ranking():
    truth, found = np.array([0, 1, 0, 1]), np.tile([0.9, 0.1], (4, 1))
    ours = scores(truth, found, np.array([[1, 1, 1, 1], [1, 0, 1, 0]]))
    assert ours["MCC"].tolist() == [0, 0]
    assert ours["AUC"][0] == 0.5 and math.isnan(ours["AUC"][1])
    assert ours["AUPR"][0] == 0.5 and math.isnan(ours["AUPR"][1])


def test_intervals_are_over_units_and_gains_are_paired():
    truth, found = predictions(2, 200, 4, False)
    worse = np.where(np.arange(200)[:, None] % 4 == 0, found[:, ::-1], found)
    units = [f"u{i // 2}" for i in range(200)]
    folds = np.arange(200) % 5
    numbers = score_numbers(
        truth, {"a": found[None], "b": worse[None]}, "b", units, folds[None], {"task": "t"}
    )
    named = {(n.metric, n.labels["predictor"]): n for n in numbers}
    for metric in METRICS:
        gain = named[f"{metric} over baseline", "a"]
        values = [scores(truth, p)[metric][0] for p in (found, worse)]
        assert gain.value == pytest.approx(values[0] - values[1])
        assert 0 < gain.low < gain.value < gain.high
        of_folds = [scores(truth[folds == f], found[folds == f])[metric][0] for f in range(5)]
        assert named[f"{metric}, sd of folds", "a"].value == pytest.approx(np.std(of_folds, ddof=1))
        assert (f"{metric} over baseline", "b") not in named
    auc = named["AUC", "a"]
    one_by_one = score_numbers(
        truth, {"a": found[None]}, "a", [str(i) for i in range(200)], folds[None], {}
    )
    alone = next(n for n in one_by_one if n.metric == "AUC")
    assert auc.low < auc.value < auc.high and (auc.low, auc.high) != (alone.low, alone.high)
    # paired: the two share their errors, so that the gain is surer than a difference of strangers
    spread = np.hypot(*(named["AUC", p].high - named["AUC", p].low for p in "ab"))
    gain = named["AUC over baseline", "a"]
    assert gain.high - gain.low < spread


def test_the_accuracy_is_that_of_its_sample():
    truth, found = predictions(3, 100, 5, False)
    units = [f"u{i // 3}" for i in range(100)]
    number = accuracy_sample(truth, found[None], units, {"task": "t"}).number(DRAWS)
    assert number.value == pytest.approx(scores(truth, found)["accuracy"][0])
    both, halves = {"a": found[None], "b": found[None]}, (np.arange(100) % 2)[None]
    gains = score_numbers(truth, both, "b", units, halves, {})
    assert {n.value for n in gains if "over baseline" in n.metric} == {0.0}


def test_scores_are_means_over_repeats_and_their_spread_widens_the_interval():
    truth, found = predictions(2, 120, 6, False)
    rng = np.random.default_rng(1)
    # one repeat is much worse: half of its predictions are of others
    worse = np.where(np.arange(120)[:, None] % 2 == 0, found[rng.permutation(120)], found)
    units, folds = [f"u{i}" for i in range(120)], np.tile(np.arange(120) % 3, (3, 1))
    three = np.stack([found, worse, found])
    numbers = score_numbers(truth, {"a": three}, "a", units, folds, {})
    alone = score_numbers(truth, {"a": found[None]}, "a", units, folds[:1], {})
    named, single = ({n.metric: n for n in each} for each in (numbers, alone))
    values = [scores(truth, p)["AUC"][0] for p in three]
    assert named["AUC"].value == pytest.approx(np.mean(values))
    width = named["AUC"].high - named["AUC"].low
    t = 2 * 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    assert width > t and width > 2 * (single["AUC"].high - single["AUC"].low)
    number = accuracy_sample(truth, three, units, {}).number(DRAWS)
    hits = [scores(truth, p)["accuracy"][0] for p in three]
    assert number.value == pytest.approx(np.mean(hits))
    assert number.high - number.low > 2 * 4.303 * np.std(hits, ddof=1) / math.sqrt(3)
    once = accuracy_sample(truth, found[None], units, {}).number(DRAWS)
    plain = Sample("accuracy", units, found.argmax(1) == truth, np.ones(120)).number(DRAWS)
    assert (once.low, once.high) == (plain.low, plain.high)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_intervals_hold_the_mean_over_head_seeds_and_folds(spread):
    """Antibodies and three repeats drawn anew; one repeat alone holds it far less often."""
    rng, held, one = np.random.default_rng(2), 0, 0
    for _ in range(300):
        antibodies = 0.5 * rng.standard_normal(80)
        repeats = antibodies + spread * rng.standard_normal((3, 1))
        counts = rng.multinomial(80, np.full(80, 1 / 80), size=300)
        low, high = repeated_interval(counts @ repeats.mean(0) / 80, repeats.mean(1).tolist())
        held += low <= 0 <= high
        low, high = interval(counts @ repeats[0] / 80)
        one += low <= 0 <= high
    assert held / 300 >= 0.92
    assert one / 300 < 0.75 or spread == 0


def annotated(v_gene: str, cdr3: str, light: str = "DIQ") -> Annotated:
    letters = "EVQ" + cdr3 + "WGQ"
    region = np.repeat(np.array([5, 6, 7], np.uint8), (3, len(cdr3), 3))
    plain = np.zeros(len(letters), np.uint8)
    heavy = Chain(letters, letters, region if cdr3 else plain, plain, plain, v_gene, "")
    blank = np.zeros(len(light), np.uint8)
    other = Chain(light, light, blank, blank, blank, "", "") if light else NO_CHAIN
    return Annotated(letters, "", len(letters), heavy, other)


def test_clones_share_gene_length_and_most_of_cdr3():
    found = clones(
        [
            annotated("IGHV1-2", "ARDYYGSGSY"),
            annotated("IGHV1-2", "ARDYYGSGAA"),  # 2 of 10 differ
            annotated("IGHV1-2", "ARDYYGWWAA"),  # 2 from the second: linked through it
            annotated("IGHV1-3", "ARDYYGSGSY"),  # another gene
            annotated("IGHV1-2", "ARDYYGSGSYY"),  # another length
            annotated("IGHV1-2", "VVVVVGSGSY"),  # 5 differ
            annotated("", "", "DIQM"),
            annotated("", "", "DIQL"),
            annotated("", "", "DIQM"),
        ]
    )
    assert len(set(found[:3].tolist())) == 1
    assert len(set(found[[0, 3, 4, 5, 6, 7]].tolist())) == 6
    assert found[6] == found[8]


def test_groups_joined_by_either_partition():
    found = joined(np.array([0, 0, 1, 2, 3]), np.array([0, 1, 1, 2, 2]))
    assert numbered(found.tolist()).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_a_clone_is_never_in_two_folds_and_folds_are_alike(seed):
    rng = np.random.default_rng(seed)
    groups = rng.zipf(1.7, 600) % 150
    classes = (groups + rng.integers(0, 2, 600)) % 3
    folds = clonal_folds(groups, classes, 5, np.random.default_rng(seed))
    assert all(len(set(folds[groups == g].tolist())) == 1 for g in np.unique(groups))
    largest = np.bincount(groups).max()
    table = np.array([np.bincount(folds[classes == c], minlength=5) for c in range(3)])
    assert (np.ptp(table, axis=1) <= largest).all(), table
    np.testing.assert_array_equal(
        folds, clonal_folds(groups, classes, 5, np.random.default_rng(seed))
    )


def test_folds_of_single_antibodies_are_equal():
    classes = np.repeat([0, 1], (60, 40))
    folds = clonal_folds(np.arange(100), classes, 5, np.random.default_rng(0))
    for c, size in ((0, 12), (1, 8)):
        assert np.bincount(folds[classes == c]).tolist() == [size] * 5


def test_what_is_predicted_was_never_trained_on():
    folds = np.array([0, 1, 2, 0, 1, 2, 2])
    asked = []

    def predict(train, held):
        assert not set(folds[train]) & set(folds[held])
        assert len(train) + len(held) == 7
        asked.extend(held.tolist())
        return np.stack([held, -held], 1).astype(float)

    found = out_of_fold(predict, folds)
    assert sorted(asked) == list(range(7))
    np.testing.assert_array_equal(found, np.stack([np.arange(7), -np.arange(7)], 1))
