"""Runs and a model that an earlier version left behind: they load, and go on as they would have.

`recorded/runs.tar.xz` was made with commit 9286c4a, the last one with one spec for all routers: ten
runs of six updates (three layers of width 8, simulated antibodies, float32 on a CPU), each with its
checkpoint of step 4, and `upcycled/`, a dense run of them made sparse by `moe_ablm upcycle`. The
digests below are what that version said of them (`load_model(...).digest()`).
"""

import json
import tarfile
from pathlib import Path

import pytest

from moe_ablm import config as configs
from moe_ablm import trainer
from moe_ablm.interop.load import load_model
from moe_ablm.results import read_results

ARCHIVE = Path(__file__).parent / "recorded" / "runs.tar.xz"
DIGESTS = {
    "batch": "a3f967da6c7100d26c2ad6e9c51f7d7bfbd55b82e558b8b42fc8070a2d53fe73",
    "capacity": "f5eacf2b44c1d00ab668d13a59e0e969fb6a5a55266637ed3089922238b531ad",
    "dense": "11d7e0b1a9a4827b989b693d9dd56b92978b738ac327f4139b8d8425c809e0c1",
    "expert_choice": "0117da241f64a36f083c08aba8553e84ab8b8984bcfdc46567b01cea8f0de6ee",
    "sequence": "511078fd76fcef095d17a8f22dc74a33ca991e32b8a88b87a9d3ac0975744284",
    "soft": "34cf209a039520f84322ea296ece4de23dcf29654fa9b65b6aad7e2a2a21a702",
    "soft_l2": "d3a70de2e21e50617b75755a81ded615849240487375dbe04208e94d89a6bc92",
    "topk": "b8c84f707c4b92da2048509f7f84094524041738d0988bb74b92b44a0e9e4924",
    "topp": "f46b9b181c6af90a0bbe2d951ffa44ad99200ac8dc623f6252072d10d454bb2e",
    "unequal": "5379b7aa32725fc1fb9056c5d0fe451b8f953565e654f41664efa4224450466d",
    "upcycled": "62d74e526eb12dcba0836c0d0fba1c23f04aa1d565818a8f52f3c741174e7479",
}
RUNS = sorted(DIGESTS.keys() - {"upcycled"})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The runs unpacked; their configs name the dataset relatively to that directory."""
    directory = tmp_path_factory.mktemp("recorded")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield directory


def stored(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", DIGESTS)
def test_a_recorded_model_is_the_same_model(recorded, name):
    assert load_model(recorded / name).digest() == DIGESTS[name]


@pytest.mark.parametrize("name", RUNS)
def test_a_config_of_then_loads_and_has_its_fingerprint(recorded, name):
    content = stored(recorded / name)
    assert content["config"]["compute"]["remat"] is False  # a switch then
    assert not {"hidden_dropout", "attention_dropout"} & content["config"]["model"].keys()
    config = configs.from_mapping(content["config"])
    assert config.compute.remat == "none" and not config.model.spec().drops
    assert config.model.moe.l2_scale == (1.0 if name == "soft_l2" else None)
    fingerprint = configs.fingerprint(config, content["dataset"])
    run = json.loads((recorded / name / "run.json").read_text())
    assert fingerprint == content["fingerprint"] == run["fingerprint"]


def losses(workdir: Path) -> dict[int, float]:
    records = read_results(workdir / "results.jsonl")
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


# a step of every kind is compiled anew: the others by --slow
QUICK = ("topk", "soft")
GO_ON = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]


@pytest.mark.parametrize("name", GO_ON)
def test_a_recorded_run_goes_on_as_it_did(recorded, name, capsys):
    """From the checkpoint of step 4 to the losses of steps 5 and 6 and the end's validation loss.

    "topk" has loss-free balancing: its optimizer had moments of `balance`, of which there are none
    now.
    """
    workdir = recorded / name
    expected, then = losses(workdir), json.loads((workdir / "run.json").read_text())
    (workdir / "run.json").rename(workdir / "run.then.json")  # so that it is no finished run
    try:
        found = trainer.run(configs.from_mapping(stored(workdir)["config"]), workdir)
    finally:
        (workdir / "run.then.json").rename(workdir / "run.json")
    assert "resuming at step 4" in capsys.readouterr().out
    assert losses(workdir) == pytest.approx(expected, rel=1e-5)
    for key in ("valid_loss_final", "valid_loss_best"):
        assert found[key] == pytest.approx(then[key], rel=1e-5), key
    for key in ("fingerprint", "step", "tokens_seen", "router"):
        assert found[key] == then[key], key
    assert found["corpus_tokens"] == then["unique_tokens"]  # so it was called then
    balance = 4 if name == "topk" else 0  # the bias of its four experts is no parameter any more
    assert found["params_total"] == then["params_total"] - balance
    same = found["flops"] == pytest.approx(then["flops"], rel=1e-9)
    assert same == (name not in COUNTED_ANEW)


# FLOPs that were counted otherwise: places that padding is owed, slots of packed rows. (Those of
# "topp" are the same: its routers are still so undecided that every token has the most experts.)
COUNTED_ANEW = {"capacity", "expert_choice", "soft_l2"}
