"""Named hardware: what a device holds, and what is refused."""

import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from math import prod

import jax
import pytest
from conftest import REPO

from launch import mesh_plan
from launch.hardware import GPU_FLAGS, hardware
from launch.mesh_plan import fitting_plan, given_keys, plan
from launch.meshes import rung
from moe_ablm.errors import UserError
from moe_ablm.model.families import Soft, TopK
from moe_ablm.model.spec import REMAT, SIZES, EncoderSpec, Execution
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.training import memory
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OPTIMIZERS
from moe_ablm.training.state import init_state

TINY = EncoderSpec(4, 16, 32, 2, moe=TopK(experts=4))


@pytest.mark.parametrize(
    ("name", "kind", "devices", "hosts", "near", "topology"),
    [
        ("a100x8", "gpu", 8, 1, 8, ""),
        ("h100x8x4", "gpu", 32, 4, 8, ""),
        ("h200x1", "gpu", 1, 1, 1, ""),
        ("v4-8", "tpu", 4, 1, 4, "2x2x1"),  # cores: two a chip
        ("v5p-128", "tpu", 64, 16, 64, "4x4x4"),
        ("v5e-8", "tpu", 8, 2, 8, "2x4"),  # chips
        ("v6e-16", "tpu", 16, 4, 16, "4x4"),
        ("v6e-1", "tpu", 1, 1, 1, "1x1"),
        ("cpu", "cpu", 1, 1, 1, ""),
    ],
)
def test_names(name, kind, devices, hosts, near, topology):
    found = hardware(name)
    assert (found.kind, found.devices, found.hosts, found.near) == (kind, devices, hosts, near)
    assert found.topology == topology


def test_memory_of_a_chip():
    """16 GB where others have 32: what fits one need not fit the other."""
    assert hardware("v5e-8").memory == 16 * 10**9 == hardware("v6e-8").memory / 2


@pytest.mark.parametrize(
    "name", ["", "h100", "h100x3", "b200x8", "v4-9", "v5p-12", "v5e-2", "h100x8x0", "v9-8"]
)
def test_unknown_names(name):
    with pytest.raises(UserError, match="expected one of"):
        hardware(name)


# memory, from shapes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_on_one_device_is_as_large_as_a_real_one(name):
    mesh = make_mesh(-1, 1, 1)
    optimizer = make_optimizer(replace(memory._ADAM, optimizer=name))
    with jax.set_mesh(mesh):
        state = init_state(TINY, optimizer, 0, False, mesh)
    real = [sum(x.nbytes for x in jax.tree.leaves(t)) for t in (state.params, state)]
    assert memory.state_bytes(TINY, memory.abstract_mesh(1, 1, 1), False, name) == tuple(real)
    assert memory.least(TINY, 1, 0, 8, name) <= real[0] + real[1]  # with gradients


def test_axes_divide_what_they_shard():
    whole, _ = memory.state_bytes(TINY, memory.abstract_mesh(4, 1, 1))
    spread, _ = memory.state_bytes(TINY, memory.abstract_mesh(1, 4, 1))
    e, d, f = 4, TINY.d_model, TINY.ffn
    experts = 2 * 4 * (e * (2 * d * f + f + d))  # two layers, float32
    assert whole - spread == experts * 3 // 4


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("moe", [None, TINY.moe, Soft(experts=4)], ids=["none", "topk", "soft"])
def test_layers_of_a_kind_keep_equally_much(moe, remat):
    """Four layers traced whole, against two of each kind."""
    spec = replace(TINY, moe=moe)
    execution = Execution(remat=remat)
    found = memory.activation_bytes(spec, execution, 32)
    # router losses are a few numbers that no layer has to itself
    whole = memory._slope(spec, execution, 32, tiled=False)
    assert found.rest + found.layers == pytest.approx(whole, rel=1e-3)
    assert 0 < found.largest < found.layers <= 4 * found.largest


def test_remat_keeps_less_and_longer_rows_more():
    kept, matmuls, least = (
        memory.activation_bytes(TINY, Execution(remat=remat), 32).layers for remat in REMAT
    )
    assert least < kept / 2 and least < matmuls < kept
    # in proportion: accelerators keep nothing of size length x length of attention
    once, twice = (
        memory.activation_bytes(TINY, Execution(backend="gpu"), n).layers for n in (32, 64)
    )
    assert twice == pytest.approx(2 * once, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ((), ()),
        ((7,), (7,)),
        ((4, 7, 320), (4, 8, 384)),
        ((256, 128), (256, 128)),
        ((32, 256, 1), (32, 256, 1)),  # the last axis goes elsewhere
        ((5, 100, 3), (8, 128, 3)),
        ((33, 0), (0,)),
    ],
)
def test_arrays_of_a_tpu_fill_tiles(shape, padded):
    array = jax.ShapeDtypeStruct(shape, "bfloat16")
    assert memory.in_tiles(array) == 2 * prod(padded)


