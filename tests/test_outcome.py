"""How the trainer ended, told to whoever started it."""

import json
import signal

import pytest
from conftest import tiny_flags

from moe_ablm import outcome, train, trainer
from moe_ablm.errors import UserError
from moe_ablm.outcome import Ending


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file that a launcher has named."""
    path = tmp_path / "cell.outcome.json"
    monkeypatch.setenv("MOE_ABLM_OUTCOME", str(path))
    return path


def status_of(error: Exception) -> str:
    return "refused" if isinstance(error, UserError) else "failed"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("row 3 of x.csv:\nno letter"), ["refused", 2, "row 3 of x.csv: no letter"]),
        (ValueError("the \x1b[31mdog"), ["failed", 1, "ValueError: the [31mdog"]),
        (ValueError("a" * 900), ["failed", 1, "ValueError: " + "a" * 285 + "..."]),
    ],
)
def test_an_exception_is_told_in_one_line_and_raised_again(error, expected, file):
    with pytest.raises(type(error)) as found, outcome.told(status_of):
        raise error
    assert found.value is error
    content = json.loads(file.read_text())
    assert list(content) == ["status", "exit_code", "message", "step"]
    assert list(content.values()) == [*expected, None]


def test_nobody_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_ABLM_OUTCOME", raising=False)
    monkeypatch.chdir(tmp_path)
    with outcome.told(status_of) as told:
        told("complete", 3)
    with pytest.raises(ValueError), outcome.told(status_of):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_the_first_failure_counts_and_the_end_of_the_first_process_before_all(file):
    """Of several processes, each with a block of its own."""
    for text in ("cause", "consequence"):
        with pytest.raises(ValueError), outcome.told(status_of):
            raise ValueError(text)
    assert outcome.read(file) == Ending("failed", 1, "ValueError: cause")
    with outcome.told(status_of) as told:
        told("stopped", 7)
    with pytest.raises(ValueError), outcome.told(status_of):
        raise ValueError("too late to matter")
    assert outcome.read(file) == Ending("stopped", 0, "", 7)


def test_a_file_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_ABLM_OUTCOME", str(tmp_path / "none" / "x.json"))
    with pytest.raises(ValueError, match="dog"), outcome.told(status_of):
        raise ValueError("dog")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"status": "complete"}',
     '{"status": "done", "exit_code": 0, "message": "", "step": 1}',
     '{"status": ["complete"], "exit_code": 0, "message": "", "step": 1}',
     '{"status": "complete", "exit_code": "0", "message": "", "step": 1}'],
)  # fmt: skip
def test_a_damaged_file_is_a_failure(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    found = outcome.read(path)
    assert found.failed and f"{path} is damaged" in found.message and "\n" not in found.message
    assert outcome.read(tmp_path / "none") is None


def test_what_a_later_version_adds_is_left_out(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"status": "complete", "exit_code": 0, "message": "", "step": 1,
                                "host": "a"}))  # fmt: skip
    assert outcome.read(path) == Ending("complete", 0, "", 1)


# the trainer's own words


def command(workdir, **changes) -> int:
    changes |= {"model__layers": 1, "model__moe__router": "none"}
    return train.main(["train", *tiny_flags(**changes), f"--workdir={workdir}"])


def test_the_trainer_refuses(file, tmp_path, capsys):
    assert command(tmp_path / "w", train__stpes=3) == 2
    found = outcome.read(file)
    assert (found.status, found.exit_code, found.step) == ("refused", 2, None)
    assert "stpes" in found.message and found.message in capsys.readouterr().err


def test_the_trainer_stops(file, tmp_path, monkeypatch):
    """`tests/test_multihost.py` has one that completes."""
    evaluate = trainer.validation_sums

    def evaluate_and_signal(*args):
        signal.raise_signal(signal.SIGUSR1)
        return evaluate(*args)

    monkeypatch.setattr(trainer, "validation_sums", evaluate_and_signal)
    assert command(tmp_path / "w") == 0
    assert outcome.read(file) == Ending("stopped", 0, "", 6)


def test_the_trainer_diverges(file, tmp_path, capsys):
    changes = {"train__lr": 3e38, "train__clip": 0.0, "train__warmup": 12}
    assert command(tmp_path / "w", **changes) == 1
    found = outcome.read(file)
    assert (found.status, found.exit_code) == ("diverged", 1)
    assert found.message.startswith("step ") and found.message in capsys.readouterr().err
