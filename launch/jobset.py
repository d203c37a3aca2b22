"""Writes a Kubernetes JobSet for each cell, for GPU nodes or TPU slices, and the xpk command line.

Nothing is sent to a cluster: `kubectl create -f FOLDER` or the printed command does that.
tests/jobset_schema.py holds what the JobSet API (v1alpha2) and Kubernetes ask of every field used
here; `Setting` patterns keep out what would not fit.

An evicted pod receives TERM. The trainer saves and reports that it stopped. The container turns
this into a failure, so that the JobSet restarts all pods and the run resumes. A run that diverged
or collapsed ends the JobSet instead, since it would do so again.
"""

import argparse
import re
from pathlib import Path
from shlex import join, quote
from typing import Any

import yaml

from launch import assign
from launch.cell import LOGS, Cell
from launch.ended import ATTEMPT, FINAL
from launch.hardware import Hardware, hardware
from launch.settings import Setting, add_options, given, resolve
from moe_ablm.errors import UserError
from moe_ablm.files import address_of
from moe_ablm.outcome import VARIABLE

API = "jobset.x-k8s.io/v1alpha2"
LABEL = r"(?=.{1,63}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?"  # names and labels of Kubernetes
PORT = 8476  # of the coordinator
GRACE = 120  # seconds between TERM and the end
RESTARTS = 100  # of all pods; a run that is evicted more often is given up
JOB = "run"
SETTINGS = {
    "hardware": assign.SETTING,
    "image": Setting(r"[A-Za-z0-9_.:@/-]+", "container image with this repository at --source"),
    "source": Setting(r"/[A-Za-z0-9_./-]*", "absolute path of the repository in it", "/moe_ablm"),
    "claim": Setting(LABEL, "persistent volume claim of the data and of --out"),
    "mount": Setting(
        r"/[A-Za-z0-9_./-]+", "mount point of the claim, the same here and in the pods", "/runs"
    ),
    "namespace": Setting(LABEL, "a namespace"),
    "queue": Setting(LABEL, "a local queue of Kueue"),
    "cluster": Setting(LABEL, "GKE cluster, for the xpk command line"),
    "service-account": Setting(LABEL, "a service account"),
}
# GKE's names
ACCELERATORS = {
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
XPK_DEVICES = {"a100": "a100-80gb-8", "h100": "h100-80gb-8", "h200": "h200-141gb-8"}
# The process of a container, with the log and the outcome before the trainer's arguments.
# The first process of a container is sent TERM, alone, and ignores it unless it has a trap.
# The trainer ends with 0 when it was stopped: `launch.ended` makes that a failure.
# Each pod removes the outcome of earlier attempts: no run ends well before all pods have met.
COMMAND = f"""\
log=$1
export {VARIABLE}="$2"
shift 2
mkdir -p "${{log%/*}}"
rm -f "${VARIABLE}"
printf '{ATTEMPT}%s\\n' "pod $(uname -n)" >>"$log"
pipe=$(mktemp -u)
mkfifo "$pipe"
tee -a "$log" <"$pipe" &
pid=
trap 'kill -TERM "$pid"' TERM
python3 "$@" >"$pipe" 2>&1 &
pid=$!
wait "$pid"
code=$?
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
rm -f "$pipe"
sleep 1 # for tee; it is not waited for, since a process that is left over may hold the pipe
exec python3 -m launch.ended "${VARIABLE}" "$log" "$code"
"""


_FINAL_RULE = {
    "action": "FailJob",
    "onExitCodes": {"containerName": "train", "operator": "In", "values": [FINAL]},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this launcher."""
    add_options(parser, SETTINGS)


def launch(cells: list[Cell], options: argparse.Namespace) -> int:
    """Writes `logs/jobset/CELL.yaml`, and CELL.sh for xpk, and prints how to send them; returns 0.

    Raises:
      UserError: a setting is wrong or missing, or a cell is not on the volume.
    """
    if not cells:
        return 0
    settings = resolve(options, "jobset", SETTINGS)
    for name in ("hardware", "image", "claim"):
        if settings[name] is None:
            raise UserError(f"--{name} is missing: {SETTINGS[name].help}")
    folder = cells[0].workdir.parent / LOGS / "jobset"
    _hardware(settings)
    cells = assign.assigned(cells, settings["hardware"])
    made = [(cell, manifest(cell, settings)) for cell in cells]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for cell, content in made:
            text = yaml.safe_dump(content, sort_keys=False, width=1000)
            (folder / f"{cell.name}.yaml").write_text(text)
            _xpk_script(cell).write_text(xpk_script(cell, settings))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    print(f"{len(cells)} JobSets; kubectl create -f {join([str(folder)])} sends them, or xpk:")
    for cell in cells:
        print(join(xpk_command(cell, settings)))
    return 0


def manifest(cell: Cell, settings: dict[str, str | None]) -> dict:
    """The JobSet of a cell.

    Raises:
      UserError: the cell's folder or its data are not on the volume.
    """
    where = _hardware(settings)
    _check_place(cell, settings)
    labels = {"app.kubernetes.io/name": "moe_ablm"}
    if settings["queue"]:
        labels["kueue.x-k8s.io/queue-name"] = settings["queue"]
    # the name of a cell is longer than a name may be
    annotations = {"moe-ablm/cell": cell.name, "moe-ablm/fingerprint": cell.fingerprint}
    if where.kind == "tpu":  # a slice is a node pool of its own
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        annotations[exclusive] = "cloud.google.com/gke-nodepool"
    metadata = {"name": job_name(cell), "labels": labels, "annotations": annotations}
    if settings["namespace"]:
        metadata["namespace"] = settings["namespace"]
    return {
        "apiVersion": API,
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            # pods of two attempts must not meet: they would share a work directory
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "final",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": where.hosts,
                            "completions": where.hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": [_FINAL_RULE]},
                            "template": {"spec": _pod(cell, where, settings)},
                        }
                    },
                }
            ],
        },
    }


def job_name(cell: Cell) -> str:
    """A name for Kubernetes, the same for the same run: words of the cell's and its fingerprint."""
    words = re.sub("[^a-z0-9]+", "-", cell.name.lower()).strip("-")[:24].strip("-")
    return "-".join(filter(None, ("m", words, cell.fingerprint[:8])))


def xpk_command(cell: Cell, settings: dict[str, str | None]) -> list[str]:
    """`xpk workload create` for the same run, as an argument list.

    xpk puts the command into YAML as it is; so it is no more than the path of a script.
    """
    where = _hardware(settings)
    if where.kind == "tpu":
        slice_ = where.name.replace("v5e-", "v5litepod-")  # Google's own name
        device = [f"--tpu-type={slice_}", "--num-slices=1"]
    else:
        device = [f"--device-type={XPK_DEVICES[where.chip]}", f"--num-nodes={where.hosts}"]
    return [
        "xpk",
        "workload",
        "create",
        f"--cluster={settings['cluster'] or 'CLUSTER'}",
        f"--workload={job_name(cell)}",
        *device,
        f"--docker-image={settings['image']}",
        f"--max-restarts={RESTARTS}",
        "--restart-on-exit-codes=1,2",
        f"--termination-grace-period-seconds={GRACE}",
        # exec: xpk sends TERM to the shell that reads this
        f"--command=exec sh {quote(str(_xpk_script(cell)))}",
    ]


def xpk_script(cell: Cell, settings: dict[str, str | None]) -> str:
    """The script that a container runs when xpk starts it."""
    where = _hardware(settings)
    lines = [f"cd {quote(given(settings, 'source'))} || exit 1"]
    lines += [f"export {join([f'{k}={v}'])}" for k, v in cell.environment.items()]
    if where.kind == "gpu":  # xpk's names for the same
        lines += [
            'export JAX_COORDINATOR_ADDRESS="$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"',
            'export JAX_PROCESS_COUNT="$NNODES" JAX_PROCESS_INDEX="$NODE_RANK"',
        ]
    lines += [join(["exec", "sh", "-c", COMMAND, "sh", *_arguments(cell)])]
    return "".join(f"{line}\n" for line in ["#!/bin/sh", *lines])


def _xpk_script(cell: Cell) -> Path:
    return cell.log.parent / "jobset" / f"{cell.name}.sh"


def _arguments(cell: Cell) -> tuple[str, ...]:
    """Of `COMMAND`."""
    return str(cell.log), str(cell.outcome), *cell.argv


def _hardware(settings: dict[str, str | None]) -> Hardware:
    where = hardware(given(settings, "hardware"))
    if where.kind == "cpu":
        raise UserError("--hardware cpu: a JobSet needs GPUs or TPUs; --launcher=local needs none")
    if where.kind == "gpu" and where.near != 8:
        raise UserError(f"--hardware {where.name}: a JobSet takes whole nodes of 8 GPUs")
    return where


def _check_place(cell: Cell, settings: dict[str, str | None]) -> None:
    mount = given(settings, "mount")
    if not cell.workdir.is_relative_to(mount):
        raise UserError(
            f"{cell.workdir} is not on the volume, which is mounted at {mount}: use "
            f"--out {mount}/..., or another --mount"
        )
    for argument in cell.argv:
        name, _, value = argument.partition("=")
        if name != "--config.data.path" or value == "None":  # None: made in the pod
            continue
        if not (address_of(value) or Path(value).is_relative_to(mount)):
            raise UserError(
                f"--data {value} is not on the volume, which is mounted at {mount}: no pod would "
                "find it"
            )


def _pod(cell: Cell, where: Hardware, settings: dict[str, str | None]) -> dict:
    chips = where.devices // where.hosts
    resource = "nvidia.com/gpu" if where.kind == "gpu" else "google.com/tpu"
    mounts = [{"name": "runs", "mountPath": settings["mount"]}]
    volumes: list[dict[str, Any]] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": settings["claim"]}}
    ]
    if where.kind == "gpu":  # NCCL's shared memory; a container has 64 MiB by default
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    container = {
        "name": "train",
        "image": settings["image"],
        "workingDir": settings["source"],
        "command": ["sh", "-c", _literal(COMMAND), "sh"],
        "args": [_literal(a) for a in _arguments(cell)],
        "env": _environment(cell, where),
        "resources": {"limits": {resource: chips}},
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": _node_selector(where),
        "containers": [container],
        "volumes": volumes,
    }
    if settings["service-account"]:
        pod["serviceAccountName"] = settings["service-account"]
    return pod


def _environment(cell: Cell, where: Hardware) -> list[dict]:
    """How the processes find each other: GKE sets it for a TPU slice."""
    env = [{"name": k, "value": _literal(v)} for k, v in cell.environment.items()]
    if where.kind == "tpu" or where.hosts == 1:
        return env
    name = job_name(cell)
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        *env,
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{JOB}-0-0.{name}:{PORT}"},
        {"name": "JAX_PROCESS_COUNT", "value": str(where.hosts)},
        {"name": "JAX_PROCESS_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _node_selector(where: Hardware) -> dict[str, str]:
    if where.kind == "gpu":
        return {"cloud.google.com/gke-accelerator": ACCELERATORS[where.chip]}
    return {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[where.chip],
        "cloud.google.com/gke-tpu-topology": where.topology,
    }


def _literal(text: str) -> str:
    """Text that Kubernetes, which expands `$(NAME)` and reads `$$` as `$`, leaves as it is."""
    return text.replace("$", "$$")
