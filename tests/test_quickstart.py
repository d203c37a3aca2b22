"""The first command of the README, in an empty folder and much shorter."""

import os
import subprocess
import sys

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


def test_its_flags_are_the_trainers(run_quickly):
    done = run_quickly("moe_ablm", "quickstart", "--config.train.learning_rate=1")
    assert done.returncode == 2 and "mean 'lr'" in done.stderr


def test_help(run_quickly):
    done = run_quickly("moe_ablm", "quickstart", "--help")
    assert done.returncode == 0 and "--workdir" in done.stdout
