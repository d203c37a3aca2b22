"""The trainer in one process: what a run leaves on disk, and when it stops."""

import json
import os
import platform
import signal
import subprocess

import jax
import numpy as np
import pytest
from conftest import COMPILE_QUICKLY, REPO, tiny_config
from jax.interpreters.partial_eval import dce_jaxpr
from strict_json import read_all_strictly
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from moe_ablm import trainer
from moe_ablm.errors import Diverged, UserError
from moe_ablm.model.encoder import make_definition
from moe_ablm.model.spec import PRECISIONS, Execution
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.results import read_results
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.state import abstract_state, init_state
from moe_ablm.training.step import make_train_step
from moe_ablm.verbs import report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Work directory and `run.json` of one complete tiny run."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    return workdir, trainer.run(tiny_config(), workdir)


def test_every_json_of_a_run_is_valid(finished):
    assert read_all_strictly(finished[0]) >= {"run.json", "config.json", "results.jsonl"}


def test_run_json_holds_what_scaling_needs(finished):
    workdir, summary = finished
    on_disk = json.loads((workdir / "run.json").read_text())
    assert on_disk == json.loads(json.dumps(summary))
    assert on_disk["status"] == "complete"
    assert on_disk["step"] == 12
    assert len(on_disk["params_sha256"]) == 64
    assert on_disk["params_total"] > on_disk["params_active"] > 0
    assert on_disk["router"] == "topk"
    assert on_disk["experts"] == 4
    assert on_disk["size"] == "tiny"
    assert on_disk["data_fraction"] == "full"
    assert on_disk["valid_loss_best"] <= on_disk["valid_loss_final"]
    assert "CDRH3" in on_disk["valid_loss_by_region"]
    for key in ("fingerprint", "corpus_tokens", "tokens_seen", "flops", "seed", "stability"):
        assert key in on_disk


def test_chains_are_apart_in_results_events_run_json_and_report(finished, main):
    """That they are right is tested in test_losses and test_chains; here, that they arrive."""
    workdir, summary = finished
    *_, line = (r for r in read_results(workdir / "results.jsonl") if r["kind"] == "eval")
    losses, masked = line["loss_by_chain"], line["masked_by_chain"]
    for chain in ("heavy", "light"):
        parts = sum(masked.get(f"{chain}_{part}", 0) for part in ("seen", "unseen"))
        assert parts == masked[chain] > 0
        assert masked.get(f"{chain}_novel", 0) == masked.get(f"{chain}_unseen", 0)  # of all data
    total = sum(masked[c] * losses[c] for c in ("heavy", "light"))
    assert total / (masked["heavy"] + masked["light"]) == pytest.approx(line["loss"])
    (file,) = (workdir / "tensorboard").iterdir()
    events = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
    values = {(e.step, v.tag): v.tensor.float_val[0] for e in events for v in e.summary.value}
    for chain, loss in losses.items():
        assert values[12, f"eval/loss_by_chain/{chain}"] == pytest.approx(loss)
    assert values[12, "eval/loss_novel"] == pytest.approx(line["loss_novel"])
    assert summary["valid_loss_by_chain"] == losses
    assert summary["valid_loss_novel"] == line["loss_novel"]
    assert set(summary["valid_seen"]) == {"heavy", "light"}
    assert summary["unique_tokens"] <= summary["corpus_tokens"]
    told = main("report", "--run", workdir)
    assert told.returncode == 0
    (unseen,) = (x.split() for x in told.stdout.splitlines() if x.split()[:1] == ["unseen"])
    assert (
        unseen[1] == f"{losses['heavy_unseen']:.4f}" and f"{losses['light_unseen']:.4f}" in unseen
    )


def test_an_evaluation_of_before_is_reported_as_it_was(finished, tmp_path, main):
    new = [json.loads(x) for x in (finished[0] / "results.jsonl").read_text().splitlines()]
    apart = ("loss_by_chain", "accuracy_by_chain", "masked_by_chain", "loss_by_region_unseen")
    old = [{k: v for k, v in x.items() if k not in (*apart, "loss_novel")} for x in new]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in old))
    told = main("report", "--run", tmp_path)
    assert told.returncode == 0 and "CDR3" in told.stdout and "unseen" not in told.stdout


