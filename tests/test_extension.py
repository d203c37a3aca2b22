"""A run that is extended ends as one that was as long from the start."""

import json
import shutil

import pytest
from conftest import tiny_config

from moe_ablm import config as configs
from moe_ablm import trainer
from moe_ablm.errors import UserError
from moe_ablm.extension import plan_extension, set_aside
from moe_ablm.interop.load import load_model
from moe_ablm.results import read_results

SAME = ("params_sha256", "tokens_seen", "fingerprint", "step", "unique_tokens")


def config_of(schedule: str, steps: int, **changes):
    return tiny_config(
        train__schedule=schedule,
        train__steps=steps,
        eval__every=8,
        checkpoint__every=5,
        checkpoint__keep=1,
        model__moe__router="none",
        model__layers=1,
        **changes,
    )


def extended(config, workdir, steps):
    extension = plan_extension(config, workdir, steps)
    return trainer.run(extension.config, workdir, extension), extension


@pytest.mark.parametrize("schedule", ["constant", pytest.param("wsd", marks=pytest.mark.slow)])
def test_as_if_it_had_been_longer_from_the_start(schedule, tmp_path):
    short, whole = config_of(schedule, 12), config_of(schedule, 20)
    expected = trainer.run(whole, tmp_path / "whole")
    first = trainer.run(short, tmp_path / "w")
    found, extension = extended(short, tmp_path / "w", 20)
    assert {k: found[k] for k in SAME} == {k: expected[k] for k in SAME}
    assert configs.identity(extension.config, "d") == configs.identity(whole, "d")
    # and its lines, beside those of the former end
    lines, theirs = (
        {(r["kind"], r["step"]): r["loss"] for r in read_results(tmp_path / name / "results.jsonl")}
        for name in ("w", "whole")
    )
    assert theirs.items() <= lines.items()
    # it is complete, and goes on no further
    again, extension = extended(short, tmp_path / "w", 20)
    assert again == json.loads((tmp_path / "w" / "run.json").read_text()) and not extension.note
    # what the shorter run left is kept
    aside = tmp_path / "w" / "ended-at-12"
    assert json.loads((aside / "run.json").read_text())["params_sha256"] == first["params_sha256"]
    assert max(r["step"] for r in read_results(aside / "results.jsonl")) == 12
    if schedule == "wsd":  # the rate of the shorter run fell from update 10 on
        assert "step 12" in load_model(aside).source


@pytest.mark.slow
def test_other_schedules_begin_anew_and_say_so(tmp_path):
    """The longer run is the one whose config has `train.restarts` from the start."""
    short = config_of("linear", 10)
    trainer.run(short, tmp_path / "w")
    found, extension = extended(short, tmp_path / "w", 20)
    assert "fell to 0 at step 10: it rises again" in extension.note
    whole = trainer.run(config_of("linear", 20, train__restarts=(10,)), tmp_path / "whole")
    assert {k: found[k] for k in SAME} == {k: whole[k] for k in SAME}
    assert found["fingerprint"] != configs.fingerprint(config_of("linear", 20), "d")
    with pytest.raises(UserError, match="different run .*train.steps: 20 there, 10 now.*extend-to"):
        trainer.run(short, tmp_path / "w")


@pytest.mark.parametrize(("schedule", "sent"), [("wsd", False), ("constant", True)])
def test_a_tracker_never_mixes_the_shorter_run_with_the_longer_one(schedule, sent, tmp_path):
    """Where updates are done again, they belong to a run of its own there."""
    short = config_of(schedule, 12)
    of_a_run(short, tmp_path, steps=(10, 12))
    (tmp_path / "tracker.json").write_text("{}")
    extension = plan_extension(short, tmp_path, 20)
    set_aside(tmp_path, extension)
    set_aside(tmp_path, extension)  # as after an interruption
    assert (tmp_path / "tracker.json").exists() == sent
    assert (tmp_path / "ended-at-12" / "tracker.json").exists() != sent
    assert (tmp_path / "checkpoints" / "10").exists()


def test_a_copy_that_was_going_up_when_it_was_broken_off_is_made_again(tmp_path):
    """As a store leaves it: the checkpoint where it was, and a part of it where it was to go."""
    short = config_of("wsd", 12)
    of_a_run(short, tmp_path, steps=(10, 12))
    (tmp_path / "checkpoints/12/whole").touch()
    part = tmp_path / "ended-at-12/checkpoints/12/part"
    part.mkdir(parents=True)
    set_aside(tmp_path, plan_extension(short, tmp_path, 20))
    assert [p.name for p in part.parent.iterdir()] == ["whole"]
    assert not (tmp_path / "checkpoints/12").exists()


def of_a_run(config, workdir, steps=(12,), **run):
    """A work directory as a run leaves it, without arrays."""
    for step in steps:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    content = {"config": configs.to_dict(config), "dataset": "d", "fingerprint": "f"}
    (workdir / "config.json").write_text(json.dumps(content))
    if run:
        (workdir / "run.json").write_text(json.dumps(run))
    return workdir


REFUSED = {
    "shorter": ({}, {}, 11, "has 12 updates: expected more"),
    "patience": ({}, {"status": "complete", "step": 9}, 20, "at step 9 of 12 by train.patience"),
    "collapsed": ({}, {"status": "collapsed", "step": 9}, 20, "by its status, collapsed"),
    "curriculum": ({"data__regime": "curriculum:sigmoid"}, {}, 20, "spread over all train.steps"),
    "unfinished": ({"train__steps": 16}, {}, 20, "is at step 12 of 16: let it end first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_extended(name, tmp_path):
    changes, run, steps, words = REFUSED[name]
    config = config_of(**({"schedule": "linear", "steps": 12} | {
        k.removeprefix("train__"): v for k, v in changes.items()
    }))  # fmt: skip
    with pytest.raises(UserError, match=words):
        plan_extension(config, of_a_run(config, tmp_path, **run), steps)


def test_where_there_is_no_run(tmp_path):
    config = config_of("constant", 12)
    with pytest.raises(UserError, match="holds no run to extend"):
        plan_extension(config, tmp_path / "new", 20)
    of_a_run(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        plan_extension(config, tmp_path, 20)


def test_where_runs_of_other_lengths_part(tmp_path):
    """Under wsd a run of 100 updates and one of 200 are the same until update 80."""
    config = config_of("wsd", 100, train__warmup=0)
    before = plan_extension(config, of_a_run(config, tmp_path / "a", (70,)), 200)
    assert (before.back_to, before.note, before.config.train.restarts) == (80, "", ())
    after = plan_extension(config, of_a_run(config, tmp_path / "b", (80, 100)), 200)
    assert after.back_to == 80 and "from step 80" in after.note
    lost = plan_extension(config, of_a_run(config, tmp_path / "c", (90, 100)), 200)
    assert (lost.back_to, lost.config.train.restarts) == (None, (100,))
