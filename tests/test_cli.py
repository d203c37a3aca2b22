"""Wrong input at the command line: one clear line, exit code 2, nothing written."""

import csv
import fcntl
import os
import shutil
import subprocess

import numpy as np
import pytest
from conftest import run_command, tiny_config, tiny_flags, xla_flags

from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.results import read_results


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("moe_ablm: ")
    for word in words:
        assert word.lower() in lines[0].lower()


@pytest.fixture(scope="module")
def dataset(cache):
    return simulated_dataset(tiny_config().data.simulated_pairs)


# (flags beside the tiny ones, words in the message)
WRONG = {
    "misspelt key": (["--config.train.stepz=5"], ("stepz", "did you mean", "steps")),
    "misspelt section": (["--config.trian.steps=5"], ("trian", "train")),
    "misspelt choice": (["--config.model.moe.router=topkk"], ("topkk", "'topk'")),
    "wrong type": (["--config.train.steps=many"], ("train.steps", "many")),
    "heads": (["--config.model.heads=3"], ("heads=3", "d_model=16")),
    "k": (["--config.model.moe.k=5"], ("model.moe.k=5", "experts (4)")),
    "placement": (["--config.model.moe.placement=odd"], ("'odd'", "alternate")),
    "no experts left": (["--config.model.moe.first_dense=2"], ("first_dense=2",)),
    "mesh": (["--config.mesh.expert=3"], ("mesh.expert=3", "1 devices")),
    "micro-batches": (["--config.train.accumulate=3"], ("accumulate=3", "train.batch (8)")),
    "capacity": (["--config.model.moe.capacity=0.0"], ("capacity=0.0", "no slot")),
    "widths": (
        ["--config.model.moe.router=expert_choice", "--config.model.moe.widths=(8,8,8,16)"],
        ("widths", "'expert_choice'"),
    ),
    "layers": (["--config.model.layers=100000"], ("model.layers=100000", "4,096")),
    "width": (["--config.model.d_model=1000000"], ("at least", "GB a device", "parameters")),
    "rows": (["--config.train.batch=1000000000"], ("at least", "1,000,000,000 rows")),
    "beta": (["--config.train.beta1=2.0"], ("train.beta1=2.0", "below 1")),
    "no dataset": (["--config.data.path=nowhere"], ("nowhere", "moe_ablm prepare")),
    "too short": (["--config.data.length=64"], ("data.length=64", "fits")),
    "stray argument": (["steps=5"], ("steps=5",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags(name, tmp_path, run_quickly):
    flags, words = WRONG[name]
    workdir = tmp_path / "w"
    result = run_quickly("moe_ablm.train", *tiny_flags(), *flags, f"--workdir={workdir}")
    refused(result, *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/nowhere.py", "--workdir=w"], ("configs/nowhere.py",)),
        (["--config=configs/ladder.py:size=9m", "--workdir=w"], ("'9m'", "'8m'")),
        (["--config=configs/ladder.py:sise=8m", "--workdir=w"], ("sise", "size")),
        (["--config=configs/ladder.py:router=tops", "--workdir=w"], ("tops", "top2")),
        (["--workdir=w"], ("--config is missing",)),
        (["--config=configs/base.py"], ("--workdir is missing",)),
        (["--config=configs/base.py", "--workdri=w"], ("workdri", "workdir")),
    ],
)
def test_wrong_command_lines(flags, words, run_quickly):
    refused(run_quickly("moe_ablm.train", *flags), *words)


def altered(dataset, tmp_path, change):
    copy = tmp_path / "d"
    shutil.copytree(dataset, copy)
    change(copy)
    return copy


def truncate(path):
    shard = path / "shard-00000.arrow"
    os.truncate(shard, shard.stat().st_size - 100)


def flip(path):
    shard = path / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)


def unknown_schema(path):
    file = path / "dataset.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 99'))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, ("shard-00000.arrow", "truncated or altered")),
        (flip, ("shard-00000.arrow", "altered")),
        (unknown_schema, ("schema version 99", "reads 1")),
    ],
)
def test_a_damaged_dataset(dataset, tmp_path, change, words, run_quickly):
    path, workdir = altered(dataset, tmp_path, change), tmp_path / "w"
    flags = [*tiny_flags(), f"--config.data.path={path}", f"--workdir={workdir}"]
    refused(run_quickly("moe_ablm.train", *flags), *words)
    assert not workdir.exists()


