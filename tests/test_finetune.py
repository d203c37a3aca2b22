"""Training from given weights, with frozen layers; and a trained run as a model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import run_command, tiny_config, tiny_flags
from random_models import random_params, same

from configs import esm_finetune
from moe_ablm import config as configs
from moe_ablm import trainer
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.interop.card import model_card
from moe_ablm.interop.load import load_model
from moe_ablm.interop.saved import Model, flat_arrays, save_model
from moe_ablm.interop.start import require_same_function
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.training.optimizer import frozen_mask
from moe_ablm.training.state import params_sha256

FEW = {"train__steps": 4, "train__warmup": 1, "eval__every": 4, "checkpoint__every": 4,
       "train__ema": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An import for `tiny_config`, with every parameter random."""
    spec = tiny_config().model.spec()
    facts = {"licence": "cc-by-4.0"}
    model = Model(spec, random_params(spec), LAYOUTS["esm"], 256, "a test", facts=facts)
    path = tmp_path_factory.mktemp("start") / "model"
    save_model(model, path)
    return model, path


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
    """A run of four updates from `start` with its first layer frozen."""
    workdir = tmp_path_factory.mktemp("tuned") / "w"
    config = tiny_config(train__init=str(start[1]), train__freeze=1, **FEW)
    return trainer.run(config, workdir), workdir, config


def test_a_run_starts_from_the_given_weights_and_keeps_frozen_layers(start, tuned):
    before, after = (flat_arrays(m.params) for m in (start[0], load_model(tuned[1])))
    for name, value in before.items():
        frozen = name == "embedding" or name.startswith("layers/0/")
        same_bits = value.tobytes() == after[name].tobytes()
        assert same_bits == frozen, name
        if not frozen:  # four small updates from there, and not from fresh weights
            assert np.abs(value - after[name]).max() < 0.1


def test_a_trained_run_is_a_model(tuned):
    summary, workdir, config = tuned
    model = load_model(workdir)
    assert model.spec == config.model.spec() and model.length == config.data.length
    assert model.facts["metrics"]["loss"] == summary["valid_loss_best"]
    assert "step 4 (averaged weights)" in model.source
    flat = dataclasses.replace(config, train=dataclasses.replace(config.train, ema=0.0))
    content = json.loads((workdir / "config.json").read_text())
    content["config"] = configs.to_dict(flat)
    plain = shutil.copytree(workdir, workdir.with_name("plain"))
    (plain / "config.json").write_text(json.dumps(content))
    assert params_sha256(load_model(plain).params) == summary["params_sha256"]


def test_the_licence_of_the_start_goes_on_to_exports(tuned):
    model = load_model(tuned[1])
    assert model.facts["licence"] == "cc-by-4.0"
    assert model_card(model, "X", "", None).startswith("---\nlicense: cc-by-4.0\n")
    assert model_card(model, "X", "", "mit").startswith("---\nlicense: mit\n")


def test_the_start_is_part_of_the_runs_identity_by_its_content(start, tuned, tmp_path):
    summary, workdir, config = tuned
    moved = shutil.copytree(start[1], tmp_path / "moved")
    elsewhere = dataclasses.replace(config.train, init=str(moved))
    again = trainer.run(dataclasses.replace(config, train=elsewhere), workdir)
    assert again["fingerprint"] == summary["fingerprint"]
    other = Model(config.model.spec(), random_params(config.model.spec(), 1), LAYOUTS["esm"], 9, "")
    save_model(other, tmp_path / "other")
    different = dataclasses.replace(config.train, init=str(tmp_path / "other"))
    with pytest.raises(UserError, match="holds a different run .dataset"):
        trainer.run(dataclasses.replace(config, train=different), workdir)


def test_keys_of_later_versions_leave_the_identity_of_older_runs_alone():
    config = tiny_config()
    tree = configs.to_dict(config)
    assert not {"train.init", "train.freeze", "model.moe.exceed"} & set(
        configs.identity(config, "d")
    )
    del tree["train"]["init"], tree["train"]["freeze"], tree["model"]["moe"]["exceed"]
    assert configs.from_mapping(tree) == config
    frozen = tiny_config(train__freeze=1)
    assert configs.fingerprint(frozen, "d") != configs.fingerprint(config, "d")


def test_frozen_are_the_embedding_and_the_first_layers():
    params = random_params(EncoderSpec(3, 8, 16, 2))
    flat = jax.tree_util.tree_leaves_with_path(frozen_mask(params, 2))
    frozen = {jax.tree_util.keystr(path) for path, value in flat if value}
    assert all(("embedding" in p) or ("[0]" in p) or ("[1]" in p) for p in frozen)
    assert len(frozen) == 1 + 2 * 12
    assert not any(jax.tree.leaves(frozen_mask(params, 0))[1:])


