"""Fixtures shared by all tests."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# overrides that make configs/base.py a run of seconds; also as a command line in `tiny_flags`
TINY = {
    "data.simulated_pairs": 400,
    "model.size": "tiny",
    "model.layers": 2,
    "model.d_model": 16,
    "model.ffn": 32,
    "model.heads": 2,
    "model.moe.router": "topk",
    "model.moe.experts": 4,
    "train.steps": 12,
    "train.batch": 8,
    "train.warmup": 3,
    "train.lr": 3e-3,
    "eval.every": 6,
    "eval.pairs": 16,
    "checkpoint.every": 4,
    "log.every": 1,
}

# many tests compile the same tiny step, in this process and in others
COMPILED = tempfile.TemporaryDirectory(prefix="moe_ablm-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# a worker a core: threads of matrix libraries would only wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Half of the time of a test that trains would go into optimising what runs for a moment. The last
# flag fuses differently: two programs of one update may then differ in their last bits.
COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    COMPILE_QUICKLY += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """`XLA_FLAGS` of a process of a test with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {COMPILE_QUICKLY}"


def pytest_configure(config):
    # jax traces make millions of small objects: a seventh of their time went to looking for cycles
    gc.set_threshold(100_000, 20, 20)
    given = os.environ.get("XLA_FLAGS", "")
    # programs for TPUs and GPUs are looked at as they are compiled for users
    if config.option.markexpr != "aot" and COMPILE_QUICKLY not in given:
        os.environ["XLA_FLAGS"] = f"{given} {COMPILE_QUICKLY}".strip()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow, too")


# files of minutes begin first: otherwise a worker waits for the last of them alone
LONGEST = ("test_resume", "test_contracts", "test_cli", "test_distributed", "test_encoder",
           "test_train", "test_moe", "test_recorded", "test_api", "test_buckets", "test_compile",
           "test_multihost")  # fmt: skip


def pytest_collection_modifyitems(config, items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout (or in $MOE_ABLM_DATA); skips where absent."""
    path = Path(os.environ.get("MOE_ABLM_DATA", REPO.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path} (set MOE_ABLM_DATA)")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A user's cache of its own, so that tests neither use nor fill the real one."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(path)
    return path


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder of `s3://bucket`, and an empty cache."""
    from folder_store import register

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return register(tmp_path / "store")


@pytest.fixture(scope="session")
def simulated_table(tmp_path_factory):
    """A table of 60 simulated antibodies."""
    from moe_ablm.__main__ import main

    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    assert main(["moe_ablm", "simulate", "--pairs", "60", "--seed", "1", "--out", str(path)]) == 0
    return path


def tiny_config(**changes):
    """The checked config of a run of seconds; changes by dotted key with "." as "__"."""
    from configs.base import get_config
    from moe_ablm.config import from_mapping

    c = get_config()
    c.update_from_flattened_dict(
        TINY | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return from_mapping(c)


def tiny_flags(**changes) -> list[str]:
    """`tiny_config` as flags of `python -m moe_ablm.train`."""
    values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return ["--config=configs/base.py", *(f"--config.{k}={v}" for k, v in values.items())]


def command(*arguments: str, **environment: str) -> tuple[list[str], dict]:
    """Argument list and environment of `python -m ARGUMENTS` in the checkout."""
    # set, so that a training process does not start itself a second time
    env = os.environ | {"GLIBC_TUNABLES": "", "COLUMNS": "120"} | environment
    return [sys.executable, "-m", *map(str, arguments)], {"env": env, "cwd": REPO, "text": True}


@pytest.fixture(scope="session")
def run_quickly(cache):
    """`run_command` for command lines that end in an error message: no new interpreter each."""
    # a script's own folder comes first on its path: the checkout must be named
    env = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(REPO)}
    options = {"env": env, "cwd": REPO, "text": True}
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("command_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **options,
    )

    def run(*arguments: str, folder: Path = REPO) -> subprocess.CompletedProcess:
        server.stdin.write(json.dumps([str(folder), *map(str, arguments)]) + "\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(arguments, *json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture
def main(capsys):
    """`python -m moe_ablm` in this process."""
    from moe_ablm import __main__

    def run(*arguments) -> subprocess.CompletedProcess:
        capsys.readouterr()
        code = __main__.main(["moe_ablm", *map(str, arguments)])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m ARGUMENTS` in the checkout to its end."""
    argv, options = command(*arguments, **environment)
    return subprocess.run(argv, capture_output=True, check=False, timeout=300, **options)
