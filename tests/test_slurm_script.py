"""Batch scripts for SLURM: what they say, that they run, and that no cell smuggles in a command."""

import argparse
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import settings, slurm
from launch.cell import Cell
from launch.state import FAILED, state_of
from moe_ablm import outcome
from moe_ablm.errors import UserError
from moe_ablm.outcome import Ending, leave

TELL = "import json, sys; print(json.dumps(sys.argv[1:]))"
HOSTILE = ["a b", "'", '"', "$(touch injected)", "`touch injected`", "; touch injected #", "a\nb",
           "\\", "*", "--x=$HOME", "é", "", "!!", "EOF\n#SBATCH --array=0-99"]  # fmt: skip


def cell(folder: Path, name: str = "c", argv: tuple[str, ...] = ("-c", TELL)) -> Cell:
    return Cell(name, tuple(argv), folder / name, name * 16, 1.0, 1.0)


def options(**given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    slurm.add_arguments(parser)
    return parser.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in given.items()])


def resolved(**given: str) -> dict:
    return slurm.settings_of(options(**given))


@pytest.fixture(autouse=True)
def configuration(tmp_path, monkeypatch) -> Path:
    """A launch.toml of the test's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = settings.settings_file()
    file.parent.mkdir(parents=True)
    return file


def program(folder: Path, name: str, text: str) -> None:
    """An executable that stands in for one of SLURM's."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bin_folder(tmp_path, monkeypatch) -> Path:
    """SLURM's commands: srun leaves its own options out; the others tell what they were given."""
    folder = tmp_path / "bin"
    program(folder, "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    program(folder, "sbatch", 'printf "%s\\0" "$@" > "$(dirname "$0")/sbatch.txt"; echo 7')
    program(folder, "squeue", 'cat "$(dirname "$0")/queue.txt" 2>/dev/null; exit 0')
    program(folder, "apptainer", 'while [[ "$1" != *.sif ]]; do shift; done; shift; exec "$@"')
    program(
        folder,
        "scontrol",
        'echo "$*" >> "$(dirname "$0")/scontrol.txt"; echo " JobState=RUNNING BatchFlag=1 "',
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def run(text: str, task: int, folder: Path) -> subprocess.CompletedProcess:
    file = folder / "job.sh"
    file.write_text(text)
    # the last task of array 7: SLURM gives it the number of the array
    job = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7"}
    job["SLURM_JOB_NODELIST"] = "n"
    (folder / "logs").mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", file],
        env=os.environ | job,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]


def test_the_script_of_two_nodes_of_gpus(tmp_path):
    given = resolved(nodes="2", gpus="8", cpus="12", partition="gpu", account="ab", time="1-0:0:0")
    text = slurm.script([cell(tmp_path, "a"), cell(tmp_path, "b")], given)
    assert directives(text) == [
        "requeue", "job-name=moe_ablm", "array=0-1", "output=slurm-%A_%a.out", "open-mode=append",
        "signal=USR1@120", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12",
        "partition=gpu", "account=ab", "time=1-0:0:0",
    ]  # fmt: skip
    assert "srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task=12" in text


def test_each_task_gets_its_arguments_unchanged(tmp_path, bin_folder):
    """As many cells as there are hostile words, and one with all of them."""
    out = tmp_path / "a 'quoted' $(touch injected) folder"
    out.mkdir()
    cells = [cell(out, f"c{i}", ("-c", TELL, word)) for i, word in enumerate(HOSTILE)]
    cells.append(cell(out, "all", ("-c", TELL, *HOSTILE)))
    text = slurm.script(cells, resolved())
    for task, each in enumerate(cells):
        (out / "logs").mkdir(exist_ok=True)
        done = run(text, task, tmp_path)
        assert done.returncode == 0, done.stderr
        log = each.log.read_text().splitlines()
        assert log[0].startswith("$ SLURM job 7 on n")
        assert json.loads(log[-1]) == list(each.argv[2:])
    assert not list(Path.cwd().rglob("injected")) and not list(tmp_path.rglob("injected"))


def test_only_the_directives_of_the_script_count(tmp_path):
    """SLURM stops to read directives at the first command."""
    text = slurm.script([cell(tmp_path, "a", ("-c", TELL, *HOSTILE))], resolved())
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    head = [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert len(head) == 8
    assert any(line.startswith("#SBATCH --array=0-99") for line in lines[first:])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"gpus": "8", "nodes": "4", "cpus": "8", "at_once": "3"},
        {"container": "/images/my image.sif", "gpus": "1"},
        {"container": "nvcr.io#nvidia/jax:25.01-py3", "gpus": "8"},
    ],
)
def test_scripts_pass_shellcheck(given, tmp_path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    file = tmp_path / "job.sh"
    file.write_text(slurm.script([cell(tmp_path, "a", HOSTILE), cell(tmp_path)], resolved(**given)))
    done = subprocess.run(["shellcheck", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


LEAVE = """
import sys
from moe_ablm.outcome import told
with told(lambda error: "refused") as end:
    if sys.argv[1] == "raise":
        raise ValueError("no such file")
    end(sys.argv[1], 5)
"""


def test_a_failure_is_told_where_the_sweep_looks(tmp_path, bin_folder):
    failing = cell(tmp_path, "a", ("-c", LEAVE, "raise"))
    assert run(slurm.script([failing], resolved()), 0, tmp_path).returncode == 1
    found = state_of(failing)
    assert (found.name, found.note) == (FAILED, "no such file")
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_failure_without_a_word_of_the_trainer_is_told_by_its_last_line(tmp_path, bin_folder):
    """Not by the word of an earlier attempt, nor by what srun adds."""
    text = "srun: error: n: task 0: Exited with exit code 1"
    fail = f"import sys; print('ValueError: dog', file=sys.stderr); print({text!r}); sys.exit(1)"
    failing = cell(tmp_path, "a", ("-c", fail))
    failing.log.parent.mkdir()
    failing.log.write_text("$ SLURM job 6 on n: a\nof before\n")
    leave(failing.outcome, Ending("stopped", 0, "", 3))
    assert run(slurm.script([failing], resolved()), 0, tmp_path).returncode == 1
    assert state_of(failing).note == "exit code 1; last line: ValueError: dog"
    silent = cell(tmp_path, "b", ("-c", "import sys; sys.exit(1)"))
    assert run(slurm.script([silent], resolved()), 0, tmp_path).returncode == 1
    assert state_of(silent).note == "exit code 1; last line: no output"


def test_where_python_itself_is_broken_the_exit_code_stays(tmp_path, bin_folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    one = cell(tmp_path, "a")
    leave(one.outcome, Ending("failed", 1, "of before"))
    assert run(slurm.script([one], resolved()), 0, tmp_path).returncode == 127
    assert state_of(one).note != "of before"
    assert "/nowhere/python" in one.log.read_text()


@pytest.mark.parametrize(("status", "asked"), [("stopped", True), ("complete", False)])
def test_a_container_is_queued_again_from_outside(status, asked, tmp_path, bin_folder):
    program(bin_folder, "python3", f'exec {shlex.quote(sys.executable)} "$@"')
    one = cell(tmp_path, "a", ("-c", LEAVE, status))
    done = run(slurm.script([one], resolved(container="/i/x.sif")), 0, tmp_path)
    assert done.returncode == 0, done.stderr
    told = bin_folder / "scontrol.txt"
    lines = told.read_text().splitlines() if told.exists() else []
    # "7" alone would queue every task of the array again
    assert lines == (["show job --oneliner 7_0", "requeue 7_0"] if asked else [])
    assert outcome.read(one.outcome) == Ending(status, 0, "", 5)


def test_a_container_sees_what_it_is_given(tmp_path):
    for image, words in (
        ("/i/x.sif", "--bind=/data"),
        ("lab/x:1", f"{tmp_path},/data:/data,/s/b:"),
    ):
        text = slurm.script([cell(tmp_path)], resolved(container=image, mounts="/data,/s/b"))
        assert words in text.replace(f":{tmp_path}", "")


def test_submission(tmp_path, bin_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("JAX_SECRET_KEY", "hidden")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    cells = [cell(tmp_path / "o", name) for name in "abc"]
    assert slurm.launch(cells, options(partition="low")) == 0
    asked = (bin_folder / "sbatch.txt").read_text().split("\0")
    exported = next(a for a in asked if a.startswith("--export=")).removeprefix("--export=")
    assert {"PATH", "NCCL_DEBUG"} <= set(exported.split(","))
    assert not {"HF_TOKEN", "JAX_SECRET_KEY"} & set(exported.split(","))
    assert f"--chdir={tmp_path / 'o' / 'logs'}" in asked
    for file in (tmp_path / "o").rglob("*"):
        assert file.is_dir() or "hidden" not in file.read_text()
    assert "SLURM job 7: 3 cells" in capsys.readouterr().out


def test_what_is_queued_is_not_submitted_again(tmp_path, bin_folder, capsys):
    cells = [cell(tmp_path, name) for name in "abc"]
    slurm.launch(cells, options())
    (bin_folder / "queue.txt").write_text("7 0\n7 2\n8 N/A\n99 0\n")
    capsys.readouterr()
    slurm.launch([*cells, cell(tmp_path, "d")], options())
    assert "2 cells are queued or running" in capsys.readouterr().out
    assert json.loads((tmp_path / "logs" / "slurm-7.json").read_text()) == ["b" * 16, "d" * 16]


def test_two_launchers_at_once_take_turns(tmp_path, bin_folder):
    """The second asks for the queue when the first has submitted."""
    order = tmp_path / "order.txt"
    program(bin_folder, "squeue", f'echo queue >>"{order}"')
    program(bin_folder, "sbatch", f'sleep 0.5; echo submit >>"{order}"; echo 7')
    both = [
        threading.Thread(target=slurm.launch, args=([cell(tmp_path, name)], options()))
        for name in "ab"
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert order.read_text().split() == ["queue", "submit"] * 2


def test_a_large_sweep_is_several_arrays(tmp_path, bin_folder, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "LARGEST_ARRAY", 2)
    slurm.launch([cell(tmp_path, name) for name in "abcde"], options())
    assert capsys.readouterr().out.count("SLURM job 7") == 3


def test_settings_come_from_options_then_from_the_file(configuration):
    configuration.write_text('[slurm]\npartition = "gpu"\ngpus = 8\n')
    found = resolved(partition="low")
    assert (found["partition"], found["gpus"], found["nodes"]) == ("low", "8", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[slurm]\ntoken = 'x'\n", "slurm.token is no key: expected"),
        ("[slurm]\ngpus = [8]\n", r"slurm.gpus=\[8\]: expected"),
        ("[slurm\n", "cannot be read"),
        ("slurm = 3\n", "expected a table"),
        ('[slurm]\npartition = "a b; rm -rf"\n', "slurm.partition='a b; rm -rf': expected"),
    ],
)
def test_a_wrong_file_is_named(text, message, configuration):
    configuration.write_text(text)
    with pytest.raises(UserError, match=f"launch.toml.*{message}"):
        resolved()


@pytest.mark.parametrize(
    ("name", "value"),
    [("partition", "x\n#SBATCH --uid=0"), ("time", "$(id)"), ("gpus", "eight"), ("nodes", "0"),
     ("container", "x;y"), ("account", "")],
)  # fmt: skip
def test_no_value_becomes_a_directive(name, value):
    with pytest.raises(UserError, match=f"--{name}="):
        resolved(**{name: value})


def test_where_there_is_no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="squeue is not here"):
        slurm.launch([cell(tmp_path)], options())


def test_a_refusal_is_told(tmp_path, bin_folder):
    program(bin_folder, "sbatch", 'echo "sbatch: error: invalid partition" >&2; exit 1')
    with pytest.raises(UserError, match="sbatch refused: sbatch: error: invalid partition"):
        slurm.launch([cell(tmp_path)], options())
