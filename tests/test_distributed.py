"""Several processes under `jax.distributed` on CPU: the losses of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import xla_flags

PROGRAM = Path(__file__).parent / "programs" / "losses_of_processes.py"
ROUTERS = ("none", "dropless", "capacity", "soft")


def start(count: int, index: int, devices: int, port: int) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}
    arguments = [count, index, port, 2, *ROUTERS]
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def losses(processes: list[subprocess.Popen]) -> list[dict]:
    outputs = [p.communicate(timeout=280) for p in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow  # tests/test_multihost.py trains in two processes
def test_two_processes_give_the_losses_of_one():
    """Experts spread over both: rows travel from one process to the other."""
    port = free_port()
    found = losses([start(2, index, 1, port) for index in range(2)])
    (expected,) = losses([start(1, 0, 2, port)])
    assert found[0] == found[1]
    for router in ROUTERS:
        np.testing.assert_allclose(found[0][router], expected[router], atol=1e-5, err_msg=router)
