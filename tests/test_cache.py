"""What is compiled once is found by the next start, and computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import command, tiny_flags

from moe_ablm import cache
from moe_ablm.data.simulated import simulated_dataset

# a training command that tells how many programs it compiled, and how many it found
PROGRAM = """
import json, signal, sys
import jax
from moe_ablm import train, trainer

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
if sys.argv[1] == "stop":
    evaluate = trainer.validation_sums
    trainer.validation_sums = lambda *args: signal.raise_signal(signal.SIGTERM) or evaluate(*args)
code = train.main(["train", *sys.argv[2:]])
print(json.dumps([events.count("cache_misses"), events.count("cache_hits")]))
sys.exit(code)
"""


def start(
    kept: Path, workdir: Path, how: str = "go", devices: int = 1, **changes
) -> tuple[int, int, dict]:
    """(programs compiled, programs found, `run.json`) of a start in a process of its own."""
    data = simulated_dataset(400)  # not to be made again in a cache of its own
    changes |= {"data__path": str(data), "eval__every": 3, "checkpoint__every": 3}
    flags = tiny_flags(**changes)
    _, options = command(
        "",
        JAX_COMPILATION_CACHE_DIR="",  # not the one that tests share
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        XDG_CACHE_HOME=str(kept),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    argv = [sys.executable, "-c", PROGRAM, how, *flags, f"--workdir={workdir}"]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=600, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, found = json.loads(done.stdout.splitlines()[-1])
    return compiled, found, json.loads((workdir / "run.json").read_text())


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_learns_the_same(tmp_path):
    dense = {"model__moe__router": "none", "model__layers": 1, "train__steps": 3}
    compiled, _, first = start(tmp_path, tmp_path / "first", **dense)
    assert any((tmp_path / "moe_ablm" / "compiled").glob("jit_train_step-*"))
    anew, found, second = start(tmp_path, tmp_path / "second", **dense)
    assert anew == 0 and found >= compiled > 0
    assert second["params_sha256"] == first["params_sha256"]


@pytest.mark.slow
def test_sharded_updates_from_the_cache_resume_bit_for_bit(tmp_path):
    mesh = {"devices": 4, "mesh__expert": 2, "mesh__fsdp": 2, "train__steps": 6}
    _, _, expected = start(tmp_path, tmp_path / "first", **mesh)
    anew, found, stopped = start(tmp_path, tmp_path / "second", "stop", **mesh)
    assert (anew, stopped["status"], stopped["step"]) == (0, "stopped", 3) and found > 0
    _, found, resumed = start(tmp_path, tmp_path / "second", **mesh)
    assert found > 0
    for key in ("status", "step", "params_sha256", "valid_loss_final"):
        assert resumed[key] == expected[key]


@pytest.fixture
def nowhere():
    """JAX without a place for compiled functions."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_place_is_the_users_unless_jax_was_told_another(nowhere, monkeypatch):
    told = jax.config.jax_persistent_cache_min_compile_time_secs
    cache.keep_compilations()
    assert jax.config.jax_compilation_cache_dir == str(cache.cache_directory() / "compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == told  # set by conftest
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    cache.keep_compilations()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_several_processes_on_cpu_keep_nothing(nowhere, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    cache.keep_compilations()
    assert jax.config.jax_compilation_cache_dir is None
