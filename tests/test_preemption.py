"""Who is queued again, told by a scontrol that is a script."""

import pytest

from moe_ablm.preemption import requeue_job

SCONTROL = """#!/bin/sh
echo "$*" >>"{folder}/asked"
echo "JobId=9 JobName=x JobState={state} BatchFlag={batch} Requeue=1"
"""
ARRAY = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Sets the environment of a job; the function that it gives is what scontrol was asked."""
    for name in ARRAY:
        monkeypatch.delenv(name, raising=False)

    def ask(environment: dict[str, str], state: str = "RUNNING", batch: str = "1") -> list[str]:
        (tmp_path / "scontrol").write_text(
            SCONTROL.format(folder=tmp_path, state=state, batch=batch)
        )
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        told = requeue_job()
        file = tmp_path / "asked"
        return [told, *(file.read_text().splitlines() if file.exists() else [])]

    return ask


def test_outside_of_slurm_nobody_is_asked(asked):
    assert asked({}) == [""]


def test_a_task_of_an_array_is_queued_again_alone(asked):
    """One task has the number of the array, and that would queue all of them again."""
    assert asked(ARRAY) == [
        "SLURM job 9_3 is queued again", "show job --oneliner 9_3", "requeue 9_3"
    ]  # fmt: skip


def test_a_job_of_its_own(asked):
    assert asked({"SLURM_JOB_ID": "9"})[1:] == ["show job --oneliner 9", "requeue 9"]


@pytest.mark.parametrize(("state", "batch"), [("CANCELLED", "1"), ("COMPLETING", "1"),
                                              ("RUNNING", "0")])  # fmt: skip
def test_what_is_cancelled_or_interactive_stays_so(asked, state, batch):
    told, *commands = asked(ARRAY, state, batch)
    assert "not queued again" in told
    assert commands == ["show job --oneliner 9_3"]
