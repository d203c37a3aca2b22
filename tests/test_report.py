"""`report` says how a run stands: its size, its step, and whether it has ended."""

import json

import pytest
from conftest import tiny_config

from moe_ablm import config as configs
from moe_ablm import outcome
from moe_ablm.summary import RunRecord
from moe_ablm.trainer import why_it_ended
from moe_ablm.verbs.report import standing

LINES = [{"kind": "train", "step": 7}, {"kind": "eval", "step": 8}]
STATUS = {
    outcome.COMPLETE: "step 8 of 12, complete, ended by train.patience",
    outcome.STOPPED: "step 8 of 12, stopped: the same command resumes it",
    outcome.COLLAPSED: "step 8 of 12, collapsed",
    None: "step 8 of 12, not ended: running, or interrupted",
}


@pytest.mark.parametrize("status", STATUS)
def test_how_a_run_stands(status, tmp_path):
    content = {"config": configs.to_dict(tiny_config())}
    (tmp_path / "config.json").write_text(json.dumps(content))
    if status:
        (tmp_path / "run.json").write_text(json.dumps({"status": status}))
    found = standing(tmp_path, LINES)
    assert found.startswith(f"{tmp_path}: tiny (") and found.endswith(STATUS[status])
    assert " parameters, " in found and " active), " in found and "\n" not in found


def test_a_run_that_reached_its_last_step(tmp_path):
    content = {"config": configs.to_dict(tiny_config(train__steps=8))}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "run.json").write_text('{"status": "complete"}')
    assert standing(tmp_path, LINES).endswith("step 8 of 8, complete")


def test_a_run_that_was_saved_between_two_lines(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "stopped", "step": 11}')
    assert "step 11, stopped" in standing(tmp_path, LINES)


def test_results_alone_tell_the_step(tmp_path):
    assert standing(tmp_path, LINES) == f"{tmp_path}: step 8, not ended: running, or interrupted"


def test_patience_says_what_it_ended():
    config = tiny_config(train__patience=2)
    line = why_it_ended(config, RunRecord(best_loss=1.25, best_step=6), 10)
    assert line.startswith("ended at step 10 of 12 by train.patience=2: ")
    assert "better than that of step 6 (1.2500), whose checkpoint is kept" in line