def test_only_tpus_pad_what_a_layer_keeps():
    """Width 320 lies in 384 lanes."""
    spec = EncoderSpec(2, 320, 384, 2)
    gpu, tpu = (
        memory.activation_bytes(spec, Execution(backend=name, remat="full"), 32).layers
        for name in ("gpu", "tpu")
    )
    assert 1.1 < tpu / gpu <= 1.2
    mesh = memory.abstract_mesh(1, 1, 1)
    programs = [
        memory.needed(spec, Execution(backend=name), mesh, (4, 32)).program
        for name in ("cpu", "gpu", "tpu")
    ]
    assert programs == [0, 0, 2 * memory.PROGRAM]


def test_what_is_needed_at_the_peak():
    """Activations or gradients, whichever is more; gradients of earlier micro-batches beside."""
    mesh = memory.abstract_mesh(1, 1, 1)
    execution = Execution(remat="matmuls", backend="gpu")
    few, many = (memory.needed(TINY, execution, mesh, (rows, 8)) for rows in (1, 1000))
    assert few.activations < few.gradients == many.gradients < many.activations
    assert few.total == pytest.approx(memory.SPARE * (few.state + few.gradients))
    assert many.total == pytest.approx(memory.SPARE * (many.state + many.activations))
    several = memory.needed(TINY, execution, mesh, (1000, 8), accumulate=2)
    assert several.total - many.total == pytest.approx(memory.SPARE * many.gradients)


SPECS = {
    "dense": rung("8m", "none"),
    "wide": rung("350m", "none"),
    "top2": rung("35m", "top2", model__moe__experts=16),
    "soft": rung("8m", "soft"),
}


LEAST = list(product(SPECS, REMAT))
QUICK = (("top2", "none"), ("wide", "full"))  # each is compiled; the others by --slow


@pytest.mark.parametrize(
    ("name", "remat"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in LEAST],
)
def test_the_least_is_no_more_than_what_is_needed(name, remat):
    """By arithmetic alone, and not far below: three quarters of the state, or some activations."""
    spec, execution = SPECS[name].model.spec(), Execution("bfloat16", "bfloat16", remat=remat)
    for rows in (1, 16, 512):
        found = memory.needed(spec, execution, memory.abstract_mesh(1, 1, 1), (rows, 128))
        held = found.state + max(found.gradients, found.activations)
        assert 0.01 * held < memory.least(spec, 1, rows, 128) <= held


def test_sizes_that_cannot_be_are_refused_at_once():
    for change, words in (
        ({"model__layers": 4000, "model__d_model": 20_000}, "parameters with gradients"),
        ({"model__d_model": 1_000_000}, "parameters with gradients"),
        ({"model__moe__router": "topk", "model__moe__experts": 60_000}, "parameters with"),
        ({"train__batch": 10**9}, "a smaller batch"),
    ):
        began = time.process_time()
        with pytest.raises(UserError, match=words):
            fitting_plan(rung("8m", "none", **change), hardware("h100x8"))
        assert time.process_time() - began < 20
    with pytest.raises(UserError, match="experts=100000000: expected 1 to 65,536"):
        rung("8m", "top2", model__moe__experts=10**8)


# plans

BIG = replace(hardware("h100x8"), memory=80 * 10**9)


def test_what_fits_is_not_divided():
    found = plan(rung("8m", "none", train__batch=128), hardware("h100x8"))
    assert (found.data, found.expert, found.fsdp, found.rows) == (8, 1, 1, 16)
    assert found.remat == "matmuls" and found.fits
    assert found.flags == (
        "--config.mesh.data=8", "--config.mesh.expert=1", "--config.mesh.fsdp=1",
        "--config.compute.remat=matmuls",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "router", "experts", "expert"),
    [
        ("8m", "top2-capacity", 32, 1),  # small weights are repeated
        ("650m", "none", 8, 1),
        ("650m", "top2", 8, 8),  # rows of dropless experts travel, too
        ("650m", "top2-capacity", 8, 8),
        ("650m", "top2-capacity", 12, 4),
        ("150m", "expert_choice", 32, 8),
        ("150m", "soft", 8, 1),
    ],
)
def test_which_experts_are_spread(size, router, experts, expert):
    spec = rung(size, router, model__moe__experts=experts).model.spec()
    assert mesh_plan._expert_axis(spec, BIG) == expert


