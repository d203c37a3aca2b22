"""Verdicts on hand-made series of router statistics, and on runs forced to collapse."""

import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from strict_json import read_strictly

from moe_ablm import command_line, train, trainer
from moe_ablm.config_schema import MoEConfig
from moe_ablm.files import write_json
from moe_ablm.model.families import FAMILIES, ExpertChoice, Soft, TopK
from moe_ablm.model.moe import RouterWeights, router_logits
from moe_ablm.model.routers import Tokens, plan
from moe_ablm.model.routing import RouterStats, summarise
from moe_ablm.progress import stability_lines
from moe_ablm.training.stability import (
    StabilityWatch,
    Thresholds,
    dead_experts,
    load_entropy,
    max_min_load,
    signals_of,
)

E = 8
EVEN = np.full(E, 1 / E)
TWO = np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0])
ONE_DEAD = np.array([0, *[1 / 7] * 7])


def stats(load=EVEN, dropped=0.0, spread=0.8, logit_rms=1.0, layers=2, bad_layer=1) -> RouterStats:
    """Statistics of `layers` layers, one of which differs from a healthy one as told."""
    loads = np.tile(EVEN, (layers, 1))
    loads[bad_layer] = load
    values = {"dropped": np.zeros(layers), "spread": np.full(layers, 0.8), "rms": np.ones(layers)}
    values["dropped"][bad_layer] = dropped
    values["spread"][bad_layer] = spread
    values["rms"][bad_layer] = logit_rms
    none = np.zeros(layers)
    return RouterStats(
        load=loads, asked=loads, choices=none, entropy=load_entropy(loads),
        dropped=values["dropped"], spread=values["spread"], logit_rms=values["rms"],
        load_balance=none, z_loss=none, entropy_loss=none,
    )  # fmt: skip


def watch_of(router="topk", warmup=0, **changes) -> StabilityWatch:
    layers = () if router == "none" else (1, 3)
    return StabilityWatch(MoEConfig(router=router, experts=E, **changes).spec(), layers, warmup)


def feed(watch: StabilityWatch, parts, losses=None) -> StabilityWatch:
    """Reads `[(updates, statistics), ...]` one after the other."""
    step = watch.state()["updates"]
    rng = np.random.default_rng(step)
    for updates, each in parts:
        for _ in range(updates):
            step += 1
            loss = 2.5 + 0.02 * rng.standard_normal() if losses is None else losses[step - 1]
            watch.update(step, loss, each)
    return watch


