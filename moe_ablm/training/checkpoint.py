"""Checkpoints of the training state, by orbax.

A checkpoint has the training state and a small JSON record with a checksum of every array. A file
that was altered on disk is thereby noticed at restore, and the checkpoint before it is used.
"""

import errno
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    CustomSteps,
    LatestN,
)

from moe_ablm.errors import UserError
from moe_ablm.training.state import (
    TrainState,
    with_untrained_moments,
    without_untrained_moments,
)

log = logging.getLogger(__name__)
METRIC = "valid_loss"
# of what is saved. In 1 (or absent) the optimizer also has moments of variables that it never
# moves; in 1 and 2 the checksums are a list in the order of the arrays
LAYOUT = 3
SPARE = 1 << 20  # bytes that a checkpoint may need besides its arrays: metadata, indices
# a file is absent or of another kind: it was removed or cut off, so the checkpoint is damaged
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_READ = 1 << 24  # bytes read at a time


class Restored(NamedTuple):
    """A state and the record (plain JSON) saved with it."""

    state: TrainState
    record: dict


def checksums(parts: Mapping[str, Any]) -> dict[str, int]:
    """Checksum, a uint32, of every array of a state or of some of its fields, by path.

    A checksum is a position-weighted sum of the array's bits. Sums of integers are exact in any
    order, so it does not depend on how the array is sharded over devices or hosts.

    Args:
      parts: trees of arrays by field of `TrainState`.
    """
    flat = {
        f"{name}{jax.tree_util.keystr(path)}": x
        for name, tree in parts.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return dict(zip(flat, np.asarray(_stacked(list(flat.values()))).tolist(), strict=True))


@jax.jit
def _stacked(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(x) for x in arrays])


def _require_same(parts: Mapping[str, Any], expected: dict[str, int] | list[int]) -> None:
    """ValueError if arrays differ from their saved checksums (in layouts 1 and 2, a list)."""
    now = checksums(parts)
    if isinstance(expected, dict):
        same = now == {path: expected.get(path) for path in now}
    else:
        same = list(now.values()) == expected
    if not same:
        raise ValueError("the arrays differ from their checksums")


def _checksum(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    place = lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return (bits * place).sum(dtype=jnp.uint32)


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, the best by validation loss, and `always`.

    Saving is asynchronous and atomic: a checkpoint gets its name when it is complete.
    """

    def __init__(self, directory: Path, keep: int, always: Sequence[int] = ()):
        best = BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self.directory = directory.resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(keep), best, CustomSteps(always)]
                ),
                # makes orbax save the losses, so that the best one is known after a restart
                best_fn=lambda metrics: metrics[METRIC],
                best_mode="min",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: TrainState, record: dict, valid_loss: float | None) -> None:
        """Starts saving once the previous save is on disk; errors of that save are raised here.

        Args:
          step: number of updates done, the name of the checkpoint.
          state: what is saved.
          record: plain JSON that is saved with it.
          valid_loss: validation loss at this step; None: not evaluated.

        Raises:
          UserError: the disk has no room for it; nothing is written.
        """
        self.wait()
        self._check_space(state)
        record = record | {
            "layout": LAYOUT, "checksums": checksums(state._asdict())
        }  # fmt: skip
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), record=ocp.args.JsonSave(record)
            ),
            # orbax warns where there is no number; with infinity the checkpoint is never the best
            metrics={METRIC: math.inf if valid_loss is None else valid_loss},
        )

    def _check_space(self, state: TrainState) -> None:
        # checked in advance: a save that fails midway prints tracebacks of many threads
        local = sum(
            shard.data.nbytes
            for x in jax.tree.leaves(state)
            for shard in x.addressable_shards
            if shard.replica_id == 0
        )
        free = shutil.disk_usage(self.directory).free
        if free < local + SPARE:
            raise UserError(
                f"no space left for the work directory: {self.directory} has {free / 1e6:,.1f} MB "
                f"free, a checkpoint takes up to {(local + SPARE) / 1e6:,.1f}; free some, then run "
                "the same command again: it resumes from the last whole checkpoint"
            )

    def restore(self, target: TrainState) -> Restored | None:
        """The newest undamaged checkpoint; None if there never was one.

        Damaged checkpoints are moved to `damaged/` beside the checkpoints, with a warning. One that
        cannot be read (permissions, I/O, memory, no backend) does not count as damaged and stays.

        Args:
          target: shapes and shardings to restore to (`state.abstract_state`).

        Raises:
          UserError: a checkpoint cannot be read; or all are damaged, now or at an earlier start.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self.restore_step(step, target)
            except Exception as error:  # orbax raises many kinds for a damaged file
                path = self.directory / str(step)
                if obstacle := _obstacle(error, path):
                    raise UserError(
                        f"{path}: the checkpoint cannot be read ({obstacle}): nothing was changed; "
                        "fix that, then run the same command again"
                    ) from error
                self._set_aside(step, _first_line(error))
        damaged = sorted(p.name for p in self._damaged.glob("*"))
        if damaged:  # the user decides whether to begin anew
            raise UserError(
                f"{self.directory} holds no checkpoint that can be restored, and {self._damaged} "
                f"those set aside as damaged ({', '.join(damaged[:9])}): move one back to try it "
                f"again, remove {self._damaged} to begin anew, or use another --workdir"
            )
        return None

    def restore_step(self, step: int, target: TrainState) -> Restored:
        """Restores one checkpoint.

        Raises:
          ValueError: its arrays differ from what was saved. orbax raises many other kinds.
        """
        earlier = _record(self.directory / str(step)).get("layout", 1) < 2
        if earlier:
            target = with_untrained_moments(target)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target._asdict()), record=ocp.args.JsonRestore()
            ),
        )
        state, record = TrainState(**restored["state"]), dict(restored["record"])
        _require_same(state._asdict(), record.pop("checksums"))
        record.pop("layout", None)
        return Restored(without_untrained_moments(state) if earlier else state, record)

    @property
    def _damaged(self) -> Path:
        return self.directory.parent / "damaged"

    def _set_aside(self, step: int, reason: str) -> None:
        log.warning("checkpoint %d is damaged, trying the one before it: %s", step, reason)
        self._damaged.mkdir(exist_ok=True)
        target = self._damaged / str(step)
        number = 0
        while target.exists():
            number += 1
            target = self._damaged / f"{step}.{number}"
        (self.directory / str(step)).rename(target)
        self._manager.reload()

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint on disk; None if there is none."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until everything is on disk; raises errors of the save."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        self._manager.close()