def test_learned_positions_and_the_norm_after_them_are_of_the_embedding():
    spec = EncoderSpec(1, 8, 16, 2, learned_positions=5, embedding_norm=True)
    flat = jax.tree_util.tree_leaves_with_path(frozen_mask(random_params(spec), 1))
    assert {path[0].key for path, frozen in flat if frozen} == {
        "embedding", "positions", "embedding_norm", "layers"
    }  # fmt: skip
    assert {path[0].key for path, frozen in flat if not frozen} == {"final_norm", "head"}


SPEC = tiny_config().model.spec()
OTHERS = {
    "layers": (dataclasses.replace(SPEC, layers=3), "model.layers=2 .there 3"),
    "heads": (dataclasses.replace(SPEC, heads=4), "model.heads=2 .there 4"),
    "dropout": (dataclasses.replace(SPEC, token_dropout=False), "model.token_dropout=True"),
    "dense": (dataclasses.replace(SPEC, moe=None), "model.moe.router='topk' .there 'none'"),
    "k": (
        dataclasses.replace(SPEC, moe=dataclasses.replace(SPEC.moe, k=3)),
        "model.moe.k=2 .there 3",
    ),
    "placement": (
        dataclasses.replace(
            SPEC, moe=dataclasses.replace(SPEC.moe, placement="every", first_dense=0)
        ),
        r"model.moe.placement=\(1,\) .there \(0, 1\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_encoder_is_no_start(name):
    spec, words = OTHERS[name]
    with pytest.raises(UserError, match=words):
        require_same_function(Model(spec, None, LAYOUTS["esm"], 9, "x"), SPEC)


def test_what_acts_in_training_alone_may_differ():
    moe = dataclasses.replace(
        SPEC.moe, capacity=1.0, group="batch", load_balance=0.5, renormalise=True, placement="1"
    )
    spec = dataclasses.replace(SPEC, moe=moe)
    require_same_function(Model(spec, None, LAYOUTS["esm"], 9, "x"), SPEC)


WRONG = {
    "nowhere": (["--config.train.init=nowhere"], "config.train.init nowhere is not there"),
    "no model": (["--config.train.init=docs"], "config.train.init docs holds neither"),
    "freeze": (["--config.train.freeze=3"], "train.freeze=3: expected 0 (off) to the number"),
    "freeze below": (["--config.train.freeze=-1"], "train.freeze=-1"),
    "balance": (
        ["--config.train.freeze=1", "--config.model.moe.balance_rate=0.1"],
        "balance_rate=0.1: expected 0 with train.freeze",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name, tmp_path, run_quickly):
    flags, words = WRONG[name]
    workdir = tmp_path / "w"
    result = run_quickly("moe_ablm.train", *tiny_flags(), *flags, f"--workdir={workdir}")
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not workdir.exists()


def test_the_config_of_ft_esm():
    c = esm_finetune.get_config("size=8m")
    assert (c.model.size, c.train.init, c.data.length, c.data.layout) == (
        "8m", "runs/esm2_8m", 320, "esm",
    )  # fmt: skip
    assert esm_finetune.get_config("size=35m,init=x/y").train.init == "x/y"
    configs.from_mapping(esm_finetune.get_config())
    with pytest.raises(UserError, match="size='8mm' .did you mean '8m'"):
        esm_finetune.get_config("size=8mm")


@pytest.mark.slow
def test_upcycled_weights_train_from_the_command_line(tmp_path):
    """dense run -> upcycle -> run with experts that starts at the dense model's loss."""
    few = {"train.steps": 4, "train.warmup": 1, "eval.every": 4, "checkpoint.every": 4}
    flags = tiny_flags(**{k.replace(".", "__"): v for k, v in few.items()})
    dense = [*flags, "--config.model.moe.router=none", f"--workdir={tmp_path / 'dense'}"]
    done = run_command("moe_ablm.train", *dense)
    assert done.returncode == 0, done.stderr
    paths = ["--run", tmp_path / "dense", "--out", tmp_path / "moe"]
    done = run_command("moe_ablm", "upcycle", *paths, "--experts", "4")
    assert done.returncode == 0, done.stderr
    told = [word for word in done.stdout.split() if word.startswith("--config")]
    done = run_command("moe_ablm.train", *flags, *told, f"--workdir={tmp_path / 'tuned'}")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "tuned" / "results.jsonl").read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if r["kind"] == "train")
    last = json.loads((tmp_path / "dense" / "run.json").read_text())
    assert abs(first["loss"] - last["valid_loss_final"]) < 0.2


def test_a_saved_model_survives_another_round(start, tmp_path):
    save_model(load_model(start[1]), tmp_path / "again")
    assert same(load_model(tmp_path / "again"), start[0])