# router, its spec, what a collapsed layer looks like, the signal it must raise
COLLAPSES = {
    "two experts take all": ("topk", {}, {"load": TWO}, "load_entropy"),
    "one expert of top-p": ("topp", {}, {"load": np.eye(E)[0]}, "load_entropy"),
    "antibodies all alike": ("sequence", {}, {"load": TWO}, "load_entropy"),
    "one expert writes all": ("soft", {}, {"load": np.eye(E)[0]}, "load_entropy"),
    "a dead expert": ("topk", {}, {"load": ONE_DEAD}, "dead_experts"),
    "no place": ("topk", {"capacity": 1.0}, {"dropped": 0.75}, "dropped"),
    "one works, one idles": (
        "topk", {}, {"load": np.array([0.7, 0.0128, *[0.04787] * 6])}, "max_min_load",
    ),
    "all choose the same": ("expert_choice", {}, {"dropped": 0.7}, "dropped"),
    "experts see no difference": ("expert_choice", {}, {"spread": 0.9999}, "flat_dispatch"),
    "slots are plain means": ("soft", {}, {"spread": 0.9999}, "flat_dispatch"),
    "a slot reads one token": ("soft", {}, {"spread": 0.001}, "sharp_dispatch"),
    "logits explode": ("expert_choice", {}, {"logit_rms": 40.0}, "logit_rms"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLAPSES)
def test_each_kind_of_collapse_is_seen_in_its_layer_and_recovers(name):
    router, spec, bad, what = COLLAPSES[name]
    healthy = stats()
    watch = feed(watch_of(router, **spec), [(60, healthy)])
    assert watch.verdict == "stable" and watch.summary()["events"] == []
    feed(watch, [(250, stats(**bad))])
    found = watch.summary()
    assert found["verdict"] == "collapse"
    events = [e for e in found["events"] if e["what"] == what]
    assert [(e["layer"], e["until"]) for e in events] == [(3, None)]
    assert 60 < events[0]["step"] <= 60 + 120
    assert {e["layer"] for e in found["events"]} == {3}
    assert found["worst"][what]["layer"] == 3
    feed(watch, [(200, healthy)])
    found = watch.summary()
    assert found["verdict"] == "transient collapse"
    assert all(310 < e["until"] < 510 for e in found["events"])


@pytest.mark.parametrize("router", FAMILIES)
def test_a_healthy_run_is_stable_with_every_router(router):
    rng = np.random.default_rng(3)
    watch = watch_of(router)
    for step in range(1, 400):
        load = rng.dirichlet(np.full(E, 30.0))  # +- 17 % of a share
        each = stats(load, dropped=rng.uniform(0, 0.1), spread=rng.uniform(0.3, 0.98))
        watch.update(step, 2 + np.exp(-step / 100) + 0.05 * rng.standard_normal(), each)
    found = watch.summary()
    assert (found["verdict"], found["events"]) == ("stable", [])
    assert {s.name for s in signals_of(MoEConfig(router=router).spec())} | {"loss_spike"} == set(
        found["worst"]
    )


def test_what_is_too_short_to_tell():
    """Ten bad updates after the first 20 are the fewest that a router is flagged for."""
    assert feed(watch_of(), [(2, stats())]).summary()["verdict"] == "too short to tell"
    assert feed(watch_of(), [(29, stats())]).verdict == "too short to tell"
    assert feed(watch_of(), [(30, stats())]).verdict == "stable"
    flagged = feed(watch_of(), [(30, stats(TWO))])  # as soon as it is long enough
    assert flagged.verdict == "collapse"


def test_a_short_dip_is_no_collapse():
    watch = feed(watch_of(), [(60, stats()), (5, stats(TWO)), (60, stats())])
    assert watch.verdict == "stable"


def test_an_expert_that_is_seldom_chosen_is_not_dead():
    seldom = [(5, stats(ONE_DEAD)), (1, stats())]
    assert feed(watch_of(), [(30, stats()), *seldom * 60]).verdict == "stable"
    once = [(30, stats()), (80, stats(ONE_DEAD)), (60, stats())]
    assert feed(watch_of(), once).verdict == "stable"


def test_batches_that_go_to_another_expert_each_are_seen():
    one = [(1, stats(np.eye(E)[i % E])) for i in range(200)]
    assert feed(watch_of(k=1), one).verdict == "collapse"
    # antibodies of one batch may well be alike: a sequence router is judged by many
    assert feed(watch_of("sequence", k=1), one).verdict == "stable"


def test_expert_choice_is_not_judged_by_loads_nor_token_choice_by_spread():
    assert feed(watch_of("expert_choice"), [(300, stats(TWO))]).verdict == "stable"
    for spread in (1.0, 0.0):
        assert feed(watch_of(), [(300, stats(spread=spread))]).verdict == "stable"


def test_routing_is_not_judged_in_the_warm_up():
    assert feed(watch_of(warmup=100), [(80, stats(TWO)), (80, stats())]).verdict == "stable"
    assert feed(watch_of(warmup=10), [(80, stats(TWO)), (80, stats())]).verdict != "stable"


def test_a_dispatch_that_forms_late_has_not_collapsed():
    flat, formed = stats(spread=0.9999), stats(spread=0.95)
    watch = feed(watch_of("soft"), [(300, flat)])
    assert watch.verdict == "collapse"
    assert not watch.is_lasting(300)  # it may still form: no reason to stop
    assert [e["what"] for e in watch.summary()["events"]] == ["unformed_dispatch"]
    feed(watch, [(200, formed)])
    assert watch.verdict == "stable"
    feed(watch, [(300, flat)])
    assert watch.verdict == "collapse" and watch.is_lasting(800)
    feed(watch, [(200, formed)])
    assert watch.verdict == "transient collapse"


def test_the_entropy_limit_knows_how_many_experts_a_token_has():
    # half way between K and E experts: sqrt(K E) of them, evenly
    for k, effective in ((1, np.sqrt(8)), (2, 4), (4, np.sqrt(32))):
        limits = {s.name: s.limit for s in signals_of(TopK(experts=8, k=k))}
        assert limits["load_entropy"] == pytest.approx(np.log(effective) / np.log(8))
    assert "load_entropy" not in {s.name for s in signals_of(TopK(k=8))}


def test_unseen_tokens_are_compared_with_experts_that_choose_independently():
    (limit,) = (s.limit for s in signals_of(ExpertChoice()) if s.name == "dropped")
    logits = np.random.default_rng(0).standard_normal((16, 256, E)).astype(np.float32)
    tokens = 256

    @jax.jit
    def unseen(logits):  # sigmoids of different experts do not compete as softmaxes do
        spec = ExpertChoice(gate="sigmoid")
        _, rows = plan(spec, logits, Tokens(jnp.ones((16, tokens), bool)))
        return summarise(rows, balanced=False).dropped

    independent = float(unseen(logits))
    same = float(unseen(np.repeat(logits[..., :1], E, -1)))
    assert independent == pytest.approx(0.75**8, abs=0.02)
    assert same == pytest.approx(1 - ExpertChoice().places(tokens) / tokens)
    assert independent < limit < same


# losses


def losses(n: int, **bumps: tuple[int, float]) -> np.ndarray:
    """A falling, noisy loss; `at300=(20, 1.0)`: 1.0 nats more for 20 updates from 300 on."""
    series = 2 + 1.5 * np.exp(-np.arange(n) / 80)
    series += 0.03 * np.random.default_rng(1).standard_normal(n)
    for start, (length, height) in bumps.items():
        first = int(start.removeprefix("at"))
        series[first : first + length] += height
    return series


@pytest.mark.parametrize(
    ("bumps", "verdict"),
    [
        ({}, "stable"),
        ({"at300": (1, 1.0)}, "stable"),  # one odd batch
        ({"at300": (20, 0.5)}, "transient collapse"),
        ({"at300": (100, 0.5)}, "collapse"),
        ({"at10": (390, 2.0)}, "collapse"),  # in the warm-up, and for good
    ],
)
@pytest.mark.parametrize("router", ["none", "soft"])
def test_loss_spikes(router, bumps, verdict):
    series = losses(400, **bumps)
    found = feed(watch_of(router), [(400, None if router == "none" else stats())], series).summary()
    assert found["verdict"] == verdict
    if verdict == "stable":
        assert found["events"] == []
    else:
        (event,) = found["events"]
        assert (event["layer"], event["what"]) == (None, "loss_spike")
        assert event["step"] == int(next(iter(bumps)).removeprefix("at")) + 1


# state


@pytest.mark.parametrize("cut", [1, 15, 61, 75, 130, 260, 341])
def test_a_state_carries_on_exactly(cut):
    rng = np.random.default_rng(5)
    loads = [rng.dirichlet(np.full(E, 5.0)) for _ in range(400)]
    for i in [*range(60, 120), *range(250, 400)]:
        loads[i] = TWO + 1e-4 * rng.random(E)
    series = losses(400, at340=(9, 1.0))

    def read(watch, first, last):
        for i in range(first, last):
            watch.update(i + 1, series[i], stats(loads[i], spread=rng.uniform(), logit_rms=9.0))

    rng = np.random.default_rng(6)
    whole = watch_of("soft")
    read(whole, 0, 400)
    rng = np.random.default_rng(6)
    before, after = watch_of("soft"), watch_of("soft")
    read(before, 0, cut)
    state = before.state()
    text = json.dumps(state, allow_nan=False)
    read(before, cut, cut + 1)  # a state is a copy: it must not change with the watch
    assert json.dumps(state) == text
    rng = np.random.default_rng(6)
    for _ in range(cut):
        rng.uniform()
    after.restore(json.loads(text))
    read(after, cut, 400)
    assert after.summary() == whole.summary()
    assert after.state() == whole.state()
    assert whole.verdict == "collapse" and len(whole.summary()["events"]) > 2


# definitions


def test_derived_scalars_by_hand():
    loads = np.array([[0.25] * 4, [0.7, 0.28, 0.02, 0.0]])
    assert dead_experts(loads).tolist() == [0, 2]
    np.testing.assert_allclose(max_min_load(loads), [1, 2.5])
    np.testing.assert_allclose(
        load_entropy(np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]])), [1, 0.5, 0]
    )


