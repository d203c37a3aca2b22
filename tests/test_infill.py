"""Completion of masked residues."""

import numpy as np
import pytest
from tiny_models import engine

from moe_ablm.data.antibody import row_of
from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID, LAYOUTS, MASK
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.infill import INFILLED, infill, table
from moe_ablm.inference.logits import EveryPosition
from moe_ablm.inference.sampling import Sampling

ESM = LAYOUTS["esm"]


def antibodies(*pairs):
    return given(pairs, ESM, 64, INFILLED)


def probabilities(antibody) -> dict[int, np.ndarray]:
    """Of the 20 amino acids at every masked residue."""
    row = row_of(antibody, ESM)
    (found,) = [x for _, x in engine().run(EveryPosition(), [row.tokens])]
    masked = [i for i, place in enumerate(row.places) if row.tokens[place] == MASK]
    some = found[row.places][:, FIRST_AMINO_ACID : FIRST_AMINO_ACID + 20].astype(np.float64)
    shares = np.exp(some) / np.exp(some).sum(1, keepdims=True)
    return {i: shares[i] for i in masked}


def test_the_most_certain_residue_first_then_the_next_given_it():
    (start,) = antibodies(("EV_LV", "D_Q"))
    (done,) = infill(engine(), [start])
    left = {"heavy": list(start.heavy), "light": list(start.light)}
    for filled in done.filled:
        (now,) = antibodies(("".join(left["heavy"]), "".join(left["light"])))
        expected = probabilities(now)
        surest = max(expected, key=lambda i: expected[i].max())
        assert filled.place == surest
        assert filled.residue == AMINO_ACIDS[int(expected[surest].argmax())]
        assert filled.probability == pytest.approx(expected[surest].max(), rel=1e-5)
        chain, place = ("heavy", filled.place) if filled.place < 5 else ("light", filled.place - 5)
        left[chain][place] = filled.residue
    assert (done.antibody.heavy, done.antibody.light) == tuple(map("".join, left.values()))
    logs = [np.log(filled.probability) for filled in done.filled]
    assert len(logs) == 2 and done.log_probability == pytest.approx(sum(logs))


def test_candidates_are_amino_acids_best_first():
    (start,) = antibodies(("EV_LV", ""))
    ((filled,),) = [c.filled for c in infill(engine(), [start], Sampling(top=20))]
    letters, shares = zip(*filled.candidates, strict=True)
    assert sorted(letters) == sorted(AMINO_ACIDS)
    assert list(shares) == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert filled.residue == letters[0] and filled.probability == shares[0]


def test_draws_depend_on_seed_sequence_and_sample_alone():
    pairs = [("EV___", "D_Q"), ("__QLV", "")]
    sampling = Sampling(samples=4, temperature=3.0, seed=5)
    both = infill(engine(), antibodies(*pairs), sampling)
    turned = infill(engine(), antibodies(*pairs[::-1]), sampling)
    assert [c.sample for c in both] == [0, 1, 2, 3] * 2
    heavies = [c.antibody.heavy for c in both]
    assert heavies[:4] == [c.antibody.heavy for c in turned[4:]]
    assert heavies[4:] == [c.antibody.heavy for c in turned[:4]]
    assert len(set(heavies[:4])) > 1
    other = infill(engine(), antibodies(*pairs), Sampling(4, 3.0, seed=6))
    assert [c.antibody.heavy for c in other] != heavies


def test_draws_follow_the_probabilities():
    (start,) = antibodies(("EV_LV", ""))
    expected = probabilities(start)[2]
    done = infill(engine(), [start], Sampling(samples=1000))
    counts = np.array([sum(c.filled[0].residue == a for c in done) for a in AMINO_ACIDS])
    error = np.sqrt(expected * (1 - expected) / 1000)
    assert (np.abs(counts / 1000 - expected) < 5 * error + 1e-3).all()
    cold = infill(engine(), [start], Sampling(samples=3, temperature=1e-3))
    assert {c.filled[0].residue for c in cold} == {AMINO_ACIDS[int(expected.argmax())]}


def test_what_is_not_masked_stays():
    start = antibodies(("EVQXV", "DIQ"), ("E_QXV", "DIQ"))
    first, second = infill(engine(), start)
    assert first.antibody == start[0] and first.filled == [] and first.log_probability == 0
    assert second.antibody.heavy[0] == "E" and second.antibody.heavy[2:] == "QXV"


def test_tables_of_antibodies_and_residues():
    start = antibodies(("EV_LV", "D_Q"), ("EVQ", ""))
    whole = table(engine(), start, "antibody", Sampling())
    assert whole["filled"].to_pylist() == [2, 0]
    assert "_" not in "".join(whole["heavy"].to_pylist() + whole["light"].to_pylist())
    lines = table(engine(), start, "residue", Sampling(top=2)).to_pylist()
    assert sorted((r["chain"], r["position"]) for r in lines) == [("heavy", 3), ("light", 2)]
    for line in lines:
        assert line["residue"] == line["candidate_1"]
        assert line["probability_1"] >= line["probability_2"] > 0
    assert table(engine(), start[1:], "residue", Sampling()).num_rows == 0
