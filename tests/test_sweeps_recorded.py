"""Hours of planned cells from recorded speeds."""

import csv
import json
from argparse import Namespace

import pytest

from launch.cell import Cell
from moe_ablm.errors import UserError
from sweeps import repeated, scaling, studies
from sweeps.cost import RECORDED, rate_of
from sweeps.device import planned_device
from sweeps.recorded import read_recorded
from sweeps.study import main

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections


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


def test_runs_of_the_sweep_itself_say_how_fast_this_machine_is(tmp_path):
    """A machine a third as fast as the recorded one at one size is so at the others, too."""
    before = rate_of("core", None, 0.3, 0.0, [], tmp_path)  # nothing there yet
    with RECORDED["core"].open() as file:
        runs = [(float(r["flops"]), float(r["tokens"])) for r in csv.DictReader(file)]
    small = min(flops / tokens for flops, tokens in runs)
    usual = [before.hours(cell(tmp_path, *run)) for run in runs]
    slow = before.recorded.at(small) / small / 3
    write_run(tmp_path / "a", small, slow, device_kind="cpu", devices=1)
    write_run(tmp_path / "b", small, 90 * slow, device_kind="NVIDIA H200")  # of an earlier part
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text('{"flops": ')
    rate = rate_of("core", None, 0.3, 0.0, [], tmp_path)
    assert [rate.hours(cell(tmp_path, *run)) for run in runs] == pytest.approx(
        [3 * hours for hours in usual], rel=1e-6
    )
    assert f"1 run of {tmp_path}" in str(rate)
    # what the command line says counts before them
    given = rate_of("core", None, 0.3, 0.0, [RECORDED["core"]], tmp_path)
    assert given.hours(cell(tmp_path, *runs[0])) == pytest.approx(usual[0])
    assert rate_of("core", 0.5, 0.3, 0.0, [], tmp_path).recorded is None
    # two sizes that run as fast as each other, and half-way between them
    write_run(tmp_path / "d", 16 * small, slow / 16, device_kind="cpu")
    rate = rate_of("core", None, 0.3, 0.0, [], tmp_path)
    assert rate.recorded.at(16 * small) == pytest.approx(slow * small)
    # a device without a table has the sweep's own runs alone
    assert rate_of("h200", None, 0.3, 0.0, [], tmp_path).hours(
        cell(tmp_path, small * 9e9, 9e9)
    ) == pytest.approx(9e9 / (90 * slow) / 3600)


def test_cpu_runs_do_not_calibrate_an_accelerator(tmp_path):
    write_run(tmp_path / "a", 1e6, 1e5, device_kind="cpu")
    with pytest.raises(UserError, match="a run on cpu, --device is h100"):
        rate_of("h100", None, 0.3, 0.0, [tmp_path])


@pytest.mark.parametrize(
    "made_for, named, here, expected",
    [
        ("h100", None, False, "h100"),
        ("h100", None, True, "core"),
        ("core", None, False, "core"),
        ("core", "h200x8", False, "h200"),
        ("h100", "v5e-8", False, "v5e"),
        ("h100", "cpu", True, "core"),
    ],
)
def test_hours_are_of_the_device_that_is_to_run(made_for, named, here, expected):
    assert planned_device(made_for, named, here, accelerators=()) == expected


def test_a_machine_with_an_accelerator_is_no_core(tmp_path):
    assert planned_device("h100", None, True, accelerators=(str(tmp_path),)) == "h100"


@pytest.mark.parametrize(
    "study, argv, title",
    [
        (scaling.study, ["--routers=dense"], "core as fast as 105 recorded runs"),
        (studies.STUDIES["masking"], [], "h100 at 30%"),
        (studies.STUDIES["masking"], ["--launcher=slurm", "--hardware=v5p-8"], "v5p at 30%"),
        (repeated.study, ["--device=a100"], "a100 at 10%"),
        (studies.STUDIES["masking"], ["--launcher=print", "--hardware=cpu"], "core as fast as"),
        (repeated.study, [], "core as fast as"),
    ],
)
def test_the_title_of_the_table_names_the_device(study, argv, title, tmp_path, capsys):
    argv = [*argv, "--data=simulated", "--config.data.simulated_pairs=400", "--seeds=1"]
    assert main(study, [*argv, "--dry-run", f"--out={tmp_path / 'x'}"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("hours: ")]
    assert line.startswith(f"hours: {title}")


def test_the_ladder_says_what_it_is_made_for():
    made_for = {name: scaling.study.device(Namespace(ladder=name)) for name in scaling.LADDERS}
    assert made_for == {"paper": "h100", "mini": "h100", "micro": "core"}
