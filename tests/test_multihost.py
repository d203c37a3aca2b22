"""Several processes train one run: one result, one writer, one end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import command, tiny_config, tiny_flags

from moe_ablm import outcome, trainer
from moe_ablm.errors import UserError
from moe_ablm.outcome import Ending
from moe_ablm.parallel import multihost
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.results import read_results

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "h:1234", "JAX_PROCESS_COUNT": "4", "JAX_PROCESS_INDEX": "3"}


# which processes belong together


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # the batch script itself
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, {}),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4", "JAX_PROCESS_COUNT": "1"}, None),
    ],
)
def test_who_is_alone_and_who_asks_the_scheduler(environment, expected):
    assert multihost.arguments_of(environment) == expected


def test_a_plain_address_needs_no_scheduler():
    assert multihost.arguments_of(SLURM | PLAIN) == {
        "coordinator_address": "h:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_COORDINATOR_ADDRESS", "host"),
        ("JAX_COORDINATOR_ADDRESS", "ho st:1"),
        ("JAX_PROCESS_COUNT", "0"),
        ("JAX_PROCESS_INDEX", "-1"),
        ("JAX_PROCESS_INDEX", "4"),
    ],
)
def test_a_contradiction_names_the_variable(name, value):
    with pytest.raises(UserError, match=f"^.{name} is '?{value}"):
        multihost.arguments_of(PLAIN | {name: value})


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_variable_is_named(name):
    with pytest.raises(UserError, match=f"^.{name} is None, expected .*set all of"):
        multihost.arguments_of({k: v for k, v in PLAIN.items() if k != name})


def test_a_process_alone_needs_no_agreement():
    heard = []
    stop = multihost.Stop(heard, make_mesh(-1, 1, 1))
    assert not stop()
    heard.append("SIGUSR1")
    assert stop()
    assert multihost.is_first()
    assert multihost.from_first(lambda: [1, None]) == [1, None]
    tree = {"x": jax.numpy.ones(2)}
    assert multihost.gathered(tree, make_mesh(-1, 1, 1)) is tree


# two processes on this machine

PATIENCE = 900  # seconds; two processes on one core compile slowly
FOREVER = ("--config.train.steps=1000000", "--config.eval.every=1000000")
CHANGES = {"train__steps": 24, "eval__every": 8, "checkpoint__every": 8}


def start_two(workdir: Path, *more: str, **environment: str) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_PROCESS_COUNT": "2"}
    processes = []
    for index in range(2):
        argv, options = command(
            "moe_ablm.train",
            *tiny_flags(**CHANGES),
            f"--workdir={workdir}",
            *more,
            **together,
            JAX_PROCESS_INDEX=str(index),
            **environment,
        )
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(argv, stdout=pipe, stderr=pipe, **options))
    return processes


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each printed; all must have ended well."""
    told = [p.communicate(timeout=PATIENCE) for p in processes]
    for process, (_, error) in zip(processes, told, strict=True):
        assert process.returncode == 0, error[-3000:]
    # XLA's collectives on CPU write to the descriptor itself
    return [re.sub(r"\[Gloo\].*\n", "", out) for out, _ in told]


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    while max((r["step"] for r in read_results(workdir / "results.jsonl")), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_json(workdir: Path) -> dict:
    return json.loads((workdir / "run.json").read_text())


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Work directory of an undisturbed run of two processes, and what they printed."""
    workdir = tmp_path_factory.mktemp("together") / "w"
    named = str(workdir.with_name("outcome.json"))
    return workdir, finish(start_two(workdir, MOE_ABLM_OUTCOME=named))


def test_two_processes_learn_what_one_does(together, tmp_path):
    workdir, _ = together
    alone = trainer.run(tiny_config(**CHANGES), tmp_path / "w")
    found = run_json(workdir)
    for key in ("fingerprint", "status", "step", "tokens_seen", "params_total"):
        assert found[key] == alone[key]
    np.testing.assert_allclose(found["valid_loss_final"], alone["valid_loss_final"], atol=1e-4)
    pair = [
        [r["loss"] for r in read_results(w / "results.jsonl") if r["kind"] == "train"]
        for w in (workdir, tmp_path / "w")
    ]
    np.testing.assert_allclose(*pair, atol=1e-4)


def test_one_of_them_writes(together):
    workdir, (first, second) = together
    records = read_results(workdir / "results.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 25))
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert "validation loss" in first
    assert second == ""
    assert outcome.read(workdir.with_name("outcome.json")) == Ending("complete", 0, "", 24)


@pytest.mark.slow
def test_a_finished_run_is_told_to_both(together):
    workdir, _ = together
    first, second = finish(start_two(workdir))
    assert "is complete" in first and second == ""


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_nothing_is_lost(together, tmp_path):
    workdir = tmp_path / "w"
    processes = start_two(workdir)
    wait_for_step(workdir, 3, processes)
    processes[1].send_signal(signal.SIGUSR1)
    finish(processes)
    stopped = run_json(workdir)
    assert stopped["status"] == "stopped" and 3 <= stopped["step"] < 24
    finish(start_two(workdir))
    assert run_json(workdir)["params_sha256"] == run_json(together[0])["params_sha256"]


def test_bad_input_ends_both(together, tmp_path):
    """Found by the first alone: the second would wait for it."""
    named = tmp_path / "outcome.json"
    processes = start_two(together[0], "--config.train.lr=0.5", MOE_ABLM_OUTCOME=str(named))
    told = [p.communicate(timeout=PATIENCE)[1] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], told
    words = "holds a different run (train.lr: 0.003 there, 0.5 now)"
    assert all(words in text for text in told)
    found = outcome.read(named)
    assert found.status == "refused" and words in found.message


HALT = """
import sys, time
import jax
from moe_ablm.parallel.multihost import watchdog

jax.device_count = lambda: 2
with watchdog() as beat:
    for _ in range(3):
        time.sleep(0.5)
        beat()
    print("alive", flush=True)
    time.sleep(60)
"""


def test_a_halt_ends_the_process():
    """As in a collective that never returns; updates that come in time do not."""
    done = subprocess.run(
        [sys.executable, "-c", HALT],
        env=os.environ | {"MOE_ABLM_HANG_SECONDS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "Timeout (0:00:01)!" in done.stderr and 'File "<string>", line 12' in done.stderr


@pytest.mark.parametrize("text", ["soon", "-1", "nan", ""])
def test_a_wrong_time_is_refused(text, monkeypatch):
    monkeypatch.setenv("MOE_ABLM_HANG_SECONDS", text)
    with pytest.raises(UserError, match="MOE_ABLM_HANG_SECONDS is"):
        multihost._hang_seconds()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_peer_ends_the_run(lost, how, tmp_path):
    """Dead, or alive without a sign of life."""
    workdir = tmp_path / "w"
    processes = start_two(workdir, *FOREVER)
    try:
        wait_for_step(workdir, 9, processes)
        processes[lost].send_signal(how)
        began = time.monotonic()
        processes[1 - lost].wait(timeout=PATIENCE)
        # twice: a dead process is only missed when its next sign of life is overdue
        assert time.monotonic() - began < 2 * multihost.LOST_PEER_SECONDS
        assert processes[1 - lost].returncode != 0
    finally:
        for process in processes:
            process.kill()
