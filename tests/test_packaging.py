"""What `pip install` is asked for: extras by hardware, and the commands of the documentation."""

import re
import runpy
import subprocess

import pytest
import setuptools
from conftest import REPO

from launch import jobset
from moe_ablm.interop.transformers_moe import CODE


@pytest.fixture(scope="module")
def package():
    """The arguments of `setup`."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", found.update)
        runpy.run_path(str(REPO / "setup.py"))
    return found


def test_a_wheel_holds_all_that_commands_import(package):
    """`python -m sweeps.status` and `from configs.base import ...` need no checkout."""
    assert {"moe_ablm", "moe_ablm.data", "configs", "launch", "sweeps"} <= set(package["packages"])
    assert not {name for name in package["packages"] if name.startswith(("tests", "benchmarks"))}
    data = (
        REPO / "moe_ablm/interop" / glob for glob in package["package_data"]["moe_ablm.interop"]
    )
    assert CODE in [path for glob in data for path in glob.parent.glob(glob.name)]
    for name in ("configs", "launch", "sweeps", "moe_ablm"):
        assert not [p for p in (REPO / name).rglob("*.py") if "sys.path" in p.read_text()]


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_jax_for_hardware_has_the_bounds_of_jax(package, extra):
    (bounds,) = [r.removeprefix("jax") for r in package["install_requires"] if r[:4] == "jax>"]
    assert package["extras_require"][extra] == [f"jax[{extra}]{bounds}"]


def test_every_extra_that_the_documentation_installs_exists(package):
    named = set()
    for page in (REPO / "README.md", *(REPO / "docs").glob("*.md")):
        for extras in re.findall(r"'\.\[([a-z0-9,]+)\]'", page.read_text()):
            named |= set(extras.split(","))
    assert {"cuda12", "cuda13", "tpu"} <= named <= set(package["extras_require"])


def test_files_that_the_documentation_names_exist():
    """Those in backquotes, from the top of the checkout, such as `moe_ablm/config.py`."""
    top = "moe_ablm|configs|launch|sweeps|benchmarks|docs|tests"
    missing = {}
    for page in (*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")):
        text = page.read_text()
        named = re.findall(rf"`((?:{top})/[\w./-]+\.(?:py|md|json|html))`", text)
        named += re.findall(rf"\]\(((?:{top})/[\w./-]+)\)", text) if page.parent == REPO else []
        if gone := sorted(name for name in set(named) if not (REPO / name).exists()):
            missing[page.name] = gone
    assert not missing


OLD = """#!/bin/sh
test "$1" = -c || { mkdir .venv; exit 1; }
exec python3 -c "import sys; sys.version_info = (3, 10, 1, 'final', 0); exec(sys.argv[1])" "$2"
"""


def test_an_old_python_is_told_and_leaves_no_environment(tmp_path):
    python = tmp_path / "python"
    python.write_text(OLD)
    python.chmod(0o755)
    make = ["make", "-s", "-C", tmp_path, "-f", REPO / "Makefile", ".venv/bin/python"]
    done = subprocess.run([*make, f"PYTHON={python}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr and "is 3.10" in done.stderr
    assert not (tmp_path / ".venv").exists()


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of the instructions of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (REPO / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").split("\n") if line.strip()]
    return [(name, rest.strip()) for name, rest in (line.split(None, 1) for line in lines)]


def test_the_image_is_what_launchers_expect(package):
    found = instructions()
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known
    assert ("WORKDIR", jobset.SETTINGS["source"].default) in found
    copied = [name for kind, rest in found if kind == "COPY" for name in rest.split()[:-1]]
    assert all((REPO / name).exists() for name in copied)
    for kind, script in found:
        if kind == "RUN":
            checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, check=False)
            assert checked.returncode == 0, script
    built = re.findall(r"EXTRAS=([a-z0-9]+)", (REPO / "Dockerfile").read_text())
    assert built and set(built) <= set(package["extras_require"])
    ignored = (REPO / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data", "runs"} <= set(ignored)
