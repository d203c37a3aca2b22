"""`python -m launch.compile` where its plug-ins need not be; with them: tests/test_aot.py."""

import json
from dataclasses import replace

import jax
import per_layer
import pytest
from conftest import tiny_flags

from launch import compile as launch_compile
from launch import topology
from launch.compile import compile_step, main
from launch.hardware import hardware
from launch.meshes import rung
from moe_ablm.command_line import read_config
from moe_ablm.errors import UserError

DENSE = tiny_flags(model__moe__router="none")
ONE = replace(hardware("h100x1"), kind="cpu")  # an accelerator's name for the device that is here


@pytest.fixture
def here(monkeypatch):
    """Compiles for this CPU, with the memory of an H100."""
    monkeypatch.setattr(topology, "devices", lambda where: jax.devices("cpu")[:1])
    monkeypatch.setattr(launch_compile, "hardware", lambda name: ONE)


def test_the_step_of_a_config(here):
    found = compile_step(read_config(DENSE), ONE)
    batch = 8 * 256 * 5
    assert found.fits and found.memory.arguments == pytest.approx(
        found.plan.needed.state + batch, rel=0.1
    )
    assert found.memory.output < 0.1 * found.memory.arguments  # the state is donated
    assert found.counts.kernels > 10 and found.counts.collectives == ()


def test_what_is_printed_and_written(here, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["--hardware=h100x1", f"--json={file}", *DENSE]) == 0
    out = capsys.readouterr().out
    assert "memory a device" in out and out.splitlines()[-1] == "it fits h100x1"
    found = json.loads(file.read_text())
    assert found["fits"] and found["hardware"] == "h100x1"
    assert found["memory"]["total"] < found["memory"]["usable"] == 0.92 * 80e9


def test_what_does_not_fit(here, monkeypatch, capsys):
    small = replace(ONE, memory=10**5)
    monkeypatch.setattr(launch_compile, "hardware", lambda name: small)
    assert main(["--hardware=h100x1", *DENSE]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "does not fit h100x1" in error and "0.00 that can" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hardware=h100x3", *tiny_flags()], "not known"),
        (["--hardware=cpu", *tiny_flags()], "expected GPUs or TPUs"),
        (["--hardware=h100x8"], "--config is missing"),
        (["--hardware=h100x8", *tiny_flags(), "--x"], "'--x' is not understood"),
        (["--hardware=h100x8", *tiny_flags(model__heads=3)], "does not divide"),
        (["--hardware=h100x8", *tiny_flags(train__batch=9)], "cannot be split"),
    ],
)
def test_bad_input_is_told_in_one_line(argv, words, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("launch.compile: ") and words in error


@pytest.mark.parametrize(("name", "plugin"), [("h100x8", "jax_cuda12_plugin"), ("v5e-8", "libtpu")])
def test_a_missing_plugin_says_how_to_get_it(name, plugin, monkeypatch, capsys):
    monkeypatch.setattr(topology, "find_spec", lambda module: None)
    assert main([f"--hardware={name}", *tiny_flags()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{plugin}, its compiler, is not installed: `make .venv-aot`" in error


def test_the_makefile_makes_what_is_named():
    from conftest import REPO

    assert ".venv-aot: " in (REPO / "Makefile").read_text() and topology.MAKE == "make .venv-aot"


def test_options_are_the_flags_of_the_run():
    assert topology.compiler_options(hardware("v5e-8")) == {
        flag.removeprefix("--").removesuffix("=true"): True for flag in hardware("v5e-8").flags
    }
    gpu = topology.compiler_options(hardware("h100x8"))
    assert gpu["xla_gpu_all_reduce_combine_threshold_bytes"] == str(1 << 27)


@pytest.mark.slow
def test_what_one_layer_costs(here):
    """Twice as wide a FFN keeps more, and a layer has as many kernels in any encoder."""
    narrow, wide = (
        per_layer.measure(read_config(tiny_flags(model__ffn=f, model__moe__router="none")), ONE)[0]
        for f in (32, 512)
    )
    assert 0 < narrow.kept < wide.kept
    assert narrow.kernels == pytest.approx(wide.kernels, abs=10) and narrow.kernels > 5
    assert narrow.copies >= 0


def test_a_depth_that_the_config_cannot_have():
    config = rung("8m", "top2", model__moe__placement="5")
    with pytest.raises((UserError, ValueError), match="placement"):
        per_layer.measure(config, ONE)
