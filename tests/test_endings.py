"""How commands end: one line and a code, whatever is wrong, with what is really wrong."""

import errno
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from conftest import command
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moe_ablm.__main__ import VERBS
from moe_ablm.endings import INTERRUPTED, Parser, end, obstacle
from moe_ablm.errors import UserError


def write_to(path):
    with open(path, "w") as file:  # noqa: PTH123 - as libraries do
        file.write("x")


@pytest.fixture
def full():
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("needs /dev/full")
    return "/dev/full"


def test_what_the_system_says_becomes_a_line_with_the_file(full, tmp_path, capsys):
    (tmp_path / "a_file").write_text("")
    for path, reason in (
        (full, "no space left on the disk"),
        (tmp_path / "a_file" / "b", "a_file/b: Not a directory"),
        (tmp_path / "none" / "b", "none/b: No such file"),
        (tmp_path, f"{tmp_path}: Is a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        assert end(lambda path=path: write_to(path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("moe_ablm: ") and reason in line


def test_libraries_that_have_errors_of_their_own(tmp_path, capsys):
    table = pa.table({"a": list(range(1000))})
    (tmp_path / "a_file").write_text("")
    with pytest.raises(SafetensorError) as error:
        save_file({}, tmp_path / "none" / "b.safetensors")
    assert "No such file" in obstacle(error.value)
    assert end(lambda: parquet.write_table(table, tmp_path / "a_file" / "b")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def ctrl_c():
    """Python's own handler, also where the tests were started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_codes(ctrl_c, capsys):
    def raising(error):
        def run():
            raise error

        return run

    assert end(lambda: None) == 0 and end(lambda: 1) == 1
    assert end(raising(UserError("x: wrong"))) == 2
    assert capsys.readouterr().err == "moe_ablm: x: wrong\n"
    assert end(raising(KeyboardInterrupt()), "sweeps") == INTERRUPTED == 130
    assert capsys.readouterr().err == "sweeps: interrupted: give the same command again\n"
    assert end(raising(SystemExit(2))) == 2 and end(raising(SystemExit())) == 0
    assert end(raising(SystemExit("no data"))) == 2
    assert capsys.readouterr().err == "moe_ablm: no data\n"
    assert end(raising(MemoryError())) == 2
    assert "out of memory" in capsys.readouterr().err
    assert obstacle(OSError(errno.ESTALE, "Stale file handle", "/mnt/x")).startswith("/mnt/x: St")
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        end(lambda: 1 // 0)


def test_a_parser_says_it_in_one_line(capsys):
    parser = Parser(prog="python -m sweeps.x")
    parser.add_argument("--pairs", type=int, required=True)
    for arguments, words in (
        (["--pairs", "many"], "--pairs: invalid int value: 'many'"),
        ([], "required: --pairs"),
        (["--pairs", "1", "--piars=2"], "--piars=2 (did you mean '--pairs'?)"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("sweeps.x: ") and words in line


@pytest.mark.parametrize("module", ["moe_ablm", "moe_ablm.train"])
def test_output_that_cannot_be_written(module, full):
    argv, options = command(module, "--help")
    with open(full, "w") as out:  # noqa: PTH123
        done = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, check=False, **options)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "no space left" in line


def test_help_and_refusals_need_nothing_that_takes_time():
    """No jax: an import of it takes longer than people wait."""
    code = (
        "import sys, moe_ablm.__main__ as verbs, moe_ablm.train as train\n"
        "for verb in [*verbs.VERBS, 'train']:\n"
        "    for flags in (['--help'], ['--nonsense']):\n"
        "        expected = 0 if flags == ['--help'] else 2\n"
        "        assert verbs.main(['x', verb, *flags]) == expected, verb\n"
        "assert train.main(['x', '--config=configs/base.py', '--config.trian.x=1']) == 2\n"
        "assert not {'jax', 'flax', 'orbax', 'grain'} & set(sys.modules)\n"
    )
    _, options = command("x")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    # a refusal of every verb and of train, and that of the key
    assert len(lines) == len(VERBS) + 2 and all(line.startswith("moe_ablm: ") for line in lines), (
        lines
    )


def test_help_keeps_the_lines_of_a_docstring_and_wraps_a_long_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = " ".join(["word"] * 40)
    text = Parser(description="First.\n\n    a command\n", epilog=words).format_help()
    assert "First.\n\n    a command\n" in text
    assert max(map(len, text.splitlines())) < 80 and text.count("word") == 40
