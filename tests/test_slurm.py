"""A real SLURM: arrays, preemption, several processes, cancellation. `make test-slurm`.

The cluster is this machine alone, made and ended by `programs/slurm_cluster.sh`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config, tiny_flags

from launch import slurm
from launch.cell import REPOSITORY, Cell
from launch.state import FAILED, state_of
from moe_ablm import config as configs
from moe_ablm import outcome, trainer
from moe_ablm.feed import Feed
from moe_ablm.results import read_results

pytestmark = pytest.mark.slurm
DOCS = Path(__file__).parents[1] / "docs"
CLUSTER = Path(__file__).parent / "programs" / "slurm_cluster.sh"
MINUTES = 60
# long enough to be interrupted: a checkpoint only at a signal and at the end
LONG = {"train__steps": 3000, "eval__every": 3000, "checkpoint__every": 3000, "log__every": 1}
SHORT = {"train__steps": 12}


@pytest.fixture(scope="module", autouse=True)
def cluster(request, tmp_path_factory):
    """Skips, with the reason, where there can be no SLURM."""
    if request.config.getoption("markexpr") != "slurm":
        pytest.skip("starts a SLURM cluster: run with -m slurm (make test-slurm)")
    if os.geteuid() != 0:
        pytest.skip("a cluster of the test's own needs root")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("SLURM is not installed, and there is no apt-get to install it")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        started = subprocess.run(
            [CLUSTER, "up", folder], capture_output=True, text=True, check=False
        )
        if started.returncode:
            pytest.skip(f"SLURM does not start: {started.stderr.strip()[-500:]}")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        os.environ["MOE_ABLM_HANG_SECONDS"] = "600"
        # the trainer would start itself again, and twice as many processes are no better here
        os.environ["GLIBC_TUNABLES"] = ""
        yield folder
    finally:
        subprocess.run([CLUSTER, "down", folder], check=False)


def make_cell(folder: Path, name: str, **changes) -> Cell:
    config = tiny_config(**changes)
    identity = Feed(config, *trainer.open_datasets(config)).identity
    workdir = folder / name
    argv = ("-m", "moe_ablm.train", *tiny_flags(**changes), f"--workdir={workdir}")
    return Cell(name, argv, workdir, configs.fingerprint(config, identity), 1.0, 1.0)


def submit(cells: list[Cell], **given: str) -> str:
    """Job id of the array."""
    parser = argparse.ArgumentParser()
    slurm.add_arguments(parser)
    options = parser.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in given.items()])
    assert slurm.launch(cells, options) == 0
    (file,) = cells[0].log.parent.glob("slurm-*.json")
    return file.stem.removeprefix("slurm-")


def slurm_says(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def jobs(job: str) -> list[dict[str, str]]:
    """The fields of each task of an array."""
    told = slurm_says("scontrol", "show", "job", "--oneliner", job)
    return [
        dict(word.partition("=")[::2] for word in line.split() if "=" in word)
        for line in told.splitlines()
        if line
    ]


def wait(condition, what: str, cell: Cell) -> None:
    deadline = time.monotonic() + 15 * MINUTES
    while not condition():
        if time.monotonic() > deadline:
            log = cell.log.read_text()[-3000:] if cell.log.exists() else "no log"
            raise AssertionError(f"{what}: not within 15 minutes\n{log}")
        time.sleep(0.5)


def status(cell: Cell) -> str | None:
    try:
        return json.loads((cell.workdir / "run.json").read_text())["status"]
    except (OSError, ValueError):
        return None


def steps(cell: Cell) -> int:
    return max((r["step"] for r in read_results(cell.workdir / "results.jsonl")), default=0)


def ended(job: str) -> bool:
    return all(j["JobState"] in ("COMPLETED", "FAILED", "CANCELLED") for j in jobs(job))


def occupy(folder: Path) -> str:
    """A job of the higher partition that takes the node for some seconds."""
    where = ("--partition=high", "--exclusive", f"--chdir={folder}", "--output=/dev/null")
    return slurm_says("sbatch", "--parsable", *where, "--wrap=sleep 5").strip()


def test_an_array_of_four_cells_finishes(tmp_path):
    cells = [make_cell(tmp_path, f"seed{i}", seed=i, **SHORT) for i in range(4)]
    job = submit(cells, at_once="2")
    wait(lambda: ended(job), "the array", cells[0])
    assert {j["JobState"] for j in jobs(job)} == {"COMPLETED"}
    assert [status(c) for c in cells] == ["complete"] * 4
    assert [outcome.read(c.outcome).status for c in cells] == ["complete"] * 4
    hashes = {json.loads((c.workdir / "run.json").read_text())["params_sha256"] for c in cells}
    assert len(hashes) == 4
    assert cells[0].log.read_text().startswith("$ SLURM job")
    # a finished cell does nothing
    before = (cells[0].workdir / "results.jsonl").read_bytes()
    (tmp_path / "logs" / f"slurm-{job}.json").unlink()
    again = submit(cells[:1])
    wait(lambda: ended(again), "the second job", cells[0])
    assert (cells[0].workdir / "results.jsonl").read_bytes() == before


def test_a_preempted_cell_is_queued_again_and_ends_the_same(tmp_path):
    undisturbed = trainer.run(tiny_config(**LONG), tmp_path / "undisturbed")
    one = make_cell(tmp_path / "out", "one", **LONG)
    job = submit([one], partition="low")
    wait(lambda: steps(one) >= 20, "step 20", one)
    began = time.monotonic()
    occupy(tmp_path)
    wait(lambda: status(one) == "stopped", "the checkpoint", one)
    assert time.monotonic() - began < 120  # GraceTime of the partition
    saved = json.loads((one.workdir / "run.json").read_text())["step"]
    assert 20 <= saved < LONG["train__steps"]
    wait(lambda: ended(job), "the job", one)
    (found,) = jobs(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert f"resuming at step {saved}" in one.log.read_text()
    summary = json.loads((one.workdir / "run.json").read_text())
    for key in ("status", "step", "params_sha256", "valid_loss_final", "tokens_seen"):
        assert summary[key] == undisturbed[key]
    lines = [r["step"] for r in read_results(one.workdir / "results.jsonl") if r["kind"] == "train"]
    assert lines == list(range(1, LONG["train__steps"] + 1))


def test_a_run_of_its_own_is_queued_again_by_the_command_of_the_docs(tmp_path):
    """As printed, but for the partition, what the machine has, and the config."""
    (block,) = re.findall(r"```\n(sbatch .*?)```", (DOCS / "launch.md").read_text(), re.DOTALL)
    words = shlex.split(block.replace("\\\n", ""))
    for word in ("--partition=gpu", "--gpus=1", "--cpus-per-task=8"):
        words.remove(word)
    one = make_cell(tmp_path, "one", **LONG | {"train__steps": 600})
    printed = "python -m moe_ablm.train --config=configs/ladder.py:size=8m --workdir=runs/8m"
    assert printed in words[-1] and "--output=8m.log" in words
    words[-1] = words[-1].replace(printed, shlex.join([sys.executable, *one.argv]))
    words[words.index("--output=8m.log")] = f"--output={one.log}"
    one.log.parent.mkdir()
    (job,) = re.findall(r"\d+", slurm_says(*words, "--partition=low", f"--chdir={REPOSITORY}"))
    wait(lambda: steps(one) >= 20, "step 20", one)
    occupy(tmp_path)
    wait(lambda: ended(job), "the job", one)
    (found,) = jobs(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), one.log.read_text()
    assert status(one) == "complete" and "is queued again" in one.log.read_text()


def test_one_task_of_an_array_is_queued_again_alone(tmp_path):
    """The one that has the number of the array, which stands for all of its tasks."""
    cells = [make_cell(tmp_path, f"seed{i}", seed=i, **LONG) for i in range(2)]
    job = submit(cells)
    for each in cells:
        wait(lambda each=each: steps(each) >= 20, "step 20", each)
    tasks = {j["ArrayTaskId"] for j in jobs(job)}
    (own,) = [j["ArrayTaskId"] for j in jobs(job) if j["JobId"] == job]
    slurm_says("scancel", "--signal=USR1", f"{job}_{own}")
    wait(lambda: ended(job), "the array", cells[int(own)])
    restarts = {j["ArrayTaskId"]: j["Restarts"] for j in jobs(job)}
    assert restarts == {task: "1" if task == own else "0" for task in tasks}
    assert [status(c) for c in cells] == ["complete"] * 2


def test_two_processes_learn_what_one_does(tmp_path):
    cells = [make_cell(tmp_path / name, name, **SHORT) for name in ("one", "two")]
    submitted = [submit([c], processes=str(n)) for n, c in enumerate(cells, 1)]
    for job, each in zip(submitted, cells, strict=True):
        wait(lambda job=job: ended(job), "the job", each)
        assert status(each) == "complete", each.log.read_text()[-3000:]
        assert outcome.read(each.outcome) == outcome.Ending("complete", 0, "", 12)
    assert "2 device(s)" in cells[1].log.read_text()
    one, two = (
        [r["loss"] for r in read_results(c.workdir / "results.jsonl") if r["kind"] == "train"]
        for c in cells
    )
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_a_cell_that_fails_says_why(tmp_path):
    """By its own word, or by that of the script where the process was killed."""
    good = make_cell(tmp_path / "refused", "refused", **SHORT)
    refused = replace(good, argv=(*good.argv, "--config.train.stpes=3"))
    kill = "import os; print('the dog', flush=True); os.kill(os.getpid(), 9)"
    killed = Cell("killed", ("-c", kill), tmp_path / "killed" / "killed", "k" * 16, 1.0, 1.0)
    for each in (refused, killed):
        job = submit([each])
        wait(lambda job=job: ended(job), "the job", each)
        assert {j["JobState"] for j in jobs(job)} == {"FAILED"}
    found = state_of(refused)
    assert found.name == FAILED and "stpes" in found.note
    assert state_of(killed).note == "exit code 137; last line: the dog"


def test_a_cancelled_cell_stays_cancelled_and_can_be_resumed(tmp_path):
    one = make_cell(tmp_path, "one", **LONG)
    job = submit([one])
    wait(lambda: steps(one) >= 20, "step 20", one)
    slurm_says("scancel", job)
    wait(lambda: ended(job), "the end", one)
    wait(lambda: status(one) == "stopped", "the checkpoint", one)
    time.sleep(5)  # to be queued again, if anybody asked for it
    assert {j["JobState"] for j in jobs(job)} == {"CANCELLED"}
    done = subprocess.run(
        [sys.executable, *one.argv], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout and status(one) == "complete"