def read_records(directory: Path) -> dict[int, dict]:
    """The record of every checkpoint, by step; an empty record where it is damaged.

    This is a plain reader: a CheckpointManager could create, delete or lock files of a live run.

    Raises:
      UserError: there is no checkpoint.
      OSError: a record cannot be read.
    """
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())
    if not steps:
        raise UserError(f"{directory} holds no checkpoint: the run has not saved one yet")
    return {step: _record(directory / str(step)) for step in steps}


def _record(checkpoint: Path) -> dict:
    try:
        record = json.loads((checkpoint / "record" / "metadata").read_text())
    except ValueError:
        return {}
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return {}
    return record if isinstance(record, dict) else {}


def _obstacle(error: BaseException, checkpoint: Path) -> str:
    """Why a checkpoint cannot be read; empty if it can be read and is therefore damaged.

    A checkpoint is damaged if all its files can be read from end to end, but `error` was raised.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (
            isinstance(cause, OSError) and cause.errno not in (None, *_MISSING)
        ):
            return str(getattr(cause, "strerror", None) or "out of memory")
        if isinstance(cause, (jax.errors.JaxRuntimeError, RuntimeError)):
            return _first_line(cause)  # a device, its memory, or a missing backend
        numbers = re.findall(r"OS error (\d+)", str(cause))  # tensorstore's errors are ValueErrors
        if any(int(number) not in _MISSING for number in numbers):
            return _first_line(cause)
        cause = cause.__cause__ or cause.__context__
    try:
        _read_all(checkpoint)
    except OSError as unread:
        return f"{unread.filename}: {unread.strerror}"
    return ""


def _read_all(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if not path.is_dir():
            with path.open("rb") as file:
                while file.read(_READ):
                    pass


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_parameters(checkpoint: Path, shapes: nnx.State, averaged: bool) -> nnx.State:
    """The parameters of a checkpoint, on the default device; nothing else is read.

    Args:
      checkpoint: its directory.
      shapes: shapes of the parameters (`jax.eval_shape`).
      averaged: whether to take the average of the weights, which the run evaluated.

    Raises:
      UserError: the checkpoint is of another encoder, damaged, or cannot be read.
    """
    try:
        return _read_parameters(checkpoint, shapes, averaged)
    except Exception as error:  # orbax raises many kinds for a damaged file
        if obstacle := _obstacle(error, checkpoint):
            raise UserError(
                f"{checkpoint}: the checkpoint cannot be read ({obstacle[:200]})"
            ) from error
        raise UserError(
            f"{checkpoint}: the checkpoint is damaged ({_first_line(error)[:200]}): move it away "
            "to use another one of the run"
        ) from error


def _read_parameters(checkpoint: Path, shapes: nnx.State, averaged: bool) -> nnx.State:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    name = "ema" if averaged else "params"
    item = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            checkpoint.resolve() / "state",
            ocp.args.PyTreeRestore(
                item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    params = restored[name]
    expected, count = _record(checkpoint)["checksums"], len(jax.tree.leaves(params))
    if isinstance(expected, list):  # step, parameters, optimizer, average
        expected = expected[-count:] if averaged else expected[1 : 1 + count]
    _require_same({name: params}, expected)
    return params
