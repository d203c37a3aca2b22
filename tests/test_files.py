"""Files written whole or not at all, and locks between processes."""

import json
import subprocess
import sys

import pytest

from moe_ablm.files import locked, replacing, write_atomically, write_json


def test_content_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_nothing_is_left_of_what_failed(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(ValueError, match="midway"), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError("midway")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_atomically(tmp_path / "a", "Å\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\x85\n"


def test_json_without_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}


HOLD = """
import sys, time
from pathlib import Path
from moe_ablm.files import locked
with locked(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("theirs", "shared", "free"),
    [("", False, False), ("", True, False), ("shared", True, True), ("shared", False, False)],
)
def test_locks_keep_other_processes_out(theirs, shared, free, tmp_path):
    path = tmp_path / "lock"
    path.touch()
    command = [sys.executable, "-c", HOLD, str(path), theirs]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        if free:
            with locked(path, shared=shared):
                pass
        else:
            with pytest.raises(BlockingIOError), locked(path, shared=shared):
                pass
        other.stdin.close()
        with locked(path, wait=True):  # released when the process ends
            pass
