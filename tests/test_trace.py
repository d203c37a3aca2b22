"""A trace of some updates: what it holds, when it is written, and that nothing else changes."""

import jax
import pytest
from conftest import tiny_config

from moe_ablm import trainer
from moe_ablm.training.trace import Trace


def traced_updates(directory) -> list[int]:
    """Numbers of the updates whose dispatch the one trace in a directory holds."""
    (file,) = (directory / "plugins" / "profile").glob("*/*.xplane.pb")  # where xprof looks
    host = jax.profiler.ProfileData.from_file(str(file)).find_plane_with_name("/host:CPU")
    events = [event for line in host.lines for event in line.events if event.name == "update"]
    return sorted(dict(event.stats)["step_num"] for event in events)


def test_a_trace_holds_its_updates_and_the_run_is_the_same(tmp_path, capsys):
    plain = trainer.run(tiny_config(), tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()
    traced = trainer.run(tiny_config(log__profile="3:5"), tmp_path / "traced")
    assert traced_updates(tmp_path / "traced" / "profile") == [3, 4, 5]
    assert f"trace of updates 3:5: {tmp_path / 'traced' / 'profile'}" in capsys.readouterr().out
    for key in ("fingerprint", "params_sha256", "valid_loss_final", "tokens_seen"):
        assert traced[key] == plain[key]


class Profiler:
    """Notes in the place of JAX's profiler."""

    def __init__(self, monkeypatch):
        self.told = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: self.told.append("start"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.told.append("stop"))

    def run(self, window, updates) -> list:
        """What happens in an order: numbers are updates, "wait" for the one before."""
        with Trace("there", window) as trace:
            for update in updates:
                trace.begin(update, lambda: self.told.append("wait"))
                self.told.append(update)
                trace.end(update, lambda: self.told.append("wait"))
        return self.told


@pytest.mark.parametrize(
    ("window", "updates", "expected"),
    [
        (None, [1, 2], [1, 2]),
        ((2, 3), [1, 2, 3, 4], [1, "wait", "start", 2, 3, "wait", "stop", 4]),
        ((2, 2), [1, 2, 3], [1, "wait", "start", 2, "wait", "stop", 3]),
        ((2, 4), [3, 4, 5], ["wait", "start", 3, 4, "wait", "stop", 5]),  # resumed in the window
        ((2, 4), [5, 6], [5, 6]),  # ... and after it
        ((2, 9), [1, 2], [1, "wait", "start", 2, "stop"]),  # ended within it
    ],
)
def test_when_a_trace_begins_and_ends(window, updates, expected, monkeypatch):
    assert Profiler(monkeypatch).run(window, updates) == expected


def test_a_run_that_breaks_off_writes_its_trace(monkeypatch):
    profiler = Profiler(monkeypatch)

    def updates():
        yield 1
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        profiler.run((1, 5), updates())
    assert profiler.told[-1] == "stop"
