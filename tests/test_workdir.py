"""Who owns a work directory, and whose `run.json` is believed."""

import fcntl
import json
import threading
import time

import pytest
from conftest import tiny_config

from moe_ablm import workdir
from moe_ablm.errors import UserError
from moe_ablm.workdir import PATIENCE, finished_run, work_directory


def test_a_look_at_the_lock_does_not_turn_the_owner_away(tmp_path, monkeypatch):
    """`sweeps.status` takes the lock for a moment, in another process."""
    monkeypatch.setattr(workdir, "PATIENCE", 60.0)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        look = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        look.start()
        with work_directory(tmp_path, tiny_config(), "d"):
            assert (tmp_path / "config.json").exists()
        look.join()


def test_an_owner_who_stays_turns_others_away(tmp_path):
    began = time.monotonic()
    with (
        work_directory(tmp_path, tiny_config(), "d"),
        pytest.raises(UserError, match="in use by another process"),
        work_directory(tmp_path, tiny_config(), "d"),
    ):
        pass
    assert time.monotonic() - began >= PATIENCE


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match="cannot be locked .Function not implemented"),
        work_directory(tmp_path, tiny_config(), "d"),
    ):
        pass


def test_a_directory_of_somebody_else_is_no_work_directory(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with (
        pytest.raises(UserError, match="is no run .* holds thesis.tex: name a new"),
        work_directory(tmp_path, tiny_config(), "d"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ({"status": "complete", "fingerprint": "a"}, True),
        ({"status": "stopped", "fingerprint": "a"}, False),
        ({"status": "complete", "fingerprint": "b"}, False),  # another run's
        ({"status": "complete"}, False),
        ([], False),
    ],
)
def test_only_the_own_complete_run_is_finished(tmp_path, content, kept):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(content))
    assert finished_run(tmp_path, "a") == (content if kept else None)
    assert file.exists() == kept
