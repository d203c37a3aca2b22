"""`report --watch`: where runs stand, until they have ended."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from conftest import REPO
from test_run_curves import line

from moe_ablm.errors import UserError
from moe_ablm.files import locked
from moe_ablm.verbs import watch
from moe_ablm.verbs.watch import standing_of


def begin(run, steps=100):
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": {"train": {"steps": steps}}}))
    return run


def log(run, *lines):
    with (run / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)


def end(run, status="complete"):
    (run / "run.json").write_text(json.dumps({"status": status}))


def test_where_a_run_stands(tmp_path):
    run = tmp_path / "a"
    assert standing_of(run, "a").cells() == ["a", "waiting", "0", "", "", "", "", "", ""]
    begin(run)
    assert standing_of(run, "a").status == "interrupted"
    with locked(run / ".lock"):
        assert standing_of(run, "a").cells()[:3] == ["a", "running", "0 of 100"]
        log(run, line("train", 10, 2.5), line("eval", 20, 2.0), line("eval", 40, 2.25))
        found = standing_of(run, "a")
        # 60 updates of 1,000 tokens are left, at 50 tokens a second
        assert found.cells()[2:] == [
            *("40 of 100", "2.5000", "2.2500", "2.0000", "3.2500", "50", "0:20:00"),
        ]
        assert found.line() == (
            "a: running; updates 40 of 100, training 2.5000, validation 2.2500, best 2.0000, "
            "CDRH3 3.2500, tokens/s 50, left 0:20:00"
        )
    end(run, "diverged")
    assert standing_of(run, "a").cells()[1] == "diverged"
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"--run .*a: its results are damaged"):
        standing_of(run, "a")


def test_lines_while_runs_go_on_and_figures_at_their_end(tmp_path, main, monkeypatch):
    """Without a terminal; a run that ends while it is watched, beside one that has ended."""
    done, going = begin(tmp_path / "done"), begin(tmp_path / "going")
    log(done, line("train", 5, 2.5), line("eval", 100, 2.0))
    end(done)
    log(going, line("train", 5, 3.0))
    left = [lambda: log(going, line("eval", 100, 1.5)), lambda: None, lambda: end(going)]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: left.pop(0)())
    found = main("report", "--run", done, "--run", going, "--watch", "--out", tmp_path / "both")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [each for each in lines if each.startswith("done: ")] == [lines[0]]
    told = [each for each in lines if each.startswith("going: ")]
    assert told[0].startswith("going: interrupted; updates 5 of 100, training 3.0000")
    assert told[1].startswith("going: interrupted; updates 100 of 100") and not left
    assert told[2].startswith("going: complete; updates 100 of 100") and len(told) == 3
    assert (tmp_path / "both" / "curves.png").exists()


def test_a_table_in_a_terminal_until_control_c(tmp_path):
    run = begin(tmp_path / "a")
    log(run, line("train", 5, 2.75))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_ablm", "report", "--run", str(run), "--watch"],
        stdout=slave, stderr=subprocess.PIPE, cwd=REPO,
        env=os.environ | {"COLUMNS": "120", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while b"2.7500" not in shown:  # ends with an OSError where the process has ended
        shown += os.read(master, 65536)
    log(run, line("eval", 10, 1.125))
    while b"1.1250" not in shown:
        shown += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and b"Traceback" not in process.stderr.read()
    os.close(master)
    process.stderr.close()
    assert b"interrupted" in shown and b"validation" in shown


def test_a_run_is_watched_once(tmp_path, main):
    found = main("report", "--run", tmp_path, "--run", tmp_path, "--watch")
    assert found.returncode == 2 and "given twice" in found.stderr
