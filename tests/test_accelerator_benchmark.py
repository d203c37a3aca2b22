"""The accelerator benchmark on CPU: results of every kind of entry, failures, time, and checks that
can fail."""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import accelerator
import accelerator_entries
import exactness
import jax
import numpy as np
import pytest
import steps
from accelerator_tables import line, tables
from strict_json import read_strictly
from waves import Budget, Entry, Runner, Worker, expected, run_wave

from moe_ablm.model.experts import IMPLEMENTATIONS, Batched
from moe_ablm.model.spec import SIZES, EncoderSpec
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.training.optimizer import make_optimizer
from moe_ablm.training.spec import OptimizerSpec
from moe_ablm.training.state import abstract_state

BENCHMARKS = Path(accelerator.__file__).parent


# waves, with a worker that needs nothing to start

STUB = """
import os, sys, time
from waves import Entry, Prepared, serve

def fail():
    raise ValueError("first line\\nsecond line")

def compiled(compile=lambda: 20, measure=lambda made: {"made": made + 1}):
    return lambda: Prepared(compile, measure)

WORK = {
    "good": lambda: {"value": 1.0},
    "noisy": lambda: print("no JSON") or {"value": 2.0},
    "bad": fail,
    "dies": lambda: os._exit(3),
    "slow": lambda: time.sleep(60),
    "compiled": compiled(),
    "compiles badly": compiled(compile=fail),
    "measures badly": compiled(measure=lambda made: fail()),
    "dies compiling": compiled(compile=lambda: os._exit(4)),
    "dies measuring": compiled(measure=lambda made: os._exit(5)),
}
serve({name: Entry(name, "stub", 0, 0, work) for name, work in WORK.items()}, {"pid": os.getpid()})
"""


def run(tmp_path, *waves: tuple[str, ...], seconds: float = 20, needs: float = 0.0):
    """Results by name in the order of their coming, and how many workers there were."""
    stub, results = tmp_path / "stub.py", []
    stub.write_text(STUB)
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    with (tmp_path / "log").open("w") as log:
        runner = Runner(
            lambda kind: Worker([sys.executable, str(stub)], environment, log),
            Budget(seconds),
            results.append,
        )
        runner.run([[Entry(name, "stub", 0, needs, dict) for name in names] for names in waves])
    by_name = {r["entry"]: r for r in results if "entry" in r}
    assert len(by_name) == sum(map(len, waves)) == sum("entry" in r for r in results)
    return by_name, sum("pid" in r for r in results)


def test_a_failing_entry_does_not_stop_the_others(tmp_path):
    results, workers = run(tmp_path, ("bad", "good", "noisy"), ("compiles badly", "compiled"))
    assert workers == 1
    assert results["good"] == {"entry": "good", "values": {"value": 1.0}, "status": "done"}
    assert results["noisy"]["values"] == {"value": 2.0}
    reason = "ValueError: first line"
    assert results["bad"] == {"entry": "bad", "status": "failed", "reason": reason}
    assert results["compiles badly"]["reason"] == reason
    values = results["compiled"]["values"]
    assert values["made"] == 21 and values["compiled_together"] == 2 and values["compile_s"] < 5


def test_a_worker_that_dies_is_replaced(tmp_path):
    """Whoever measured has failed; where that is not known, each is tried by itself."""
    results, workers = run(tmp_path, ("good", "dies", "noisy"))
    assert results["dies"]["reason"] == "the process ended with exit code 3"
    assert results["good"]["status"] == results["noisy"]["status"] == "done" and workers == 3
    results, workers = run(tmp_path, ("dies measuring", "compiled"))
    assert results["dies measuring"]["reason"].endswith("exit code 5") and workers == 2
    assert results["compiled"]["status"] == "done"
    results, _ = run(tmp_path, ("compiled", "dies compiling", "measures badly"))
    assert results["dies compiling"]["reason"].endswith("exit code 4")
    assert results["compiled"]["status"] == "done"
    assert results["measures badly"]["reason"] == "ValueError: first line"


def test_time_that_is_up_ends_what_runs_and_skips_what_follows(tmp_path):
    results, _ = run(tmp_path, ("good", "slow", "noisy"), ("bad",), seconds=1.5, needs=0.1)
    assert results["good"]["status"] == "done"
    assert results["slow"]["reason"] == results["noisy"]["reason"] == "out of time"
    assert results["bad"]["status"] == "skipped"


