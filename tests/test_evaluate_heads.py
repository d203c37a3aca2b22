"""Heads: what can be learned is, the same twice, and an antibody's prediction is its own."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_models import HEAVY, engine, tiny_model

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.supervised import baselines, head_inputs
from moe_ablm.evaluation.supervised.head_inputs import (
    IGNORED,
    POOLINGS,
    Head,
    HeadInputs,
    inputs_of,
)
from moe_ablm.evaluation.supervised.heads import Training, fit, settled
from moe_ablm.inference.buckets import Engine
from moe_ablm.interop.saved import flat_arrays

CLASSES = Head("classification", 2)
SHORT = Training(epochs=30, batch=16, lr=1e-2)
MOTIF = "WWHWW"
CHOOSING = "expert_choice batch"


def antibodies(n: int, seed: int) -> tuple[list[Antibody], np.ndarray]:
    """Chains of random residues without W and H; every second one has the motif somewhere."""
    rng = np.random.default_rng(seed)
    letters = [x for x in AMINO_ACIDS if x not in "WH"]
    found = []
    for i in range(n):
        heavy = "".join(rng.choice(letters, rng.integers(20, 25)))
        if i % 2:
            at = rng.integers(0, len(heavy) - len(MOTIF))
            heavy = heavy[:at] + MOTIF + heavy[at + len(MOTIF) :]
        found.append(Antibody(str(i), heavy, "".join(rng.choice(letters, 16))))
    return found, np.arange(n) % 2


@pytest.fixture(scope="module")
def motif():
    return antibodies(64, 0), antibodies(60, 1)


def test_a_planted_motif_is_found(motif):
    (train, classes), (test, truth) = motif
    found = fit(engine(), train, classes, CLASSES, SHORT)(test)
    assert found.shape == (60, 2) and found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-5)
    assert (found.argmax(1) == truth).mean() > 0.85


def test_labels_without_a_meaning_are_not(motif):
    (train, _), (test, truth) = motif
    drawn = np.random.default_rng(3).permutation(np.arange(64) % 2)
    found = fit(engine(), train, drawn, CLASSES, SHORT)(test)
    assert 0.25 < (found.argmax(1) == truth).mean() < 0.75


def test_the_same_seed_gives_the_same_and_another_another(motif):
    (train, classes), (test, _) = motif
    one, two, other = (
        fit(engine(), train, classes, CLASSES, Training(epochs=2, seed=seed))(test)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 1e-3


@pytest.fixture(scope="module")
def tuned(motif):
    """Trained with its encoder, which has a router that would see neighbours."""
    train, classes = motif[0]
    training = Training(epochs=12, batch=16, lr=1e-2, encoder_lr=3e-3, full=True)
    return fit(engine(CHOOSING), train, classes, CLASSES, training)


@pytest.mark.parametrize("full", [False, True])
def test_a_prediction_does_not_depend_on_its_neighbours(full, motif, tuned):
    """Neither on the batch, nor on the padding; with experts that choose, too."""
    (train, classes), (test, _) = motif
    frozen = fit(engine(CHOOSING), train[:16], classes[:16], CLASSES, Training(1, 16))
    predictor = tuned if full else frozen
    mixed = [*test[:3], Antibody("long", HEAVY[:70], ""), *test[3:5]]
    together = predictor(mixed)
    alone = np.concatenate([predictor([antibody]) for antibody in mixed])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_padding_has_no_part(monkeypatch, motif):
    (train, classes), (test, _) = motif
    predictor = fit(engine(), train, classes, CLASSES, SHORT)
    found = predictor(test)
    monkeypatch.setattr(head_inputs, "MULTIPLE", 160)
    np.testing.assert_allclose(predictor(test), found, atol=1e-5)


def test_attention_pooling_is_the_softmax_over_residues(motif):
    (train, classes), (test, _) = motif
    predictor = fit(engine(), train, classes, CLASSES, SHORT)
    states = inputs_of(engine(), test, CLASSES, False).states
    p = {k: np.asarray(v, np.float64) for k, v in predictor.params["head"].items()}
    for found, state in zip(predictor(test), states, strict=True):
        x = (state.astype(np.float64) - p["centre"]) / p["spread"]
        weights = np.exp(x @ p["query"])
        pooled = (x * weights / weights.sum()).sum(0)
        inner = np.asarray(jax.nn.gelu(pooled @ p["inner"] + p["inner_bias"]), np.float64)
        logits = inner @ p["outer"] + p["outer_bias"]
        np.testing.assert_allclose(found, logits - np.logaddexp.reduce(logits), atol=1e-4)


def test_full_fine_tuning_changes_the_encoder_and_frozen_does_not(motif, tuned):
    (train, classes), (test, truth) = motif
    base, before = engine(CHOOSING), tiny_model(CHOOSING).params
    changed = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, tuned.params["encoder"])
    leaves = jax.tree_util.tree_flatten_with_path(changed)[0]
    moved = {jax.tree_util.keystr(path) for path, value in leaves if value > 0}
    for part in ("embedding", "attention", "router", "up", "final_norm"):
        assert any(part in name for name in moved), (part, sorted(moved))
    assert not any("'head'" in name for name in moved), "the language-model head has no part"
    assert (tuned(test).argmax(1) == truth).mean() > 0.85
    jax.tree.map(np.testing.assert_array_equal, before, base.model.params)
    assert "encoder" not in fit(base, train, classes, CLASSES, Training(epochs=1)).params


def test_a_settled_predictor_says_the_same_on_a_model_that_can_be_saved(motif, tuned):
    """But for hidden states that are kept as float16."""
    test = motif[1][0]
    found = settled(tuned)
    jax.tree.map(np.testing.assert_array_equal, found.engine.model.params, tuned.params["encoder"])
    assert set(found.params) == {"head"}
    np.testing.assert_allclose(np.exp(found(test)), np.exp(tuned(test)), atol=0.02)
    frozen = fit(engine(), test[:8], np.arange(8) % 2, CLASSES, Training(epochs=1))
    assert settled(frozen) is frozen


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_regression_on_composition(pooling):
    """The number of residues W, on a scale far from 1."""
    rng = np.random.default_rng(5)
    counts = rng.integers(0, 15, 120)
    chains = [
        "".join(rng.permutation(list("W" * k + "A" * (40 - k)))) for k in counts
    ]  # fmt: skip
    pairs = [Antibody(str(i), chain, "") for i, chain in enumerate(chains)]
    head = Head("regression", 1, pooling)
    predictor = fit(engine(), pairs[:80], 1000 + 10 * counts[:80], head, SHORT)
    found = predictor(pairs[80:])
    assert found.shape == (40,)
    assert np.corrcoef(found, counts[80:])[0, 1] > 0.9
    assert abs(found.mean() - (1000 + 10 * counts[80:].mean())) < 10


def test_several_values_at_once():
    rng = np.random.default_rng(6)
    pairs = [Antibody(str(i), "".join(rng.choice(list("ACDW"), 40)), "") for i in range(60)]
    values = np.array([[p.heavy.count("W"), -p.heavy.count("A")] for p in pairs], float)
    found = fit(engine(), pairs, values, Head("regression", 2), SHORT)(pairs)
    assert found.shape == (60, 2)
    assert all(np.corrcoef(found[:, i], values[:, i])[0, 1] > 0.9 for i in range(2))


def test_classes_of_residues():
    """A residue's class is whether it is hydrophobic; every third has none."""
    (train, _), (test, _) = antibodies(64, 7), antibodies(10, 8)

    def classes(pairs):
        found = [np.array([x in "AVILMFYW" for x in p.heavy + p.light], int) for p in pairs]
        for each in found:
            each[::3] = IGNORED
        return found

    found = fit(engine(), train, classes(train), Head("residue", 2), SHORT)(test)
    assert [f.shape for f in found] == [(p.residues, 2) for p in test]
    known = [(f.argmax(1) == c)[c >= 0] for f, c in zip(found, classes(test), strict=True)]
    assert np.concatenate(known).mean() > 0.8  # guessing: 0.6


