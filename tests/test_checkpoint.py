"""Checkpoints: what is kept, and that they do not depend on the mesh."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import xla_flags
from flax import nnx
from test_optimizer import spec as optimizer_spec

from moe_ablm.errors import UserError
from moe_ablm.model.families import TopK
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.training import state as states
from moe_ablm.training.checkpoint import Checkpoints, checksums
from moe_ablm.training.optimizer import make_optimizer

SPEC = EncoderSpec(2, 8, 16, 2, moe=TopK(experts=4))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1)


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(optimizer_spec())


@pytest.fixture(scope="module")
def state(mesh, optimizer):
    with jax.set_mesh(mesh):
        return states.init_state(SPEC, optimizer, seed=0, ema=True, mesh=mesh)


def names(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def test_newest_and_best_are_kept(tmp_path, state, mesh, optimizer):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)]:
        checkpoints.save(step, state, {"step": step}, loss)
    checkpoints.wait()
    assert names(tmp_path / "c") == [2, 4, 5]
    assert checkpoints.newest_step() == 5
    target = states.abstract_state(SPEC, optimizer, ema=True, mesh=mesh)
    with jax.set_mesh(mesh):
        restored = checkpoints.restore(target)
    assert restored.record == {"step": 5}
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoints.close()


def test_the_best_one_is_kept_after_a_restart(tmp_path, state):
    for losses in ([(1, 1.0), (2, 2.0), (3, None)], [(4, 3.0), (5, 2.5)]):
        checkpoints = Checkpoints(tmp_path / "c", keep=1)
        for step, loss in losses:
            checkpoints.save(step, state, {}, loss)
            checkpoints.wait()
        checkpoints.close()
    assert names(tmp_path / "c") == [1, 5]


def test_no_checkpoint_is_none(tmp_path, mesh, optimizer):
    target = states.abstract_state(SPEC, optimizer, ema=False, mesh=mesh)
    assert Checkpoints(tmp_path / "c", keep=1).restore(target) is None


def test_what_cannot_be_read_is_not_called_damaged(tmp_path, state, mesh, optimizer):
    """An I/O error, as of a disk or a network: a link to memory where nothing can be read."""
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("needs Linux: /proc/self/mem")
    target = states.abstract_state(SPEC, optimizer, ema=True, mesh=mesh)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step}, None)
    checkpoints.wait()
    files = [p for p in (tmp_path / "c" / "2" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    for file in (largest, tmp_path / "c" / "2" / "record" / "metadata"):
        file.rename(tmp_path / "kept")
        file.symlink_to(unreadable)
        with jax.set_mesh(mesh), pytest.raises(UserError, match=r"2: .*cannot be read .*Input/out"):
            checkpoints.restore(target)
        assert names(tmp_path / "c") == [1, 2] and not (tmp_path / "damaged").exists()
        file.unlink()
        (tmp_path / "kept").rename(file)
    with jax.set_mesh(mesh):
        assert checkpoints.restore(target).record == {"step": 2}
    checkpoints.close()


def test_nothing_begins_anew_beside_what_was_set_aside(tmp_path, state, mesh, optimizer):
    target = states.abstract_state(SPEC, optimizer, ema=True, mesh=mesh)
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, state, {}, None)
    checkpoints.wait()
    (tmp_path / "c" / "1" / "record" / "metadata").write_text("{}")  # no checksums
    for _ in range(2):  # at once, and when the same command is given again
        with jax.set_mesh(mesh), pytest.raises(UserError, match=r"set aside as damaged \(1\)"):
            checkpoints.restore(target)
        assert (tmp_path / "damaged" / "1").is_dir()
    shutil.rmtree(tmp_path / "damaged")
    assert checkpoints.restore(target) is None
    checkpoints.close()


def test_checksums_notice_any_change(state):
    before = checksums(state._asdict())
    flat = [(p, v) for p, v in nnx.to_flat_state(state.params)]
    path, variable = flat[3]
    value = np.array(variable.get_value())
    swapped = value.copy().reshape(-1)
    swapped[[0, 1]] = swapped[[1, 0]] + [0, 1]
    flat[3] = (path, variable.replace(jax.numpy.asarray(swapped.reshape(value.shape))))
    after = checksums({"params": nnx.from_flat_state(flat)})
    (changed,) = (name for name, value in after.items() if before[name] != value)
    assert changed == f"params{''.join(f'[{key!r}]' for key in path)}.value"


def test_a_list_of_checksums_is_read_too(tmp_path, state):
    """As runs of layouts 1 and 2 have it, in the order of the arrays."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, state, {}, None)
    checkpoints.wait()
    file = next((tmp_path / "c" / "1" / "record").iterdir())
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"checksums": list(record["checksums"].values())}))
    assert checkpoints.restore_step(1, state).record == {}
    wrong = [1, *list(record["checksums"].values())[1:]]  # step 0 has checksum 0
    file.write_text(json.dumps(record | {"checksums": wrong}))
    with pytest.raises(ValueError, match="differ from their checksums"):
        checkpoints.restore_step(1, state)


def test_a_state_is_restored_on_another_mesh(tmp_path):
    program = Path(__file__).parent / "programs" / "restore_elsewhere.py"
    env = os.environ | {"XLA_FLAGS": xla_flags(8)}
    result = subprocess.run(
        [sys.executable, program, tmp_path / "c"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert result.stdout.strip() == "equal", result.stderr
