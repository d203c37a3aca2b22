"""Perplexity of test sets: against loops over masked rows, and masks that are the same for all."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from planted import StandIn, arbitrary
from small_datasets import Record, random_records, write_dataset
from tiny_models import engine

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.dataset import SPLITS
from moe_ablm.data.regions import region_names
from moe_ablm.data.tokenizer import AMINO_ACIDS, LAYOUTS, MASK, VOCABULARY
from moe_ablm.evaluation.cohort import annotated
from moe_ablm.evaluation.perplexity import MASK_RATE, Settings, evaluate, masked, test_sets
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.logits import EveryPosition

SEED, REPEATS = 11, 3
LAYOUT, CHAINS = LAYOUTS["esm"], ("heavy", "light")
test_sets.__test__ = False  # of the package, no test
SINGLE = Record("ACDEFGHIKLMNPQRSTVWY", "", heavy_cdr="00110022003333300000")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Pairs, and a heavy chain alone."""
    records = [*random_records(14, 2), SINGLE]
    path = tmp_path_factory.mktemp("perplexity") / "data"
    return write_dataset(path, records, SPLITS.index("test"))


def by_hand(
    dataset, predict, sets=("paired", "heavy", "light")
) -> dict[tuple, list[tuple[float, bool]]]:
    """(loss, hit) of every masked residue by test set and region: float64, a row at a time."""
    found = defaultdict(list)
    for antibody in annotated(dataset, np.arange(len(dataset))):
        for name in sets:
            chains = [c for c, _ in antibody.chains() if name in (c, "paired")]
            if len(chains) < (2 if name == "paired" else 1):
                continue
            letters = {c: getattr(antibody, c).letters if c in chains else "" for c in CHAINS}
            row = row_of(Antibody("x", **letters), LAYOUT)
            regions = [
                region_names()[7 * CHAINS.index(c) + r - 1]
                for c in chains
                for r in getattr(antibody, c).region
            ]
            for repeat in range(REPEATS):
                chosen, corrupted = masked([row], np.array([antibody.key], np.uint64), SEED, repeat)
                probabilities = predict(corrupted[0])
                for i in chosen[0]:
                    place = row.places[i]
                    p = probabilities[place].astype(np.float32).astype(float)
                    entry = (-math.log(p[row.tokens[place]]), p.argmax() == row.tokens[place])
                    found[name, "all"].append(entry)
                    if name == "paired":
                        found[name, regions[i]].append(entry)
    return found


def test_numbers_are_those_of_a_loop_over_masked_rows(dataset, tmp_path):
    subject = Subject(StandIn(arbitrary), dataset, tmp_path, seed=SEED)
    outcome = evaluate(subject, Settings(100, REPEATS))
    found = {
        (s.metric, s.labels["test set"], s.labels["region"]): s.number(draws=2)
        for s in outcome.samples
        if "region" in s.labels
    }
    expected = by_hand(dataset, arbitrary)
    assert {(name, region) for _, name, region in found} == set(expected)
    assert {"CDRH3", "FRL4", "all"} <= {region for _, region in expected}
    for (name, region), entries in expected.items():
        losses, hits = map(list, zip(*entries, strict=True))
        loss = sum(losses) / len(losses)
        assert found["loss", name, region].value == pytest.approx(loss, rel=2e-6)
        assert found["perplexity", name, region].value == pytest.approx(math.exp(loss), rel=2e-5)
        assert found["accuracy", name, region].value == pytest.approx(np.mean(hits))
        assert found["loss", name, region].n == len(entries)


def test_chains_that_training_has_are_apart(tmp_path):
    """12 test pairs, of which 5 have a light and one a heavy chain of two training antibodies."""
    records = random_records(14, 3)

    def share(chain: str, row: int, of: int) -> None:
        names = (chain, f"{chain}_cdr", f"{chain}_mutated")
        its = {name: getattr(records[of], name) for name in names}
        records[row] = replace(records[row], **its)

    for row in range(4, 9):
        share("light", row, 13 * (row % 2))
    share("heavy", 9, 13)
    splits = np.full(14, SPLITS.index("test"))
    splits[[0, 13]] = SPLITS.index("train")
    data = write_dataset(tmp_path / "d", records, splits)  # a quarter has the first row alone
    test = annotated(data, data.rows("test"))
    losses = defaultdict(list)
    for n, antibody in enumerate(test, 1):
        row = row_of(antibody.antibody, LAYOUT)
        chosen, corrupted = masked([row], np.array([antibody.key], np.uint64), SEED, 0)
        probabilities = arbitrary(corrupted[0]).astype(np.float32).astype(float)
        for i in chosen[0]:
            place = row.places[i]
            loss = -math.log(probabilities[place, row.tokens[place]])
            light = i >= len(antibody.heavy.letters)
            of = "light" if light else "heavy"
            trained = 4 <= n < 9 if light else n == 9
            losses[of].append(loss)
            losses[f"{'seen' if trained else 'unseen'} {of}"].append(loss)

    def found(**facts) -> dict[str, float]:
        engine = StandIn(arbitrary)
        engine.model = replace(engine.model, facts=facts)
        outcome = evaluate(Subject(engine, data, tmp_path, seed=SEED), Settings(100, 1))
        words = "as of the model's run" if facts else "all of it"
        assert sum(words in note for note in outcome.notes) == 1
        return {
            s.labels["chain"]: s.number(draws=2).value
            for s in outcome.samples
            if s.metric == "loss" and s.labels["test set"] == "paired" and "chain" in s.labels
        }

    full = found()
    assert set(full) == set(losses) and len(full) == 6
    for name, values in losses.items():
        assert full[name] == pytest.approx(np.mean(values), rel=2e-6), name
    # a run on a quarter, the first row, has seen the light chains of even rows alone
    quarter = found(data={"sha256": data.identity, "fraction": "quarter"})
    assert quarter["light"] == full["light"] and quarter["seen light"] != full["seen light"]
    assert "seen heavy" not in quarter
    assert found(data={"sha256": data.identity, "fraction": "full"}) == full


