"""Hours of planned cells from recorded speeds."""

import csv
import json

import pytest

from launch.cell import Cell
from moe_ablm.errors import UserError
from sweeps.cost import RECORDED, rate_of
from sweeps.recorded import read_recorded


def cell(tmp_path, flops, tokens):
    return Cell("x", (), tmp_path, "f", tokens=tokens, flops=flops)


def write_run(folder, per_token, rate, **execution):
    folder.mkdir(parents=True)
    run = {"flops": per_token * 1e6, "tokens_seen": 1e6, "tokens_per_second": rate}
    (folder / "run.json").write_text(json.dumps({**run, "execution": execution}))


def test_speeds_are_interpolated_between_recorded_models(tmp_path):
    """1e6 FLOPs a token at 1e5 tokens/s, 1e8 at 1e4: half-way on log axes 10^11.5 FLOP/s."""
    write_run(tmp_path / "small", 1e6, 1e5)
    write_run(tmp_path / "large", 1e8, 2e4, devices=2, device_kind="NVIDIA H100 80GB HBM3")
    rate = rate_of("h100", None, 0.3, 30.0, [tmp_path])
    for per_token, speed in ((1e6, 1e11), (1e7, 10**11.5), (1e8, 1e12), (1e9, 1e12), (1e4, 1e11)):
        hours = rate.hours(cell(tmp_path, per_token * 1e9, 1e9))
        assert hours == pytest.approx((per_token * 1e9 / speed + 30) / 3600)
    assert "2 recorded runs" in str(rate) and "30 s a start" in str(rate)


def test_the_recorded_micro_study_is_planned_at_the_hours_that_it_took(tmp_path):
    """61 min 43 s, two at a time; at 30 % of the peak of a core a third of that."""
    with RECORDED["core"].open() as file:
        runs = [(float(r["flops"]), float(r["tokens"])) for r in csv.DictReader(file)]
    rate = rate_of("core", None, 0.3, 12.0, [])
    assert sum(rate.hours(cell(tmp_path, *run)) for run in runs) == pytest.approx(2.06, rel=0.05)
    single = rate_of("core", 0.3, 0.3, 0.0, [])
    assert sum(single.hours(cell(tmp_path, *run)) for run in runs) < 0.7


def test_runs_of_another_device_and_files_without_speeds_are_refused(tmp_path):
    write_run(tmp_path / "runs" / "a", 1e6, 1e5, device_kind="NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError, match="a run on NVIDIA A100-SXM4-80GB, --device is h100"):
        read_recorded([tmp_path / "runs"], "h100")
    empty = tmp_path / "empty.csv"
    empty.write_text("flops,tokens\n1,2\n")
    with pytest.raises(UserError, match="has no column tokens_per_second"):
        read_recorded([empty], "h100")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no run with flops"):
        read_recorded([tmp_path / "none"], "h100")
