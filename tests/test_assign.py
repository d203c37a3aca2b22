"""What named hardware gives every cell, on every launcher."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest

from launch import assign, local, slurm
from launch import print as print_launcher
from launch.cell import Cell, config_of
from launch.hardware import hardware
from moe_ablm import config as configs
from moe_ablm.errors import UserError

BASE = ("-m", "moe_ablm.train", "--config=configs/base.py")
FLAGS = {"XLA_FLAGS": "--xla_a=1 --xla_b='2'", "MOE_ABLM_HARDWARE": "h100x8", "SHARE": "0.9"}


@pytest.fixture(autouse=True)
def no_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def cell(*more: str, folder: Path = Path("/runs/x")) -> Cell:
    return Cell("c", (*BASE, *more), folder / "c", "0" * 16, 1.0, 1.0)


def overrides(cell: Cell) -> list[str]:
    return [a.removeprefix("--config.") for a in cell.argv if a.startswith("--config.")]


def test_a_cell_gets_mesh_remat_and_flags():
    (made,) = assign.assigned([cell()], "h100x8")
    assert overrides(made) == [
        "mesh.data=8",
        "mesh.expert=1",
        "mesh.fsdp=1",
        "compute.remat=matmuls",
    ]
    assert made.environment == {"MOE_ABLM_HARDWARE": "h100x8"} | hardware("h100x8").environment


def test_no_hardware_changes_nothing():
    assert assign.assigned([cell()], None) == [cell()]


def test_the_identity_of_a_cell_stays():
    (made,) = assign.assigned([cell("--config.compute.remat=none")], "v5e-8")
    before, after = (configs.fingerprint(config_of(c.argv), "data") for c in (cell(), made))
    assert before == after


def test_a_cells_own_choice_wins():
    own = "--config.mesh.fsdp=4", "--config.compute.remat=none"
    (made,) = assign.assigned([cell(*own)], "h100x8")
    found = overrides(made)
    assert found == ["mesh.fsdp=4", "compute.remat=none", "mesh.data=2", "mesh.expert=1"]
    assert config_of(made.argv).compute.remat == "none"


def test_a_cell_that_cannot_be_split_or_does_not_fit():
    with pytest.raises(UserError, match="cell c: 32 rows .* 64 devices of h100x8x8"):
        assign.assigned([cell()], "h100x8x8")
    with pytest.raises(UserError, match=r"cell c: it does not fit v5e-1: .*train.accumulate=\d"):
        assign.assigned([cell("--config.train.batch=8192")], "v5e-1")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, FLAGS),
        ({"SHARE": "0.5"}, FLAGS | {"SHARE": "0.5"}),
        ({"MOE_ABLM_HARDWARE": "other"}, FLAGS),
        ({"XLA_FLAGS": "--xla_a=3"}, FLAGS | {"XLA_FLAGS": "--xla_a=1 --xla_b='2' --xla_a=3"}),
    ],
)
def test_the_users_environment_wins(own, expected):
    """In Python and in a shell; of two flags of one name XLA takes the last."""
    own = {"PATH": os.environ["PATH"]} | own
    found = assign.merged(FLAGS, own)
    assert {k: found[k] for k in FLAGS} == expected and found["PATH"] == own["PATH"]
    script = "set -u\n" + "\n".join(assign.exports(FLAGS)) + "\nenv"
    told = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True)
    environment = dict(line.split("=", 1) for line in told.stdout.splitlines())
    assert {k: environment[k] for k in FLAGS} == expected


def options(launcher, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launcher.add_arguments(parser)
    return parser.parse_args(given)


def test_print(capsys):
    assert print_launcher.launch([cell()], options(print_launcher, "--hardware=v5e-8")) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("env MOE_ABLM_HARDWARE=v5e-8 'LIBTPU_INIT_ARGS=--xla_tpu")
    assert "--config.mesh.data=8" in line
    assert print_launcher.launch([cell()], options(print_launcher)) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("python -m moe_ablm.train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hardware=h100x8x2"], "2 machines"),
        (["--hardware=h100x1", "--jobs=2"], "a cell has all devices"),
        (["--hardware=b200x8"], "not known"),
        (["--hardware=A B"], "expected hardware whose mesh"),
    ],
)
def test_hardware_that_this_machine_is_not(given, message):
    with pytest.raises(UserError, match=message):
        local.launch([cell()], options(local, *given))


def test_the_local_launcher_gives_its_cells_what_hardware_asks(tmp_path, monkeypatch):
    seen = []

    def start(cell, cores):
        seen.append(cell)
        raise OSError(2, "enough")

    monkeypatch.setattr(local, "start", start)
    local.launch([cell(folder=tmp_path)], options(local, "--hardware=h100x8"))
    assert "mesh.data=8" in overrides(seen[0])


def test_slurm_takes_its_nodes_from_the_hardware():
    found = slurm.settings_of(options(slurm, "--hardware=h100x8x4"))
    assert (found["nodes"], found["gpus"]) == ("4", "8")
    same = slurm.settings_of(options(slurm, "--hardware=h100x8x4", "--nodes=4", "--gpus=8"))
    assert same == found
    alone = slurm.settings_of(options(slurm, "--gpus=2"))
    assert (alone["nodes"], alone["gpus"]) == ("1", "2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hardware=h100x8", "--gpus=4"], "--gpus=4: --hardware h100x8 has 8"),
        (["--hardware=h100x8x2", "--nodes=1"], "--nodes=1: --hardware h100x8x2 has 2"),
        (["--hardware=v5e-8"], "no TPUs"),
    ],
)
def test_slurm_and_other_hardware(given, message):
    with pytest.raises(UserError, match=message):
        slurm.settings_of(options(slurm, *given))


def test_the_script_of_slurm_sets_the_environment(tmp_path):
    given = slurm.settings_of(options(slurm, "--hardware=h100x8"))
    cells = assign.assigned([cell(folder=tmp_path)], "h100x8")
    text = slurm.script(cells, given)
    assert "  export MOE_ABLM_HARDWARE=h100x8\n" in text
    assert "--config.mesh.data=8" in text and "XLA_FLAGS:+" in text
