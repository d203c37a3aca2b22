"""Which values a config may have: ranges, choices, and what does not go together."""

import re
from collections.abc import Callable

from moe_ablm.config_keys import LATER
from moe_ablm.config_schema import (
    DROPOUTS,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    choice,
    require,
)
from moe_ablm.data.dataset import FRACTIONS
from moe_ablm.data.masking import MASKS, parse_policy
from moe_ablm.data.mixture import BATCHINGS, REGIMES, parse_regime
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError, suggestion
from moe_ablm.model.families import FAMILIES, Router
from moe_ablm.model.spec import ACTIVATIONS, PRECISIONS, REMAT, SIZES, EncoderSpec
from moe_ablm.training.spec import OPTIMIZERS, SCHEDULES
from moe_ablm.training.tracking import TRACKERS

MOST_LAYERS = 1 << 12  # more than were ever trained, fewer than take minutes to trace
MOST_STEPS = 2**31 - 1  # as jax counts updates
MOST_SIMULATED = 10**8  # pairs, some 50 GB
MOST_THREADS = 1024  # of the loader: more than a machine has cores


def check(c: Config) -> None:
    """UserError where a value is out of its range, or does not go with the others."""
    choice("data.fraction", c.data.fraction, FRACTIONS)
    choice("data.layout", c.data.layout, LAYOUTS)
    choice("data.batching", c.data.batching, BATCHINGS)
    _parse("data.regime", c.data.regime, REGIMES, parse_regime)
    _parse("data.mask", c.data.mask, MASKS, parse_policy)
    _check_data(c.data)
    choice("train.schedule", c.train.schedule, SCHEDULES)
    choice("compute.precision", c.compute.precision, ("auto", *PRECISIONS))
    if c.compute.remat is not None:
        choice("compute.remat", c.compute.remat, REMAT)
    for name, most in (("compute.loader_threads", MOST_THREADS), ("train.steps", MOST_STEPS),
                       ("data.simulated_pairs", MOST_SIMULATED)):  # fmt: skip
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        require(value <= most, name, value, f"at most {most:,}")
    require(0 <= c.seed < 2**32, "seed", c.seed, "0 to 2^32 - 1")
    require(0 < c.data.mask_rate < 1, "data.mask_rate", c.data.mask_rate, "between 0 and 1")
    for name in ("data.length", "data.simulated_pairs", "train.steps", "train.batch",
                 "train.accumulate", "eval.every", "eval.pairs", "checkpoint.every",
                 "checkpoint.keep", "log.every", "mesh.expert", "mesh.fsdp",
                 "compute.loader_threads"):  # fmt: skip
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        require(value > 0, name, value, "a positive number")
    require(c.mesh.data > 0 or c.mesh.data == -1, "mesh.data", c.mesh.data, "-1 or positive")
    _check_optimizer(c.train)
    require(0 <= c.train.ema < 1, "train.ema", c.train.ema, "0 (off) to below 1")
    require(0 < c.train.decay_share <= 1, "train.decay_share", c.train.decay_share, "in (0, 1]")
    _check_wsd(c.train)
    if c.log.tracker is not None:
        choice("log.tracker", c.log.tracker, TRACKERS)
    _check_profile(c.log.profile, c.train.steps)
    require(c.train.patience >= 0, "train.patience", c.train.patience, "0 (off) or more")
    require(c.train.batch % c.train.accumulate == 0, "train.accumulate", c.train.accumulate,
             f"a divisor of train.batch ({c.train.batch})")  # fmt: skip
    check_model(c.model)
    spec = c.model.spec()
    layers = spec.layers
    positions = spec.learned_positions
    require(not positions or c.data.length <= positions, "data.length", c.data.length,
             f"at most model.learned_positions ({positions})")  # fmt: skip
    require(0 <= c.train.freeze <= layers, "train.freeze", c.train.freeze,
             f"0 (off) to the number of layers ({layers})")  # fmt: skip
    require(spec.moe is not None or c.train.router_lr == 1, "train.router_lr", c.train.router_lr,
             "1 with model.moe.router='none', which has no routers")  # fmt: skip
    require(not (c.train.freeze and c.model.moe.balance_rate), "model.moe.balance_rate",
             c.model.moe.balance_rate, "0 with train.freeze, which it would not obey")  # fmt: skip


def _check_profile(profile: str | None, steps: int) -> None:
    if profile is None:
        return
    found = re.fullmatch(r"([1-9]\d{0,11}):([1-9]\d{0,11})", profile, re.ASCII)
    holds = found is not None and int(found[1]) <= int(found[2]) <= steps
    require(holds, "log.profile", profile, "FROM:TO, the first and the last update to trace, such "
             f"as 20:24, out of 1 to train.steps ({steps})")  # fmt: skip


