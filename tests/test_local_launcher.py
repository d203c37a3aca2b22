"""The local launcher, with cells that are small scripts in place of training runs."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from launch import local
from launch.cell import REPOSITORY, Cell
from launch.state import COMPLETE, FAILED, INTERRUPTED, state_of
from moe_ablm.errors import UserError

# what each script can do; a run is its work directory with a lock that is held, then run.json and
# its outcome
PRELUDE = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
from moe_ablm.outcome import told
workdir = Path(sys.argv[1])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "argv.json").write_text(json.dumps(sys.argv[2:]))
lock = (workdir / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
(workdir / "starts").open("a").write("x")
def finish(status="complete", loss=1.5):
    content = {"fingerprint": workdir.name, "status": status, "step": 3, "valid_loss_final": loss}
    (workdir / "run.json").write_text(json.dumps(content))
    with told(str) as end:
        end(status, 3)
def fail(error, status="failed"):
    with told(lambda _: status):
        raise error
"""


def make_cell(folder: Path, name: str, body: str = "finish()", *arguments: str) -> Cell:
    workdir = folder / name
    argv = ("-c", PRELUDE + body, str(workdir), *arguments)
    return Cell(name, argv, workdir, name, 1.0, 1.0)


def run(cells: list[Cell], jobs: int = 1) -> int:
    return local.launch(cells, Namespace(jobs=jobs))


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores and a system that pins",
)


@needs_two_cores
def test_two_at_a_time_on_cores_of_their_own(tmp_path):
    body = """
(workdir / "cores.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
other = workdir.parent / ("b" if workdir.name == "a" else "a") / "cores.json"
for _ in range(3000):  # ends only if both run at once
    if other.exists():
        finish()
        break
    time.sleep(0.02)
"""
    cells = [make_cell(tmp_path, name, body) for name in "ab"]
    assert run(cells, jobs=2) == 0
    a, b = (set(json.loads((tmp_path / n / "cores.json").read_text())) for n in "ab")
    assert a and b and not a & b
    assert a | b <= os.sched_getaffinity(0)


def test_cores_are_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 8, 9}, raising=False)
    assert local.core_groups(2) == [(3, 4), (5, 8, 9)]
    assert local.core_groups(1) == [(3, 4, 5, 8, 9)]
    for wrong in (0, -1, 6):
        with pytest.raises(UserError, match=r"--jobs .*1 to 5"):
            local.core_groups(wrong)


def test_a_failure_is_told_with_its_last_line_and_the_rest_goes_on(tmp_path, capsys):
    cells = [
        make_cell(tmp_path, "a", "fail(ValueError('the dog ate it'))"),
        make_cell(tmp_path, "b", "print('moe_ablm: wrong key', file=sys.stderr); sys.exit(2)"),
        make_cell(tmp_path, "c", "print('fine so far', flush=True); os.kill(os.getpid(), 9)"),
        make_cell(tmp_path, "d"),
    ]
    assert run(cells) == 1
    told = capsys.readouterr()
    assert "failed: a: ValueError: the dog ate it" in told.err
    assert "failed: b: exit code 2; last line: moe_ablm: wrong key" in told.err
    assert "failed: c: killed by SIGKILL; last line: fine so far" in told.err
    assert "failed: d" not in told.err
    assert [state_of(c).name for c in cells] == [FAILED, FAILED, FAILED, COMPLETE]
    assert "the dog ate it" in state_of(cells[0]).note


def test_a_mended_cell_is_no_longer_failed(tmp_path):
    broken = make_cell(tmp_path, "a", "raise ValueError('broken')")
    assert run([broken]) == 1
    mended = make_cell(tmp_path, "a")
    assert run([mended]) == 0
    assert state_of(mended).name == COMPLETE
    assert "broken" in mended.log.read_text()  # attempts follow each other in the log


def test_a_run_that_says_nothing_and_ends_well_but_unfinished_counts_as_failed(tmp_path, capsys):
    assert run([make_cell(tmp_path, "a", "pass")]) == 1
    assert "a" in capsys.readouterr().err


