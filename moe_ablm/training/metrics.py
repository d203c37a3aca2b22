"""What a run reports: named metrics, speed, `results.jsonl` and TensorBoard events."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from moe_ablm.files import json_text
from moe_ablm.model.routing import RouterStats
from moe_ablm.parallel.mesh import global_batch
from moe_ablm.results import keep_until, read_results
from moe_ablm.training.stability import dead_experts, max_min_load
from moe_ablm.training.step import CELLS, REGIONS, SEEN_LEVELS
from moe_ablm.training.tracking import Tracker, scalars


def loss_metrics(sums: Iterable[jax.Array | np.ndarray], names: tuple[str, ...]) -> dict[str, Any]:
    """Loss, perplexity and accuracy, overall and by region.

    Args:
      sums: loss, correct predictions and masked tokens, arrays `[CELLS]`.
      names: the 14 regions of a pair (`data.regions.region_names`), in the order of the cells
        without those of special tokens.
    """
    loss, correct, count = (np.asarray(s, np.float64) for s in sums)
    total = max(count.sum(), 1)
    cell = [c for c in range(len(count)) if c % REGIONS]
    seen = {name: c for name, c in zip(names, cell, strict=True) if count[c]}
    mean = float(loss.sum() / total)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": float(correct.sum() / total),
        "loss_by_region": {n: float(loss[c] / count[c]) for n, c in seen.items()},
        "accuracy_by_region": {n: float(correct[c] / count[c]) for n, c in seen.items()},
        "masked_by_region": {n: int(count[c]) for n, c in seen.items()},
    }


def seen_metrics(sums: Iterable[jax.Array | np.ndarray], names: tuple[str, ...]) -> dict[str, Any]:
    """`loss_metrics` of a validation set, and metrics by whether training has the chain.

    Added are:
      loss_by_chain, accuracy_by_chain, masked_by_chain: of "heavy" and "light", and of each with
        "_seen" (the training sequences that the run draws from have the chain), "_unseen" (they do
        not) and "_novel" (no training antibody of the dataset has it, whatever part a run takes).
      loss_by_region_unseen: of unseen chains.
      loss_novel: of all novel chains, heavy and light.

    Entries without a masked token are left out.

    Args:
      sums: arrays `[SEEN_LEVELS * CELLS]`.
      names: as in `loss_metrics`.
    """
    by_level = [np.asarray(s, np.float64).reshape(SEEN_LEVELS, CELLS) for s in sums]
    novel, elsewhere, seen = range(SEEN_LEVELS)
    unseen = [s[[novel, elsewhere]].sum(0) for s in by_level]
    parts = {"": [s.sum(0) for s in by_level], "_seen": [s[seen] for s in by_level]}
    parts |= {"_unseen": unseen, "_novel": [s[novel] for s in by_level]}
    chains = {
        f"{chain}{part}": [s[cell : cell + REGIONS].sum() for s in found]
        for cell, chain in ((0, "heavy"), (REGIONS, "light"))
        for part, found in parts.items()
    }
    there = {name: sums for name, sums in chains.items() if sums[2]}
    values = loss_metrics(parts[""], names)
    values["loss_by_chain"] = {n: float(loss / count) for n, (loss, _, count) in there.items()}
    values["accuracy_by_chain"] = {n: float(hits / count) for n, (_, hits, count) in there.items()}
    values["masked_by_chain"] = {n: int(count) for n, (_, _, count) in there.items()}
    values["loss_by_region_unseen"] = loss_metrics(unseen, names)["loss_by_region"]
    loss, _, count = (s[novel].sum() for s in by_level)
    if count:
        values["loss_novel"] = float(loss / count)
    return values


def router_metrics(stats: RouterStats, layers: tuple[int, ...]) -> dict[str, Any]:
    """All of `RouterStats` for each MoE layer, by layer number as a string.

    `max_min_load` and `dead_experts` of this batch are added, as the stability watch defines them.

    Args:
      stats: arrays `[M, ...]`.
      layers: numbers of the MoE layers, M of them.
    """
    arrays = {k: np.asarray(v, np.float64) for k, v in stats._asdict().items()}
    load = arrays["load"]
    arrays |= {"max_min_load": max_min_load(load), "dead_experts": dead_experts(load)}
    return {
        str(layer): {k: a[i].tolist() for k, a in arrays.items()} for i, layer in enumerate(layers)
    }


class Clock:
    """Tokens per second of training, without evaluations and the first update, which compiles."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._last: float | None = None
        self._recent: float | None = None

    def tick(self, tokens: int) -> float:
        """Counts an update of `tokens`; returns smoothed tokens per second, 0 at the first one."""
        now = time.perf_counter()
        last, self._last = self._last, now
        if last is None:
            return 0.0
        seconds = now - last
        self.tokens += tokens
        self.seconds += seconds
        rate = tokens / seconds
        self._recent = rate if self._recent is None else 0.9 * self._recent + 0.1 * rate
        return self._recent

    def pause(self, seconds: float) -> None:
        """Excludes `seconds` that were not spent on training."""
        if self._last is not None:
            self._last += seconds

    @property
    def mean(self) -> float | None:
        """Mean tokens per second without the first update; None before the second one."""
        return self.tokens / self.seconds if self.seconds else None


class Results:
    """`results.jsonl` and TensorBoard events of a work directory, and a tracker if there is one.

    On opening at a step, everything reported after this step is dropped: the run that continues
    from there reports it again.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        tracker: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """Args: work directory; updates done; one of `tracking.TRACKERS` and a flat config."""
        self.path = workdir / "results.jsonl"
        keep_until(self.path, step)
        self._file = self.path.open("a")
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        self._tracker = None
        if tracker is not None:
            self._tracker = Tracker(tracker, workdir, config or {}, read_results(self.path))
        self._events.add_event(
            Event(wall_time=0, step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, kind: str, step: int, values: dict[str, Any], wall_time: float) -> None:
        """Appends a line to `results.jsonl`, and its scalars to TensorBoard under `kind/name`."""
        line = {"kind": kind, "step": step, **values}
        self._file.write(json_text(line) + "\n")
        self._file.flush()
        shown = [Summary.Value(tag=k, simple_value=v) for k, v in scalars(values, f"{kind}/")]
        self._events.add_event(Event(wall_time=wall_time, step=step, summary=Summary(value=shown)))
        if self._tracker:
            self._tracker.put(line)

    def close(self) -> None:
        """Flushes and closes both files, and sends what is still to be sent."""
        self._file.close()
        self._events.close()
        if self._tracker:
            self._tracker.close()


class ValidationSums(NamedTuple):
    """`training.step.EvalSums` over the whole validation set, in float64."""

    sums: tuple[np.ndarray, np.ndarray, np.ndarray]
    routed: np.ndarray | None


def validation_sums(
    eval_step: Callable[..., Any], params: Any, batches: Iterable[dict], mesh: Mesh
) -> ValidationSums:
    """Sums the results of `eval_step` (`training.step.make_eval_step`) over batches.

    `batches` has this process's rows of each batch.
    """
    total: Any = None
    for batch in batches:
        sums = jax.tree.map(
            lambda x: np.asarray(x, np.float64), eval_step(params, global_batch(batch, mesh))
        )
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return ValidationSums(tuple(total.sums), total.routed)