def test_less_memory_first_shards_then_recomputes():
    """A smaller and smaller device, for one model."""
    config, seen = rung("8m", "none", train__batch=128), []
    for mib in (2048, 900, 500, 200, 130, 100, 80, 60):
        where = replace(BIG, memory=mib << 20)
        try:
            found = fitting_plan(config, where)
            seen.append((found.remat, found.fsdp))
            assert found.needed.total <= where.usable
        except UserError as error:
            seen.append(str(error).split(":")[0])
    assert seen[0] == ("matmuls", 1)
    assert seen[-1] == "it does not fit h100x8"
    plans = [s for s in seen if isinstance(s, tuple)]
    order = [(mesh_plan.REMAT["gpu"].index(remat), fsdp) for remat, fsdp in plans]
    assert order == sorted(order) and plans[-1][0] == "full"


def test_a_batch_that_cannot_be_split():
    with pytest.raises(
        UserError, match="128 rows .* 256 devices of h100x8x32: use a multiple of 256"
    ):
        plan(rung("8m", "none", train__batch=128), hardware("h100x8x32"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"mesh__fsdp": 4}, (2, 1, 4, "matmuls")),
        ({"mesh__data": 2, "mesh__fsdp": 4}, (2, 1, 4, "matmuls")),
        ({"mesh__data": 4}, (4, 1, 2, "matmuls")),
        ({"mesh__expert": 2}, (4, 2, 1, "matmuls")),
        ({"compute__remat": "none"}, (8, 1, 1, "none")),
    ],
)
def test_what_the_config_says_stays(overrides, expected):
    found = plan(rung("8m", "top2", train__batch=128, **overrides), hardware("h100x8"))
    assert (found.data, found.expert, found.fsdp, found.remat) == expected


def test_what_the_command_line_says_stays_even_if_it_is_the_default():
    config = rung("8m", "none", train__batch=128)
    small = replace(BIG, memory=100 << 20)
    free = plan(config, small)
    kept = plan(config, small, given_keys(["--config.mesh.fsdp=1"]))
    assert free.fsdp > 1 and kept.fsdp == 1


def test_keys_of_a_command_line():
    argv = ["-m", "moe_ablm.train", "--config=x.py:a=1", "--config.mesh.fsdp=1",
            "--config.train.lr", "1e-3", "--workdir=/config.x"]  # fmt: skip
    assert given_keys(argv) == {"mesh.fsdp", "train.lr"}


def test_a_mesh_that_is_not_that_of_the_devices():
    with pytest.raises(UserError, match="mesh.data=3, .* do not multiply to the 8 devices"):
        plan(rung("8m", "none", train__batch=128, mesh__data=3), hardware("h100x8"))


def test_what_does_not_fit_says_how_it_would():
    """Micro-batches make it another run, so that nobody but its user may choose them."""
    config = rung("8m", "none", train__batch=1024)
    with pytest.raises(UserError, match=r"does not fit .* train.accumulate=\d+ \(which makes") as e:
        fitting_plan(config, replace(BIG, memory=300 << 20))
    n = int(str(e.value).partition("accumulate=")[2].split()[0])
    config = rung("8m", "none", train__batch=1024, train__accumulate=n)
    assert fitting_plan(config, replace(BIG, memory=300 << 20)).fits


def run(*arguments: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "launch.meshes", *arguments]
    return subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command():
    shown = run("--hardware=v4-8", "--size=8m", "--router=none", "--router=soft")
    assert shown.returncode == 0, shown.stderr
    assert "4 x 1 x 1" in shown.stdout and "LIBTPU_INIT_ARGS=" in shown.stdout
    assert "--config.mesh" not in shown.stdout
    one = run("--hardware=v4-8", "--size=8m", "--router=none")
    assert "--config.mesh.expert=1 --config.mesh.fsdp=1" in one.stdout
    refused = run("--hardware=v4-8", "--size=8m", "--router=none", "--batch=10000000")
    assert refused.returncode == 2
    assert "8m none on v4-8: it does not fit" in refused.stderr


def test_xla_knows_the_flags():
    """An unknown one would end every process at its start. (TPU flags are libtpu's.)"""
    environment = {"XLA_FLAGS": " ".join(GPU_FLAGS), "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_state_is_parameters_and_two_moments(size):
    spec = rung(size, "none").model.spec()
    params, state = memory.state_bytes(spec, memory.abstract_mesh(8, 1, 1))
    assert state == pytest.approx(3 * params, rel=1e-6)
