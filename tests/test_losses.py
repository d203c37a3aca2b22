"""Sums by region against a loop in float64."""

import numpy as np
import pytest

from moe_ablm.data.regions import region_names
from moe_ablm.training.metrics import loss_metrics, seen_metrics
from moe_ablm.training.step import CELLS, REGIONS, SEEN_LEVELS, region_sums


def example():
    rng = np.random.default_rng(0)
    shape = (3, 90)  # every cell has some
    segment = rng.integers(0, 3, shape)
    batch = {
        "targets": rng.integers(4, 24, shape).astype(np.uint8),
        "loss_mask": (rng.random(shape) < 0.5) & (segment > 0),
        "segment": segment.astype(np.uint8),
        "region": rng.integers(1, 8, shape).astype(np.uint8),
    }
    return rng.normal(size=(*shape, 33)).astype(np.float32), batch


def test_sums_by_region():
    logits, batch = example()
    found = region_sums(logits, batch)
    expected = np.zeros((3, CELLS))
    for b, i in np.argwhere(batch["loss_mask"]):
        row, target = logits[b, i].astype(np.float64), batch["targets"][b, i]
        cell = (int(batch["segment"][b, i]) - 1) * REGIONS + batch["region"][b, i]
        loss = np.log(np.exp(row).sum()) - row[target]
        expected[:, cell] += [loss, row.argmax() == target, 1]
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-5)


def test_metrics_are_named_by_chain_and_region():
    logits, batch = example()
    sums = region_sums(logits, batch)
    metrics = loss_metrics(sums, region_names())
    expected = np.asarray(sums.loss, np.float64).sum() / batch["loss_mask"].sum()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    heavy_cdr3 = (batch["segment"] == 1) & (batch["region"] == 6) & batch["loss_mask"]
    assert metrics["masked_by_region"].get("CDRH3", 0) == heavy_cdr3.sum()
    assert sum(metrics["masked_by_region"].values()) == batch["loss_mask"].sum()
    light_fr1 = np.asarray(sums.loss)[REGIONS + 1] / np.asarray(sums.tokens)[REGIONS + 1]
    assert metrics["loss_by_region"]["FRL1"] == light_fr1


def test_a_region_without_masked_tokens_is_left_out():
    logits, batch = example()
    batch["loss_mask"][batch["region"] == 6] = False
    assert "CDRH3" not in loss_metrics(region_sums(logits, batch), region_names())["loss_by_region"]


def seen_example():
    """Three rows; heavy, light chain: novel, elsewhere; elsewhere, seen; seen, novel."""
    logits, batch = example()
    of_chains = np.array([[0, 1], [1, 2], [2, 0]])
    levels = np.concatenate([np.zeros((3, 1), int), of_chains], axis=1)
    batch["seen"] = np.take_along_axis(levels, batch["segment"].astype(int), 1).astype(np.uint8)
    return logits, batch, of_chains


def test_chains_that_training_has_seen_are_told_apart():
    logits, batch, of_chains = seen_example()
    losses = {}  # (chain, row): float64, by hand
    for row in range(3):
        for chain in (0, 1):
            there = batch["loss_mask"][row] & (batch["segment"][row] == chain + 1)
            z, targets = logits[row, there].astype(np.float64), batch["targets"][row, there]
            losses[chain, row] = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), targets]
    metrics = seen_metrics(region_sums(logits, batch), region_names())
    wanted = {"": (0, 1, 2), "_seen": (2,), "_unseen": (0, 1), "_novel": (0,)}
    for chain, name in enumerate(("heavy", "light")):
        for part, levels in wanted.items():
            rows = [r for r in range(3) if of_chains[r, chain] in levels]
            expected = np.concatenate([losses[chain, r] for r in rows])
            found = metrics["loss_by_chain"][name + part]
            assert found == pytest.approx(expected.mean(), rel=1e-6), name + part
            assert metrics["masked_by_chain"][name + part] == len(expected)
    novel = np.concatenate([losses[0, 0], losses[1, 2]])
    assert metrics["loss_novel"] == pytest.approx(novel.mean(), rel=1e-6)
    everything = np.concatenate(list(losses.values()))
    assert metrics["loss"] == pytest.approx(everything.mean(), rel=1e-6)


def test_regions_are_those_without_levels():
    """Totals are the same sums; those of unseen chains are of the rows that are unseen."""
    logits, batch, of_chains = seen_example()
    with_levels = seen_metrics(region_sums(logits, batch), region_names())
    plain = {name: array for name, array in batch.items() if name != "seen"}
    without = loss_metrics(region_sums(logits, plain), region_names())
    for name, value in without.items():
        assert with_levels[name] == pytest.approx(value, rel=1e-6), name
    for row in range(3):
        levels = np.array([0, *of_chains[row]])  # padding, heavy, light
        plain["loss_mask"][row] &= levels[batch["segment"][row]] < 2
    unseen = loss_metrics(region_sums(logits, plain), region_names())["loss_by_region"]
    assert with_levels["loss_by_region_unseen"] == pytest.approx(unseen, rel=1e-6)


def test_what_no_chain_is_in_is_left_out():
    logits, batch, _ = seen_example()
    batch["seen"][:] = SEEN_LEVELS - 1
    metrics = seen_metrics(region_sums(logits, batch), region_names())
    assert set(metrics["loss_by_chain"]) == {"heavy", "heavy_seen", "light", "light_seen"}
    assert "loss_novel" not in metrics and metrics["loss_by_region_unseen"] == {}


def test_levels_of_both_rooms_are_as_many():
    from moe_ablm.data import chains

    assert tuple(range(SEEN_LEVELS)) == (chains.NOVEL, chains.ELSEWHERE, chains.SEEN)
