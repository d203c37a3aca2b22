"""Writes a Kubernetes JobSet for each cell, for GPU nodes or TPU slices, and the xpk command line.

Nothing is sent to a cluster: `kubectl create -f FOLDER` or the printed command does that. The
manifests are checked against what the JobSet API (v1alpha2) and Kubernetes ask of every field used
here, before a cluster sees them.

A pod that is evicted gets TERM; the trainer saves and says that it stopped, which the container
turns into a failure, so that the JobSet starts all pods again and the run resumes.
"""

import argparse
import re
from pathlib import Path
from shlex import join

import yaml

from launch.cell import LOGS, Cell
from launch.meshes import Hardware, hardware
from launch.settings import Setting, add_options, resolve
from moe_ablm.errors import UserError

API = "jobset.x-k8s.io/v1alpha2"
PORT = 8476  # of the coordinator
GRACE = 120  # seconds between TERM and the end
RESTARTS = 100  # of all pods; a run that is evicted more often is given up
JOB = "run"
_LABEL = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
SETTINGS = {
    "hardware": Setting(r"[a-z0-9-]+", "its name in launch/meshes.py, such as h100x8x2, v6e-16"),
    "image": Setting(r"[A-Za-z0-9_.:@/-]+", "container image with this repository at --source"),
    "source": Setting(r"/[A-Za-z0-9_./-]*", "absolute path of the repository in it", "/moe_ablm"),
    "claim": Setting(_LABEL, "persistent volume claim of the data and of --out"),
    "mount": Setting(r"/[A-Za-z0-9_./-]+", "where it is mounted, here and there", "/runs"),
    "namespace": Setting(_LABEL, "a namespace"),
    "queue": Setting(_LABEL, "a local queue of Kueue"),
    "cluster": Setting(_LABEL, "of GKE, for the xpk command line"),
    "service-account": Setting(_LABEL, "a service account"),
}
# GKE's names
ACCELERATORS = {
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "v4": "tpu-v4-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
XPK_DEVICES = {"a100": "a100-80gb-8", "h100": "h100-80gb-8", "h200": "h200-141gb-8"}
# by chips: v4 and v5p are tori of three dimensions, v6e of two
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
         256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}  # fmt: skip
SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# the trainer ends with 0 when it was stopped; here that is not the end
COMMAND = (
    'workdir=$1; shift; python3 "$@" || exit; '
    'if grep -q \'"status": "stopped"\' "$workdir/run.json"; then exit 1; fi'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this launcher."""
    add_options(parser, SETTINGS)


def launch(cells: list[Cell], options: argparse.Namespace) -> int:
    """Writes `logs/jobset/CELL.yaml` and prints how to send them; returns 0.

    Raises:
      UserError: a setting is wrong or missing, or a manifest would be refused.
    """
    if not cells:
        return 0
    settings = resolve(options, "jobset", SETTINGS)
    for name in ("hardware", "image", "claim"):
        if settings[name] is None:
            raise UserError(f"--{name} is missing: {SETTINGS[name].help}")
    folder = cells[0].workdir.parent / LOGS / "jobset"
    made = [(cell, manifest(cell, settings)) for cell in cells]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for cell, content in made:
            text = yaml.safe_dump(content, sort_keys=False, width=1000)
            (folder / f"{cell.name}.yaml").write_text(text)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    print(f"{len(cells)} JobSets; kubectl create -f {join([str(folder)])} sends them, or xpk:")
    for cell in cells:
        print(join(xpk_command(cell, settings)))
    return 0


def manifest(cell: Cell, settings: dict[str, str | None]) -> dict:
    """The JobSet of a cell, checked.

    Raises:
      UserError: the cell's folder is not on the volume, or a field would be refused.
    """
    where = _hardware(settings)
    _check_place(cell, settings)
    labels = {"app.kubernetes.io/name": "moe_ablm"}
    if settings["queue"]:
        labels["kueue.x-k8s.io/queue-name"] = settings["queue"]
    metadata = {
        "name": job_name(cell),
        "labels": labels,
        # the name of a cell is longer than a name may be
        "annotations": {"moe-ablm/cell": cell.name, "moe-ablm/fingerprint": cell.fingerprint},
    }
    if settings["namespace"]:
        metadata["namespace"] = settings["namespace"]
    if where.kind == "tpu":  # a slice is a node pool of its own
        metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = (
            "cloud.google.com/gke-nodepool"
        )
    made = {
        "apiVersion": API,
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            # pods of two attempts must not meet: they would share a work directory
            "failurePolicy": {"maxRestarts": RESTARTS, "restartStrategy": "BlockingRecreate"},
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
                            "template": {"spec": _pod(cell, where, settings)},
                        }
                    },
                }
            ],
        },
    }
    if problems := check(made):
        raise UserError(f"cell {cell.name}: {problems[0]}")
    return made


def job_name(cell: Cell) -> str:
    """A name for Kubernetes, the same for the same run: words of the cell's and its fingerprint."""
    words = re.sub("[^a-z0-9]+", "-", cell.name.lower()).strip("-")[:24].strip("-")
    return "-".join(filter(None, ("m", words, cell.fingerprint[:8])))


def xpk_command(cell: Cell, settings: dict[str, str | None]) -> list[str]:
    """`xpk workload create` for the same run, as an argument list."""
    where = _hardware(settings)
    kind = re.match("[a-z]+[0-9]+[a-z]*", where.name)[0].removesuffix("x")
    if where.kind == "tpu":
        device = [f"--tpu-type={where.name}", "--num-slices=1"]
    else:
        device = [f"--device-type={XPK_DEVICES[kind]}", f"--num-nodes={where.hosts}"]
    argument = [f"cd {settings['source']}"]
    argument += [f"export {join([f'{k}={v}'])}" for k, v in where.environment.items()]
    argument += [join(["sh", "-c", COMMAND, "sh", str(cell.workdir), *cell.argv])]
    return [
        "xpk",
        "workload",
        "create",
        f"--cluster={settings['cluster'] or 'CLUSTER'}",
        f"--workload={job_name(cell)}",
        *device,
        f"--docker-image={settings['image']}",
        f"--max-restarts={RESTARTS}",
        f"--command={' && '.join(argument)}",
    ]


def _hardware(settings: dict[str, str | None]) -> Hardware:
    where = hardware(settings["hardware"])
    if where.kind == "cpu":
        raise UserError("--hardware cpu: a JobSet needs GPUs or TPUs; --launcher=local needs none")
    if where.kind == "gpu" and where.near != 8:
        raise UserError(f"--hardware {where.name}: a JobSet takes whole nodes of 8 GPUs")
    return where


def _check_place(cell: Cell, settings: dict[str, str | None]) -> None:
    if not cell.workdir.is_relative_to(Path(settings["mount"])):
        raise UserError(
            f"{cell.workdir} is not on the volume, which is mounted at {settings['mount']}: use "
            f"--out {settings['mount']}/..., or another --mount"
        )


def _pod(cell: Cell, where: Hardware, settings: dict[str, str | None]) -> dict:
    chips = where.devices // where.hosts
    resource = "nvidia.com/gpu" if where.kind == "gpu" else "google.com/tpu"
    container = {
        "name": "train",
        "image": settings["image"],
        "workingDir": settings["source"],
        "command": ["sh", "-c", _literal(COMMAND), "sh"],
        "args": [_literal(a) for a in (str(cell.workdir), *cell.argv)],
        "env": _environment(cell, where),
        "resources": {"limits": {resource: chips}},
        "volumeMounts": [{"name": "runs", "mountPath": settings["mount"]}],
    }
    volumes = [{"name": "runs", "persistentVolumeClaim": {"claimName": settings["claim"]}}]
    if where.kind == "gpu":  # NCCL's shared memory; a container has 64 MiB unless it is told
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
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
    """How the processes find each other: GKE tells those of a TPU slice by itself."""
    env = [{"name": k, "value": _literal(v)} for k, v in where.environment.items()]
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
    kind = re.match("[a-z]+[0-9]+[a-z]*", where.name)[0].removesuffix("x")
    if where.kind == "gpu":
        return {"cloud.google.com/gke-accelerator": ACCELERATORS[kind]}
    shapes = SQUARES if kind == "v6e" else CUBES
    if where.devices not in shapes:
        raise UserError(
            f"--hardware {where.name}: {where.devices} chips are no slice; expected one of "
            f"{', '.join(map(str, shapes))} chips"
        )
    return {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[kind],
        "cloud.google.com/gke-tpu-topology": shapes[where.devices],
    }


def _literal(text: str) -> str:
    """Text that Kubernetes, which expands `$(NAME)` and reads `$$` as `$`, leaves as it is."""
    return text.replace("$", "$$")


# what the API asks, of the fields that are used here


def check(made: dict) -> list[str]:
    """What a cluster would refuse in a JobSet, one line each; fields not known here count, too."""
    problems: list[str] = []
    _walk(made, SCHEMA, "", problems)
    if problems:
        return problems
    name, spec = made["metadata"]["name"], made["spec"]
    for job in spec["replicatedJobs"]:
        inner = job["template"]["spec"]
        # names of pods, which are host names here: NAME-JOB-REPLICA-INDEX
        pod = f"{name}-{job['name']}-{job['replicas'] - 1}-{inner['completions'] - 1}"
        if len(pod) > 63:
            problems.append(f"metadata.name: the pod {pod} has {len(pod)} letters, at most 63")
        containers = inner["template"]["spec"]
        volumes = {v["name"] for v in containers["volumes"]}
        mounted = {m["name"] for c in containers["containers"] for m in c["volumeMounts"]}
        if mounted - volumes:
            problems.append(f"volumeMounts: {sorted(mounted - volumes)} are no volumes")
    if len({job["name"] for job in spec["replicatedJobs"]}) < len(spec["replicatedJobs"]):
        problems.append("spec.replicatedJobs: two of one name")
    return problems


class Optional:
    """A field that may be missing."""

    def __init__(self, schema):
        self.schema = schema


class Values:
    """An object whose keys are free and whose values have one schema."""

    def __init__(self, schema):
        self.schema = schema


_NAME = re.compile(rf"(?=.{{1,63}}$){_LABEL}")
_TEXT = re.compile("(?s).*")
_PATH = re.compile("/.*")
# a dict: its fields, all needed unless Optional; a list: of such elements, at least one; a range:
# whole numbers; a tuple: one of; a pattern: text
_ENV = {"name": re.compile("[A-Za-z_][A-Za-z0-9_]*"), "value": Optional(_TEXT),
        "valueFrom": Optional({"fieldRef": {"fieldPath": _TEXT}})}  # fmt: skip
_CONTAINER = {
    "name": _NAME,
    "image": re.compile(r"\S+"),
    "workingDir": Optional(_PATH),
    "command": [_TEXT],
    "args": [_TEXT],
    "env": Optional([_ENV]),
    "resources": {"limits": Values(range(1, 1025))},
    "volumeMounts": [{"name": _NAME, "mountPath": _PATH}],
}
_POD = {
    "restartPolicy": ("Never", "OnFailure"),  # of a Job
    "terminationGracePeriodSeconds": range(0, 86401),
    "serviceAccountName": Optional(_NAME),
    "nodeSelector": Values(re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")),
    "containers": [_CONTAINER],
    "volumes": [
        {
            "name": _NAME,
            "persistentVolumeClaim": Optional({"claimName": _NAME}),
            "emptyDir": Optional({"medium": ("", "Memory")}),
        }
    ],
}
_JOB = {
    "parallelism": range(0, 2**31),
    "completions": range(0, 2**31),
    "completionMode": ("Indexed",),
    "backoffLimit": range(0, 2**31),
    "template": {"spec": _POD},
}
SCHEMA = {
    "apiVersion": (API,),
    "kind": ("JobSet",),
    "metadata": {
        "name": _NAME,
        "namespace": Optional(_NAME),
        "labels": Optional(Values(re.compile("[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"))),
        "annotations": Optional(Values(_TEXT)),
    },
    "spec": {
        "network": Optional({"enableDNSHostnames": (True, False),
                             "publishNotReadyAddresses": (True, False)}),
        "failurePolicy": Optional({"maxRestarts": range(0, 2**31),
                                   "restartStrategy": ("Recreate", "BlockingRecreate")}),
        "replicatedJobs": [
            {"name": _NAME, "replicas": range(0, 2**31), "template": {"spec": _JOB}}
        ],
    },
}  # fmt: skip


def _walk(value, schema, where: str, problems: list[str]) -> None:
    """Adds what does not fit the schema, with its place."""
    if isinstance(schema, dict | Values):
        if not isinstance(value, dict):
            problems.append(f"{where}: {value!r}, expected an object")
            return
        fields = dict.fromkeys(value, schema.schema) if isinstance(schema, Values) else schema
        for key in [k for k in value if k not in fields]:
            problems.append(f"{where}.{key}".lstrip(".") + ": there is no such field")
        for key, inner in fields.items():
            place, needed = f"{where}.{key}".lstrip("."), not isinstance(inner, Optional)
            if key in value:
                _walk(value[key], inner if needed else inner.schema, place, problems)
            elif needed:
                problems.append(f"{place}: missing")
    elif isinstance(schema, list):
        if not isinstance(value, list) or not value:
            problems.append(f"{where}: {value!r}, expected a list")
            return
        for i, element in enumerate(value):
            _walk(element, schema[0], f"{where}[{i}]", problems)
    elif isinstance(schema, re.Pattern):
        if not isinstance(value, str) or not schema.fullmatch(value):
            problems.append(f"{where}: {value!r}, expected {schema.pattern}")
    elif type(value) not in {type(x) for x in schema[:1]} or value not in schema:
        problems.append(f"{where}: {value!r}, expected {schema}")
