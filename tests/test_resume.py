"""A run killed without warning, at any point, ends as one that was never interrupted."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command, run_command, tiny_config, tiny_flags

from moe_ablm import trainer
from moe_ablm.results import read_results

CHANGES = {"train__steps": 24, "eval__every": 8, "checkpoint__every": 3}


def start(workdir: Path) -> subprocess.Popen:
    argv, options = command("moe_ablm.train", *tiny_flags(**CHANGES), f"--workdir={workdir}")
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it never came to the point where it is to be killed"
        time.sleep(0.005)  # more often, and this process takes the time of the other


def kill_when(workdir: Path, condition) -> None:
    process = start(workdir)
    wait_for(condition, process)
    process.send_signal(signal.SIGKILL)
    process.wait()


def steps_logged(workdir: Path) -> int:
    return max((r["step"] for r in read_results(workdir / "results.jsonl")), default=0)


def being_written(workdir: Path, step: int) -> bool:
    return any((workdir / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp*"))


@pytest.fixture(scope="module")
def undisturbed_workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed") / "w"


@pytest.fixture(scope="module")
def undisturbed(undisturbed_workdir):
    return trainer.run(tiny_config(**CHANGES), undisturbed_workdir)


def test_killed_again_and_again(undisturbed, tmp_path):
    workdir = tmp_path / "w"
    kill_when(workdir, lambda: steps_logged(workdir) >= 2)  # before the first checkpoint
    kill_when(workdir, lambda: being_written(workdir, 9))  # in the middle of one
    kill_when(workdir, lambda: steps_logged(workdir) >= 17)
    finished = run_command("moe_ablm.train", *tiny_flags(**CHANGES), f"--workdir={workdir}")
    assert finished.returncode == 0, finished.stderr
    assert "resuming at step" in finished.stdout
    found = json.loads((workdir / "run.json").read_text())
    for key in ("params_sha256", "tokens_seen", "valid_loss_final", "valid_loss_best", "step"):
        assert found[key] == undisturbed[key]
    records = read_results(workdir / "results.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 25))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [8, 16, 24]


@pytest.fixture
def interrupted(undisturbed, undisturbed_workdir, tmp_path):
    """A copy of the finished run as if it had stopped at step 21: newest checkpoints 21 and 18."""
    workdir = tmp_path / "w"
    shutil.copytree(undisturbed_workdir, workdir)
    (workdir / "run.json").unlink()
    return workdir


def damage_truncated(checkpoint: Path) -> None:
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def damage_flipped(checkpoint: Path) -> None:
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


def damage_emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


@pytest.mark.parametrize(
    "damage",
    [
        damage_flipped,
        pytest.param(damage_truncated, marks=pytest.mark.slow),
        pytest.param(damage_emptied, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage, interrupted, undisturbed, caplog
):
    steps = sorted(int(p.name) for p in (interrupted / "checkpoints").iterdir() if p.name.isdigit())
    damage(interrupted / "checkpoints" / str(steps[-1]))
    summary = trainer.run(tiny_config(**CHANGES), interrupted)
    assert f"checkpoint {steps[-1]} is damaged" in caplog.text
    assert (interrupted / "damaged" / str(steps[-1])).is_dir()
    assert summary["params_sha256"] == undisturbed["params_sha256"]


def test_sigterm_exits_with_0_and_says_how_to_resume(undisturbed, tmp_path):
    workdir = tmp_path / "w"
    argv, options = command("moe_ablm.train", *tiny_flags(**CHANGES), f"--workdir={workdir}")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    wait_for(lambda: steps_logged(workdir) >= 4, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the same command resumes it" in out
    assert f"--workdir={workdir}" in out
    assert json.loads((workdir / "run.json").read_text())["status"] == "stopped"
    summary = trainer.run(tiny_config(**CHANGES), workdir)
    assert summary["params_sha256"] == undisturbed["params_sha256"]