def test_prepare_names_the_columns_it_found(tmp_path, run_quickly):
    file, out = tmp_path / "a.csv", tmp_path / "d"
    file.write_text("id,vh_a,vl_a\n1,EVQL,DIQM\n")
    result = run_quickly("moe_ablm", "prepare", "--input", file, "--out", out)
    refused(result, "a.csv", "vh", "sequence_aa_heavy")
    assert not out.exists()


def test_prepare_names_row_and_letter(tmp_path, run_quickly):
    source, out = tmp_path / "a.csv", tmp_path / "d"
    run_quickly("moe_ablm", "simulate", "--pairs", 50, "--seed", 1, "--out", source)
    with source.open(newline="") as f:
        rows = list(csv.DictReader(f))
    rows[6]["sequence_aa_heavy"] = "EVQ*" + rows[6]["sequence_aa_heavy"][4:]
    with source.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    result = run_quickly("moe_ablm", "prepare", "--input", source, "--out", out)
    refused(result, "a.csv", "7", "*")
    assert not out.exists()
    skipped = run_quickly(
        "moe_ablm", "prepare", "--input", source, "--out", out, "--on-bad-row=skip"
    )
    assert skipped.returncode == 0, skipped.stderr
    assert (out / "dataset.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        # the state takes 1.2 MB: the first checkpoints fit, more than that do not
        changes = {"model__d_model": 64, "model__ffn": 128, "checkpoint__keep": 9}
        flags = [*tiny_flags(**changes), f"--workdir={disk / 'w'}"]
        result = run_command("moe_ablm.train", *flags)
        refused(result, "no space left")
        steps = [p.name for p in (disk / "w" / "checkpoints").iterdir() if p.name.isdigit()]
        assert steps
        subprocess.run([*mount[:4], "remount,size=64m", *mount[5:]], check=True)
        assert run_command("moe_ablm.train", *flags).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_backend_that_is_not_here_damages_nothing(tmp_path):
    workdir = tmp_path / "w"
    flags = [*tiny_flags(train__steps=2, train__warmup=1), f"--workdir={workdir}"]
    step = workdir / "checkpoints" / "2"
    (step / "state").mkdir(parents=True)
    result = run_command("moe_ablm.train", *flags, JAX_PLATFORMS="cuda")
    refused(result, "backend", "cuda", "JAX_PLATFORMS=cpu")
    assert step.is_dir() and [p.name for p in workdir.iterdir()] == ["checkpoints"]


def test_two_trainers_on_one_work_directory(tmp_path, run_quickly):
    workdir = tmp_path / "w"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_quickly("moe_ablm.train", *tiny_flags(), f"--workdir={workdir}")
    refused(result, "in use by another process")


def test_experts_that_the_mesh_does_not_divide(tmp_path):
    result = run_command(
        "moe_ablm.train",
        *tiny_flags(mesh__expert=8),
        f"--workdir={tmp_path / 'w'}",
        XLA_FLAGS=xla_flags(8),
    )
    refused(result, "mesh.expert=8", "experts=4")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow  # tests/test_contracts.py has three steps of every router on every mesh
def test_the_loss_is_the_same_on_1_and_8_devices(tmp_path):
    losses = {}
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        result = run_command(
            "moe_ablm.train",
            *tiny_flags(train__steps=4, eval__every=4, compute__precision="float32"),
            f"--workdir={workdir}",
            XLA_FLAGS=xla_flags(devices),
        )
        assert result.returncode == 0, result.stderr
        assert f"{devices} device(s)" in result.stdout
        losses[devices] = [r["loss"] for r in read_results(workdir / "results.jsonl")]
    assert len(losses[1]) == 5
    np.testing.assert_allclose(losses[8], losses[1], atol=1e-5)


def test_verbs_explain_themselves(run_quickly):
    result = run_quickly("moe_ablm", "--help")
    assert result.returncode == 0
    for verb in ("simulate", "prepare", "report"):
        assert verb in result.stdout
    assert "--run" in run_quickly("moe_ablm", "report", "--help").stdout
    assert "--workdir" in run_quickly("moe_ablm.train", "--help").stdout
    refused(run_quickly("moe_ablm", "report", "--run", "nowhere"), "nowhere/results.jsonl")