def test_a_model_gives_the_loss_that_its_probabilities_have(dataset, tmp_path):
    """The encoder itself, in batches of padded rows, against the same rows one by one."""
    model = engine()

    def alone(tokens: np.ndarray) -> np.ndarray:
        ((_, log_probabilities),) = model.run(EveryPosition(), [tokens])
        return np.exp(log_probabilities[: len(tokens)].astype(float))

    outcome = evaluate(Subject(model, dataset, tmp_path, seed=SEED), Settings(100, REPEATS))
    expected = [loss for loss, _ in by_hand(dataset, alone, ["paired"])["paired", "all"]]
    loss = next(s for s in outcome.samples if s.metric == "loss").number(draws=2)
    assert loss.n == len(expected) and loss.value == pytest.approx(np.mean(expected), rel=1e-5)


def test_masks_do_not_depend_on_the_model_or_on_other_antibodies(dataset, tmp_path):
    keys = dataset.key[:8]
    antibodies = [a.antibody for a in annotated(dataset, np.arange(8))]
    rows = [row_of(a, LAYOUT) for a in antibodies]
    chosen, corrupted = masked(rows, keys, SEED, 0)
    for i, row in enumerate(rows):
        alone, tokens = masked([row], keys[i : i + 1], SEED, 0)
        np.testing.assert_array_equal(alone[0], chosen[i])
        np.testing.assert_array_equal(tokens[0], corrupted[i])
    # another layout of tokens: the same residues, replaced by the same
    other = [row_of(a, LAYOUTS["balm"]) for a in antibodies]
    for i, (places, tokens) in enumerate(zip(*masked(other, keys, SEED, 0), strict=True)):
        np.testing.assert_array_equal(places, chosen[i])
        np.testing.assert_array_equal(tokens[other[i].places], corrupted[i][rows[i].places])
    repeated = masked(rows, keys, SEED, 1)[0]
    reseeded = masked(rows, keys, SEED + 1, 0)[0]
    for drawn in (repeated, reseeded):
        assert any(not np.array_equal(a, b) for a, b in zip(drawn, chosen, strict=True))


def test_masks_are_15_percent_of_which_80_10_10():
    letters = "".join(np.random.default_rng(0).choice(list(AMINO_ACIDS), 300))
    rows = [row_of(Antibody("x", letters[:150], letters[150:]), LAYOUT)] * 200
    chosen, corrupted = masked(rows, np.arange(1, 201, dtype=np.uint64) << np.uint64(32), 0, 0)
    n = sum(map(len, chosen))
    assert n / 60_000 == pytest.approx(MASK_RATE, abs=0.006)
    new = np.concatenate([c[r.places[i]] for c, r, i in zip(corrupted, rows, chosen, strict=True)])
    old = np.concatenate([r.tokens[r.places[i]] for r, i in zip(rows, chosen, strict=True)])
    assert (new == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert ((new != MASK) & (new != old)).mean() == pytest.approx(0.1 * 19 / 20, abs=0.015)
    for row, tokens, places in zip(rows, corrupted, chosen, strict=True):
        untouched = np.delete(np.arange(len(tokens)), row.places[places])
        np.testing.assert_array_equal(tokens[untouched], row.tokens[untouched])


def test_test_sets_are_pairs_and_chains_alone(dataset):
    sets = test_sets(annotated(dataset, np.arange(len(dataset))))
    assert {name: len(members) for name, members in sets.items()} == {
        "paired": 14, "heavy": 15, "light": 14,
    }  # fmt: skip
    assert all(not a.light.letters for a in sets["heavy"])
    assert all(not a.heavy.letters for a in sets["light"])


def test_single_chains_have_no_pairs_and_say_so(tmp_path):
    data = write_dataset(tmp_path / "d", [SINGLE] * 3, SPLITS.index("test"))
    outcome = evaluate(Subject(StandIn(arbitrary), data, tmp_path), Settings(10, 1))
    assert {s.labels["test set"] for s in outcome.samples} == {"heavy"}
    assert sum("left out" in note for note in outcome.notes) == 2


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(dataset, tmp_path):
    size = len(VOCABULARY)
    uniform = StandIn(lambda tokens: np.full((len(tokens), size), 1 / size))
    outcome = evaluate(Subject(uniform, dataset, tmp_path), Settings(100, 1))
    for sample in outcome.samples:
        if sample.metric == "perplexity" and sample.labels.get("region") == "all":
            number = sample.number()
            assert (number.value, number.low, number.high) == pytest.approx([size] * 3, rel=1e-6)
