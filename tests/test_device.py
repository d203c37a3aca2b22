"""Which peak a run is held against."""

import jax
import pytest

from moe_ablm.training import device
from moe_ablm.training.peaks import KINDS, PEAKS, data_sheet_peak


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
    ],
)
def test_kinds_as_jax_names_them(kind, tflops):
    assert data_sheet_peak(kind, "bfloat16") == tflops * 1e12
    assert data_sheet_peak(kind, "float32") is None


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v3"])
def test_what_has_no_data_sheet(kind):
    assert data_sheet_peak(kind, "bfloat16") is None


def test_every_peak_belongs_to_a_kind():
    assert set(KINDS.values()) == set(PEAKS)


class Gpu:
    device_kind = "NVIDIA H100 80GB HBM3"


def test_the_data_sheet_counts_all_devices_and_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(), Gpu()])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(device, "matmul_peak", lambda *_: pytest.fail("measured"))
    assert device.peak("bfloat16") == (2 * 989e12, "data sheet")


def test_a_cpu_is_measured():
    found = device.peak("float32")
    assert found.source == "measured" and 1e8 < found.flops < 1e14
