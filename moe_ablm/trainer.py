"""The trainer: one run as one story, from its first update or its newest checkpoint on."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from moe_ablm import config as configs
from moe_ablm import outcome
from moe_ablm.cache import keep_compilations
from moe_ablm.config_schema import Config
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.regions import region_names
from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.errors import Diverged, UserError
from moe_ablm.extension import Extension
from moe_ablm.feed import Feed
from moe_ablm.files import write_json
from moe_ablm.interop.load import Model, load_model
from moe_ablm.interop.start import require_same_function
from moe_ablm.model import flops
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.out_of_memory import is_out_of_memory, out_of_memory
from moe_ablm.parallel import multihost
from moe_ablm.parallel.mesh import global_batch, make_mesh
from moe_ablm.preemption import stop_flag
from moe_ablm.program import batch_rows, execution_on, make_program
from moe_ablm.progress import Progress, region_table, stability_lines
from moe_ablm.results import read_results
from moe_ablm.store_copies import fetched, fetched_run
from moe_ablm.summary import RunRecord, execution_summary, recent_train_loss, run_summary
from moe_ablm.training import state as states
from moe_ablm.training.checkpoint import Checkpoints
from moe_ablm.training.device import device_memory, memory_limit, peak
from moe_ablm.training.memory import abstract_mesh, fitting_remat, least, needed
from moe_ablm.training.metrics import (
    Clock,
    Results,
    loss_metrics,
    router_metrics,
    seen_metrics,
    validation_sums,
)
from moe_ablm.training.optimizer import make_schedule
from moe_ablm.training.stability import StabilityWatch
from moe_ablm.training.step import Batch, StepMetrics, make_eval_step
from moe_ablm.training.trace import Trace
from moe_ablm.training.tracking import require_tracker
from moe_ablm.workdir import finished_run, work_directory


def run(config: Config, workdir: Path, extension: Extension | None = None, again: str = "") -> dict:
    """Trains, or resumes, until the last step or a stop signal.

    Args:
      config: of the run; with an extension, that of the longer run.
      workdir: where it lives.
      extension: of the run that is there.
      again: the command line that resumes the run, printed when it is stopped.

    Returns:
      The content of `run.json`.

    Raises:
      UserError: the config, the dataset or the work directory does not fit, nothing is written; or
        a device has too little memory, what was saved is kept.
      Diverged: the loss or a norm is not finite; the last good checkpoint is kept.
    """
    keep_compilations()
    mesh = make_mesh(config.mesh.data, config.mesh.expert, config.mesh.fsdp)
    _check_divides(config, mesh)
    _check_size(config, mesh)
    if config.log.tracker is not None:
        require_tracker(config.log.tracker)
    model = starting_model(config)
    start, licence = (model.params, model.facts.get("licence")) if model else (None, None)
    identity = "" if start is None else states.params_sha256(start)
    feed = Feed(config, *open_datasets(config), start=identity)
    owned = multihost.first_inside(
        work_directory(workdir, config, feed.identity, licence, extension)
    )
    with owned, jax.set_mesh(mesh):
        fingerprint = configs.fingerprint(config, feed.identity)
        finished = multihost.from_first(lambda: finished_run(workdir, fingerprint))
        if finished:
            print(f"{workdir} is complete: {finished['step']} steps")
            Console().print(region_table(finished["evaluation"]))
            return finished
        trainer = Trainer(config, workdir, mesh, feed, start, again)
        try:
            with stop_flag() as heard, multihost.watchdog() as beat:
                return trainer.train(multihost.Stop(heard, mesh), beat)
        except Diverged as error:
            good = trainer.give_up(str(error))
            raise Diverged(f"{error}; the last good checkpoint is of step {good}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(trainer.run_out_of_memory(error)) from error


def why_collapsed(summary: dict) -> str:
    """The line for a run that `train.stop_on_collapse` ended."""
    reason = stability_lines(summary["stability"])[-1].strip()
    return (
        f"stopped: collapse ({reason}); the checkpoint of step {summary['step']} is kept, and "
        "train.stop_on_collapse=False does not stop"
    )


def why_it_ended(config: Config, record: RunRecord, step: int) -> str:
    """The line for a run that `train.patience` ended before its last step."""
    return (
        f"ended at step {step} of {config.train.steps} by train.patience={config.train.patience}: "
        f"no evaluation has been better than that of step {record.best_step} "
        f"({record.best_loss:.4f}), whose checkpoint is kept"
    )


def open_datasets(config: Config) -> list[Dataset]:
    """The datasets of `data.path`, or the simulated one, which is made on first use."""
    paths = config.data.path
    if not paths:  # one process makes it, the others find it
        pairs = config.data.simulated_pairs
        multihost.from_first(lambda: str(simulated_dataset(pairs)))
        return [Dataset(simulated_dataset(pairs))]
    given = paths if isinstance(paths, tuple) else (paths,)
    return [Dataset(fetched(path, "config.data.path")) for path in given]


def starting_model(config: Config) -> Model | None:
    """The model of `train.init`; None: the run starts from random parameters."""
    if config.train.init is None:
        return None
    model = load_model(fetched_run(config.train.init, "config.train.init"), "config.train.init")
    model.require_head("config.train.init")
    require_same_function(model, config.model.spec())
    return model


def execution_of(config: Config, spec: EncoderSpec, mesh: Mesh) -> Execution:
    """How this machine computes: `compute.*`, with what is left open decided by the hardware."""
    execution = execution_on(config, jax.default_backend())
    memory = device_memory()
    if config.compute.remat is not None or memory is None:
        return execution
    axes = abstract_mesh(*mesh.axis_sizes)
    rows = batch_rows(config) // config.train.accumulate // mesh.size
    shape, optimizer = (rows, config.data.length), config.train.optimizer
    return fitting_remat(spec, execution, axes, shape, memory, optimizer)


def _check_divides(config: Config, mesh: Mesh) -> None:
    rows = config.train.batch // config.train.accumulate
    if rows % mesh.size:
        raise UserError(
            f"config.train.batch={config.train.batch} in {config.train.accumulate} micro-batch(es) "
            f"of {rows} rows cannot be split over {mesh.size} devices: use a multiple of "
            f"{mesh.size * config.train.accumulate}"
        )
    moe, ways = config.model.spec().moe, config.mesh.expert
    if moe and moe.experts % ways:
        raise UserError(
            f"config.mesh.expert={ways} does not divide config.model.moe.experts={moe.experts}"
        )


def _check_size(config: Config, mesh: Mesh) -> None:
    """Refuses what no setting makes fit, before anything is built."""
    spec, rows = config.model.spec(), batch_rows(config) // config.train.accumulate // mesh.size
    shared = config.mesh.expert * config.mesh.fsdp
    needs = least(spec, shared, rows, config.data.length, config.train.optimizer)
    has = memory_limit()
    if needs > has:
        raise UserError(
            f"an update needs at least {needs / 1e9:,.1f} GB a device, which has {has / 1e9:,.1f}: "
            f"{flops.params_total(spec):,} parameters, {rows:,} rows of {config.data.length} "
            "tokens: a smaller config.model or config.train.batch, or more devices"
        )


class Trainer:
    """One run; `train` is its story from top to bottom."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Mesh,
        feed: Feed,
        start: nnx.State | None,
        again: str,
    ):
        self.again = again
        self.config, self.workdir, self.mesh, self.feed = config, workdir, mesh, feed
        self.spec, self.start = config.model.spec(), start
        self.execution = execution_of(config, self.spec, mesh)
        definition, self.optimizer, self.train_step = make_program(config, self.execution)
        self.schedule = make_schedule(config.train)
        self.eval_step = jax.jit(make_eval_step(definition))
        # where runs under wsd of other lengths part from this one
        self.parting = config.train.decay_start
        always = [] if self.parting is None else [self.parting]
        self.checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, always)
        self.record = RunRecord()
        window = config.log.window if multihost.is_first() else None
        self.trace = Trace(workdir / "profile", window)
        self.watch = StabilityWatch(self.spec.moe, self.spec.moe_layers, config.train.warmup)
        self.clock = Clock()
        self.results: Results | None = None  # opened by `train`, in the first process
        self.step = 0  # updates dispatched
        # (step, metrics) of an update that was dispatched but not yet read
        self.pending: tuple[int, StepMetrics] | None = None
        # of the update: traced, then compiled or found in the cache
        self.compile_seconds: float | None = None

    def train(self, stop: multihost.Stop, beat: Callable[[], None]) -> dict:
        """The whole story of a run; it ends early, saved, once `stop` says so.

        Both are called at every update; `beat` shows that the run is alive.
        """
        steps = self.config.train.steps
        state = self._restore_or_init()
        if multihost.is_first():
            flat = configs.flatten(configs.to_dict(self.config))
            self.results = Results(self.workdir, self.step, self.config.log.tracker, flat)
        self.peak = peak(self.execution.operands)
        self._announce()
        batches = self.feed.train_batches(self.step)
        done = self.step == steps or self._patience_is_over() or self.record.collapsed
        with Progress(steps, self.step) as self.progress, self.trace:
            while not done:
                batch = global_batch(next(batches), self.mesh)
                self.trace.begin(self.step + 1, self._read_pending)
                state, metrics = self._update(state, batch)
                # the device works on this step while the host reads the one before
                self._read_pending()
                self.record.collapsed = self._is_given_up()
                self.step += 1
                self.pending = (self.step, metrics)
                if self.trace.end(self.step, self._read_pending):
                    self.progress.note(
                        f"trace of updates {self.config.log.profile}: {self.trace.directory}"
                    )
                improved = False
                if self.step % self.config.eval.every == 0 or self.step == steps:
                    improved = self._evaluate(state)
                done = self.step == steps or self._patience_is_over() or self.record.collapsed
                due = self.step % self.config.checkpoint.every == 0 or self.step == self.parting
                stopped = stop()
                beat()
                if due or improved or done or stopped:
                    self._save(state)
                if stopped and not done:
                    return self._finish(state, outcome.STOPPED, stop.heard)
        early = self.record.collapsed and self.step < steps
        return self._finish(state, outcome.COLLAPSED if early else outcome.COMPLETE)

    def _update(self, state: states.TrainState, batch: Batch):
        """Dispatches an update; the first one waits until it is compiled, and says how long."""
        if self.compile_seconds is None:
            self.progress.busy("compiling the update")
        start = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("update", step_num=self.step + 1):
            out = self.train_step(state, batch)
        if self.compile_seconds is None:
            self.compile_seconds = time.perf_counter() - start
            self.progress.note(f"compiled in {self.compile_seconds:.1f} s")
        return out

    # restoring and saving

    def _restore_or_init(self) -> states.TrainState:
        ema = self.config.train.ema > 0
        target = states.abstract_state(self.spec, self.optimizer, ema, self.mesh)
        restored = self.checkpoints.restore(target)
        if restored:
            self.record = RunRecord(**restored.record)
            self.watch.restore(self.record.stability)
            self.step = int(restored.state.step)
            return restored.state
        state = states.init_state(self.spec, self.optimizer, self.config.seed, ema, self.mesh)
        return state if self.start is None else states.started_from(state, self.start)

    def _save(self, state: states.TrainState) -> None:
        self._read_pending()  # raises if this state is not finite: it must not be saved
        evaluated = self.record.evaluation.get("step") == self.step
        loss = self.record.evaluation["loss"] if evaluated else None
        self.record.stability = self.watch.state()
        self.checkpoints.save(self.step, state, vars(self.record), loss)

    # measuring

    def _read_pending(self) -> None:
        """Waits for the newest update's metrics, checks them and logs them when it is time."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        metrics = jax.tree.map(np.asarray, metrics)
        norms = {k: float(getattr(metrics, k)) for k in ("grad_norm", "update_norm", "param_norm")}
        losses = loss_metrics(metrics.sums, region_names())
        for name, value in {
            "loss": losses["loss"],
            "objective": metrics.objective,
            **norms,
        }.items():
            if not math.isfinite(value):
                raise Diverged(f"step {step}: {name} is {float(value)}")
        tokens = int(metrics.tokens)
        self.record.tokens_seen += tokens
        if self.spec.moe and self.spec.moe.token_choice and self.spec.moe.varying:
            self.record.count_choices(float(metrics.router.choices.mean()), tokens)
        self.watch.update(step, losses["loss"], metrics.router)
        speed = self.clock.tick(tokens)
        self.progress.update(step, losses["loss"], speed)
        if step % self.config.log.every and step != self.config.train.steps:
            return
        # a skipped update leaves its place in the schedule to the next one
        skipped = 0 if metrics.skipped is None else int(metrics.skipped)
        per_token = flops.train_flops_per_token(self.spec, self.feed.row, self.record.mean_choices)
        flop_rate = speed * per_token
        values = losses | norms | {
            "learning_rate": float(self.schedule(step - 1 - skipped)),
            "tokens_seen": self.record.tokens_seen,
            "epochs": self.feed.mixture.epochs(step),
            "tokens_per_second": speed,
            "model_flops_per_second": flop_rate,
            "matmul_peak_share": flop_rate / self.peak.flops,
        }  # fmt: skip
        if metrics.skipped is not None:
            values["skipped_updates"] = skipped
        if metrics.router is not None:
            values["router"] = router_metrics(metrics.router, self.spec.moe_layers)
        self._log("train", step, values)

    def _evaluate(self, state: states.TrainState) -> bool:
        """Evaluates on the validation set; True when it is the best so far."""
        self._read_pending()
        step = self.step
        params = state.params if state.ema is None else state.ema
        start = time.perf_counter()
        found = validation_sums(self.eval_step, params, self.feed.valid_batches(), self.mesh)
        self.clock.pause(time.perf_counter() - start)
        values = seen_metrics(found.sums, region_names())
        if not math.isfinite(values["loss"]):
            raise Diverged(f"step {step}: validation loss is {values['loss']}")
        values["tokens_seen"] = self.record.tokens_seen
        if found.routed is not None:
            values["routed"] = {
                str(layer): table.tolist()
                for layer, table in zip(self.spec.moe_layers, found.routed, strict=True)
            }
        self._log("eval", step, values)
        chains = values["loss_by_chain"]
        self.progress.note(
            f"step {step}: validation loss {values['loss']:.4f}, "
            f"heavy {chains.get('heavy', math.nan):.4f}, "
            f"CDRH3 {values['loss_by_region'].get('CDRH3', math.nan):.4f}, "
            f"light seen {chains.get('light_seen', math.nan):.4f}, "
            f"unseen {chains.get('light_unseen', math.nan):.4f}, "
            f"accuracy {values['accuracy']:.3f}"
        )
        record = self.record
        record.evaluation = {"step": step, **values}
        improved = record.best_loss is None or values["loss"] < record.best_loss
        record.stale_evaluations = 0 if improved else record.stale_evaluations + 1
        if improved:
            record.best_loss, record.best_step = values["loss"], step
        return improved

    def _patience_is_over(self) -> bool:
        patience = self.config.train.patience
        return bool(patience) and self.record.stale_evaluations >= patience

    def _is_given_up(self) -> bool:
        # asked before each update is counted, of those read until then: with the same answer
        # whether or not a checkpoint or a restart came between
        return self.config.train.stop_on_collapse and self.watch.is_lasting(self.step)

    # reporting

    def _log(self, kind: str, step: int, values: dict) -> None:
        if self.results is not None:
            self.results.write(kind, step, values, time.time())

    def _announce(self) -> None:
        rows, left_out = len(self.feed.train_rows), self.feed.left_out
        print(
            f"{self.config.model.size}: {flops.params_total(self.spec):,} parameters"
            f" ({flops.params_active(self.spec):,} active), {rows:,} antibodies"
            f" ({self.feed.corpus_tokens:,} tokens, {self.feed.mixture.unique_tokens():,} of"
            f" different chains), {self.mesh.size} device(s),"
            f" {self.execution.operands} matmuls at {self.peak.flops / 1e9:,.0f} GFLOP/s peak"
            f" ({self.peak.source})"
        )
        if left_out:
            print(f"{left_out:,} sequences are longer than data.length and left out")
        seen = " and ".join(f"{s:.1%} of {c}" for c, s in self.feed.seen_shares.items())
        print(f"training has {seen} chains of the validation antibodies, letter by letter")
        for note in self.feed.mixture.notes:
            print(note)
        if self.step:
            print(f"resuming at step {self.step}")

    def _finish(self, state: states.TrainState, status: str, heard: Sequence[str] = ()) -> dict:
        """Waits for the last checkpoint, then writes `run.json`; `heard` is why it was stopped."""
        self.checkpoints.wait()
        recent = recent_train_loss(read_results(self.workdir / "results.jsonl"), self.step)
        measured = self.watch.summary(), self.clock.mean, recent
        state = state._replace(params=multihost.gathered(state.params, self.mesh))
        summary = run_summary(self.config, self.feed, state, self.record, status, *measured)
        summary["execution"] = self._execution()
        self._write_run(summary)
        if status == outcome.STOPPED:
            why = next((reason for reason in heard if not reason.startswith("SIG")), "")
            then = why or f"the same command resumes it:\n  {self.again}"
            print(f"saved at step {summary['step']}; {then}")
        elif status == outcome.COMPLETE:
            if self.step < self.config.train.steps:
                print(why_it_ended(self.config, self.record, self.step))
            Console().print(region_table(summary["evaluation"]))
            print("\n".join(stability_lines(summary["stability"])))
            print(f"results: {self.workdir / 'results.jsonl'}, {self.workdir / 'run.json'}")
        return summary

    def give_up(self, reason: str) -> int | None:
        """Writes a `run.json` that says why; returns the step of the last good checkpoint."""
        self.checkpoints.wait()
        good = self.checkpoints.newest_step()
        fingerprint = configs.fingerprint(self.config, self.feed.identity)
        content = {
            "fingerprint": fingerprint,
            "status": outcome.DIVERGED,
            "step": good,
            "error": reason,
        }
        self._write_run(content | {"execution": self._execution()})
        return good

    def run_out_of_memory(self, error: Exception) -> str:
        """Lets a save in progress end and closes everything; returns the line for the user."""
        with contextlib.suppress(Exception):  # what failed may be the save
            self.checkpoints.close()
        if self.results is not None:
            self.results.close()
        batching, accumulate = self.feed.mixture.batching, self.config.train.accumulate
        rows = batching.rows // accumulate // self.mesh.size
        axes, ema = abstract_mesh(*self.mesh.axis_sizes), self.config.train.ema > 0
        shape, optimizer = (rows, batching.length), self.config.train.optimizer
        needs = needed(self.spec, self.execution, axes, shape, ema, optimizer=optimizer)
        return out_of_memory(error, self.config, self.execution, needs, device_memory())

    def _execution(self) -> dict:
        return execution_summary(self.execution, self.mesh, self.peak, self.compile_seconds)

    def _write_run(self, content: dict) -> None:
        if self.results is not None:
            write_json(self.workdir / "run.json", content)
            self.results.close()
        self.checkpoints.close()
