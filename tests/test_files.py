"""Files written whole or not at all, and locks between processes."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from strict_json import read_strictly

import moe_ablm
from moe_ablm.data.dataset import Dataset
from moe_ablm.errors import UserError
from moe_ablm.files import (
    address_of,
    in_store,
    json_text,
    locked,
    replacing,
    shortened,
    write_atomically,
    write_json,
)


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


def test_a_number_that_is_not_finite_is_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    content = {"x": [1, None, nan], "y": {"z": (np.float64(inf), 2.5)}, "w": -inf, "v": "NaN"}
    expected = {"x": [1, None, None], "y": {"z": [None, 2.5]}, "w": None, "v": "NaN"}
    write_json(tmp_path / "a.json", content)
    assert read_strictly(tmp_path / "a.json") == [expected]
    (tmp_path / "a.jsonl").write_text(f"{json_text(content)}\n{json_text([0.1, True])}\n")
    assert read_strictly(tmp_path / "a.jsonl") == [expected, [0.1, True]]


def test_there_is_one_writer_of_json():
    """Elsewhere JSON is only hashed, or a message between processes."""
    package = Path(moe_ablm.__file__).parent
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "json.dump" in path.read_text()
    }
    assert writers == {"files.py", "config.py", "parallel/multihost.py"}


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


def test_an_address_in_an_object_store_is_told_from_a_path():
    assert in_store("runs/gs") is None and in_store("transformers:/d") is None
    assert in_store("C:/x") is None and in_store("hf:org/name") is None
    for path in ("gs://b/x", Path("gs://b/x"), "gs://b/x/"):  # a Path has one slash left
        assert address_of(path) == "gs://b/x"
        assert str(in_store(path)).startswith("gs://b/x is in an object store")
    assert "(aws s3 cp --recursive s3://b DIR)" in str(in_store("s3://b"))
    assert "(" not in str(in_store("az://b"))


STORE = "az://bucket/it"  # of a kind that is not read; others: test_stores.py
TAKEN = {
    "prepare --input": ("prepare", "--input", STORE, "--out", "d"),
    "prepare --out": ("prepare", "--input", "pairs.csv", "--out", STORE),
    "describe --input": ("describe", "--input", STORE, "--out", "f"),
    "evaluate --out": ("evaluate", "--run", "r", "--input", "d", "--out", STORE),
    "score --run": ("score", "--run", STORE, "--heavy", "EVQLV"),
    "score --input": ("score", "--run", "r", "--input", STORE),
    "report --run": ("report", "--run", STORE),
    "report --watch": ("report", "--run", STORE, "--watch"),
    "import --input": ("import", "--input", STORE, "--out", "r"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_verbs_refuse_an_object_store_in_a_line(name, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = main(*TAKEN[name])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "az://bucket/it is in an object store" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_on_a_file_system():
    with pytest.raises(UserError, match=r"dataset az://bucket/it is in an object store"):
        Dataset(STORE)


def test_digits_of_float32_are_those_of_numpy():
    """The shortest that numpy finds, of numbers of all sizes; what is no float stays."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=500) * 10.0 ** rng.integers(-30, 5, 500)).astype(np.float32)
    for value in values[values != np.round(values)]:
        assert shortened(float(value)) == float(str(value))
    assert shortened(1 / 3) == 0.33333334 and repr(shortened(0.1 + 0.2)) == "0.3"
    assert shortened(1.23456789e-60) == 1.23457e-60, "no float32, and no zero"
    for kept in (123456789.0, 1e300, float("inf"), 7, "x", None, True):
        assert shortened(kept) is kept
    assert math.isnan(shortened(math.nan))
