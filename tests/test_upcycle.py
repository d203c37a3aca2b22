"""Upcycling: the function stays, the experts are copies, the router is fresh."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import run_command
from random_models import logits_of, random_model, random_params, same

from moe_ablm.errors import UserError
from moe_ablm.interop.load import load_model
from moe_ablm.interop.saved import flat_arrays, save_model
from moe_ablm.interop.upcycle import upcycle
from moe_ablm.model.families import TopK

ROWS = np.random.default_rng(1).integers(4, 24, (3, 20))
VALID = np.arange(20) < np.array([20, 13, 7])[:, None]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("k", "placement"), [(2, "every"), (3, "1")])
def test_the_function_is_that_of_the_dense_model(activation, k, placement):
    dense = random_model(activation=activation)
    moe = TopK(experts=4, k=k, placement=placement, first_dense=0)
    sparse = upcycle(dense, moe, seed=0)
    assert sparse.spec.moe_layers == ((0, 1) if placement == "every" else (1,))
    before, after = (logits_of(m, ROWS, VALID) for m in (dense, sparse))
    np.testing.assert_allclose(after[VALID], before[VALID], atol=1e-5 * np.abs(before).max())
    # and it is the experts that compute it
    spoilt = {n: a * (0 if n.endswith("ffn/down") else 1) for n, a in arrays(sparse).items()}
    assert not np.allclose(logits_of(with_arrays(sparse, spoilt), ROWS, VALID), after, atol=1e-3)


def arrays(model):
    return flat_arrays(model.params)


def with_arrays(model, values):
    from moe_ablm.interop.saved import fill

    return replace(model, params=fill(model.params, values.__getitem__))


def test_experts_are_copies_and_routers_differ_by_layer_and_seed():
    dense = random_model()
    moe = TopK(experts=4, placement="every", first_dense=0)
    first, again, other = (arrays(upcycle(dense, moe, seed)) for seed in (0, 0, 1))
    for e in range(4):
        np.testing.assert_array_equal(
            first["layers/1/ffn/up"][e], arrays(dense)["layers/1/ffn/up/kernel"]
        )
    router = first["layers/0/ffn/router"]
    assert router.shape == (24, 4) and 0.01 < router.std() < 0.03
    np.testing.assert_array_equal(router, again["layers/0/ffn/router"])
    assert (router != first["layers/1/ffn/router"]).any()
    assert (router != other["layers/0/ffn/router"]).any()


WRONG = {
    "one expert a token": ({"k": 1}, "--k 1: expected 2"),
    "k": ({"k": 5}, r"--k 5: expected 2 to --experts \(4\)"),
    "placement": ({"placement": "odd"}, "--placement 'odd'.*alternate"),
    "none left": ({"first_dense": 2}, "leaves none of the 2 layers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    changes, words = WRONG[name]
    moe = replace(TopK(experts=4), **changes)
    with pytest.raises(UserError, match=words):
        upcycle(random_model(), moe, 0)


def test_experts_are_not_upcycled_again():
    model = upcycle(random_model(), TopK(experts=4), 0)
    with pytest.raises(UserError, match="has experts already .layers 1."):
        upcycle(model, TopK(experts=4), 0)


def test_the_verb(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "dense")
    flags = ["--run", tmp_path / "dense", "--experts", 4, "--k", 2]
    done = run_command("moe_ablm", "upcycle", *flags, "--out", tmp_path / "moe")
    assert done.returncode == 0, done.stderr
    assert "--config.model.moe.experts=4" in done.stdout
    assert same(load_model(tmp_path / "moe"), upcycle(model, TopK(experts=4), 0))


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--experts", 1], "--k 2"), (["--seed", -1], "--seed -1"), (["--first-dense", -1], "-1")],
)
def test_the_verb_refuses(tmp_path, run_quickly, flags, words):
    save_model(random_model(), tmp_path / "dense")
    paths = ["--run", tmp_path / "dense", "--out", tmp_path / "moe"]
    result = run_quickly("moe_ablm", "upcycle", *paths, *flags)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_a_random_model_is_no_constant():
    """The helper of these tests: other seeds, other models."""
    spec = random_model().spec
    a, b = (flat_arrays(random_params(spec, seed)) for seed in (0, 1))
    assert all((a[name] != b[name]).any() for name in a)
