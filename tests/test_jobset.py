"""Manifests for Kubernetes: what the JobSet API would take, and what reaches the trainer."""

import argparse
import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from jobset_schema import check

from launch import ended, jobset, settings
from launch.cell import Cell
from moe_ablm.errors import UserError
from moe_ablm.outcome import Ending, leave, read
from moe_ablm.parallel import multihost

HOSTILE = ("a b", "'", "$(HOME)", "$$(HOME)", "$HOME", "`id`", "a\nb", "{{x}}", "- y: z", "")


def cell(
    argv: tuple[str, ...] = ("-m", "moe_ablm.train"),
    name: str = "35m.top2-S=1-0123abcd",
    folder: Path = Path("/runs/x"),
) -> Cell:
    environment = {"XLA_FLAGS": "--xla_a=1 --xla_b=2", "PRICE": "$5"}
    return Cell(name, argv, folder / name, "0123456789abcdef", 1.0, 1.0, environment)


def resolved(**given: str) -> dict:
    known = {"hardware": "h100x8x2", "image": "lab/moe_ablm:1", "claim": "runs"} | given
    parser = argparse.ArgumentParser()
    jobset.add_arguments(parser)
    options = parser.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in known.items()])
    return settings.resolve(options, "jobset", jobset.SETTINGS)


def manifest(one: Cell, settings: dict) -> dict:
    """The manifest of a cell, which a cluster would take."""
    made = jobset.manifest(one, settings)
    assert check(made) == []
    return made


@pytest.fixture(autouse=True)
def no_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def pod(made: dict) -> dict:
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def expand(text: str, variables: dict[str, str]) -> str:
    """Kubernetes' expansion of `command` and `args` ($$ is $, unknown names stay)."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]),
        text,
    )


def test_gpu_nodes_find_each_other():
    made = manifest(cell(), resolved())
    inner = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (inner["parallelism"], inner["completions"], inner["completionMode"]) == (
        2,
        2,
        "Indexed",
    )
    container = pod(made)["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod(made)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    env = {e["name"]: e.get("value") for e in container["env"]}
    name = made["metadata"]["name"]
    # JobSet's names of pods: SET-JOB-REPLICA-INDEX, in a subdomain of the name of the set
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-run-0-0.{name}:8476"
    assert env["JAX_PROCESS_COUNT"] == "2"
    assert env["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"
    assert expand(env["PRICE"], {}) == "$5"


@pytest.mark.parametrize(
    ("hardware", "hosts", "topology"),
    [("v4-8", 1, "2x2x1"), ("v5p-128", 16, "4x4x4"), ("v6e-16", 4, "4x4"), ("v5e-8", 2, "2x4")],
)
def test_tpu_slices(hardware, hosts, topology):
    made = manifest(cell(), resolved(hardware=hardware))
    inner = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert inner["parallelism"] == inner["completions"] == hosts
    assert pod(made)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert pod(made)["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    names = {e["name"] for e in pod(made)["containers"][0]["env"]}
    assert not any(n.startswith("JAX_") for n in names)


TELL = 'for a in "$@"; do printf "%s\\0" "$a"; done'


def start_container(words: list[str], folder: Path, python: str = TELL, **env) -> subprocess.Popen:
    """The container's process, with a script in place of the trainer."""
    tell = folder / "python3"
    real = shlex.quote(sys.executable)
    tell.write_text(f'#!/bin/sh\n[ "$2" = launch.ended ] && exec {real} "$@"\n{python}\n')
    tell.chmod(0o755)
    env |= {"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(REPO)}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True)


def words_of(made: dict) -> list[str]:
    container = pod(made)["containers"][0]
    return [expand(w, {"HOME": "WRONG"}) for w in container["command"] + container["args"]]


def run_cell(folder: Path, argv: tuple[str, ...] = (), python: str = TELL) -> tuple[int, str]:
    """Exit code and output of the container of a cell below `folder`."""
    made = manifest(cell(argv, folder=folder), resolved(mount=str(folder)))
    process = start_container(words_of(made), folder, python)
    return process.wait(timeout=60), process.communicate()[0]


def test_arguments_reach_the_trainer_unchanged(tmp_path):
    one = cell(HOSTILE, folder=tmp_path)
    text = yaml.safe_dump(manifest(one, resolved(mount=str(tmp_path))), sort_keys=False)
    process = start_container(words_of(yaml.safe_load(text)), tmp_path)
    assert process.communicate(timeout=60)[0].split("\0")[:-1] == list(HOSTILE)
    assert one.log.read_text().startswith("$ pod ")  # where `sweeps.status` looks
    assert one.log.read_text().partition("\n")[2].split("\0")[:-1] == list(HOSTILE)


def leaving(status: str) -> str:
    """A shell command that leaves an outcome."""
    content = json.dumps({"status": status, "exit_code": 0, "message": "", "step": 3})
    return f"echo '{content}' >\"$MOE_ABLM_OUTCOME\""


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        (f"{leaving('complete')}; exit 0", 0),
        (f"{leaving('stopped')}; exit 0", ended.AGAIN),
        (f"{leaving('diverged')}; exit 1", ended.FINAL),
        (f"{leaving('collapsed')}; exit 1", ended.FINAL),
        (f"{leaving('refused')}; exit 2", 2),
        (f"{leaving('complete')}; exit 134", 134),
        ("exit 0", 0),  # of a pod that is not the first
    ],
)
def test_what_a_run_said_decides_whether_it_restarts(python, expected, tmp_path):
    assert run_cell(tmp_path, python=python)[0] == expected


