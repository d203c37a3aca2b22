"""The first command of the README, in an empty folder and much shorter."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPO, TINY


def test_it_trains_and_reports_in_any_folder(tmp_path):
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    done = subprocess.run(
        [sys.executable, "-m", "moe_ablm", "quickstart", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO), "GLIBC_TUNABLES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    figures = {p.name for p in (tmp_path / "runs/quickstart/figures").iterdir()}
    assert {"loss.png", "routing.png"} <= figures
    assert "CDRH3" in done.stdout and "figures" in done.stdout


def test_stopped_by_a_scheduler_it_reports_nothing(tmp_path, monkeypatch, capsys):
    """In the folder that the trainer was told, however that is written."""
    from moe_ablm import train
    from moe_ablm.verbs.quickstart import main

    def stopped(argv):
        folder = Path(argv[argv.index("--workdir") + 1])
        folder.mkdir()
        (folder / "run.json").write_text('{"status": "stopped", "step": 3}')
        return 0

    monkeypatch.setattr(train, "main", stopped)
    monkeypatch.chdir(tmp_path)
    assert main(["moe_ablm", "quickstart", "--workdir", "mine"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert capsys.readouterr().out == ""


def test_its_flags_are_the_trainers(run_quickly):
    done = run_quickly("moe_ablm", "quickstart", "--config.train.learning_rate=1")
    assert done.returncode == 2 and "mean 'lr'" in done.stderr


def test_help(run_quickly):
    done = run_quickly("moe_ablm", "quickstart", "--help")
    assert done.returncode == 0 and "--workdir" in done.stdout