def test_what_would_take_too_long_is_not_begun(tmp_path):
    results, workers = run(tmp_path, ("good", "slow"), ("noisy",), seconds=20, needs=11)
    assert results["good"]["status"] == results["noisy"]["status"] == "done" and workers == 1
    assert results["slow"]["status"] == "skipped"
    assert results["slow"]["reason"] == "needs about 11 s"


def test_programs_of_a_wave_compile_at_the_same_time():
    wave = [Entry(str(i), "", 10.0, 1.0, dict) for i in range(2)]
    assert expected(wave) == 12.0 and expected(wave[:1]) == 11.0
    many = [Entry(str(i), "", 10.0, 0.0, dict) for i in range(1000)]
    assert expected(many) > 100.0
    sent = []
    run_wave([Entry("a", "", 0, 0, lambda: {"x": 1})], sent.append)
    assert sent == [{"entry": "a", "values": {"x": 1}}]


# the script


@pytest.fixture
def script(monkeypatch, capsys):
    """`python benchmarks/accelerator.py` in this process; its workers are processes."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["accelerator.py", *arguments])
        return accelerator.main(), capsys.readouterr().out

    return run


def test_the_script_survives_what_this_machine_has_not(script, tmp_path):
    out = tmp_path / "out.jsonl"
    only = "float32/products", "attention/cudnn", "dense/8m"
    code, printed = script("--tiny", "--minutes=5", f"--out={out}", "--only", *only)
    assert code == 0, printed
    first, worker, *results = read_strictly(out)
    assert first["versions"]["jax"] and first["arguments"][0] == "--tiny"
    assert worker["worker"] == "jax" and worker["device"] == "cpu"
    results = {r["entry"]: r for r in results}
    assert list(results) == list(only)
    assert results["float32/products"]["values"]["passed"] is True
    assert results["attention/cudnn"]["status"] == "failed"
    assert "cuDNN" in results["attention/cudnn"]["reason"]
    step = results["dense/8m"]["values"]
    assert step["config"]["rows"]["count"] == 4 and step["config"]["execution"]["backend"] == "cpu"
    assert step["tokens_per_second"] == pytest.approx(4 * 64 / (step["ms"] / 1e3))
    # nats, ln 33 at first; how many updates follow depends on the machine's speed
    assert 0 < step["objective"] < 4
    assert "failed: attention/cudnn" in printed and "1 checks within" in printed


def test_without_time_all_is_listed_and_nothing_started(script, tmp_path):
    out = tmp_path / "out.jsonl"
    code, printed = script("--minutes=0", f"--out={out}")
    assert code == 0
    _, *results = read_strictly(out)
    assert {r["status"] for r in results} == {"skipped"}
    names = [r["entry"] for r in results]
    assert len(names) == len(set(names)) and "trainer" in names
    for size in ("8m", "35m", "150m", "350m", "650m"):
        assert {f"dense/{size}", f"torch/{size}", f"torch/{size}/compile"} <= set(names)
    for size in ("35m", "150m"):
        dropless = {f"sparse/{size}/dropless-{name}" for name in IMPLEMENTATIONS}
        assert dropless | {f"sparse/{size}/dense", f"sparse/{size}/soft"} <= set(names)
    assert printed.strip().splitlines()[-1].startswith("skipped: float32/products ")


def test_a_pattern_that_matches_nothing_is_refused(script):
    assert script("--only", "dense/9m") == (2, "")


def test_patterns():
    every = accelerator_entries.waves(accelerator_entries.TINY, None, None)

    def names(*patterns: str) -> list[str]:
        return [e.name for wave in accelerator.chosen(every, patterns) for e in wave]

    assert names("encoder") == ["encoder/dense", "encoder/all-experts", "encoder/soft"]
    assert names("torch/*/compile") == ["torch/8m/compile", "torch/35m/compile"]
    assert "dense/35m" in names("dense") and "sparse/35m/dense" not in names("dense")


# what a result means


def test_checks_can_fail(monkeypatch):
    """An implementation that leaves out the last block, and errors that are no numbers."""

    class Short(Batched):
        @staticmethod
        def product(rows, weights, groups, block):
            return Batched.product(rows, weights, groups, block).at[: 2 * block].set(0)

    monkeypatch.setitem(IMPLEMENTATIONS, "short", Short)
    found = exactness.grouped("short", "float32")
    assert found["passed"] is False and found["out"] > 0.1 and found["dweights"] < 1e-5
    assert exactness.judged({"a": float("nan")}, 1.0) == {"a": "nan", "limit": 1.0, "passed": False}
    assert exactness.error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25


def test_plain_attention_is_its_own_derivative():
    """Against central differences."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.standard_normal((4, 1, 5, 1, 3))
    allowed = np.ones((1, 5, 5), bool)
    allowed[0, :, 4] = False
    out, *gradients = exactness.plain_attention(q, k, v, g, allowed)
    np.testing.assert_allclose(out[0, 0, 0].shape, (3,))
    for which, gradient in enumerate(gradients):
        step = np.zeros(q.shape)
        step[0, 2, 0, 1] = 1e-5
        ends = []
        for sign in (1, -1):
            arrays = [q, k, v]
            arrays[which] = arrays[which] + sign * step
            ends.append((exactness.plain_attention(*arrays, g, allowed)[0] * g).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient[0, 2, 0, 1] == pytest.approx(slope, rel=1e-6)
    assert not gradients[1][0, 4].any() and not gradients[2][0, 4].any()


def test_batches_are_antibodies_with_padding():
    batch = steps.make_batch(steps.Rows(100, 64, (50, 60)))
    lengths = (batch["segment"] > 0).sum(1)
    assert set(lengths) == set(range(50, 61))
    pads = batch["segment"] == 0
    assert (batch["tokens"][pads] == steps.PAD).all() and not batch["loss_mask"][pads].any()
    assert 0.12 < batch["loss_mask"].sum() / lengths.sum() < 0.18
    same = batch["tokens"] == batch["targets"]
    np.testing.assert_array_equal(same, ~batch["loss_mask"])
    assert (np.diff(batch["segment"].astype(int), axis=1)[:, :49] >= 0).all()


def test_shares_are_of_the_data_sheet():
    """35m, 256 rows of 256 in 104.2 ms on one H100: 13.9 %."""
    spec = EncoderSpec(*SIZES["35m"])
    found = steps.speed(0.1042, spec, steps.Rows(256), "NVIDIA H100 80GB HBM3")
    assert found["tokens_per_second"] == pytest.approx(629_000, rel=1e-3)
    assert found["peak_share"] == pytest.approx(0.139, abs=5e-4)
    halved = steps.speed(0.1042, spec, steps.Rows(256), "NVIDIA H100 80GB HBM3", devices=2)
    assert halved["peak_share"] == pytest.approx(found["peak_share"] / 2)
    assert "peak_share" not in steps.speed(0.1042, spec, steps.Rows(256), "abacus")


def test_random_states_have_the_shapes_of_the_trainers():
    spec = EncoderSpec(1, 8, 16, 2, moe=replace(accelerator_entries.TOP2, balance_rate=1e-3))
    optimizer = make_optimizer(
        OptimizerSpec(10, 1e-3, 1, "linear", 0.1, 0.9, 0.98, 1e-6, 0.01, 1.0)
    )
    shapes = abstract_state(spec, optimizer, False, make_mesh(-1, 1, 1))
    state = steps.random_state(shapes)
    of = partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.sharding))
    assert of(state) == of(shapes)
    assert (state.params["final_norm"]["scale"][...] == 1).all()
    assert 0.01 < float(state.params["embedding"][...].std()) < 0.03
    assert not any(x.any() for x in jax.tree.leaves(state.opt_state))


def test_tables():
    def step(ms: float, tokens: float) -> dict:
        memory = {"temporaries_gb": 1.0, "compile_s": 3.0}
        return {"status": "done", "values": {"ms": ms, "tokens_per_second": tokens, **memory}}

    results = {
        "dense/35m": step(100.0, 600.0),
        "torch/35m": step(200.0, 300.0),
        "sparse/35m/dense": step(100.0, 1.0),
        "sparse/35m/soft": step(125.0, 1.0),
        "encoder/soft": {"status": "done", "values": {"logits": 0.5, "passed": False}},
        "trainer": {"status": "failed", "reason": "no grain"},
    }
    printed = tables(results)
    assert [row.split()[-2:] for row in printed.splitlines() if row.startswith("dense/")] == [
        ["2.00", "-"]
    ]
    assert [row.split()[2] for row in printed.splitlines() if row.startswith("soft")] == ["1.25"]
    assert "beyond the limit: encoder/soft" in printed and "failed: trainer" in printed
    assert "0 checks within" in printed
    assert line({"entry": "trainer"} | results["trainer"]).split() == [
        "trainer", "failed:", "no", "grain"
    ]  # fmt: skip
