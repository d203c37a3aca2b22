"""A device without memory enough: one line, exit code 2, and nothing lost."""

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from moe_ablm import command_line, out_of_memory, train, trainer
from moe_ablm.model.spec import Execution
from moe_ablm.training.memory import Needed

ERROR = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 51539607552 bytes.\n"
    "BufferAssignment OOM Debugging.\n"
)
NEEDED = Needed(state=int(1.2e9), summed=0, gradients=int(0.6e9), activations=int(59e9), gathered=0)


def train_main(config, workdir, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and stderr of the training command."""
    monkeypatch.setattr(command_line, "parse", lambda _: (config, workdir, None))
    code = train.main(["train"])
    return code, capsys.readouterr().err


def failing(monkeypatch, name: str, call: int) -> None:
    """Lets a method of the trainer raise XLA's error when it is called so often."""
    method, calls = getattr(trainer.Trainer, name), iter(range(1, 1000))

    def fail(self, *args):
        if next(calls) == call:
            raise ERROR
        return method(self, *args)

    monkeypatch.setattr(trainer.Trainer, name, fail)


CONFIG = tiny_config(model__moe__router="none")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return trainer.run(CONFIG, tmp_path_factory.mktemp("undisturbed") / "w")


@pytest.mark.parametrize(
    ("name", "call", "saved"),
    [
        # the state alone
        pytest.param("_restore_or_init", 1, [], marks=pytest.mark.slow),
        ("_update", 1, []),  # compiling
        # computing what was dispatched before
        pytest.param("_read_pending", 7, [4], marks=pytest.mark.slow),
        ("_evaluate", 1, [4]),
    ],
)
def test_one_line_says_what_to_set_and_the_run_goes_on(
    name, call, saved, undisturbed, tmp_path, monkeypatch, capsys
):
    workdir, config = tmp_path / "w", CONFIG
    with monkeypatch.context() as patch:
        failing(patch, name, call)
        code, told = train_main(config, workdir, patch, capsys)
    (line,) = told.splitlines()
    assert code == 2 and line.startswith("moe_ablm: out of device memory: an update needs about 0.")
    for words in ("remat=full (now none)", "fsdp (now 1)", "accumulate=2 (now 1)", "allocate 5153"):
        assert words in line
    assert not (workdir / "run.json").exists()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [str(s) for s in saved]
    code, told = train_main(config, workdir, monkeypatch, capsys)
    assert (code, told) == (0, "")
    assert trainer.run(config, workdir)["params_sha256"] == undisturbed["params_sha256"]


def test_other_errors_of_xla_are_not_hidden(tmp_path, monkeypatch):
    def fail(self, *_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")

    monkeypatch.setattr(trainer.Trainer, "_update", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such kernel"):
        trainer.run(tiny_config(), tmp_path / "w")


def test_what_xla_itself_raises_is_recognised():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jnp.ones((1 << 46,)).block_until_ready()
    assert out_of_memory.is_out_of_memory(raised.value)
    wrapped = ValueError("could not save")
    wrapped.__cause__ = raised.value
    assert out_of_memory.is_out_of_memory(wrapped)
    assert not out_of_memory.is_out_of_memory(MemoryError("RESOURCE_EXHAUSTED"))
    assert not out_of_memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: x"))


@pytest.mark.parametrize(
    ("devices", "changes", "remat", "expected", "missing"),
    [
        (1, {}, "matmuls", ("remat=full (now matmuls)", "and more devices", "accumulate=2"), ()),
        (8, {"mesh__fsdp": 2}, "full", ("fsdp (now 2):",), ("remat", "more devices", "accumulate")),
        (2, {"train__batch": 24, "train__accumulate": 4}, "full", ("=6 (now 4)",), ("remat",)),
        (1, {"train__accumulate": 8}, "full", ("newest checkpoint (XLA",), ("accumulate",)),
    ],
)
def test_advice_names_what_is_left_to_set(devices, changes, remat, expected, missing, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config, execution = tiny_config(**changes), Execution(remat=remat)
    line = out_of_memory.out_of_memory(ERROR, config, execution, NEEDED, 47_300_000_000)
    needs = "about 66.2 GB a device, which has 47.3 (state 1.2, gradients 0.6, activations 59.0)"
    assert needs in line
    assert all(words in line for words in expected), line
    assert not any(words in line for words in missing), line
    assert "\n" not in line and len(line) < 450
