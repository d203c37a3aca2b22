"""Export to a directory of our own: every run has it, and it is the same model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from random_models import random_model, same
from test_recorded import DIGESTS, recorded  # noqa: F401 - a fixture

from moe_ablm import api
from moe_ablm.errors import UserError
from moe_ablm.interop.esm2 import export_esm2
from moe_ablm.interop.load import load_model
from moe_ablm.interop.native import export_native
from moe_ablm.model.families import Soft, TopK

PAIRS = [("EVQLVESGGGLVQPGGSLRLSCAAS", "DIQMTQSPSSLSASVGDRVTITC"), ("QVQLQESGPG", "")]


QUICK = ("topk", "soft")  # each is restored from its checkpoint; the others by --slow
ELSEWHERE = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DIGESTS]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_run_is_the_same_model_elsewhere(recorded, name, main, tmp_path):  # noqa: F811
    """Runs of all routers; the digests were recorded with the runs."""
    out = tmp_path / "out"
    done = main("export", "--run", recorded / name, "--format", "native", "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "model.json",
        "params.safetensors",
    ]
    found, model = load_model(out), load_model(recorded / name)
    assert found.digest() == DIGESTS[name]
    assert (found.source, found.facts) == (model.source, model.facts)


def test_scores_are_equal_bit_for_bit(tmp_path):
    model = random_model(moe=Soft(experts=4, slots=2), token_dropout=True)
    export_native(model, tmp_path / "out")
    export_native(load_model(tmp_path / "out"), tmp_path / "again")
    one, other = (api.load(tmp_path / name) for name in ("out", "again"))
    assert same(one.model, model) and same(other.model, model)
    found = [api.score(engine, PAIRS, one_pass=True) for engine in (one, other)]
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name])  # a single chain has NaN


def test_the_licence_goes_on(tmp_path):
    model = replace(random_model(), facts={})
    export_native(model, tmp_path / "out", "cc-by-4.0")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")
    assert json.loads((tmp_path / "out" / "model.json").read_text())["facts"] == {
        "licence": "cc-by-4.0"
    }
    export_esm2(load_model(tmp_path / "out"), tmp_path / "hf")
    assert (tmp_path / "hf" / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="is there already"):
        export_native(random_model(moe=TopK(experts=4)), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]
