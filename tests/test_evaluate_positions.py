"""Every position masked in turn: against loops, interrupted, and where something is not known."""

import importlib.util
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from planted import StandIn, arbitrary, germline_records, write_germline_dataset
from small_datasets import Record, write_dataset
from tiny_models import tiny_model

from moe_ablm.data.dataset import SPLITS
from moe_ablm.data.tokenizer import CLS, EOS, MASK, VOCABULARY
from moe_ablm.evaluation import exact, positions
from moe_ablm.evaluation.estimates import draw_counts
from moe_ablm.evaluation.positions import Settings, evaluate
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.buckets import Engine

N = 24
TOKEN = {letter: i for i, letter in enumerate(VOCABULARY)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Antibodies with germline and segments; some chains are not mutated, clusters are of two."""
    records, germline = germline_records(N, 3, 0.2, shortest=11, longest=14)
    for i in range(0, N, 3):
        germline["light"][i] = records[i].light
        records[i] = replace(records[i], light_mutated="")
    segments = {c: ["V" * 5 + "N" + "D" * 2 + "J" * (len(s) - 8) for s in g]
                for c, g in germline.items()}  # fmt: skip
    path = tmp_path_factory.mktemp("positions") / "data"
    dataset = write_germline_dataset(path, records, germline, np.arange(N) // 2, segments)
    return dataset, records, germline, segments


def subject_of(dataset, work, predict=arbitrary, **options) -> Subject:
    return Subject(StandIn(predict, **options), dataset, work)


def values(outcome) -> dict[tuple, tuple[float, int]]:
    """(value, n) by metric and labels."""
    numbers = [*(s.number(draws=2) for s in outcome.samples), *outcome.numbers]
    return {(n.metric, *sorted(n.labels.items())): (n.value, n.n) for n in numbers}


def regions_by_hand(cdr: str, chain: str) -> list[str]:
    names = []
    for i, code in enumerate(cdr):
        following = next((c for c in cdr[i:] if c != "0"), "4")
        names.append(f"{'CDR' if code != '0' else 'FR'}{chain[0].upper()}{following}")
    return names


def by_hand(records, germline, segments, kept) -> dict[tuple, list[float]]:
    """Every group of residues, and every value in it, by loops over letters."""
    found = defaultdict(list)
    for i in kept:
        record = records[i]
        tokens = [CLS, *map(TOKEN.get, record.heavy), CLS, CLS, *map(TOKEN.get, record.light), EOS]
        log_likelihoods, place, mutated_at_all = [], 0, False
        for chain in ("heavy", "light"):
            letters, mutated = getattr(record, chain), getattr(record, f"{chain}_mutated")
            cdr = getattr(record, f"{chain}_cdr")
            state = "mutated" if "1" in mutated else "unmutated"
            mutated_at_all |= "1" in mutated
            place += 1 if chain == "heavy" else 2
            medians_of = defaultdict(list)
            for k, region in enumerate(regions_by_hand(cdr, chain)):
                copy = np.array(tokens, np.uint8)
                copy[place] = MASK
                p = arbitrary(copy)[place]
                loss, right = -np.log(p[TOKEN[letters[k]]]), p.argmax() == TOKEN[letters[k]]
                kind = "CDR3" if cdr[k] == "3" else "germline"
                if mutated and mutated[k] == "1":
                    kind = "mutated"
                    for metric, letter in (
                        ("likelihood", letters),
                        ("germline_likelihood", germline[chain][i]),
                    ):
                        key = metric, ("chain", chain), ("residues", "mutated")
                        found[key].append(p[TOKEN[letter[k]]])
                for labels in (
                    (("chains", "all"), ("region", "all")),
                    (("chains", "all"), ("region", region)),
                    (("chains", state), ("region", region)),
                    (("chain", chain), ("training", "unseen")),  # there is no training antibody
                    (("chain", chain), ("residues", "all")),
                    (("chain", chain), ("residues", kind)),
                    (("chain", chain), ("segment", segments[chain][i][k])),
                ):
                    found["cross_entropy", *labels].append(loss)
                    found["accuracy", *labels].append(right)
                medians_of[region].append(loss)
                log_likelihoods.append(-loss)
                place += 1
            for region, losses in medians_of.items():
                key = "median_cross_entropy", ("chains", state), ("region", region)
                found[key].append(np.median(losses))
        for name in ("all", "mutated" if mutated_at_all else "unmutated"):
            found["naturalness", ("antibodies", name)].append(np.exp(np.mean(log_likelihoods)))
    return found


def test_chains_that_training_has_are_apart(planted, tmp_path):
    """Two test antibodies; the first has the light chain of the only one that trains."""
    _, records, *_ = planted
    twin = replace(records[2], light=records[0].light, light_cdr=records[0].light_cdr,
                   light_mutated=records[0].light_mutated)  # fmt: skip
    splits = np.array([SPLITS.index(s) for s in ("train", "test", "test")])
    data = write_dataset(tmp_path / "d", [records[0], twin, records[4]], splits)
    found = values(evaluate(subject_of(data, tmp_path), Settings(antibodies=2)))
    alone = {}
    for name, record in (("seen", twin), ("unseen", records[4])):
        tokens = [CLS, *map(TOKEN.get, record.heavy), CLS, CLS, *map(TOKEN.get, record.light), EOS]
        first = len(record.heavy) + 3
        losses = []
        for place in range(first, first + len(record.light)):
            copy = np.array(tokens, np.uint8)
            copy[place] = MASK
            losses.append(-np.log(arbitrary(copy)[place, tokens[place]]))
        alone[name] = losses
    for name, losses in alone.items():
        value, n = found["cross_entropy", ("chain", "light"), ("training", name)]
        assert (value, n) == (pytest.approx(np.mean(losses), rel=1e-5), len(losses))
    assert ("cross_entropy", ("chain", "heavy"), ("training", "seen")) not in found


def test_all_numbers_are_those_of_loops_over_letters(planted, tmp_path):
    dataset, *known = planted
    outcome = evaluate(subject_of(dataset, tmp_path), Settings(antibodies=N))
    expected = by_hand(*known, range(N))
    found = values(outcome)
    assert set(found) == set(expected)
    assert len([key for key in found if key[0] == "cross_entropy"]) > 40
    for key, parts in expected.items():
        middle = np.median(parts) if key[0] == "median_cross_entropy" else np.mean(parts)
        assert found[key] == (pytest.approx(middle, rel=2e-6), len(parts)), key


def test_a_killed_evaluation_goes_on_after_its_last_part(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "WINDOW", (60, 1 << 30))  # two antibodies or so
    dataset, records, *_ = planted
    total = sum(len(r.heavy) + len(r.light) for r in records)
    whole = evaluate(subject_of(dataset, tmp_path / "whole"), Settings(N))
    stopped = subject_of(dataset, tmp_path / "parts", stop_after=total // 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, Settings(N))
    again = subject_of(dataset, tmp_path / "parts")
    resumed = evaluate(again, Settings(N))
    assert total // 2 <= again.engine.rows < total // 2 + 60
    assert any("kept from an earlier command" in note for note in resumed.notes)
    third = subject_of(dataset, tmp_path / "parts")
    once_more = evaluate(third, Settings(N))
    assert third.engine.rows == 0
    for other in (resumed, once_more):
        assert repr(other.numbers) == repr(whole.numbers)
        for a, b in zip(whole.samples, other.samples, strict=True):
            np.testing.assert_array_equal(a.total, b.total)
            np.testing.assert_array_equal(a.weight, b.weight)
    assert [n for n in whole.notes if "positions/s" in n]


def test_other_settings_and_models_do_not_take_each_others_parts(planted, tmp_path):
    dataset = planted[0]
    few = evaluate(subject_of(dataset, tmp_path), Settings(antibodies=5))
    many = evaluate(subject_of(dataset, tmp_path), Settings(antibodies=N))
    subject = Subject(Engine(tiny_model(layers=1)), dataset, tmp_path)
    real = evaluate(subject, Settings(antibodies=5))
    key = ("cross_entropy", ("chains", "all"), ("region", "all"))
    found = [values(outcome)[key] for outcome in (few, many, real)]
    assert len({value for value, _ in found}) == 3
    assert len(list(tmp_path.glob("positions-*.parquet"))) == 3


def test_single_chains_without_germline_are_evaluated_with_notes(tmp_path):
    records = [Record("EVQLVESGGG" + aa, "") for aa in "ACDE"]
    dataset = write_dataset(tmp_path / "data", records, SPLITS.index("test"))
    outcome = evaluate(subject_of(dataset, tmp_path / "work"), Settings())
    assert set(values(outcome)) == {
        ("cross_entropy", ("chains", "all"), ("region", "all")),
        ("accuracy", ("chains", "all"), ("region", "all")),
        ("cross_entropy", ("chain", "heavy"), ("residues", "all")),
        ("accuracy", ("chain", "heavy"), ("residues", "all")),
        ("cross_entropy", ("chain", "heavy"), ("training", "unseen")),
        ("accuracy", ("chain", "heavy"), ("training", "unseen")),
        ("naturalness", ("antibodies", "all")),
    }
    for what in ("no light chains", "no regions", "no germline", "gene segments"):
        assert any(what in note for note in outcome.notes), what
    assert not outcome.pictures


@pytest.mark.parametrize("with_seaborn", [True, False])
def test_letter_values_are_drawn(planted, tmp_path, monkeypatch, with_seaborn):
    if with_seaborn:
        pytest.importorskip("seaborn")
    else:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            positions.importlib.util, "find_spec", lambda n: None if n == "seaborn" else find(n)
        )
    outcome = evaluate(subject_of(planted[0], tmp_path), Settings(antibodies=N))
    figure = outcome.pictures[0].draw()
    assert [axis.get_title() for axis in figure.axes] == ["unmutated chains", "mutated chains"]
    labels = [t.get_text() for t in figure.axes[-1].get_xticklabels()]
    assert labels[:3] == ["FRH1", "CDRH1", "FRH2"] and len(labels) == 14
    assert any("box plots instead" in note for note in outcome.notes) != with_seaborn
    assert all(axis.has_data() for axis in figure.axes)


def test_medians_and_their_intervals_are_those_of_drawn_copies():
    rng = np.random.default_rng(0)
    groups, found = rng.integers(0, 7, 60), rng.normal(size=60).round(1)
    names, middles = positions.group_medians(groups, found)
    assert middles.tolist() == pytest.approx([np.median(found[groups == g]) for g in names])
    units = [f"u{i}" for i in rng.integers(0, 15, 60)]
    number = positions.median_number("m", units, found, {}, "nats", draws=300)
    named = np.unique(units)
    drawn = [
        np.median(np.repeat(found, [row[list(named).index(u)] for u in units]))
        for row in draw_counts(tuple(named.tolist()), 300)
    ]
    assert number.value == np.median(found)
    assert (number.low, number.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    alone = positions.median_number("m", ["a", "a"], np.array([1.0, 2.0]), {}, "nats")
    assert alone.value == 1.5 and np.isnan(alone.low)


@pytest.mark.parametrize("order", [("low", "high"), ("high", "low")])
def test_no_panel_cuts_off_what_another_has_room_for(order, monkeypatch):
    """Panels share an axis, whose limits are those of all of them."""
    monkeypatch.setattr(positions, "has_seaborn", lambda: False)
    values = {"low": np.array([0.1, 0.2, 0.3]), "high": np.array([1.0, 4.0, 9.0])}
    figure = positions.letter_values({name: {"FRH1": values[name]} for name in order}, "nats")
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert low == 0 and high >= 9
