"""Contracts of one training step: shapes and shardings of every variant, collectives of the mesh.

`python tests/test_contracts.py OUT.json [--slow]` lowers and compiles the steps on eight devices;
the tests run it in a process of its own and look at what it found.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import xla_flags
from flax import nnx

from moe_ablm.model import flops
from moe_ablm.model.dispatch import SLACK
from moe_ablm.model.encoder import make_definition
from moe_ablm.model.families import ExpertChoice, Sequence, Soft, TopK, TopP
from moe_ablm.model.spec import SIZES, EncoderSpec, Execution
from moe_ablm.parallel.mesh import axes_sharding, batch_sharding, global_batch, make_mesh
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OptimizerSpec
from moe_ablm.training.state import abstract_state, init_state
from moe_ablm.training.step import CELLS, make_train_step

MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)]  # data, expert, fsdp
TOPK = TopK(experts=8, k=2)
MOES = {
    "none": None,
    "dropless": TOPK,
    "capacity": replace(TOPK, capacity=1.0),
    "topp": TopP(experts=8, k=3, capacity=0.5),
    "expert_choice": ExpertChoice(experts=8),
    "soft": Soft(experts=8, slots=5, l2=True),
    "sequence": Sequence(experts=8, k=1),
    "batch": replace(TOPK, group="batch", capacity=1.0),
}
ROUTERS = tuple(MOES)
FIXED = ("capacity", "topp", "expert_choice", "soft")  # as many rows go to each expert
DROPLESS = ("dropless", "sequence")  # rows go to the experts if they fit, else weights to the rows
# what is compiled for eight devices, some ten seconds each; an expert axis shards nothing of a
# dense encoder
VARIANTS = [((2, 4, 1), r) for r in ("dropless", "capacity", "expert_choice", "soft", "batch")]
VARIANTS += [((8, 1, 1), r) for r in ("none", "dropless")]
VARIANTS += [((1, 8, 1), "capacity")]
VARIANTS += [((2, 2, 2), r) for r in ("none", "dropless")]
# their siblings: by --slow alone
SIBLINGS = [((2, 4, 1), r) for r in ("topp", "sequence")]
SIBLINGS += [((8, 1, 1), r) for r in ("capacity", "soft", "sequence")]
SIBLINGS += [((1, 8, 1), r) for r in ("dropless", "sequence")] + [((2, 2, 2), "capacity")]
OPTIMIZER = OptimizerSpec(
    steps=10, lr=1e-3, warmup=2, schedule="linear", decay_share=0.1,
    beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01, clip=1.0,
)  # fmt: skip
# one layer of either kind: small enough to compile for eight devices five times
TINY = {
    name: EncoderSpec(1, 16, 32, 2, moe=moe and replace(moe, placement="0", first_dense=0))
    for name, moe in MOES.items()
}
# and what is dropped out does not depend on the mesh
TINY["none"] = replace(
    TINY["none"], attention_dropout=0.2, hidden_dropout=0.2, embedding_dropout=0.2
)
BATCH, LENGTH = 24, 40  # no parameter has such an axis, so activations can be told from parameters


def step_and_arguments(spec: EncoderSpec, mesh):
    """A train step as the trainer makes it, its abstract state and batch."""
    optimizer = make_optimizer(OPTIMIZER)
    # scanned layers trace in seconds; the arrays in and out are the same unrolled
    definition = make_definition(spec, Execution(scan=spec.layers > 1))
    step = make_train_step(definition, optimizer, spec, accumulate=1, ema=0.0)
    rows = batch_sharding(mesh)
    kinds = {"tokens": "int32", "targets": "int32", "segment": "int32", "region": "int32",
             "loss_mask": "bool"}  # fmt: skip
    arrays = {
        name: jax.ShapeDtypeStruct((BATCH, LENGTH), kind, sharding=rows)
        for name, kind in kinds.items()
    }
    return step, abstract_state(spec, optimizer, False, mesh), arrays


# what the worker finds on eight devices


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
               "collective-broadcast", "ragged-all-to-all")  # fmt: skip


def collectives(hlo: str) -> dict[str, list[list[int]]]:
    """Shapes of the results of every collective of a compiled module, by its name."""
    found = {}
    for name in COLLECTIVES:
        results = re.findall(rf"= (.*?) {name}(?:-start)?\(", hlo)
        shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(results))
        if shapes:
            found[name] = [[int(n) for n in shape.split(",") if n] for shape in shapes]
    return found


def computations(hlo: str) -> dict[str, str]:
    """Text of every computation of a compiled module by its name."""
    found, name = {}, None
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[1]
            found[name] = ""
        elif name is not None:
            found[name] += line + "\n"
    return found


CALLED = r"(?:calls|to_apply|body|condition)=%?([\w.-]+)"
BRANCHES = r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.-]+))"


def branches(hlo: str) -> tuple[list[dict], dict]:
    """Collectives of every branch of a conditional, and of all else."""
    texts = computations(hlo)

    def whole(name: str) -> set[str]:
        inside = re.findall(CALLED, texts[name])
        for several, one in re.findall(BRANCHES, texts[name]):
            inside += [part.strip().lstrip("%") for part in (several or one).split(",")]
        return {name}.union(*(whole(part) for part in inside if part in texts))

    starts = {
        part.strip().lstrip("%")
        for several, one in re.findall(BRANCHES, hlo)
        for part in (several or one).split(",")
    }
    each = {start: whole(start) for start in sorted(starts)}
    rest = set(texts) - set().union(*each.values())
    return (
        [collectives("".join(texts[name] for name in names)) for names in each.values()],
        collectives("".join(texts[name] for name in rest)),
    )


def host_batch() -> dict[str, np.ndarray]:
    """Concrete rows of unequal length with a few masks."""
    rng = np.random.default_rng(0)
    valid = np.arange(LENGTH) < rng.integers(20, LENGTH, BATCH)[:, None]
    tokens = np.where(valid, rng.integers(4, 24, (BATCH, LENGTH)), 1)
    mask = (rng.random((BATCH, LENGTH)) < 0.15) & valid
    region = np.arange(LENGTH)[None] // 8 * np.ones((BATCH, 1), int)
    return {
        "tokens": np.where(mask, 32, tokens).astype(np.int32),
        "targets": tokens.astype(np.int32),
        "segment": valid.astype(np.int32),
        "region": (region * valid).astype(np.int32),
        "loss_mask": mask,
    }


def on_eight_devices(variants: list) -> dict:
    """By mesh and router: collectives of the compiled step, shardings that drift, three losses."""
    with ThreadPoolExecutor(2) as pool:
        compiled = dict(zip(variants, pool.map(compiled_step, variants), strict=True))
    found = {}
    for (sizes, router), (mesh, state, step) in compiled.items():
        with jax.set_mesh(mesh):
            losses = three_losses(TINY[router], step, mesh, global_batch(host_batch(), mesh))
        found[f"{sizes} {router}"] = {
            "collectives": collectives(step.as_text()),
            "branches": branches(step.as_text()),
            "parameters": [list(x.shape) for x in jax.tree.leaves(state.params)],
            "drifted": drifted(state, step.output_shardings[0]),
            "losses": losses,
        }
    return found


def compiled_step(variant):
    """Mesh, abstract state and compiled step of a (mesh, router)."""
    sizes, router = variant
    mesh = make_mesh(*sizes)
    step, state, batch = step_and_arguments(TINY[router], mesh)
    with jax.set_mesh(mesh):
        return mesh, state, jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def drifted(state, after) -> list[str]:
    """Arrays of the state that a step returns under another sharding than it took them."""
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    pairs = zip(paths, jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    return [p for p, a, b in pairs if not a.sharding.is_equivalent_to(b, a.ndim)]


def three_losses(spec, step, mesh, batch) -> list[float]:
    """From weights so large that no two tokens are nearly alike: at a tie, a last bit decides."""
    state = init_state(spec, make_optimizer(OPTIMIZER), 0, False, mesh)
    large = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, state.params)
    state = state._replace(params=large)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics.objective))
    return losses


def variants(of=lambda mesh, router: True) -> list:
    """Parameters of a test: variants of which `of` is true; siblings are slow."""
    slow = [pytest.param(*v, marks=pytest.mark.slow) for v in SIBLINGS if of(*v)]
    return [v for v in VARIANTS if of(*v)] + slow


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("eight") / "found.json"
    environment = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    slow = ["--slow"] if request.config.getoption("--slow") else []
    subprocess.run([sys.executable, __file__, path, *slow], env=environment, check=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize(("mesh", "router"), variants(lambda mesh, _: mesh == (8, 1, 1)), ids=str)
def test_pure_data_parallelism_needs_all_reduce_alone(eight_devices, mesh, router):
    found = eight_devices[f"{mesh} {router}"]["collectives"]
    assert set(found) == {"all-reduce"}, found


@pytest.mark.parametrize(("mesh", "router"), variants(lambda _, r: r != "batch"), ids=str)
def test_only_parameters_are_gathered(eight_devices, mesh, router):
    """Rows travel to the experts; what fsdp shards travels to the rows that need it."""
    found = eight_devices[f"{mesh} {router}"]
    gathered = found["collectives"].get("all-gather", [])
    assert [s for s in gathered if not any(_part(s, whole) for whole in found["parameters"])] == []
    travels = router in FIXED + DROPLESS and mesh[1] > 1
    _, outside = found["branches"]
    assert outside.keys() - {"all-reduce", "all-gather"} <= ({"all-to-all"} if travels else set())
    others = found["collectives"].keys() - {"all-reduce", "all-gather", "reduce-scatter"}
    assert others == ({"all-to-all"} if travels else set())
    if mesh[2] == 1:
        assert "all-gather" not in outside


@pytest.mark.parametrize(
    ("mesh", "router"), variants(lambda mesh, r: r in FIXED and mesh[1] > 1), ids=str
)
def test_rows_travel_there_and_back(eight_devices, mesh, router):
    """Two all-to-alls forward and two backward, and nothing gathered but what fsdp shards."""
    found = eight_devices[f"{mesh} {router}"]["collectives"]
    assert len(found["all-to-all"]) == 4 * mesh[1]  # a result is one array a device
    if mesh[2] == 1:
        assert "all-gather" not in found


@pytest.mark.parametrize(
    ("mesh", "router"),
    variants(lambda mesh, r: r in DROPLESS and mesh in [(2, 4, 1), (1, 8, 1)]),
    ids=str,
)
def test_what_a_dropless_layer_sends(eight_devices, mesh, router):
    """Rows there and back, forward and backward; weights in the other branch alone.

    That branch is taken where rows do not fit: there the weights travel once forward and once more
    backward, and then their gradients, whatever the number of tokens.
    """
    spec, ways = TINY[router], mesh[1]
    e, d, f = spec.moe.experts, spec.d_model, spec.ffn
    weights = sorted([[e, d, f], [e, f], [e, f, d], [e, d]])
    each, _ = eight_devices[f"{mesh} {router}"]["branches"]
    travel = [b for b in each if "all-to-all" in b]
    gather = [b for b in each if "all-gather" in b or "reduce-scatter" in b]
    assert travel and gather and not [b for b in travel if b in gather]
    sent = [s for b in travel for s in b["all-to-all"]]
    rows = math.ceil(SLACK * BATCH * LENGTH // 8 * spec.moe.k / ways) * ways
    assert sum(map(math.prod, sent)) == rows * (4 * d + 1)  # and once the numbers of experts
    assert [sorted(b["all-gather"]) for b in gather] == [weights, weights]
    (back,) = [b["reduce-scatter"] for b in gather if "reduce-scatter" in b]
    assert sorted(back) == [[s[0] // ways, *s[1:]] for s in weights]
    assert not {name for b in gather for name in b} - {"all-gather", "reduce-scatter"}


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 8, 1)], ids=str)
def test_what_a_limited_layer_sends(eight_devices, mesh):
    """E * C rows of each antibody, there and back, forward and backward."""
    spec = TINY["capacity"]
    rows = spec.moe.experts * spec.moe.places(LENGTH) * BATCH // 8
    found = eight_devices[f"{mesh} capacity"]["collectives"]
    assert sum(map(math.prod, found["all-to-all"])) == 4 * rows * spec.d_model


def _part(shape: list[int], whole: list[int]) -> bool:
    """Whether an array may be a piece of another, transposed or not."""
    return len(shape) == len(whole) and any(
        all(n % piece == 0 for n, piece in zip(order, shape, strict=True))
        for order in permutations(whole)
    )


@pytest.mark.parametrize(("mesh", "router"), variants(), ids=str)
def test_a_step_returns_its_state_where_it_found_it(eight_devices, mesh, router):
    """Otherwise the second step compiles anew, and donated memory cannot be used again."""
    assert eight_devices[f"{mesh} {router}"]["drifted"] == []


@functools.cache
def losses_of_one(router: str) -> list[float]:
    """Three steps on one device."""
    mesh = make_mesh(-1, 1, 1)
    spec = TINY[router]
    step, _, _ = step_and_arguments(spec, mesh)
    with jax.set_mesh(mesh):
        quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        step = jax.jit(step, compiler_options=quickly)
        return three_losses(spec, step, mesh, global_batch(host_batch(), mesh))


@pytest.mark.parametrize(("mesh", "router"), variants(), ids=str)
def test_three_steps_have_the_same_loss_on_every_mesh(eight_devices, mesh, router):
    expected = losses_of_one(router)
    assert abs(expected[0] - expected[2]) > 1e-4  # parameters moved
    found = eight_devices[f"{mesh} {router}"]["losses"]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


# shapes of every variant, nothing allocated


def abstract_mesh(sizes):
    axes = jax.sharding.AxisType.Auto
    return jax.sharding.AbstractMesh(sizes, ("data", "expert", "fsdp"), axis_types=(axes,) * 3)


def quick(values, few):
    """Values as parameters; those that are not among the few are slow: seconds each to trace."""
    return [v if v in few else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mesh", quick(MESHES, [(2, 4, 1)]), ids=str)
@pytest.mark.parametrize("size", quick(SIZES, ["8m"]))
def test_shapes_and_dtypes_of_a_step(size, mesh, router):
    spec = EncoderSpec(*SIZES[size], moe=MOES[router])
    step, state, batch = step_and_arguments(spec, abstract_mesh(mesh))
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    before, found = ([(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (state, after))
    assert found == before
    assert sum(x.size for x in jax.tree.leaves(after.params)) == flops.params_total(spec)
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert {x.shape for x in metrics.sums} == {(CELLS,)}
    scalars = (metrics.tokens, metrics.objective, metrics.grad_norm, metrics.param_norm)
    assert {x.shape for x in scalars} == {()}
    if router == "none":
        assert metrics.router is None
        return
    sparse = len(spec.moe_layers)
    assert metrics.router.load.shape == (sparse, spec.moe.experts)
    assert metrics.router.asked.shape == (sparse, spec.moe.experts)
    assert {x.shape for x in metrics.router[2:]} == {(sparse,)}


# which axis of which array a mesh shards, written out; absent: whole on every device
SHARDED = {
    "router": {},
    "up": {0: "expert", 2: "fsdp"},
    "up_bias": {0: "expert", 1: "fsdp"},
    "down": {0: "expert", 1: "fsdp"},
    "down_bias": {0: "expert"},
    "qkv/kernel": {1: "fsdp"},
    "qkv/bias": {0: "fsdp"},
    "out/kernel": {0: "fsdp"},
    "out/bias": {},
    "up/kernel": {1: "fsdp"},
    "up/bias": {0: "fsdp"},
    "down/kernel": {0: "fsdp"},
    "down/bias": {},
    "dense/kernel": {1: "fsdp"},
    "dense/bias": {0: "fsdp"},
    "embedding": {},
    "norm/scale": {},
    "norm/bias": {},
    "head/bias": {},
}


def kind_of(path: tuple) -> str:
    names = [str(p) for p in path if not isinstance(p, int)]
    two = "/".join(names[-2:])
    two = re.sub(r"\w+_norm/", "norm/", two)
    return two if two in SHARDED else names[-1]


@pytest.mark.parametrize(
    ("size", "mesh"),
    [("8m", mesh) for mesh in MESHES] + [(size, (2, 2, 2)) for size in SIZES if size != "8m"],
    ids=str,
)
def test_parameters_and_moments_are_sharded_by_the_table(size, mesh):
    optimizer = make_optimizer(OPTIMIZER)
    spec = EncoderSpec(*SIZES[size], moe=MOES["dropless"])
    state = abstract_state(spec, optimizer, True, abstract_mesh(mesh))
    seen = set()
    for path, variable in nnx.to_flat_state(state.params):
        kind, array = kind_of(path), variable.get_value()
        seen.add(kind)
        expected = [SHARDED[kind].get(axis) for axis in range(array.ndim)]
        found = [*array.sharding.spec] + [None] * (array.ndim - len(array.sharding.spec))
        assert found == expected, path
    assert seen == set(SHARDED)
    params = shardings(state.params)
    adam = state.opt_state[1][0]
    assert shardings(adam.mu) == shardings(adam.nu) == shardings(state.ema) == params


def shardings(tree) -> list:
    return [x.sharding for x in jax.tree.leaves(tree)]


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    mesh = abstract_mesh((2, 4, 1))
    assert axes_sharding(mesh, "EDF", (6, 8, 16)).spec[0] is None
    assert axes_sharding(mesh, "EDF", (8, 8, 16)).spec[0] == "expert"


if __name__ == "__main__":
    asked = VARIANTS + (SIBLINGS if "--slow" in sys.argv else [])
    Path(sys.argv[1]).write_text(json.dumps(on_eight_devices(asked)))
