"""Trackers of experiments - Weights & Biases, trackio, MLflow - as mirrors of `results.jsonl`.

A thread of its own sends the scalars of every line. What was sent is kept in the work directory, so
that a run that was killed and goes on sends nothing twice, and sends what an earlier process could
not. A tracker that cannot be reached never stops or delays a run: the file has everything.
"""

import importlib
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_ablm.errors import UserError
from moe_ablm.files import write_json

log = logging.getLogger(__name__)

TRACKERS = ("wandb", "trackio", "mlflow")
STATE = "tracker.json"
PROJECT = "moe_ablm"
PAUSE = 30.0  # seconds from a failure to the next attempt
PATIENCE = 20.0  # seconds that the end of a run waits for what is still to be sent

# sends scalars of a step; the second one ends the tracker's run
Sender = tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]


def require_tracker(name: str) -> None:
    """Raises UserError where the library of a tracker is not installed."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"config.log.tracker={name!r}: {name} is not installed: pip install 'moe_ablm[{name}]'"
        ) from error


def scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Numbers of a line of `results.jsonl` by path; lists are left out."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


class Tracker:
    """Sends lines to a tracker, in their order, in a thread."""

    def __init__(
        self, kind: str, workdir: Path, config: Mapping[str, Any], earlier: Iterable[dict] = ()
    ):
        """Starts sending.

        Args:
          kind: one of `TRACKERS`.
          workdir: of the run; its name is the run's.
          config: of the run, flat.
          earlier: lines of `results.jsonl` so far, of which those are sent that were not yet.
        """
        self._kind, self._config, self._workdir = kind, dict(config), workdir
        self._state = _read_state(workdir / STATE, kind)
        self._lines: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        for line in earlier:
            self.put(line)
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def put(self, line: dict) -> None:
        """Sends a line soon."""
        self._lines.put(line)

    def close(self) -> None:
        """Waits a while for what is still to be sent; the next process sends the rest."""
        self._lines.put(None)
        self._closing.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.warning("%s: not everything was sent; results.jsonl has all", self._kind)

    def _run(self) -> None:
        sender: Sender | None = None
        while (line := self._lines.get()) is not None:
            if line["step"] <= self._state["sent"].get(line["kind"], 0):
                continue
            while True:
                try:
                    sender = sender or self._open()
                    self._send(sender, line)
                    break
                except Exception as error:  # of libraries and networks: whatever they raise
                    if not self._failed(error):
                        return
        if sender:
            try:
                sender[1]()
            except Exception as error:
                self._failed(error)

    def _send(self, sender: Sender, line: dict) -> None:
        """Sends a line at most once, whenever the process ends."""
        before = self._state["sent"]
        values = {k: v for k, v in line.items() if k not in ("kind", "step")}
        self._keep(sent=before | {line["kind"]: line["step"]})
        try:
            sender[0](dict(scalars(values, f"{line['kind']}/")), line["step"])
        except Exception:
            self._keep(sent=before)
            raise

    def _failed(self, error: Exception) -> bool:
        """Says so once; waits; returns whether to try again."""
        if not self._state.pop("told", None):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("%s cannot be reached (%s): the run goes on", self._kind, reason)
        self._state["told"] = True
        return not self._closing.wait(PAUSE)

    def _open(self) -> Sender:
        module, name = importlib.import_module(self._kind), self._workdir.resolve().name
        if self._kind == "mlflow":
            return _open_mlflow(module, name, self._config, self._state.get("id"), self._keep)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        options: dict[str, Any] = {"project": project, "config": self._config, "resume": "allow"}
        self._keep(id=self._state.get("id") or secrets.token_hex(4))
        if self._kind == "wandb":
            options |= {"name": name, "id": self._state["id"], "dir": str(self._workdir)}
        else:  # of trackio the name is the identity
            options["name"] = f"{name}-{self._state['id']}"
        run = module.init(**options)
        return lambda values, step: run.log(values, step=step), run.finish

    def _keep(self, **values: Any) -> None:
        self._state |= values
        kept = {k: self._state[k] for k in ("kind", "id", "sent") if k in self._state}
        write_json(self._workdir / STATE, kept)


def _open_mlflow(
    module: Any,
    name: str,
    config: Mapping[str, Any],
    identity: str | None,
    keep: Callable[..., None],
) -> Sender:
    """A run of MLflow, at $MLFLOW_TRACKING_URI."""
    client = module.MlflowClient()
    if identity is None:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else client.create_experiment(title)
        identity = client.create_run(number, run_name=name).info.run_id
        keep(id=identity)
        given = [module.entities.Param(key, str(value)) for key, value in config.items()]
        client.log_batch(identity, params=given)
    run: str = identity

    def send(values: Mapping[str, float], step: int) -> None:
        module.log_metrics(dict(values), step=step, run_id=run)

    return send, lambda: client.set_terminated(run)


def _read_state(file: Path, kind: str) -> dict[str, Any]:
    """What was sent before; another tracker begins anew."""
    try:
        found = json.loads(file.read_text())
        if found["kind"] == kind:
            return {"kind": kind, "sent": dict(found["sent"])} | (
                {"id": str(found["id"])} if "id" in found else {}
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"kind": kind, "sent": {}}
