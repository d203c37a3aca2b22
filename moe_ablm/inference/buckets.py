"""Runs a model on rows of any lengths: rows of similar length share a batch of one padded length.

Each shape is compiled once. The padded length (bucket) of an antibody depends on its own length
alone, routers treat each antibody by itself, and nothing is random. So a result does not depend on
what else is computed.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from moe_ablm.cache import keep_compilations
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.tokenizer import PAD
from moe_ablm.errors import ArgumentError, UserError, counted
from moe_ablm.interop.load import Model
from moe_ablm.model.encoder import Encoder, make_definition
from moe_ablm.model.flops import params_total
from moe_ablm.model.spec import PRECISIONS, EncoderSpec, Execution
from moe_ablm.parallel.mesh import MESH_AXES, batch_sharding, replicated

MULTIPLE = 16  # lengths of buckets are multiples of so many tokens
BATCH_TOKENS = {"cpu": 2048}  # tokens of a forward pass; elsewhere 65,536
REPORTED_FROM = 1.0  # compilations that take so many seconds are reported


class Batch(NamedTuple):
    """Input of a task: integers `tokens [B, L]`, bool `valid [B, L]`, integers `at [B]`."""

    tokens: jax.Array
    valid: jax.Array
    at: jax.Array


# a frozen dataclass, since compiled functions are kept by its value; it returns arrays `[B, ...]`.
# Its attribute `reads_head`, if there is one, says whether it needs the language-model head.
Task = Callable[[Encoder, Batch], Any]


class NotOffered(UserError):
    """Asked of a model that cannot answer; the message says why, and what can."""


def alone(spec: EncoderSpec) -> EncoderSpec:
    """The encoder for inference: the result of an antibody depends on that antibody alone.

    See `Router.alone`.
    """
    return replace(spec, moe=spec.moe and spec.moe.alone())


class Engine:
    """A model ready to compute.

    Attributes:
      model: what was loaded.
      precision: a key of `model.spec.PRECISIONS`.
      germlines: by which chains that a caller passes are told apart and numbered (see
        `germline.load_germlines`).
    """

    germlines: tuple[str, ...] = (HUMAN,)

    def __init__(
        self,
        model: Model,
        precision: str = "float32",
        devices: int = 1,
        batch_tokens: int | None = None,
    ):
        """Prepares a model for inference.

        Args:
          model: the model.
          precision: a key of `model.spec.PRECISIONS`.
          devices: number of devices that share the rows of a batch.
          batch_tokens: tokens of a batch on all devices, padding included; None: by backend.

        Raises:
          UserError: `devices` or `batch_tokens` is out of range, or the precision is unknown.
        """
        if precision not in PRECISIONS:
            expected = f"expected one of {', '.join(PRECISIONS)}"
            raise ArgumentError("precision", precision, expected)
        if batch_tokens is not None and batch_tokens < 1:
            raise ArgumentError("batch_tokens", batch_tokens, "expected at least 1")
        self.model, self.precision = model, precision
        self._mesh = _mesh(devices)
        self._usual = BATCH_TOKENS.get(jax.default_backend(), 65_536)
        self._tokens = batch_tokens or self._usual
        execution = Execution(*PRECISIONS[precision], backend=jax.default_backend())
        self._definition = make_definition(alone(model.spec), execution)
        self._params = jax.device_put(model.params, replicated(self._mesh))
        self._compiled: dict[tuple, Callable] = {}
        keep_compilations()

    def with_model(self, model: Model) -> "Engine":
        """An engine for other parameters of the same encoder; it shares the compiled functions.

        Raises:
          ValueError: the model has another encoder.
        """
        if model.spec != self.model.spec:
            raise ValueError("another encoder: make an engine of its own")
        other = copy.copy(self)
        other.model = model
        other._params = jax.device_put(model.params, replicated(self._mesh))
        return other

    def parameters(self) -> nnx.State:
        """Parameters of the encoder, to train it or to begin anew.

        Raises:
          NotOffered: it is no encoder of ours.
        """
        return self.model.params

    def __repr__(self) -> str:
        count = params_total(self.model.spec)
        kind = type(self).__name__
        return f"{kind}({self.model.source}: {count:,} parameters, {self.precision})"

    def run(
        self, task: Task, rows: Sequence[np.ndarray], at: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Computes `task` for each row.

        Args:
          task: what to compute.
          rows: tokens, uint8 `[n]` each, of any lengths.
          at: position in each row, if the task needs one.

        Yields:
          (index of the row, its part of the result as numpy arrays, padded to the bucket's length).
          Every row comes once, in any order.

        Raises:
          UserError: the task needs a language-model head, which the model lacks; or a row is longer
            than positions were learned.
        """
        limit, longest = self.model.spec.learned_positions, max(map(len, rows), default=0)
        if limit and longest > limit:
            raise UserError(
                f"a row of {longest} tokens: {self.model.source} learned {limit} positions"
            )
        if getattr(task, "reads_head", False):
            self.model.require_head("log-probabilities", NotOffered)
        waiting: list[tuple[np.ndarray, Any]] = []
        for members, length, size in self._batches([len(row) for row in rows]):
            tokens = np.full((size, length), PAD, np.uint8)
            count, place = np.zeros(size, np.int32), np.zeros(size, np.int32)
            for i, member in enumerate(members):
                count[i] = len(rows[member])
                tokens[i, : count[i]] = rows[member]
                place[i] = 0 if at is None else at[member]
            waiting.append((members, self._call(task, tokens, count, place)))
            if len(waiting) == 2:  # the device computes one batch while results of another are read
                yield from _unpacked(*waiting.pop(0))
        for batch in waiting:
            yield from _unpacked(*batch)

    def _batches(self, lengths: list[int]) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yields (indices of the rows, padded length, number of rows) of each batch.

        A bucket has at most two shapes: full batches, and batches of one row per device for a small
        remainder.
        """
        buckets = -(-np.array(lengths, np.int64) // MULTIPLE) * MULTIPLE
        devices = self._mesh.size
        for length in np.unique(buckets).tolist():
            members = np.flatnonzero(buckets == length)
            full = max(self._tokens // length // devices, 1) * devices
            if len(members) <= full // 4:  # all would be a remainder, computed one by one
                full = min(full, max(self._usual // length // devices, 1) * devices)
            last = len(members) % full
            few = 0 < last <= full // 4
            whole = len(members) - last if few else len(members)
            for first in range(0, whole, full):
                yield members[first : first + full], length, full
            for first in range(whole, len(members), devices):
                yield members[first : first + devices], length, devices

    def _call(self, task: Task, *arrays: np.ndarray) -> Any:
        arrays = jax.device_put(arrays, batch_sharding(self._mesh))
        key = task, arrays[0].shape
        with jax.set_mesh(self._mesh):
            if key not in self._compiled:
                self._compiled[key] = self._compile(task, arrays)
            return self._compiled[key](self._params, *arrays)

    def _compile(self, task: Task, arrays: tuple) -> Callable:
        def compute(params, tokens, count, at):
            valid = jnp.arange(tokens.shape[1]) < count[:, None]
            encoder = nnx.merge(self._definition, params)
            return task(encoder, Batch(tokens.astype(jnp.int32), valid, at))

        start = time.perf_counter()
        shardings = batch_sharding(self._mesh)
        compiled = jax.jit(compute, out_shardings=shardings).lower(self._params, *arrays).compile()
        seconds = time.perf_counter() - start
        if seconds >= REPORTED_FROM:
            rows, length = arrays[0].shape
            print(
                f"moe_ablm: compiled for {counted(rows, 'row')} of {length} tokens in "
                f"{seconds:.1f} s (once)",
                file=sys.stderr,
            )
        return compiled


def _unpacked(members: np.ndarray, out: Any) -> Iterator[tuple[int, Any]]:
    arrays = jax.tree.map(np.asarray, out)
    for i, member in enumerate(members.tolist()):
        yield member, jax.tree.map(lambda a, i=i: a[i], arrays)


def _mesh(devices: int) -> Mesh:
    available = jax.devices()
    if not 1 <= devices <= len(available):
        expected = f"expected 1 to {len(available)}, the devices found ({jax.default_backend()})"
        raise ArgumentError("devices", devices, expected)
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((devices, 1, 1), MESH_AXES, axis_types=kinds, devices=available[:devices])
