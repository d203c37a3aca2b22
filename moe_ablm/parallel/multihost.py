"""Several processes of one run: how they find each other, which one writes, how they end together.

For a process that is alone every function here is a no-op.

A job ends within these times of a fault:
  300 s   a process never arrives: the others stop waiting for it (`START_SECONDS`)
  60 s    a process died or lost its network: the others are ended (`LOST_PEER_SECONDS`)
  30 min  all are alive, but there was no update, as in a hung collective: every process writes its
          stack traces to stderr and ends with code 1 ($MOE_ABLM_HANG_SECONDS changes the time)
"""

import faulthandler
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_ablm.errors import UserError
from moe_ablm.parallel.mesh import batch_sharding, replicated

START_SECONDS = 300
LOST_PEER_SECONDS = 60
HANG_SECONDS = 1800
_PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_INDEX")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_calls = count()  # of `from_first`
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def start() -> None:
    """Joins the other processes of this run, if there are any. Call it before anything computes.

    Only process 0 keeps its standard output; all keep stderr.

    Raises:
      UserError: see `arguments_of`.
      RuntimeError: the other processes were not found in time.
    """
    arguments = arguments_of(os.environ)
    if arguments is None:
        return
    jax.distributed.initialize(
        **arguments,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=LOST_PEER_SECONDS,
        shutdown_timeout_seconds=LOST_PEER_SECONDS,
    )
    # a CPU collective fails if not all processes reach the first one within 30 s: wait here first
    _service().wait_at_barrier("moe_ablm/start", START_SECONDS * 1000)
    multihost_utils.sync_global_devices("moe_ablm/start")
    if not is_first():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def arguments_of(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None for a process that is alone.

    The first of these that applies: `JAX_COORDINATOR_ADDRESS=host:port` with `JAX_PROCESS_COUNT`
    and `JAX_PROCESS_INDEX` (a count of 1 needs no others, and means that the process is alone); a
    SLURM step of more than one task; a TPU machine. For the last two JAX finds the arguments.

    Raises:
      UserError: one of the three variables is missing or malformed, or the index is not below the
        count.
    """
    if any(name in environment for name in _PLAIN):
        return _plain(environment)
    if all(name in environment for name in _SLURM):
        tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
        return {} if int(tasks) > 1 else None
    return {} if _is_tpu(environment) else None


def _plain(environment: Mapping[str, str]) -> dict[str, Any] | None:
    address, number, index = (environment.get(name, "") for name in _PLAIN)
    if number == "1":
        return None
    expected = {
        "JAX_COORDINATOR_ADDRESS": (re.fullmatch(r"\S+:[0-9]{1,5}", address), "host:port"),
        "JAX_PROCESS_COUNT": (re.fullmatch("[1-9][0-9]*", number), "a number"),
        "JAX_PROCESS_INDEX": (re.fullmatch("[0-9]+", index), "a number"),
    }
    for name, (fits, what) in expected.items():
        if not fits:
            raise UserError(
                f"${name} is {environment.get(name)!r}, expected {what}: set all of "
                f"{', '.join(_PLAIN)}, or none of them"
            )
    if int(index) >= int(number):
        raise UserError(f"$JAX_PROCESS_INDEX is {index}, expected 0 to {int(number) - 1}")
    # every device of the machine belongs to this process, so JAX must not ask a cluster
    return {
        "coordinator_address": address,
        "num_processes": int(number),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _is_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU machine, which tells JAX its neighbours, or that there are none."""
    if environment.get("JAX_PLATFORMS", "tpu") not in ("", "tpu", "tpu,cpu"):
        return False
    present = any(Path(device).exists() for device in _TPU_DEVICES)
    return present and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this process writes the results of the run."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0 only, and returns its JSON value in all processes.

    A UserError of `function` is raised in all processes.
    """
    if jax.process_count() == 1:
        return function()
    key = f"moe_ablm/from_first/{next(_calls)}"  # all processes make the same calls in one order
    if is_first():
        try:
            answer = {"value": function()}
        except UserError as error:
            answer = {"error": str(error)}
        _service().key_value_set(key, json.dumps(answer))
    answer = json.loads(_service().blocking_key_value_get(key, int(_hang_seconds() * 1000)))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def _service():
    """JAX's coordination service, whose timeouts can be set, unlike those of collectives.

    It has no public name in JAX, but in orbax.
    """
    from orbax.checkpoint import multihost  # takes a second; only several processes need it

    return multihost.get_jax_distributed_client()


@contextmanager
def first_inside(context: AbstractContextManager[None]) -> Iterator[None]:
    """Enters a context in process 0 only; a UserError on entering is raised in all processes."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(context))
        yield


def gathered(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a tree, whole on every device; unchanged where there is one process."""
    if jax.process_count() == 1:
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


class Stop:
    """Agreement on when to stop, since a signal may reach only some processes, or some later.

    Every process contributes whether it has received one (`heard` is not empty) to a reduction over
    all devices. It is dispatched with the updates and read one update later. So all processes get
    the same answer at the same update, and none waits for it.
    """

    def __init__(self, heard: list[str], mesh: Mesh):
        self.heard, self._mesh, self._pending = heard, mesh, None
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))

    def __call__(self) -> bool:
        """Whether to stop now; every process must call this once per update."""
        if jax.process_count() == 1:
            return bool(self.heard)
        local = np.full(jax.local_device_count(), bool(self.heard))
        flags = jax.make_array_from_process_local_data(batch_sharding(self._mesh), local)
        before, self._pending = self._pending, self._any(flags)
        return before is not None and bool(before)


@contextmanager
def watchdog() -> Iterator[Callable[[], None]]:
    """Kills this process if the yielded `beat` is not called in time (multi-device only).

    The watching thread needs no interpreter lock, so a collective that hangs in XLA cannot stop it.
    """
    if jax.device_count() == 1:  # no collective can hang; a single process may have many devices
        yield lambda: None
        return
    seconds = _hang_seconds()

    def beat() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # stderr, whoever replaced it

    beat()
    try:
        yield beat
    finally:
        faulthandler.cancel_dump_traceback_later()


def _hang_seconds() -> float:
    text = os.environ.get("MOE_ABLM_HANG_SECONDS", str(HANG_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"$MOE_ABLM_HANG_SECONDS is {text!r}, expected a number of seconds")
    return seconds