def test_router_side_l2_disables_the_dispatch_where_its_scale_starts_at_1():
    """Published of protein encoders: with L2 normalisation every slot is the plain mean.

    The scale of today's start, sqrt(D), gives the logits the spread that they have without it.
    """
    rng = np.random.default_rng(0)
    d, slots, tokens = 320, 8, 240
    x = jnp.asarray(rng.standard_normal((2, tokens, d)), jnp.float32)  # as after a layer norm
    kernel = jnp.asarray(0.02 * rng.standard_normal((d, E, slots)), jnp.float32)  # `normal`'s
    valid = jnp.ones((2, tokens), bool)

    @jax.jit
    def measured(scale):
        spec = Soft(slots=slots, l2=scale is not None)
        logits = router_logits(x, RouterWeights(kernel, scale, None))
        return summarise(plan(spec, logits, Tokens(valid))[1], balanced=False)

    def spread(scale):
        return float(measured(None if scale is None else jnp.float32(scale)).spread)

    limit, today = Thresholds().flat, Soft(slots=slots, l2=True).initial_scale(d)
    assert spread(1.0) > limit > spread(None)
    # weights 1 + s z: cosines have s = 1/sqrt(D)
    assert spread(1.0) == pytest.approx(1 - 1 / d / 2 / np.log(tokens), abs=2e-5)
    assert spread(today) < Thresholds().formed
    assert float(measured(jnp.float32(today)).logit_rms) == pytest.approx(1, abs=0.05)