def test_run_json_says_what_computed_it_and_how(finished):
    found = finished[1]["execution"]
    assert (found["device_kind"], found["devices"], found["processes"]) == ("cpu", 1, 1)
    assert found["mesh"] == {"data": 1, "expert": 1, "fsdp": 1}
    assert PRECISIONS[found["precision"]] == (found["activations"], found["operands"])
    assert (found["remat"], found["hardware_name"]) == ("none", None)
    assert found["matmul_peak"] > 0 and found["matmul_peak_source"] == "measured"
    assert found["compile_seconds"] > 0
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= set(found["versions"])
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert str(os.cpu_count()) in found["processor"]
    asked = ["git", "-C", str(REPO), "rev-parse", "HEAD"]
    head = subprocess.run(asked, capture_output=True, text=True, check=False)
    if head.returncode:  # an unpacked archive
        assert found["commit"] is None
    else:
        assert found["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_results_and_events_tell_the_same(finished):
    workdir, summary = finished
    records = read_results(workdir / "results.jsonl")
    train_lines = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train_lines] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [6, 12]
    last = train_lines[-1]
    assert last["tokens_seen"] == summary["tokens_seen"]
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert set(last["router"]) == {"1"}
    assert sum(last["router"]["1"]["load"]) == pytest.approx(1)
    assert 0 < last["router"]["1"]["entropy"] <= 1
    load = last["router"]["1"]["load"]
    assert last["router"]["1"]["max_min_load"] == pytest.approx(max(load) / min(load))
    assert last["router"]["1"]["dead_experts"] == 0
    (file,) = (workdir / "tensorboard").iterdir()
    events = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
    values = {(e.step, v.tag): v.tensor.float_val[0] for e in events for v in e.summary.value}
    assert values[12, "train/loss"] == pytest.approx(last["loss"])
    for name in ("max_min_load", "dead_experts", "spread", "logit_rms"):
        tag = f"train/router/1/{name}"
        assert values[12, tag] == pytest.approx(last["router"]["1"][name])
    assert values[12, "eval/loss_by_region/CDRH3"] == pytest.approx(
        summary["valid_loss_by_region"]["CDRH3"]
    )


