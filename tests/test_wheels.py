"""Every hard dependency installs without a compiler wherever upstream has wheels for it."""

import json
import runpy
import subprocess
import sys

import pytest
import setuptools
from conftest import REPO
from packaging.requirements import Requirement

# name -> (tags of wheels that pip takes there, what markers say there)
PLATFORMS = {
    "Linux x86-64": ([f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28)]
                     + ["manylinux2014_x86_64"], ("linux", "x86_64")),
    "Linux aarch64": ([f"manylinux_2_{n}_aarch64" for n in (17, 24, 26, 27, 28)]
                      + ["manylinux2014_aarch64"], ("linux", "aarch64")),
    "macOS arm64": (["macosx_14_0_arm64"], ("darwin", "arm64")),
    "Windows": (["win_amd64"], ("win32", "AMD64")),
}  # fmt: skip
COMPILED = ["jaxlib"]  # of jax, which itself is plain Python


def requirements(system: str, machine: str) -> list[str]:
    """Those of setup.py that hold on a platform, without their markers, and `COMPILED`."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", found.update)
        runpy.run_path(str(REPO / "setup.py"))
    here = {"sys_platform": system, "platform_machine": machine}
    every = [Requirement(text) for text in found["install_requires"]]
    kept = [r for r in every if r.marker is None or r.marker.evaluate(here)]
    return [f"{r.name}{r.specifier}" for r in kept] + COMPILED


def test_an_aligner_without_wheels_for_arm_is_not_asked_for_there():
    asked = {name: requirements(*markers) for name, (_, markers) in PLATFORMS.items()}
    assert {name for name, found in asked.items() if any("parasail" in r for r in found)} == {
        "Linux x86-64", "Windows"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.external
@pytest.mark.parametrize("name", PLATFORMS)
def test_there_is_a_wheel_of_each(name, tmp_path):
    tags, markers = PLATFORMS[name]
    wanted = requirements(*markers)
    flags = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    flags += ["--only-binary", ":all:", "--python-version", "3.12", "--target", tmp_path / "x"]
    flags += [part for tag in tags for part in ("--platform", tag)]
    pip = [sys.executable, "-m", "pip", *flags, "--report", tmp_path / "report.json", *wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    assert len(found) == len(wanted)
    assert all(each["download_info"]["url"].endswith(".whl") for each in found)