def test_the_best_epoch_on_validation_is_kept(motif):
    """Validation against the training classes: the first epochs are the least wrong."""
    (train, classes), (test, truth) = motif
    last = fit(engine(), train, classes, CLASSES, SHORT)(test)
    kept = fit(engine(), train, classes, CLASSES, SHORT, (test, 1 - truth))(test)

    def loss(found):
        return -found[np.arange(len(truth)), 1 - truth].mean()

    assert loss(kept) < loss(last) / 2


def test_inputs_made_once_serve_many_fits(motif):
    (train, classes), (test, _) = motif
    inputs, some = inputs_of(engine(), [*train, *test], CLASSES, False), Training(epochs=2)
    assert isinstance(inputs, HeadInputs) and len(inputs) == 124
    one = fit(engine(), inputs.take(range(64)), classes, CLASSES, some)
    two = fit(engine(), train, classes, CLASSES, some)
    np.testing.assert_array_equal(one(inputs.take(range(64, 124))), two(test))


def test_more_hidden_states_than_memory_are_not_begun(monkeypatch, motif):
    monkeypatch.setattr(head_inputs, "MOST_BYTES", 1000)
    with pytest.raises(Skipped, match="64 sequences"):
        inputs_of(engine(), motif[0][0], CLASSES, False)