def test_training_lowers_the_loss(finished):
    workdir, _ = finished
    losses = [r["loss"] for r in read_results(workdir / "results.jsonl") if r["kind"] == "train"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1


def test_routed_counts_are_those_of_the_residues(finished):
    workdir, summary = finished
    table = np.asarray(summary["evaluation"]["routed"]["1"])
    assert table.shape == (4, 16)
    # two experts for every token of the 16 validation antibodies, none for padding
    assert table.sum() % 2 == 0
    assert 16 * 2 * 200 < table.sum() < 16 * 2 * 256


def test_a_complete_run_says_so(finished, capsys):
    workdir, summary = finished
    again = trainer.run(tiny_config(), workdir)
    assert "is complete: 12 steps" in capsys.readouterr().out
    assert again["params_sha256"] == summary["params_sha256"]


def test_report_draws_figures(finished, capsys):
    workdir, _ = finished
    parser = __import__("argparse").ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args(["--run", str(workdir)]))
    out = capsys.readouterr().out
    for name in ("loss.png", "routing.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert name in out
    assert "CDR3" in out
    assert "stability: too short to tell" in out and "step 12 of 12, complete" in out


def test_a_run_json_that_is_damaged_is_made_again(finished, tmp_path):
    workdir, summary = finished
    copy = tmp_path / "copy"
    __import__("shutil").copytree(workdir, copy)
    (copy / "run.json").write_text('{"status": "comp')
    again = trainer.run(tiny_config(), copy)
    assert again["params_sha256"] == summary["params_sha256"]
    assert again["valid_loss_final"] == summary["valid_loss_final"]
    assert len(read_results(copy / "results.jsonl")) == len(read_results(workdir / "results.jsonl"))


def test_a_different_run_is_refused_and_its_keys_shown(finished):
    workdir, _ = finished
    before = sorted(p.name for p in workdir.iterdir())
    with pytest.raises(UserError, match=r"train\.lr: 0\.003 there, 0\.001 now") as error:
        trainer.run(tiny_config(train__lr=1e-3), workdir)
    assert "seed" not in str(error.value)
    assert sorted(p.name for p in workdir.iterdir()) == before


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    _, summary = finished
    again = trainer.run(tiny_config(checkpoint__every=100, log__every=5), tmp_path / "again")
    assert again["params_sha256"] == summary["params_sha256"]
    assert again["fingerprint"] == summary["fingerprint"]
    # as long: the schedule is part of what is compiled
    other = trainer.run(tiny_config(seed=1, checkpoint__every=100), tmp_path / "other")
    assert other["params_sha256"] != summary["params_sha256"]


def test_accumulated_micro_batches_equal_the_whole_batch(finished, tmp_path):
    # without router losses, which are means over micro-batches
    changes = {"model__moe__router": "none", "train__steps": 3, "compute__precision": "float32"}
    whole = trainer.run(tiny_config(**changes), tmp_path / "whole")
    parts = trainer.run(tiny_config(**changes, train__accumulate=4), tmp_path / "parts")
    assert parts["valid_loss_final"] == pytest.approx(whole["valid_loss_final"], abs=1e-5)


def test_a_signal_saves_and_the_next_run_resumes(finished, tmp_path, monkeypatch, capsys):
    _, summary = finished
    evaluate = trainer.validation_sums

    def evaluate_and_signal(*args):
        signal.raise_signal(signal.SIGUSR1)
        return evaluate(*args)

    monkeypatch.setattr(trainer, "validation_sums", evaluate_and_signal)
    stopped = trainer.run(tiny_config(), tmp_path / "w")
    assert (stopped["status"], stopped["step"]) == ("stopped", 6)
    assert "saved at step 6; the same command resumes it" in capsys.readouterr().out
    monkeypatch.undo()
    resumed = trainer.run(tiny_config(), tmp_path / "w")
    assert resumed["params_sha256"] == summary["params_sha256"]
    assert resumed["tokens_seen"] == summary["tokens_seen"]


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    # an infinite learning rate from step 5 on: warm-up ends in 1e38 * step
    config = tiny_config(train__lr=3e38, train__clip=0.0, train__warmup=12, train__steps=12)
    with pytest.raises(Diverged, match=r"step \d+: \w+ is (nan|inf|-inf)") as error:
        trainer.run(config, tmp_path / "w")
    content = json.loads((tmp_path / "w" / "run.json").read_text())
    assert content["status"] == "diverged"
    assert content["error"] in str(error.value)
    assert content["execution"]["device_kind"] == "cpu"


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """`run.json` of a run that patience ends, in bfloat16, on hardware that a launcher named."""
    changes = {"compute__precision": "bfloat16", "compute__remat": "matmuls"}
    changes |= {"train__lr": 1e-30, "train__patience": 2, "eval__every": 1, "train__steps": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ABLM_HARDWARE", "h100x8")
        patch.setenv("LIBTPU_INIT_ARGS", "--a=1")
        patch.delenv("XLA_FLAGS", raising=False)
        return trainer.run(tiny_config(**changes), tmp_path_factory.mktemp("patient") / "w")


def test_patience_ends_a_run_early(patient):
    # the first evaluation is the best; the two after it do not improve on it
    assert (patient["status"], patient["step"], patient["valid_step_best"]) == ("complete", 3, 1)


def test_the_launchers_name_of_the_hardware_and_the_precision_are_recorded(patient):
    found = patient["execution"]
    assert (found["hardware_name"], found["flags"]) == ("h100x8", "--a=1")
    assert (found["precision"], found["remat"]) == ("bfloat16", "matmuls")
    assert (found["activations"], found["operands"]) == ("bfloat16", "bfloat16")


def step_of_ema(ema: float, seed: int | None = None):
    """The update of a tiny run, and its state: shapes only, or of a seed."""
    config, mesh = tiny_config(), make_mesh(1, 1, 1)
    spec, optimizer = config.model.spec(), make_optimizer(config.train)
    step = make_train_step(make_definition(spec, Execution()), optimizer, spec, 1, ema)
    if seed is None:
        return step, abstract_state(spec, optimizer, ema > 0, mesh)
    return step, init_state(spec, optimizer, seed, ema > 0, mesh)


def test_ema_has_no_part_in_an_update():
    """The program of parameters, moments and metrics is the same, equation by equation."""
    names = ("tokens", "targets", "segment", "region", "loss_mask")
    batch = {n: jax.ShapeDtypeStruct((2, 12), "bool" if n == names[-1] else "int32") for n in names}

    def program(ema: float) -> str:
        """What all but the average needs; of the inputs it needs all but the average."""
        step, state = step_of_ema(ema)

        def update(state, batch):
            after, metrics = step(state, batch)
            return after._replace(ema=None), metrics

        whole = jax.make_jaxpr(update)(state, batch).jaxpr
        needed, used = dce_jaxpr(whole, [True] * len(whole.outvars))
        assert used.count(False) == len(jax.tree.leaves(state.ema)) == (33 if ema else 0)
        return str(needed)

    assert program(0.0) == program(0.999)


def test_ema_changes_no_bit_of_an_update():
    """Fused as for users: with the flags of tests the two programs round differently."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 24, (8, 64), dtype=np.int32)
    batch = {"tokens": ids, "targets": ids, "segment": np.ones_like(ids), "region": ids % 3,
             "loss_mask": rng.random(ids.shape) < 0.3}  # fmt: skip
    options = {name: True for name in ("xla_cpu_use_fusion_emitters",) if name in COMPILE_QUICKLY}

    def after(ema: float) -> list[np.ndarray]:
        step, state = step_of_ema(ema, seed=0)
        compiled = jax.jit(step).lower(state, batch).compile(options)
        for _ in range(3):
            state, _ = compiled(state, batch)
        return [np.asarray(x) for x in jax.tree.leaves(state._replace(ema=None))]

    for without, averaged in zip(after(0.0), after(0.999), strict=True):
        np.testing.assert_array_equal(without, averaged)


def test_ema_is_evaluated_in_place_of_the_parameters(tmp_path, finished):
    _, summary = finished
    averaged = trainer.run(tiny_config(train__ema=0.999), tmp_path / "w")
    assert averaged["valid_loss_final"] > summary["valid_loss_final"] + 0.05


def test_a_batch_that_devices_do_not_divide_is_refused(tmp_path, monkeypatch):
    class EightDevices:
        size = 8

    monkeypatch.setattr(trainer, "make_mesh", lambda *_: EightDevices())
    with pytest.raises(UserError, match=r"batch=12 .* over 8 devices: use a multiple of 8"):
        trainer.run(tiny_config(train__batch=12), tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assert jax.device_count() == 1
