"""Models from directories: trained runs, and what imports write."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import tiny_config
from random_models import random_model, same

from moe_ablm import config as configs
from moe_ablm.errors import UserError
from moe_ablm.interop.load import load_model
from moe_ablm.interop.saved import flat_arrays, read_model, save_model
from moe_ablm.model.families import TopK
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.training import state as states
from moe_ablm.training.checkpoint import Checkpoints
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.state import params_sha256


@pytest.fixture(scope="module")
def config():
    return tiny_config(data__layout="sep", data__length=224, train__ema=0.9)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run of three checkpoints, as the trainer leaves them, and their states by step."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    content = {"fingerprint": "f", "dataset": "d", "config": configs.to_dict(config)}
    (run / "config.json").write_text(json.dumps(content))
    checkpoints = Checkpoints(run / "checkpoints", keep=3)
    kept = {}
    mesh = make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        for step, loss in [(4, None), (8, 1.5), (12, 2.5)]:
            spec, optimizer = config.model.spec(), make_optimizer(config.train)
            state = states.init_state(spec, optimizer, step, True, mesh)
            state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.params))
            evaluation = {"step": step, "loss": loss, "accuracy": 0.5} if loss else {}
            checkpoints.save(step, state, {"tokens_seen": 9, "evaluation": evaluation}, loss)
            checkpoints.wait()
            kept[step] = state
    checkpoints.close()
    return run, kept


def test_a_run_gives_the_averaged_weights_of_its_best_checkpoint(trained, config):
    run, kept = trained
    before = sorted(p.name for p in run.rglob("*"))
    model = load_model(run)
    assert params_sha256(model.params) == params_sha256(kept[8].ema)
    assert model.spec == config.model.spec()
    assert (model.layout_name, model.length, model.regime) == ("sep", 224, "paired")
    assert "step 8" in model.source and "1.5000" in model.source
    assert model.facts["metrics"] == {"step": 8, "loss": 1.5, "accuracy": 0.5}
    assert model.facts["config"]["seed"] == config.seed
    assert sorted(p.name for p in run.rglob("*")) == before


def test_without_an_evaluation_the_newest_counts(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    for step in (8, 12):
        file = run / "checkpoints" / str(step) / "record" / "metadata"
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"evaluation": record["evaluation"] | {"step": 7}}))
    assert params_sha256(load_model(run).params) == params_sha256(trained[1][12].ema)


def test_without_an_average_the_parameters_count(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["config"]["train"]["ema"] = 0.0
    (run / "config.json").write_text(json.dumps(content))
    shutil.rmtree(run / "checkpoints" / "8")
    # the checksums are of the whole state: those of the parameters are found among them
    assert params_sha256(load_model(run).params) == params_sha256(trained[1][12].params)


def test_runs_of_earlier_versions_lack_later_keys(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    for key in ("activation", "tied"):
        del content["config"]["model"][key]
    for key in ("shared", "jitter", "exceed"):
        del content["config"]["model"]["moe"][key]
    (run / "config.json").write_text(json.dumps(content))
    assert same(load_model(run), load_model(trained[0]))


def damaged_config(run, text):
    (run / "config.json").write_text(text)


def flipped(run):
    """One bit of the stored arrays is another."""
    files = (run / "checkpoints" / "8" / "state").rglob("*")
    file = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BROKEN = {
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "not saved one yet"),
    "empty": (lambda run: [shutil.rmtree(p) for p in (run / "checkpoints").glob("[0-9]*")],
              "holds no checkpoint"),
    "bit": (flipped, "8: the checkpoint is damaged"),
    "no arrays": (lambda run: shutil.rmtree(run / "checkpoints" / "8" / "state"), "damaged"),
    "no record": (lambda run: [shutil.rmtree(p) for p in run.rglob("record")],
                  "12: the checkpoint is damaged"),
    "no config": (lambda run: (run / "config.json").unlink(), "neither config.json"),
    "no JSON": (lambda run: damaged_config(run, "{"), "no valid JSON"),
    "list": (lambda run: damaged_config(run, "[]"), "expected a JSON object"),
    "other version": (lambda run: damaged_config(run, '{"config": {"model": {"size": 5}}}'),
                      "of another version"),
    "hugging face": (lambda run: damaged_config(run, '{"architectures": ["EsmForMaskedLM"]}'),
                     "import it first"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_told(trained, tmp_path, name):
    run = shutil.copytree(trained[0], tmp_path / "run")
    damage, words = BROKEN[name]
    damage(run)
    with pytest.raises(UserError, match=words):
        load_model(run)


def test_no_directory(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        load_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_model(tmp_path / "file")


@pytest.fixture
def saved(tmp_path):
    model = random_model(moe=TopK(experts=4, widths=(8, 16, 8, 8), shared=1))
    model = replace(model, notes=("a note",))
    save_model(model, tmp_path / "saved")
    return model, tmp_path / "saved"


def test_a_saved_model_is_the_same_again(saved):
    model, path = saved
    found = load_model(path)
    assert same(found, model)
    for name in ("layout", "length", "source", "regime", "notes", "facts"):
        assert getattr(found, name) == getattr(model, name)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(found.params))
    assert sorted(p.name for p in path.iterdir()) == ["model.json", "params.safetensors"]
    assert (path / "params.safetensors").stat().st_mode == (path / "model.json").stat().st_mode


def changed(path, **changes):
    content = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps(content | changes))


def other_layers(path):
    encoder = json.loads((path / "model.json").read_text())["encoder"]
    changed(path, encoder=encoder | {"layers": 3})


def other_width(path):
    encoder = json.loads((path / "model.json").read_text())["encoder"]
    changed(path, encoder=encoder | {"ffn": 40})


def cut_short(path):
    file = path / "params.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


DAMAGED = {
    "schema": (lambda path: changed(path, schema="moe_ablm.model/9"), "moe_ablm.model/9.*expected"),
    "layout": (lambda path: changed(path, layout="other"), "damaged .'other'"),
    "encoder": (
        lambda path: changed(path, encoder={"layers": 2, "vocabulary": 33}),
        "model.d_model is missing",
    ),
    "vocabulary": (lambda path: changed(path, encoder={"layers": 2}), "model.vocabulary=None"),
    "layers": (other_layers, "does not fit model.json: layers/2"),
    "width": (other_width, "does not fit model.json: layers/0/ffn"),
    "cut": (cut_short, "not a complete safetensors file"),
    "no arrays": (lambda path: (path / "params.safetensors").unlink(), "params.safetensors is not"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model_is_told(saved, name):
    damage, words = DAMAGED[name]
    damage(saved[1])
    with pytest.raises(UserError, match=words):
        read_model(saved[1])


def test_nothing_is_overwritten_and_nothing_left_behind(saved, tmp_path, monkeypatch):
    model, path = saved
    before = (path / "model.json").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        save_model(random_model(), path)
    assert (path / "model.json").read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_ablm.interop.tensors.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_model(model, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_flat_names_are_paths():
    names = flat_arrays(random_model().params)
    assert "layers/0/attention/qkv/kernel" in names and names["embedding"].shape == (33, 24)
