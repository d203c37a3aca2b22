"""Mutations across chains and from germline: against loops, and with planted answers."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from planted import StandIn, arbitrary, germline_records, write_germline_dataset
from small_datasets import Record, write_dataset

from moe_ablm.data.dataset import SPLITS
from moe_ablm.data.tokenizer import AMINO_ACIDS, CLS, EOS, MASK, VOCABULARY
from moe_ablm.evaluation.cohort import mutation_counts, sample_rows
from moe_ablm.evaluation.estimates import Sample, draw_counts, quotient
from moe_ablm.evaluation.from_germline import CHEMISTRY, counts_of_others
from moe_ablm.evaluation.mutations import Settings, evaluate, mutated_pairs
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.partners import random_partners
from moe_ablm.evaluation.scores import Ranking
from moe_ablm.evaluation.subject import Subject

N = 30
CHAINS = ("heavy", "light")
TOKEN = {letter: i for i, letter in enumerate(VOCABULARY)}
CLASSES = ("AGILMV", "CSTPNQ", "DE", "KRH", "FYW")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(dataset, records, germline); clusters of two antibodies, not all with three mutations."""
    records, germline = germline_records(N, 5, 0.4, shortest=14, longest=18)
    path = tmp_path_factory.mktemp("mutations") / "data"
    return write_germline_dataset(path, records, germline, np.arange(N) // 2), records, germline


def subject_of(dataset, tmp_path, predict=arbitrary) -> Subject:
    return Subject(StandIn(predict), dataset, tmp_path)


def numbers_of(outcome) -> dict[tuple, object]:
    """Numbers by metric and labels."""
    found = [*(s.number() for s in outcome.samples), *outcome.numbers]
    return {(n.metric, *sorted(n.labels.items())): n for n in found}


def tokens_of(heavy: str, light: str) -> np.ndarray:
    between = [CLS, CLS] if heavy and light else []
    chains = [[TOKEN[aa] for aa in heavy], [TOKEN[aa] for aa in light]]
    return np.array([CLS, *chains[0], *between, *chains[1], EOS], np.uint8)


def masked_row(record: Record, masked: str, partner: str) -> tuple[np.ndarray, list[int]]:
    """Tokens with the mutations of a chain masked, and where they are."""
    chains = [partner, record.light] if masked == "light" else [record.heavy, partner]
    tokens = tokens_of(*chains)
    first = 1 if masked == "heavy" else 1 + len(partner) + (2 if partner else 0)
    at = [first + i for i, m in enumerate(getattr(record, f"{masked}_mutated")) if m == "1"]
    tokens[at] = MASK
    return tokens, at


def qualified(records) -> list[int]:
    both = [[getattr(r, f"{c}_mutated").count("1") >= 3 for c in CHAINS] for r in records]
    return [i for i, ok in enumerate(both) if all(ok)]


def test_numbers_across_chains_are_those_of_loops(planted, tmp_path):
    dataset, records, germline = planted
    subject = subject_of(dataset, tmp_path)
    found = numbers_of(evaluate(subject, Settings()))
    everyone, _ = mutated_pairs(subject, Settings())
    kept = qualified(records)
    assert 5 < len(kept) < N and [a.name for a in everyone] == [f"r{i}" for i in kept]
    for masked, other in (CHAINS, CHAINS[::-1]):
        drawn = random_partners(everyone, masked, 300, 0)
        sums = defaultdict(list)
        for number, i in enumerate(kept):
            partners = {
                "native": getattr(records[i], other),
                "reverted": germline[other][i],
                "random": getattr(records[kept[drawn[number]]], other),
                "none": "",
            }
            for partner, letters in partners.items():
                row, at = masked_row(records[i], masked, letters)
                for place, k in zip(
                    at, [k for k, m in enumerate(getattr(records[i], f"{masked}_mutated"))
                         if m == "1"], strict=True,
                ):  # fmt: skip
                    p = arbitrary(row)[place]
                    truth = p[TOKEN[getattr(records[i], masked)[k]]]
                    reverted = p[TOKEN[germline[masked][i][k]]]
                    total = sum(p[TOKEN[aa]] for aa in AMINO_ACIDS)
                    sums["cross_entropy", partner].append(-np.log(truth))
                    sums["mutated", partner].append(truth)
                    sums["germline", partner].append(reverted)
                    sums["other non-germline", partner].append(total - truth - reverted)
                    sums["non-germline", partner].append(total - reverted)
        about = ("masked", masked)
        for (what, partner), parts in sums.items():
            beside = ("partner", partner)
            if what == "cross_entropy":
                number = found["cross_entropy", about, beside]
                if partner != "native":
                    gain = found["gain", about, beside]
                    expected = np.mean(parts) - np.mean(sums[what, "native"])
                    assert gain.value == pytest.approx(expected, abs=1e-5)
                    assert gain.low < gain.value < gain.high
            else:
                number = found["likelihood", about, beside, ("residue", what)]
                if partner != "native" and what != "germline":
                    ratio = found["likelihood_ratio", about, beside, ("residue", what)]
                    expected = np.mean(sums[what, "native"]) / np.mean(parts)
                    assert ratio.value == pytest.approx(expected, rel=1e-5)
            assert number.value == pytest.approx(np.mean(parts), rel=1e-5)
            assert number.n == len(parts)


def planted_model(records, germline, likelihoods: dict[str, float]):
    """A model that gives mutated residues a likelihood that depends on the partner alone."""
    known = {}
    for i, record in enumerate(records):
        for masked, other in (CHAINS, CHAINS[::-1]):
            partners = {
                getattr(record, other): "native",
                germline[other][i]: "reverted",
                "": "none",
            }
            for j, another in enumerate(records):
                if j != i:
                    partners.setdefault(getattr(another, other), "random")
            for letters, partner in partners.items():
                row, at = masked_row(record, masked, letters)
                truth = [
                    TOKEN[aa] for aa, m in zip(getattr(record, masked),
                                               getattr(record, f"{masked}_mutated"), strict=True)
                    if m == "1"
                ]  # fmt: skip
                known[row.tobytes()] = at, truth, likelihoods[partner]

    def predict(tokens):
        p = np.full((len(tokens), len(VOCABULARY)), 1 / len(VOCABULARY))
        if MASK in tokens:
            at, truth, likelihood = known[tokens.tobytes()]
            p[at] = (1 - likelihood) / (len(VOCABULARY) - 1)
            p[at, truth] = likelihood
        return p

    return predict


def test_a_planted_gain_is_found_exactly(planted, tmp_path):
    dataset, records, germline = planted
    likelihoods = {"native": 0.5, "reverted": 0.1, "random": 0.2, "none": 0.4}
    predict = planted_model(records, germline, likelihoods)
    found = numbers_of(evaluate(subject_of(dataset, tmp_path, predict), Settings()))
    for masked in CHAINS:
        for partner in ("reverted", "random", "none"):
            at = ("masked", masked), ("partner", partner)
            gain, expected = found["gain", *at], np.log(0.5 / likelihoods[partner])
            assert (gain.value, gain.low, gain.high) == pytest.approx((expected,) * 3, abs=1e-5)
            ratio = found["likelihood_ratio", *at, ("residue", "mutated")]
            assert ratio.value == pytest.approx(0.5 / likelihoods[partner], rel=1e-5)


def test_a_model_that_ignores_the_partner_gains_nothing(planted, tmp_path):
    dataset, records, germline = planted
    predict = planted_model(
        records, germline, dict.fromkeys(("native", "reverted", "random", "none"), 0.3)
    )
    found = numbers_of(evaluate(subject_of(dataset, tmp_path, predict), Settings()))
    gains = [number for key, number in found.items() if key[0] == "gain"]
    assert len(gains) == 6
    assert all((n.value, n.low, n.high) == (0, 0, 0) for n in gains)


def test_random_partners_are_of_others_and_do_not_depend_on_who_else_is_there(planted, tmp_path):
    everyone, _ = subject_of(planted[0], tmp_path).antibodies(N)
    drawn = random_partners(everyone, "light", 300, 0)
    for a, j in zip(everyone, drawn, strict=True):
        assert a.unit != everyone[j].unit and a.heavy.letters != everyone[j].heavy.letters
    assert len(set(drawn)) > N // 3
    fewer = [a for i, a in enumerate(everyone) if i % 3]
    for a, j in zip(fewer, random_partners(fewer, "light", 300, 0), strict=True):
        before = everyone[drawn[everyone.index(a)]]
        assert before is fewer[j] or before not in fewer
    assert random_partners(everyone, "light", 300, 1) != drawn
    short = random_partners(everyone, "light", 30, 0)
    for a, j in zip(everyone, short, strict=True):
        assert j is None or len(a.light) + len(everyone[j].heavy) <= 30
    assert None in short and any(j is not None for j in short)
    twins = [replace(a, heavy=everyone[0].heavy) for a in everyone]
    assert set(random_partners(twins, "light", 300, 0)) == {None}


def test_antibodies_without_a_random_partner_are_left_out_of_its_numbers(planted, tmp_path):
    dataset, records, germline = planted
    first = qualified(records)[0]
    alone = write_germline_dataset(
        tmp_path / "one", [records[first]], {c: [germline[c][first]] for c in CHAINS}
    )
    outcome = evaluate(subject_of(alone, tmp_path), Settings())
    found = numbers_of(outcome)
    assert any("no random partner" in note for note in outcome.notes)
    at = ("masked", "light"), ("partner", "random")
    assert np.isnan(found["gain", *at].value) and found["gain", *at].n == 0
    assert np.isfinite(found["cross_entropy", at[0], ("partner", "native")].value)


def test_rows_that_qualify_are_counted_before_a_cohort_is_made(planted, tmp_path):
    dataset, records, _ = planted
    rows = sample_rows(dataset, "test", N, 0)
    expected = [[getattr(records[i], f"{c}_mutated").count("1") for i in rows] for c in CHAINS]
    assert mutation_counts(dataset, rows).tolist() == expected
    subject = subject_of(dataset, tmp_path)
    for settings in (Settings(least=4), Settings(antibodies=4), Settings(candidates=20)):
        everyone, notes = mutated_pairs(subject, settings)
        assert 0 < len(everyone) <= settings.antibodies
        assert all(min(a.heavy.mutations, a.light.mutations) >= settings.least for a in everyone)
    looked_through = set(sample_rows(dataset, "test", 20, 0).tolist())
    assert {int(a.name[1:]) for a in everyone} <= looked_through and "of 20" in notes[-1]


def by_loops(records, germline, kept, chain):
    """Truth and score of positions outside CDR3; top-1 hits of class and residue."""
    truth, score, own, hits = [], [], [], defaultdict(list)
    for i in kept:
        p = arbitrary(tokens_of(germline["heavy"][i], germline["light"][i]))
        first = 1 if chain == "heavy" else 3 + len(germline["heavy"][i])
        for k, reverted in enumerate(germline[chain][i]):
            if getattr(records[i], f"{chain}_cdr")[k] == "3":
                continue
            mutated = getattr(records[i], f"{chain}_mutated")[k] == "1"
            truth.append(mutated)
            score.append(1 - p[first + k, TOKEN[reverted]])
            own.append(i)
            if mutated:
                there = getattr(records[i], chain)[k]
                chances = {aa: p[first + k, TOKEN[aa]] for aa in AMINO_ACIDS if aa != reverted}
                of_class = [sum(chances.get(aa, 0) for aa in letters) for letters in CLASSES]
                hits["class_accuracy"].append(there in CLASSES[np.argmax(of_class)])
                hits["residue_accuracy"].append(there == max(chances, key=chances.get))
    return np.array(truth), np.array(score), np.array(own), hits


def test_mutations_from_germline_are_ranked_as_scikit_learn_does(planted, tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    dataset, records, germline = planted
    found = numbers_of(evaluate(subject_of(dataset, tmp_path), Settings()))
    named = {"auroc": metrics.roc_auc_score, "average_precision": metrics.average_precision_score}
    for chain in CHAINS:
        truth, score, own, hits = by_loops(records, germline, qualified(records), chain)
        at = ("chain", chain), ("predictor", "model")
        for metric, compute in named.items():
            number = found[metric, *at]
            assert number.value == pytest.approx(compute(truth, score), abs=1e-6)
            assert number.low < number.value < number.high and number.n == len(truth)
            each = [compute(truth[own == i], score[own == i]) for i in np.unique(own)]
            assert found[f"{metric}_within", *at].value == pytest.approx(np.mean(each), abs=1e-6)
        for metric, parts in hits.items():
            assert found[metric, *at].value == pytest.approx(np.mean(parts))
            assert found[metric, *at].n == len(parts)


def test_a_model_that_knows_where_and_what_is_right_everywhere(planted, tmp_path):
    dataset, records, germline = planted
    known = {tokens_of(germline["heavy"][i], germline["light"][i]).tobytes(): record
             for i, record in enumerate(records)}  # fmt: skip

    def predict(tokens):
        p = np.full((len(tokens), len(VOCABULARY)), 1e-3)
        p[np.arange(len(tokens)), tokens] = 0.5
        if MASK not in tokens:
            # at a mutated residue its germline stays the most probable, but less so
            truth = tokens_of(known[tokens.tobytes()].heavy, known[tokens.tobytes()].light)
            at = np.flatnonzero(truth != tokens)
            p[at, tokens[at]], p[at, truth[at]] = 0.4, 0.2
        return p

    found = numbers_of(evaluate(subject_of(dataset, tmp_path, predict), Settings()))
    for chain in CHAINS:
        at = ("chain", chain), ("predictor", "model")
        for metric in ("auroc", "average_precision", "auroc_within", "class_accuracy",
                       "residue_accuracy"):  # fmt: skip
            assert (found[metric, *at].value, found[metric, *at].low) == (1, 1), metric
        assert found["auroc", at[0], ("predictor", "region")].value < 0.8
        assert found["residue_accuracy", at[0], ("predictor", "most frequent")].value < 0.5


def test_baselines_count_among_other_clusters():
    rng = np.random.default_rng(0)
    owner, context, target = (rng.integers(0, size, 200) for size in (9, 4, 6))
    found = counts_of_others(owner, context, target, 6)
    for i in range(200):
        others = (owner != owner[i]) & (context == context[i])
        assert found[i].tolist() == np.bincount(target[others], minlength=6).tolist()
    assert sorted("".join(CHEMISTRY)) == sorted(AMINO_ACIDS) and CHEMISTRY == CLASSES


@pytest.mark.parametrize("ties", [False, True])
def test_rankings_are_those_of_scikit_learn(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, scores = rng.random(300) < 0.2, rng.normal(size=300)
    scores = scores.round(0) if ties else scores
    weights = rng.integers(0, 4, 300)
    ranking = Ranking.of(truth, scores)
    for given in (None, weights):
        of = {"sample_weight": given}
        assert ranking.auroc(given) == pytest.approx(metrics.roc_auc_score(truth, scores, **of))
        assert ranking.average_precision(given) == pytest.approx(
            metrics.average_precision_score(truth, scores, **of)
        )
    one_kind = Ranking.of(np.zeros(3, bool), np.arange(3))
    assert np.isnan(one_kind.auroc()) and np.isnan(one_kind.average_precision())


def test_quotients_are_paired_by_unit():
    rng = np.random.default_rng(0)
    units, weight = [f"u{i % 12}" for i in range(40)], rng.integers(1, 9, 40).astype(float)
    a = Sample("loss", units, rng.random(40) * weight, weight, unit="nats")
    b = Sample("loss", units[::-1], (a.total * 0.5)[::-1], weight[::-1], unit="nats")
    twice = quotient(a, b)
    assert (twice.value, twice.low, twice.high) == pytest.approx((2, 2, 2))
    assert twice.n == 12 and twice.unit == ""
    # perplexities, of units that both have, by hand
    few = replace(a, units=[*units[:20], *["other"] * 20], scale="exp")
    number = quotient(few, replace(b, scale="exp"), draws=50)
    at, back = np.arange(20), 39 - np.arange(40)
    names = sorted(set(units[:20]))

    def drawn(sample, entries, counts):
        times = np.array([counts[names.index(sample.units[e])] for e in entries])
        return np.exp(times @ sample.total[entries] / (times @ sample.weight[entries]))

    def both(counts):
        return drawn(few, at, counts) / drawn(b, back, counts)

    spread = [both(row) for row in draw_counts(tuple(names), 50)]
    assert number.value == pytest.approx(both(np.ones(12)))
    assert (number.low, number.high) == pytest.approx(tuple(np.quantile(spread, [0.025, 0.975])))
    nothing = quotient(replace(a, units=["x"] * 40), b)
    assert np.isnan(nothing.value) and nothing.n == 0


def test_data_that_do_not_allow_it_are_skipped(planted, tmp_path):
    _, records, germline = planted
    test = SPLITS.index("test")
    single = [replace(r, light="", light_cdr="", light_mutated="") for r in records]
    for number, (dataset, settings, reason) in enumerate((
        (None, Settings(), "no dataset"),
        (write_dataset(tmp_path / "none", records, test), Settings(), "no germline"),
        (write_dataset(tmp_path / "train", records, 0), Settings(), "split test"),
        (
            write_germline_dataset(tmp_path / "single", single,
                                   {"heavy": germline["heavy"], "light": [""] * N}),
            Settings(),
            "single chains only",
        ),
        (planted[0], Settings(least=40), "none of 30 antibodies has 40 mutations"),
    )):  # fmt: skip
        with pytest.raises(Skipped, match=reason):
            evaluate(subject_of(dataset, tmp_path / str(number)), settings)


def test_the_figure_shows_both_chains_and_all_partners(planted, tmp_path):
    outcome = evaluate(subject_of(planted[0], tmp_path), Settings())
    figure = outcome.pictures[0].draw()
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert [len(h) for h in heights] == [4, 4, 8, 8]
    found = numbers_of(outcome)
    for axis, masked in enumerate(CHAINS):
        expected = [found["cross_entropy", ("masked", masked), ("partner", p)].value
                    for p in ("native", "reverted", "random", "none")]  # fmt: skip
        assert heights[axis] == pytest.approx(expected)