def _check_optimizer(t: TrainConfig) -> None:
    """Values at which an optimizer is another algorithm, or none, without a word."""
    choice("train.optimizer", t.optimizer, OPTIMIZERS)
    for name in ("lr", "muon_lr"):
        require(getattr(t, name) > 0, f"train.{name}", getattr(t, name), "a positive number")
    default = LATER["config.train.muon_lr"]
    require(t.optimizer == "muon" or t.muon_lr == default, "train.muon_lr", t.muon_lr,
             f"{default} with train.optimizer={t.optimizer!r}, which does not use it")  # fmt: skip
    for name in ("beta1", "beta2"):
        require(0 <= getattr(t, name) < 1, f"train.{name}", getattr(t, name), "0 to below 1")
    require(t.skip_spikes == 0 or t.skip_spikes >= 1, "train.skip_spikes", t.skip_spikes,
             "0 (off), or standard deviations, 1 or more")  # fmt: skip
    require(t.eps > 0, "train.eps", t.eps, "a positive number")
    for name in ("weight_decay", "clip", "z_loss", "router_lr"):
        require(getattr(t, name) >= 0, f"train.{name}", getattr(t, name), "0 (off) or more")
    rising = sorted(set(t.restarts)) == list(t.restarts) and min(t.restarts, default=1) > 0
    require(rising and max(t.restarts, default=0) < t.steps, "train.restarts", t.restarts,
             f"rising numbers of updates, from 1 to below train.steps ({t.steps})")  # fmt: skip
    shortest = min(t.cycles)
    within = f"the shortest course between train.restarts ({shortest})"
    require(0 <= t.warmup <= shortest, "train.warmup", t.warmup,
             f"0 to {within if t.restarts else f'train.steps ({t.steps})'}: lower it, or raise "
             "train.steps")  # fmt: skip


def _check_wsd(t: TrainConfig) -> None:
    cycle = t.cycles.index(min(t.cycles))
    steps, decay = t.cycles[cycle], t.decay_steps(cycle)
    if t.schedule == "wsd" and t.warmup + decay > steps:
        name = f"train.steps={steps}" if not t.restarts else f"{steps} steps between train.restarts"
        raise UserError(
            f"config.train.schedule='wsd': train.warmup={t.warmup} and a decay of {decay} "
            f"steps (train.decay_share={t.decay_share:g}) do not fit into {name}: "
            f"the rate would not reach 0; lower train.warmup to {steps - decay} or less, "
            "lower train.decay_share, or raise train.steps"
        )


def _parse(where: str, value: str, forms: tuple[str, ...], parse: Callable[[str], object]) -> None:
    try:
        parse(value)
    except ValueError as error:
        raise UserError(f"config.{where}={value!r}{suggestion(value, forms)}: {error}") from error


def _check_data(d: DataConfig) -> None:
    paths = d.path if isinstance(d.path, tuple) else (d.path,)
    require(bool(paths) and "" not in paths and len(set(paths)) == len(paths), "data.path", d.path,
             "one dataset or several different ones")  # fmt: skip
    if d.weights is not None:
        require(len(d.weights) == len(paths), "data.weights", d.weights,
                 f"one number for each dataset of data.path ({len(paths)})")  # fmt: skip
        require(min(d.weights) >= 0 and max(d.weights) > 0, "data.weights", d.weights,
                 "numbers of 0 or more, at least one above 0")  # fmt: skip
    require(d.length < 2**16, "data.length", d.length, "less than 65,536 tokens")
    if d.batching == "bucketed":
        rising = sorted(set(d.buckets)) == list(d.buckets) and min(d.buckets, default=0) > 0
        require(rising and d.buckets[-1] == d.length, "data.buckets", d.buckets,
                 f"rising lengths, the last one data.length ({d.length})")  # fmt: skip


def check_model(m: ModelConfig) -> None:
    """The same of the section `model` alone."""
    given = (m.layers, m.d_model, m.ffn, m.heads)
    if m.size not in SIZES and None in given:
        raise UserError(
            f"config.model.size={m.size!r}{suggestion(m.size, SIZES)}: expected one of "
            f"{', '.join(SIZES)}, or another name with model.layers, d_model, ffn and heads given"
        )
    choice("model.activation", m.activation, ACTIVATIONS)
    if counted := re.fullmatch(r"top[-_ ]?([1-9]\d?)", m.moe.router, re.IGNORECASE):
        raise UserError(
            f"config.model.moe.router={m.moe.router!r}: expected model.moe.router='topk' with "
            f"model.moe.k={counted[1]}"
        )
    choice("model.moe.router", m.moe.router, ("none", *FAMILIES))
    for name in DROPOUTS:
        require(0 <= getattr(m, name) < 1, f"model.{name}", getattr(m, name), "0 (off) to below 1")
    spec = m.spec()
    for name in ("layers", "d_model", "ffn", "heads"):
        require(getattr(spec, name) > 0, f"model.{name}", getattr(spec, name), "a positive number")
    require(0 < spec.layer_norm_eps <= 0.01, "model.layer_norm_eps", spec.layer_norm_eps,
             "above 0, at most .01")  # fmt: skip
    require(0 <= spec.learned_positions < 2**16, "model.learned_positions", spec.learned_positions,
             "0 (rotary positions) to 65,535")  # fmt: skip
    require(spec.layers <= MOST_LAYERS, "model.layers", spec.layers, f"1 to {MOST_LAYERS:,}")
    if spec.d_model % spec.heads:
        raise UserError(
            f"config.model.heads={spec.heads} does not divide model.d_model={spec.d_model}"
        )
    require(spec.head_dim % 2 == 0, "model.heads", spec.heads,
             f"an even head width, not d_model / heads = {spec.head_dim}")  # fmt: skip
    if spec.moe:
        _check_moe(spec, spec.moe)


def _check_moe(spec: EncoderSpec, moe: Router) -> None:
    for key, expected in moe.problems():
        value = getattr(moe, key)
        near = (
            suggestion(value, expected.replace(",", "").split()) if isinstance(value, str) else ""
        )
        raise UserError(f"config.model.moe.{key}={value!r}{near}: expected {expected}")
    try:
        spec.require_moe_layers()
    except ValueError as error:
        raise UserError(f"config.{error}") from error