def test_a_head_of_no_kind_is_refused():
    for values in (("ranking", 1), ("regression", 0), ("regression", 1, "max")):
        with pytest.raises(ValueError, match="expected a kind of"):
            Head(*values)


def test_how_often_a_region_has_a_class():
    """Counts by hand, each one up; the last line is that of residues without a region."""
    train = [np.array([0, 0, 2]), np.array([-1, 0])]
    classes = [np.array([1, 0, 1]), np.array([1, -1])]
    (found,) = baselines.by_region(train, classes, [np.array([0, 1, 2, -1])], 2)
    np.testing.assert_allclose(
        found, [[2 / 4, 2 / 4], [1 / 2, 1 / 2], [1 / 3, 2 / 3], [1 / 3, 2 / 3]]
    )


ALL = 1 - 1e-7  # of the units of experts: none is left


@pytest.fixture(scope="module")
def restrained(motif):
    """With frozen routers, and no expert in any update; losses of both sets."""
    one_layer = Engine(tiny_model("topk", layers=1))
    training = Training(
        epochs=2, batch=32, encoder_lr=3e-3, full=True, freeze_routers=True, expert_dropout=ALL
    )
    watched = dict(zip(("train", "held_out"), motif, strict=True))
    return [fit(one_layer, *motif[0], CLASSES, training, watched=watched) for _ in range(2)]


def test_neither_frozen_routers_nor_experts_that_are_dropped_learn(restrained):
    """The bias of an expert's output is no unit of it: through it a router would be trained."""
    before, after = (flat_arrays(p) for p in (
        tiny_model("topk", layers=1).params, restrained[0].params["encoder"],
    ))  # fmt: skip
    still = {name for name in before if (before[name] == after[name]).all()}
    of_experts = {f"layers/0/ffn/{name}" for name in ("router", "up", "up_bias", "down")}
    assert {name for name in still if not name.startswith("head/")} == of_experts
    jax.tree.map(np.testing.assert_array_equal, *(each.params for each in restrained))


def test_losses_are_those_of_what_is_predicted(motif, restrained):
    """Of the whole encoder, whatever training went without."""
    found = restrained[0]
    for name, (some, target) in zip(("train", "held_out"), motif, strict=True):
        assert len(found.losses[name]) == 2
        expected = -np.mean(found(some)[np.arange(len(some)), target], dtype=np.float64)
        assert found.losses[name][-1] == pytest.approx(expected, rel=1e-4)


def test_losses_of_values_are_in_units_of_their_variance(motif):
    (train, classes), (test, truth) = motif
    values, targets = classes * 7.0 + np.arange(64), truth * 7.0
    watched, training = {"held_out": (test, targets)}, Training(epochs=2)
    found, unwatched = (
        fit(engine(), train, values, Head("regression", 1), training, watched=each)
        for each in (watched, None)
    )
    expected = np.mean((found(test).astype(np.float64) - targets) ** 2) / values.var()
    assert found.losses["held_out"][-1] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(unwatched(test), found(test))


@pytest.mark.slow
def test_adapters_of_frozen_routers_stay_and_those_of_experts_learn(motif):
    training = Training(epochs=3, batch=16, encoder_lr=3e-3, rank=2, freeze_routers=True)
    found, thinned = (
        settled(fit(engine("topk"), *motif[0], CLASSES, each))
        for each in (training, replace(training, expert_dropout=0.5))
    )
    model = found.engine.model.params
    before, after = (flat_arrays(p) for p in (tiny_model("topk").params, model))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert {name.rpartition("/")[2] for name in moved} == {"kernel", "up", "down"}
    other = flat_arrays(thinned.engine.model.params)
    assert any((after[name] != other[name]).any() for name in moved)


def test_the_epoch_that_is_kept_is_that_of_least_loss(motif):
    (train, classes), (test, truth) = motif
    drawn = np.random.default_rng(3).permutation(classes)  # nothing to learn: held-out loss rises
    training = Training(epochs=8, batch=16, lr=3e-2)
    valid = test, truth
    found = fit(engine(), train, drawn, CLASSES, training, valid, {"valid": valid})
    loss = -np.mean(found(test)[np.arange(len(test)), truth], dtype=np.float64)
    assert loss == pytest.approx(min(found.losses["valid"]), rel=1e-4)
    assert loss < found.losses["valid"][-1]
