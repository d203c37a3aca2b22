"""Trackers: everything once, in order, whatever is killed or cannot be reached.

The libraries themselves are asked where they are installed: MLflow with a server of this file's,
Weights & Biases in its offline mode.
"""

import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from moe_ablm import config as configs
from moe_ablm.errors import UserError
from moe_ablm.training import tracking
from moe_ablm.training.tracking import Tracker, require_tracker, scalars


def line(step: int, kind: str = "train", loss: float = 1.5) -> dict:
    return {"kind": kind, "step": step, "loss": loss, "router": {"1": {"load": [1, 2], "z": 0.5}}}


class Service:
    """Stands for a library with trackio's interface and the service behind it."""

    def __init__(self):
        self.received: list[tuple[int, dict]] = []
        self.down, self.opened, self.finished = False, 0, 0
        self.reached = threading.Event()

    def init(self, **options):
        self._answer()
        self.opened, self.options = self.opened + 1, options
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict, step: int):
        self._answer()
        self.received.append((step, values))

    def _finish(self):
        self.finished += 1

    def _answer(self):
        self.reached.set()
        if self.down:
            raise ConnectionError("no route\nto host")


@pytest.fixture
def service(monkeypatch):
    found = Service()
    monkeypatch.setitem(sys.modules, "trackio", found)
    monkeypatch.setattr(tracking, "PAUSE", 0.01)
    return found


def test_every_line_is_sent_once_with_its_numbers(service, tmp_path):
    (tmp_path / "run7").mkdir()
    tracker = Tracker("trackio", tmp_path / "run7", {"seed": 0})
    for each in (line(1), line(2), line(2, "eval")):
        tracker.put(each)
    tracker.close()
    numbers = {"train/loss": 1.5, "train/router/1/z": 0.5}
    evaluation = {"eval/loss": 1.5, "eval/router/1/z": 0.5}
    assert service.received == [(1, numbers), (2, numbers), (2, evaluation)]
    identity = json.loads((tmp_path / "run7" / "tracker.json").read_text())["id"]
    assert service.options["name"] == f"run7-{identity}" and service.options["config"] == {
        "seed": 0
    }
    assert (service.opened, service.finished) == (1, 1)


def test_a_run_that_was_killed_sends_nothing_twice(service, tmp_path):
    first = Tracker("trackio", tmp_path, {})
    for step in range(1, 6):
        first.put(line(step))
    first.close()
    # killed after update 5, resumed from a checkpoint at 3: 4 and 5 are reported again
    again = Tracker("trackio", tmp_path, {}, earlier=[line(step) for step in range(1, 4)])
    for step in range(4, 8):
        again.put(line(step))
    again.close()
    assert [step for step, _ in service.received] == list(range(1, 8))


def test_an_outage_stops_nothing_and_is_made_up_for(service, tmp_path, caplog):
    service.down = True
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("trackio", tmp_path, {})
        for step in range(1, 4):
            tracker.put(line(step))
        assert service.reached.wait(10) and not service.received
        service.down = False
        tracker.close()
        assert caplog.text.count("cannot be reached (no route to host): the run goes on") == 1
    if [step for step, _ in service.received] != [1, 2, 3]:  # it was closed before it tried again
        Tracker("trackio", tmp_path, {}, earlier=[line(step) for step in range(1, 4)]).close()
    assert [step for step, _ in service.received] == [1, 2, 3]


def test_what_an_earlier_process_could_not_send_is_sent_by_the_next(service, tmp_path):
    service.down = True
    tracker = Tracker("trackio", tmp_path, {})
    tracker.put(line(1))
    tracker.close()
    assert not service.received
    service.down = False
    Tracker("trackio", tmp_path, {}, earlier=[line(1), line(2)]).close()
    assert [step for step, _ in service.received] == [1, 2]


def test_scalars_are_numbers_by_path():
    assert dict(scalars(line(3) | {"name": "x", "seen": True}, "a/")) == {
        "a/step": 3, "a/loss": 1.5, "a/router/1/z": 0.5, "a/seen": True
    }  # fmt: skip


def test_a_tracker_that_is_none_or_not_installed(monkeypatch):
    with pytest.raises(UserError, match="log.tracker='wandbb' .did you mean 'wandb'"):
        tiny_config(log__tracker="wandbb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed: pip install 'moe_ablm.wandb.'"):
        require_tracker("wandb")
    plain, tracked = tiny_config(), tiny_config(log__tracker="mlflow")
    assert configs.fingerprint(plain, "d") == configs.fingerprint(tracked, "d")


class Server(HTTPServer):
    """The part of MLflow's REST interface that a run needs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.metrics: list[tuple[str, float, int]] = []
        self.params: dict[str, str] = {}
        self.status = "RUNNING"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        if "experiments/get-by-name" in self.path:
            self._say({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}, 404)
        else:
            self._say({"run": {"info": self._info(), "data": {}}})

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        content, action = json.loads(self.rfile.read(size)), self.path.rpartition("/mlflow/")[2]
        if action == "runs/log-batch":
            for metric in content.get("metrics", []):
                self.server.metrics.append((metric["key"], metric["value"], int(metric["step"])))
            self.server.params |= {p["key"]: p["value"] for p in content.get("params", [])}
        elif action == "runs/update":
            self.server.status = content["status"]
        answer = {"experiment_id": "1", "run": {"info": self._info(), "data": {}}}
        self._say(answer | {"run_info": self._info()})

    def _info(self):
        return {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "status": "RUNNING",
                "lifecycle_stage": "active", "artifact_uri": "file:///nowhere"}  # fmt: skip

    def _say(self, content: dict, code: int = 200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_mlflow_receives_every_number_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
    for first, last in ((1, 3), (2, 4)):
        tracker = Tracker("mlflow", tmp_path, {"seed": 3})
        for step in range(first, last + 1):
            tracker.put(line(step))
        tracker.close()
    server.shutdown()
    assert [m for m in server.metrics if m[0] == "train/loss"] == [
        ("train/loss", 1.5, step) for step in (1, 2, 3, 4)
    ]
    assert server.params == {"seed": "3"} and server.status == "FINISHED"


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker("wandb", tmp_path, {"seed": 3})
    for step in (1, 2):
        tracker.put(line(step))
    tracker.close()
    state = json.loads((tmp_path / "tracker.json").read_text())
    assert state["sent"] == {"train": 2}
    (kept,) = tmp_path.glob(f"wandb/offline-run-*/run-{state['id']}.wandb")
    assert b"train/router/1/z" in kept.read_bytes()