def test_what_another_process_completed_is_complete(tmp_path, capsys):
    """It was quicker to take the directory, and has ended when this one is looked at."""
    body = "finish(); print('moe_ablm: in use by another process', flush=True); sys.exit(2)"
    assert run([make_cell(tmp_path, "a", body)]) == 0
    assert "a: complete" in capsys.readouterr().out


def test_a_stopped_run_whose_next_attempt_fails_is_failed(tmp_path):
    one = make_cell(tmp_path, "a", "finish('stopped'); print('Traceback'); sys.exit(1)")
    run([one])
    assert state_of(one).name == INTERRUPTED  # by its own word, whatever it printed
    broken = make_cell(tmp_path, "a", "fail(ValueError('no data'), 'refused')")
    assert run([broken]) == 1
    assert state_of(broken).name == FAILED and state_of(broken).note == "no data"
    run([one])  # nothing is left of it when the next attempt begins
    assert state_of(one).name == INTERRUPTED


def test_where_no_outcome_can_be_written_the_reason_is_told_all_the_same(tmp_path, capsys):
    """As on a full disk."""
    body = "os.mkdir(os.environ['MOE_ABLM_OUTCOME']); print('no space', flush=True); sys.exit(1)"
    assert run([make_cell(tmp_path, "a", body)]) == 1
    assert "failed: a: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    ["two words", "it's", '"', "; touch pwned", "$(touch pwned)", "`id`", "a\nb", "\\", "é", "-x"],
)
def test_arguments_arrive_as_they_are(tmp_path, value):
    folder = tmp_path / f"d {value.replace('/', '_')}"
    cell = make_cell(folder, "a", "finish()", f"--config.data.path={value}")
    assert run([cell]) == 0
    assert json.loads((cell.workdir / "argv.json").read_text()) == [f"--config.data.path={value}"]
    assert not list(REPOSITORY.glob("pwned")) and not list(tmp_path.rglob("pwned"))


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file where the folder should be")
    assert run([make_cell(tmp_path, "a")]) == 1
    assert "cannot be started" in capsys.readouterr().err


DRIVER = """
import sys
from argparse import Namespace
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_local_launcher import make_cell, run
folder = Path({folder!r})
sys.exit(run([make_cell(folder, "a", {body!r}), make_cell(folder, "b")]))
"""


def start_driver(folder: Path, body: str) -> subprocess.Popen:
    text = DRIVER.format(tests=str(Path(__file__).parent), folder=str(folder), body=body)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)


def test_a_killed_driver_leaves_its_cells_running_and_the_next_one_waits_for_them(tmp_path, capsys):
    body = """
while not (workdir.parent / "go").exists():
    time.sleep(0.02)
finish()
"""
    driver = start_driver(tmp_path, body)
    wait_for(tmp_path / "a" / "starts")
    driver.kill()
    driver.communicate()
    a, b = make_cell(tmp_path, "a", body), make_cell(tmp_path, "b")
    assert local.is_running(a)
    opener = [
        sys.executable,
        "-c",
        f"import time; time.sleep(1); open({str(tmp_path / 'go')!r}, 'w')",
    ]
    with subprocess.Popen(opener):
        assert run([a, b]) == 0
    assert "a: is running already; waiting for it" in capsys.readouterr().out
    assert [state_of(c).name for c in (a, b)] == [COMPLETE, COMPLETE]
    assert (a.workdir / "starts").read_text() == "x"


def test_a_stopped_driver_lets_cells_save_and_starts_no_more(tmp_path):
    body = """
def save(*_):
    finish("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(workdir / "ready").touch()
time.sleep(60)
"""
    driver = start_driver(tmp_path, body)
    wait_for(tmp_path / "a" / "ready")
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert "the same command goes on" in out
    assert state_of(make_cell(tmp_path, "a")).name == INTERRUPTED
    assert not (tmp_path / "b").exists()


def test_a_stop_before_a_cell_can_save_is_no_failure(tmp_path):
    driver = start_driver(tmp_path, "(workdir / 'ready').touch(); time.sleep(60)")
    wait_for(tmp_path / "a" / "ready")
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert not make_cell(tmp_path, "a").outcome.exists()