def test_what_an_attempt_before_said_decides_nothing(tmp_path):
    for status in ("diverged", "stopped"):
        leave(cell(folder=tmp_path).outcome, Ending(status, 1), replace=True)
        assert run_cell(tmp_path, python="echo the dog; exit 1")[0] == 1
        found = read(cell(folder=tmp_path).outcome)
        assert found == Ending("failed", 1, "exit code 1; last line: the dog")


def test_a_container_without_python_fails(tmp_path):
    made = manifest(cell(folder=tmp_path), resolved(mount=str(tmp_path)))
    for name in ("mkdir", "rm", "uname", "mktemp", "mkfifo", "tee", "sleep"):
        (tmp_path / name).symlink_to(shutil.which(name))
    words = [shutil.which("sh"), *words_of(made)[1:]]
    done = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, check=False)
    assert done.returncode not in (0, ended.AGAIN, ended.FINAL)


def test_who_is_restarted():
    spec = manifest(cell(), resolved())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [ended.FINAL]


SAVE = f"""
save() {{ {leaving("stopped")}; exit 0; }}
trap save TERM
touch "$FOLDER/ready"
while :; do sleep 0.1; done
"""


def test_the_first_process_of_a_container_hands_on_term(tmp_path):
    """It alone is told of an eviction, and as process 1 would ignore it."""
    made = manifest(cell(folder=tmp_path), resolved(mount=str(tmp_path)))
    folder = cell(folder=tmp_path).workdir
    folder.mkdir()
    process = start_container(words_of(made), tmp_path, SAVE, FOLDER=str(folder))
    end = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == ended.AGAIN
    process.communicate()


def test_the_xpk_command(tmp_path):
    one = cell(HOSTILE, folder=tmp_path)
    argv = jobset.xpk_command(one, resolved(hardware="v6e-16", cluster="lab"))
    assert argv[:4] == ["xpk", "workload", "create", "--cluster=lab"]
    assert "--tpu-type=v6e-16" in argv and "--num-slices=1" in argv
    # xpk pastes the command into YAML, between double quotes for one
    assert re.fullmatch(r"--command=exec sh [\w./=-]+", argv[-1])
    gpu = jobset.xpk_command(cell(), resolved())
    assert "--tpu-type=v5litepod-8" in jobset.xpk_command(cell(), resolved(hardware="v5e-8"))
    assert "--num-nodes=2" in gpu and "--device-type=h100-80gb-8" in gpu


