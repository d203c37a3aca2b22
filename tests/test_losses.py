"""Sums by region against a loop in float64."""

import numpy as np
import pytest

from moe_ablm.data.regions import region_names
from moe_ablm.training.metrics import loss_metrics
from moe_ablm.training.step import CELLS, REGIONS, region_sums


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
