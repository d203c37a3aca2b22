"""Runs with Muon and skipped spikes: resumed bit for bit, the same on every mesh, in the identity.

Runs of AdamW are what they were.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import run_command, tiny_config, tiny_flags, xla_flags

from moe_ablm import config as configs
from moe_ablm import trainer
from moe_ablm.errors import UserError
from moe_ablm.results import read_results
from moe_ablm.training import spikes

MUON = {"train__optimizer": "muon", "train__muon_lr": 0.05, "train__steps": 6, "eval__every": 6}
# without a warm-up, whose first update is 0
MUON |= {
    "train__warmup": 0,
    "train__z_loss": 1e-3,
    "train__router_lr": 0.5,
    "model__moe__balance_rate": 0.01,
}
MUON |= {"data__simulated_pairs": 100, "checkpoint__every": 4}


def logged(workdir, key: str) -> list[float]:
    return [r[key] for r in read_results(workdir / "results.jsonl") if r["kind"] == "train"]


@pytest.fixture(scope="module", autouse=True)
def short_window():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "WINDOW", 1)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("muon") / "w"
    return trainer.run(tiny_config(**MUON, train__skip_spikes=1.0), workdir), workdir


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(whole, tmp_path):
    summary, source = whole
    workdir = shutil.copytree(source, tmp_path / "w")
    (workdir / "run.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "6")
    again = trainer.run(tiny_config(**MUON, train__skip_spikes=1.0), workdir)
    assert again["params_sha256"] == summary["params_sha256"]
    for key in ("loss", "skipped_updates"):
        assert logged(workdir, key) == logged(source, key) and len(logged(source, key)) == 6
    # parameters stay where an update is skipped
    counts, norms = logged(source, "skipped_updates"), logged(source, "update_norm")
    assert counts[-1] > 0
    for before, after, norm in zip([0, *counts], counts, norms, strict=False):
        assert (norm == 0) == (after > before)


@pytest.mark.slow
def test_four_devices_give_the_losses_of_one(tmp_path):
    expected = trainer.run(tiny_config(**MUON), tmp_path / "one")
    flags = tiny_flags(**MUON, mesh__expert=2, mesh__fsdp=2)
    run = ("moe_ablm.train", *flags, f"--workdir={tmp_path / 'four'}")
    done = run_command(*run, XLA_FLAGS=xla_flags(4), JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    one, four = (logged(tmp_path / name, "loss") for name in ("one", "four"))
    np.testing.assert_allclose(four, one, atol=1e-5)
    found = json.loads((tmp_path / "four" / "run.json").read_text())
    assert found["fingerprint"] == expected["fingerprint"]


def test_the_optimizer_is_part_of_the_identity_and_runs_of_before_are_what_they_were():
    adamw, muon = tiny_config(), tiny_config(train__optimizer="muon")
    assert not {"train.optimizer", "train.muon_lr"} & set(configs.identity(adamw, "d"))
    faster = tiny_config(train__optimizer="muon", train__muon_lr=0.03)
    prints = {configs.fingerprint(c, "d") for c in (adamw, muon, faster)}
    assert len(prints) == 3
    tree = configs.to_dict(adamw)
    del tree["train"]["optimizer"], tree["train"]["muon_lr"]
    assert configs.from_mapping(tree) == adamw


WRONG = {
    "adam": ({"train__optimizer": "adam"}, "train.optimizer='adam' .did you mean 'adamw'"),
    "rate": ({"train__optimizer": "muon", "train__muon_lr": 0.0}, "muon_lr=0.0: expected a posi"),
    "unused": ({"train__muon_lr": 0.1}, "muon_lr=0.1: expected 0.02 with train.optimizer='adamw'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    changes, words = WRONG[name]
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)
