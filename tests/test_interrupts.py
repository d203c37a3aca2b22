"""Ctrl-C, pressed for real: an answer within a moment, a code, and nothing half-done."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPO, command, tiny_flags

from moe_ablm.data.annotate import _without_ctrl_c

SECOND = 1.0 + 5.0  # beside what a busy machine takes to wake a thread


def start(*arguments, code: str | None = None) -> subprocess.Popen:
    argv, options = command(*arguments or ["x"])
    argv = [sys.executable, "-c", code] if code else argv
    # a group of its own, as a shell makes it: Ctrl-C goes to the workers, too
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options
    )


def press(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGINT)


def answer(process: subprocess.Popen) -> str:
    """The next line on stderr, which must not be long in coming."""
    began = time.monotonic()
    line = process.stderr.readline()
    assert time.monotonic() - began < SECOND
    return line


def waited(*tasks: Path) -> float:
    """Seconds for which threads were ready and had no processor; 0 where Linux does not tell."""
    files = [task / "schedstat" for task in tasks]
    return sum(int(file.read_text().split()[1]) for file in files if file.exists()) / 1e9


def wait_for_imports(process: subprocess.Popen) -> None:
    """Until the command loads numpy, which it does after it has begun to listen."""
    maps = Path(f"/proc/{process.pid}/maps")
    end = time.monotonic() + 60
    while maps.exists() and "numpy" not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    if not maps.exists():  # no Linux
        time.sleep(1.0)


def code_of(process: subprocess.Popen) -> int:
    """As a shell tells it: Python ends itself by the signal where that came within an `exec`."""
    code = process.wait(timeout=60)
    return 128 + signal.SIGINT if code == -signal.SIGINT else code


READY = "print('ready', flush=True)\n"
IN_A_LIBRARY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"  # no bytecode
SWALLOWED = (
    "import gc, itertools\n"
    "def callback(*_):\n"
    "    try: exec('for _ in itertools.count(): pass')\n"
    "    except KeyboardInterrupt: pass\n"
    "while True: callback()"
)
HEAD = "from moe_ablm.preemption import Interrupts, stop_flag\n"


@pytest.mark.parametrize(
    ("work", "needed"),
    [(IN_A_LIBRARY, False), (SWALLOWED, True)],
    ids=["in a library", "swallowed"],
)
def test_a_main_thread_that_does_not_listen(work, needed):
    """A line within a second, however busy the machine: time that others had does not count.

    That of the main thread is needed where it has Python's lock to hand over.
    """
    body = "with Interrupts(after='begin again'):\n"
    inner = READY + work
    body += "".join(f"    {line}\n" for line in inner.splitlines())
    process = start(code=HEAD + body)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    own, here = (Path(f"/proc/{pid}/task") for pid in (process.pid, os.getpid()))
    threads = [here / f"{threading.get_native_id()}"]
    threads += [task for task in own.glob("*") if needed or task.name != own.parent.name]
    before = waited(*threads)
    began = time.monotonic()
    press(process)
    assert answer(process) == "moe_ablm: interrupted: begin again\n"
    took = time.monotonic() - began
    assert took - (waited(*threads) - before) < 1.0
    assert code_of(process) == 130
    assert process.stderr.read() == ""


def test_python_that_called_a_command_goes_on():
    """The command is over; who called it has handled Ctrl-C, and is not ended for it later."""
    body = (
        "import time\ntry:\n    with Interrupts():\n        print('ready', flush=True)\n"
        "        time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\n"
        "time.sleep(GRACE + 1)\nprint('went on', flush=True)\n"
    )
    process = start(code="from moe_ablm.preemption import GRACE\n" + HEAD + body)
    assert process.stdout.readline() == "ready\n"
    press(process)
    assert "interrupted" in answer(process)
    assert process.stdout.readline() == "went on\n" and process.wait(timeout=60) == 0


def test_what_hangs_after_a_command_line_is_ended():
    body = (
        "import threading, time\nfrom moe_ablm.preemption import leave\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('ready', flush=True)\nleave(130)\n"
    )
    process, began = start(code=body), time.monotonic()
    assert process.stdout.readline() == "ready\n"
    assert code_of(process) == 130 and time.monotonic() - began < 50


def test_a_second_time_while_saving_ends_at_once():
    body = (
        "import time\nwith Interrupts(after='resume'), stop_flag() as heard:\n"
        "    print('ready', flush=True)\n    while not heard: time.sleep(.01)\n"
        "    print(heard, flush=True)\n    time.sleep(60)\n"
    )
    process = start(code=HEAD + body)
    assert process.stdout.readline() == "ready\n"
    press(process)
    assert "heard Ctrl-C, saving" in answer(process)
    assert process.stdout.readline() == "['SIGINT']\n"
    press(process)
    line = answer(process)
    assert "ended at once; what was saved before is kept: resume" in line
    assert code_of(process) == 130 and process.stderr.read() == ""


def test_a_scheduler_s_signal_is_no_ctrl_c():
    body = (
        "import time\nwith Interrupts() as interrupts, stop_flag() as heard:\n"
        "    print('ready', flush=True)\n    while not heard: time.sleep(.01)\n"
        "print(heard, interrupts.heard)\n"
    )
    process = start(code=HEAD + body)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("['SIGTERM'] 0\n", "", 0)


def test_the_trainer_before_it_trains(tmp_path):
    """Among its imports; most of them are of jax."""
    process = start("moe_ablm.train", *tiny_flags(), f"--workdir={tmp_path / 'w'}")
    wait_for_imports(process)
    press(process)
    line = answer(process)
    assert "interrupted: " in line and f"--workdir={tmp_path / 'w'}" in line
    assert code_of(process) == 130
    assert process.stderr.read() == ""


def test_nothing_that_takes_long_is_imported_before_ctrl_c_is_heard():
    """The command lines, up to the line that begins to listen."""
    code = "import sys, moe_ablm.__main__, moe_ablm.train, sweeps, launch; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    found = {name.partition(".")[0] for name in done.stdout.split()}
    ours = {name for name in found if not name.startswith("_")} - sys.stdlib_module_names
    assert ours == {"moe_ablm", "sweeps", "launch"}


@pytest.mark.parametrize(
    "arguments", [("sweeps.collect", "x"), ("launch.compile", "--hardware=cpu")], ids=" ".join
)
def test_other_commands_among_their_imports(arguments):
    """Beside those of the package; jax is among the imports of the second."""
    process = start(*arguments)
    end = time.monotonic() + 60
    maps = Path(f"/proc/{process.pid}/maps")
    while "pyarrow" not in (known := maps.read_text()) and "jaxlib" not in known:
        assert time.monotonic() < end
        time.sleep(0.01)
    press(process)
    name = arguments[0].partition(".")[0]
    assert answer(process) == f"{name}: interrupted: give the same command again\n"
    assert code_of(process) == 130 and process.stderr.read() == ""


def test_the_trainer_while_it_compiles(tmp_path):
    process = start("moe_ablm.train", *tiny_flags(), f"--workdir={tmp_path / 'w'}")
    assert any("parameters" in line for line in process.stdout)  # the data are made before
    press(process)
    assert "heard Ctrl-C, saving" in answer(process)
    out, err = process.communicate(timeout=120)
    assert code_of(process) == 130 and err == "", err  # `train && evaluate` does not go on
    before, told = out.split("the same command resumes it:\n")
    assert "saved at step 1;" in before
    assert told.count("\n") == 1 and f"--workdir={tmp_path / 'w'}" in told


def test_a_verb_leaves_nothing(tmp_path):
    out = tmp_path / "s.csv"
    process = start("moe_ablm", "simulate", "--pairs", 10**7, "--out", out)
    end = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    press(process)
    assert answer(process) == "moe_ablm: interrupted: give the same command again\n"
    assert code_of(process) == 130
    assert process.stderr.read() == "" and not list(tmp_path.iterdir())


def test_ctrl_c_waits_until_processes_have_begun():
    """Whichever thread the system gives the signal to: an exception would break off their start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    over, reached = threading.Event(), []
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            with _without_ctrl_c():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
                reached.append(True)
            reached.append(False)
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        other.join()
    assert reached == [True]


def test_workers_leave_ctrl_c_to_the_one_who_started_them(tmp_path, run_quickly):
    pairs = tmp_path / "pairs.csv"
    made = run_quickly("moe_ablm", "simulate", "--pairs", 20_000, "--out", pairs)
    assert made.returncode == 0, made.stderr
    arguments = ("--reannotate", "--workers", 2, "--input", pairs, "--out", tmp_path / "d")
    process = start("moe_ablm", "prepare", *arguments)
    end = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 1 + 2 and time.monotonic() < end:
        time.sleep(0.01)  # the tracker of semaphores, and workers that have just begun
    press(process)
    assert "interrupted" in answer(process)
    assert code_of(process) == 130
    assert process.stderr.read() == ""
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d.scratch-*"))
