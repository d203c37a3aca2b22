"""Manifests for Kubernetes: what the JobSet API would take, and what reaches the trainer."""

import argparse
import copy
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import jobset, settings
from launch.cell import Cell
from moe_ablm.errors import UserError

HOSTILE = ("a b", "'", "$(HOME)", "$$(HOME)", "$HOME", "`id`", "a\nb", "{{x}}", "- y: z", "")


def cell(argv: tuple[str, ...] = ("-m", "moe_ablm.train"), name: str = "35m.top2-S=1-0123abcd"):
    return Cell(name, argv, Path("/runs/x") / name, "0123456789abcdef", 1.0, 1.0)


def resolved(**given: str) -> dict:
    known = {"hardware": "h100x8x2", "image": "lab/moe_ablm:1", "claim": "runs"} | given
    parser = argparse.ArgumentParser()
    jobset.add_arguments(parser)
    options = parser.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in known.items()])
    return settings.resolve(options, "jobset", jobset.SETTINGS)


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
    made = jobset.manifest(cell(), resolved())
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
    assert "xla_gpu_enable_latency_hiding_scheduler" in env["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("hardware", "hosts", "topology"),
    [("v4-8", 1, "2x2x1"), ("v5p-128", 16, "4x4x4"), ("v6e-16", 4, "4x4"), ("v6e-8", 2, "2x4")],
)
def test_tpu_slices(hardware, hosts, topology):
    made = jobset.manifest(cell(), resolved(hardware=hardware))
    inner = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert inner["parallelism"] == inner["completions"] == hosts
    assert pod(made)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert pod(made)["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    names = {e["name"] for e in pod(made)["containers"][0]["env"]}
    assert not any(n.startswith("JAX_") for n in names)


def run_container(made: dict, folder: Path) -> subprocess.CompletedProcess:
    """What the container's process is, with `python3` telling its arguments."""
    container = pod(made)["containers"][0]
    words = [expand(w, {"HOME": "WRONG"}) for w in container["command"] + container["args"]]
    tell = folder / "python3"
    tell.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    tell.chmod(0o755)
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(words, env=path, capture_output=True, text=True, check=False)


def test_arguments_reach_the_trainer_unchanged(tmp_path):
    text = yaml.safe_dump(jobset.manifest(cell(HOSTILE), resolved()), sort_keys=False, width=1000)
    done = run_container(yaml.safe_load(text), tmp_path)
    assert done.stdout.split("\0")[:-1] == list(HOSTILE)


@pytest.mark.parametrize(("status", "code"), [("stopped", 1), ("complete", 0), ("diverged", 0)])
def test_a_stopped_run_is_a_failure_that_restarts(status, code, tmp_path):
    made = jobset.manifest(cell(), resolved())
    container = pod(made)["containers"][0]
    container["args"][0] = str(tmp_path)
    (tmp_path / "run.json").write_text(f'{{\n "status": "{status}"\n}}')
    assert run_container(made, tmp_path).returncode == code
    assert made["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_xpk_command(tmp_path):
    argv = jobset.xpk_command(cell(HOSTILE), resolved(hardware="v6e-16", cluster="lab"))
    assert argv[:4] == ["xpk", "workload", "create", "--cluster=lab"]
    assert "--tpu-type=v6e-16" in argv and "--num-slices=1" in argv
    assert shlex.split(shlex.join(argv)) == argv
    command = argv[-1].removeprefix("--command=")
    inner = shlex.split(command.rpartition("&& sh -c ")[2].join(["sh -c ", ""]))
    assert tuple(inner[5:]) == HOSTILE
    gpu = jobset.xpk_command(cell(), resolved())
    assert "--num-nodes=2" in gpu and "--device-type=h100-80gb-8" in gpu


def test_launch_writes_what_it_checked(tmp_path, capsys):
    one = Cell("a-1", ("-m", "x"), tmp_path / "a-1", "f" * 16, 1.0, 1.0)
    values = {"hardware": "v4-8", "image": "i", "claim": "c", "mount": str(tmp_path)}
    parser = argparse.ArgumentParser()
    jobset.add_arguments(parser)
    assert jobset.launch([one], parser.parse_args([f"--{k}={v}" for k, v in values.items()])) == 0
    made = yaml.safe_load((tmp_path / "logs" / "jobset" / "a-1.yaml").read_text())
    assert jobset.check(made) == []
    told = capsys.readouterr().out
    assert "kubectl create -f" in told and "xpk workload create" in told


# the checker itself


def changed(path: str, value) -> dict:
    """A good manifest with one field set, or taken out (None)."""
    made = copy.deepcopy(jobset.manifest(cell(), resolved()))
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
        (f"{POD}/nodeSelector", ["a"], "nodeSelector: ['a'], expected an object"),
    ],
)
def test_what_a_cluster_refuses_is_found(path, value, problem):
    found = jobset.check(changed(path, value))
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
    ],
)
def test_what_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        jobset.manifest(cell(), resolved(**given))


def test_names_of_long_cells_are_short_and_differ():
    long = "w" * 100
    made = jobset.manifest(cell(name=long), resolved(hardware="h100x8x1000"))
    other = Cell(long, (), Path("/runs/y"), "f" * 16, 1.0, 1.0)
    assert made["metadata"]["name"] != jobset.job_name(other)
    assert made["metadata"]["annotations"]["moe-ablm/cell"] == long