def test_the_script_for_xpk_gives_the_trainer_what_it_expects(tmp_path):
    one = cell(HOSTILE, folder=tmp_path)
    given = resolved(mount=str(tmp_path), source=str(tmp_path))
    file = tmp_path / "script"
    file.write_text(jobset.xpk_script(one, given))
    told = {"JAX_COORDINATOR_ADDRESS": "h", "JAX_COORDINATOR_PORT": "6002"}
    told |= {"NNODES": "2", "NODE_RANK": "1"}
    process = start_container(["sh", str(file)], tmp_path, f"{TELL}\nenv", **told)
    out = process.communicate(timeout=60)[0]
    assert out.split("\0")[: len(HOSTILE)] == list(HOSTILE)
    environment = dict(x.split("=", 1) for x in out.rpartition("\0")[2].splitlines())
    assert multihost.arguments_of(environment) == {
        "coordinator_address": "h:6002", "num_processes": 2, "process_id": 1,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


def test_launch_writes_what_it_checked(tmp_path, capsys):
    argv = ("-m", "moe_ablm.train", "--config=configs/base.py")
    one = Cell("a-1", argv, tmp_path / "a-1", "f" * 16, 1.0, 1.0)
    values = {"hardware": "v4-8", "image": "i", "claim": "c", "mount": str(tmp_path)}
    parser = argparse.ArgumentParser()
    jobset.add_arguments(parser)
    assert jobset.launch([one], parser.parse_args([f"--{k}={v}" for k, v in values.items()])) == 0
    made = yaml.safe_load((tmp_path / "logs" / "jobset" / "a-1.yaml").read_text())
    assert check(made) == []
    container = pod(made)["containers"][0]
    assert "--config.mesh.data=4" in container["args"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env["MOE_ABLM_HARDWARE"] == "v4-8"
    assert "xla_tpu_enable_data_parallel_all_reduce_opt" in env["LIBTPU_INIT_ARGS"]
    told = capsys.readouterr().out
    assert "kubectl create -f" in told and "xpk workload create" in told


# the checker itself


def changed(path: str, value) -> dict:
    """A good manifest with one field set, or taken out (None)."""
    made = copy.deepcopy(manifest(cell(), resolved()))
    *parents, last = path.split("/")
    place = made
    for key in parents:
        place = place[int(key) if key.isdecimal() else key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


POD = "spec/replicatedJobs/0/template/spec/template/spec"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("apiVersion", "jobset.x-k8s.io/v1", "apiVersion: "),
        ("metadata/name", "Upper", "metadata.name: "),
        ("metadata/name", "a" * 60, "the pod a"),
        ("metadata/labels/x", 3, "metadata.labels.x: 3"),
        ("spec/replicatedJobs", [], "spec.replicatedJobs: "),
        ("spec/replicatedJob", [], "spec.replicatedJob: there is no such field"),
        ("spec/failurePolicy/maxRestarts", -1, "maxRestarts: -1"),
        ("spec/failurePolicy/maxRestarts", True, "maxRestarts: True"),
        ("spec/failurePolicy/maxRestarts", "3", "maxRestarts: '3'"),
        ("spec/replicatedJobs/0/template/spec/completions", None, "completions: missing"),
        (f"{POD}/restartPolicy", "Always", "restartPolicy: 'Always'"),
        (f"{POD}/containers/0/args", ["a", 1], "args[1]: 1"),
        (f"{POD}/containers/0/env", [{"name": "A-B"}], "env[0].name: 'A-B'"),
        (f"{POD}/containers/0/volumeMounts", [{"name": "x", "mountPath": "/x"}], "are no volumes"),
        (f"{POD}/containers/0/volumeMounts/0/mountPath", "runs", "mountPath: 'runs'"),
        (f"{POD}/volumes", "runs", "volumes: 'runs', expected a list"),
        ("spec/failurePolicy/rules/0/action", "Fail", "rules[0].action: 'Fail'"),
        (f"{POD}/nodeSelector", ["a"], "nodeSelector: ['a'], expected an object"),
    ],
)
def test_what_a_cluster_refuses_is_found(path, value, problem):
    found = check(changed(path, value))
    assert len(found) == 1 and problem in found[0], found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hardware": "cpu"}, "needs GPUs or TPUs"),
        ({"hardware": "h100x4"}, "whole nodes of 8"),
        ({"hardware": "v5p-24"}, "12 chips are no slice"),
        ({"mount": "/elsewhere"}, "not on the volume"),
        ({"image": "a b"}, "--image='a b': expected"),
        ({"claim": "../x"}, "--claim="),
        ({"claim": "x" * 64}, "--claim="),
    ],
)
def test_what_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        manifest(cell(), resolved(**given))


def test_data_must_be_on_the_volume():
    with pytest.raises(UserError, match="--data /data/pairs is not on the volume"):
        manifest(cell(("-m", "x", "--config.data.path=/data/pairs")), resolved())
    for good in ("/runs/pairs", "None", "gs://bucket/pairs"):
        manifest(cell(("-m", "x", f"--config.data.path={good}")), resolved())


def test_names_of_long_cells_are_short_and_differ():
    long = "w" * 100
    made = manifest(cell(name=long), resolved(hardware="h100x8x1000"))
    other = Cell(long, (), Path("/runs/y"), "f" * 16, 1.0, 1.0)
    assert made["metadata"]["name"] != jobset.job_name(other)
    assert made["metadata"]["annotations"]["moe-ablm/cell"] == long
