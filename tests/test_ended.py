"""What a launcher's script is told once the trainer has ended."""

import subprocess
import sys

import pytest
from conftest import REPO

from launch.ended import main, outcome_of
from moe_ablm.outcome import Ending, leave, read

SRUN = "srun: error: n: task 0: Exited with exit code 1"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("complete", 0, 0), ("stopped", 0, 42), ("diverged", 1, 3), ("collapsed", 1, 3),
     ("refused", 2, 2), ("failed", 1, 1), (None, 0, 0), (None, 137, 137),
     ("complete", 134, 134), ("stopped", 134, 42)],
)  # fmt: skip
def test_the_exit_code_says_what_to_do(status, code, expected, tmp_path):
    file, log = tmp_path / "a.outcome.json", tmp_path / "a.log"
    if status:
        leave(file, Ending(status, 0))
    assert main(["ended", str(file), str(log), str(code)]) == expected


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (f"$ job 6\nof before\n$ job 7\nOSError: dog\n\n{SRUN}\nslurmstepd: x\n", "OSError: dog"),
        (f"$ job 6\nof before\n$ job 7\n{SRUN}\n", SRUN),
        ("$ job 6\nof before\n$ job 7\n", "no output"),
        ("$ job 7\nsome \x1b[31mcolour\n", "some [31mcolour"),
    ],
)  # fmt: skip
def test_a_process_without_a_word_is_told_by_its_last_line(log, line, tmp_path):
    file = tmp_path / "a.outcome.json"
    (tmp_path / "a.log").write_text(log)
    outcome_of(file, tmp_path / "a.log", 137)
    assert read(file) == Ending("failed", 137, f"exit code 137; last line: {line}")


def test_its_own_word_goes_before(tmp_path):
    own = leave(tmp_path / "x", Ending("refused", 2, "no data"))
    assert outcome_of(tmp_path / "x", tmp_path / "no log", 2) == own == read(tmp_path / "x")
    assert "killed by SIGKILL" in outcome_of(tmp_path / "y", tmp_path / "no log", -9).message
    assert "no log cannot be read" in read(tmp_path / "y").message


def test_it_needs_the_standard_library_only(tmp_path):
    """It is asked on nodes and in pods where more may be broken."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c",
         f"import sys; sys.path.insert(0, {str(REPO)!r}); from launch.ended import main; "
         f"sys.exit(main(['', {str(tmp_path / 'x')!r}, {str(tmp_path / 'log')!r}, '9']))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (9, "")
    assert read(tmp_path / "x").exit_code == 9