# runs

FORCED = {
    "model__moe__experts": 8,
    "model__moe__load_balance": 0.0,
    "model__moe__z_loss": 0.0,
    "train__clip": 0.0,
    "train__lr": 0.1,
    "train__steps": 90,
    "eval__every": 90,
    "checkpoint__every": 15,
}


@pytest.fixture
def impatient(monkeypatch):
    """Runs are given up after 20 updates of collapse instead of 200."""
    watch = functools.partial(StabilityWatch, thresholds=Thresholds(stop_after=20))
    monkeypatch.setattr(trainer, "StabilityWatch", watch)


def test_a_signal_that_is_not_a_number_is_null_in_run_json(tmp_path):
    watch = feed(watch_of(), [(100, stats(logit_rms=np.nan))])
    write_json(tmp_path / "run.json", {"stability": watch.summary()})
    [content] = read_strictly(tmp_path / "run.json")
    assert [event["value"] for event in content["stability"]["events"]] == [None]
    verdict, event = stability_lines(content["stability"])
    assert verdict == "stability: collapse"
    assert event.startswith("  layer 3: logit_rms not finite from step ")


def test_a_run_without_balancing_collapses_and_is_stopped(tmp_path, impatient, monkeypatch):
    config = tiny_config(**FORCED, train__stop_on_collapse=True)
    found = trainer.run(config, tmp_path / "w")
    assert found["status"] == "collapsed"
    assert found["stability"]["verdict"] == "collapse"
    assert found["stability"]["events"][0]["what"] == "load_entropy"
    assert 21 + 20 <= found["step"] < 90
    assert (tmp_path / "w" / "checkpoints" / str(found["step"])).is_dir()
    assert json.loads((tmp_path / "w" / "run.json").read_text()) == found
    # the same command says the same and trains no further
    again = trainer.run(config, tmp_path / "w")
    of_the_process = {"tokens_per_second": 0, "peak_memory": 0, "execution": None}
    assert again | of_the_process == found | of_the_process
    # interrupted, and with other checkpoints, it ends at the same step
    read, step = trainer.Trainer._read_pending, []

    def read_and_stop(self):
        step.append(self.step)
        if self.step == 33:
            signal.raise_signal(signal.SIGTERM)
        read(self)

    monkeypatch.setattr(trainer.Trainer, "_read_pending", read_and_stop)
    config = tiny_config(**FORCED | {"checkpoint__every": 7}, train__stop_on_collapse=True)
    assert trainer.run(config, tmp_path / "v")["status"] == "stopped"
    monkeypatch.setattr(trainer.Trainer, "_read_pending", read)
    resumed = trainer.run(config, tmp_path / "v")
    assert resumed["params_sha256"] == found["params_sha256"]
    assert resumed["stability"] == found["stability"]


@pytest.mark.slow
def test_collapse_does_not_stop_a_run_unasked(tmp_path, impatient):
    found = trainer.run(tiny_config(**FORCED), tmp_path / "w")
    assert (found["status"], found["step"]) == ("complete", 90)
    assert found["stability"]["verdict"] == "collapse"


def test_the_command_line_ends_a_collapsed_run_with_1_and_one_line(tmp_path, capsys, monkeypatch):
    event = {"layer": 1, "what": "load_entropy", "value": 0.36, "step": 50, "until": None}
    summary = {
        "status": "collapsed", "step": 250,
        "stability": {"verdict": "collapse", "events": [event], "worst": {}},
    }  # fmt: skip
    monkeypatch.setattr(command_line, "parse", lambda argv: (None, tmp_path, None))
    monkeypatch.setattr(trainer, "run", lambda *_: summary)
    assert train.main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "layer 1: load_entropy 0.36 from step 50" in line and "step 250" in line


def test_the_watch_needs_no_jax():
    assert not any(
        isinstance(value, jax.Array) for value in vars(feed(watch_of(), [(30, stats())])).values()
    )
