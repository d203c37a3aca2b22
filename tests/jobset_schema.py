"""What the JobSet API (v1alpha2) and Kubernetes ask of a manifest, of the fields used here."""

import re

API = "jobset.x-k8s.io/v1alpha2"


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


_NAME = re.compile("(?=.{1,63}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?")
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
_POD_RULE = {
    "action": ("FailJob", "FailIndex", "Ignore", "Count"),
    "onExitCodes": {"containerName": Optional(_NAME), "operator": ("In", "NotIn"),
                    "values": [range(1, 256)]},
}  # fmt: skip
_JOB_SET_RULE = {
    "name": re.compile("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
    "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    "onJobFailureReasons": Optional([("BackoffLimitExceeded", "DeadlineExceeded",
                                      "FailedIndexes", "MaxFailedIndexesExceeded",
                                      "PodFailurePolicy")]),
}  # fmt: skip
_JOB = {
    "parallelism": range(0, 2**31),
    "completions": range(0, 2**31),
    "completionMode": ("Indexed",),
    "backoffLimit": range(0, 2**31),
    "podFailurePolicy": Optional({"rules": [_POD_RULE]}),
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
                                   "restartStrategy": ("Recreate", "BlockingRecreate"),
                                   "rules": Optional([_JOB_SET_RULE])}),
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
