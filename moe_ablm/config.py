"""User's ConfigDict -> frozen, checked dataclasses; and the fingerprint that identifies a run.

All validation of what a user can set lives here. Keys are documented in configs/base.py.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moe_ablm.data.dataset import FRACTIONS
from moe_ablm.data.masking import MASKS, parse_policy
from moe_ablm.data.mixture import BATCHINGS, REGIMES, parse_regime
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError, suggestion
from moe_ablm.model.families import FAMILIES, Router, TokenChoice
from moe_ablm.model.spec import ACTIVATIONS, PRECISIONS, REMAT, SIZES, EncoderSpec
from moe_ablm.training.spec import OPTIMIZERS, SCHEDULES, OptimizerSpec
from moe_ablm.training.tracking import TRACKERS


@dataclass(frozen=True)
class DataConfig:
    path: str | tuple[str, ...] | None
    weights: tuple[float, ...] | None
    simulated_pairs: int
    fraction: str
    regime: str
    layout: str
    length: int
    batching: str
    buckets: tuple[int, ...]
    mask: str
    mask_rate: float


@dataclass(frozen=True)
class MoEConfig:
    """The section `model.moe`: one flat list of keys for all router families, as on disk."""

    router: str = "none"
    experts: int = 8
    k: int = 2
    threshold: float = 0.7
    exceed: bool = True
    gate: str = "softmax"
    renormalise: bool | None = None
    capacity: float | None = None
    group: str = "sequence"
    slots: int = 64
    l2: bool = False
    l2_scale: float | None = None
    ffn: int | None = None
    widths: tuple[int, ...] | None = None
    shared: int = 0
    placement: str = "alternate"
    first_dense: int = 1
    pads: str = "excluded"
    jitter: float = 0.0
    balance_rate: float = 0.0
    load_balance: float = 0.01
    z_loss: float = 0.001
    entropy_loss: float = 0.0

    def spec(self) -> Router | None:
        """The router family with the keys that it has; None: dense.

        Raises:
          UserError: a key is set that the family does not have.
        """
        if self.router == "none":
            return None
        family = FAMILIES[self.router]
        owned = {f.name for f in dataclasses.fields(family)}
        for key, reason in REFUSED.items():
            default = getattr(MoEConfig, key)
            if key not in owned and getattr(self, key) != default:
                raise UserError(
                    f"config.model.moe.{key}={getattr(self, key)!r}: expected {default!r} with "
                    f"model.moe.router={self.router!r}{reason}"
                )
        _choice("model.moe.gate", self.gate, family.gates)
        return family(**{key: getattr(self, key) for key in owned})

    @classmethod
    def of(cls, spec: Router | None) -> "MoEConfig":
        """The flat section of a router; keys that its family does not have keep their defaults."""
        if spec is None:
            return cls()
        return cls(router=spec.name, **dataclasses.asdict(spec))


# keys that must not be set where a family does not have them, and why; all others are ignored there
REFUSED = {
    "widths": ", whose experts all do equal work; unequal ones need "
    + ", ".join(n for n, family in FAMILIES.items() if issubclass(family, TokenChoice)),
    "balance_rate": ", which is balanced by construction",
    "capacity": ", which has no queues",
    "group": ", where antibodies never meet",
    "pads": "",
    "jitter": ": tokens of an antibody would be routed apart",
    "exceed": "",
    "l2": "",
    "l2_scale": "",
}


@dataclass(frozen=True)
class ModelConfig:
    size: str
    layers: int | None
    d_model: int | None
    ffn: int | None
    heads: int | None
    token_dropout: bool
    activation: str
    tied: bool
    layer_norm_eps: float
    attention_dropout: float
    hidden_dropout: float
    embedding_dropout: float
    moe: MoEConfig

    def spec(self) -> EncoderSpec:
        """The encoder that this section describes."""
        named = SIZES.get(self.size, (0, 0, 0, 0))  # other names give all four
        given = (self.layers, self.d_model, self.ffn, self.heads)
        layers, d_model, ffn, heads = (
            n if g is None else g for g, n in zip(given, named, strict=True)
        )
        return EncoderSpec(
            layers=layers,
            d_model=d_model,
            ffn=ffn,
            heads=heads,
            token_dropout=self.token_dropout,
            activation=self.activation,
            tied=self.tied,
            layer_norm_eps=self.layer_norm_eps,
            moe=self.moe.spec(),
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            embedding_dropout=self.embedding_dropout,
        )


@dataclass(frozen=True)
class TrainConfig(OptimizerSpec):
    init: str | None
    batch: int
    accumulate: int
    ema: float
    patience: int
    stop_on_collapse: bool
    z_loss: float


@dataclass(frozen=True)
class EvalConfig:
    every: int
    pairs: int


@dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int


@dataclass(frozen=True)
class LogConfig:
    every: int
    profile: str | None
    tracker: str | None

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last update that `profile` names."""
        if self.profile is None:
            return None
        first, last = self.profile.split(":")
        return int(first), int(last)


@dataclass(frozen=True)
class MeshConfig:
    data: int
    expert: int
    fsdp: int


@dataclass(frozen=True)
class ComputeConfig:
    precision: str
    scan: bool | None
    remat: str | None
    loader_threads: int


@dataclass(frozen=True)
class Config:
    """A run. Everything but `OUTSIDE_IDENTITY` decides its result."""

    seed: int
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    mesh: MeshConfig
    compute: ComputeConfig


MOST_LAYERS = 1 << 12  # more than were ever trained, fewer than take minutes to trace
MOST = 2**32 - 1  # of whole numbers: what seeds have room for
MOST_STEPS = 2**31 - 1  # as jax counts updates
MOST_SIMULATED = 10**8  # pairs, some 50 GB
MOST_THREADS = 1024  # of the loader: more than a machine has cores
DROPOUTS = ("attention_dropout", "hidden_dropout", "embedding_dropout")


def _earlier_l2_scale(moe: Mapping[str, Any]) -> float | None:
    return 1.0 if moe.get("l2") else None


# keys of later versions, with what earlier ones did (a value, or a function of the section): a run
# that leaves them so is the same run
LATER: dict[str, Any] = {
    "config.model.moe.exceed": True,
    "config.model.moe.l2_scale": _earlier_l2_scale,
    "config.model.layer_norm_eps": EncoderSpec.layer_norm_eps,
    **{f"config.model.{name}": 0.0 for name in DROPOUTS},
    "config.train.init": None,
    "config.train.freeze": 0,
    "config.train.restarts": (),
    "config.train.optimizer": "adamw",
    "config.train.muon_lr": 0.02,
    "config.train.router_lr": 1.0,
    "config.train.skip_spikes": 0.0,
    "config.train.z_loss": 0.0,
    "config.log.profile": None,
    "config.log.tracker": None,
}
# what our keys are called elsewhere
ELSEWHERE = {
    "learning_rate": "lr", "peak_lr": "lr", "batch_size": "batch", "num_steps": "steps",
    "max_steps": "steps", "train_steps": "steps", "warmup_steps": "warmup",
    "lr_schedule": "schedule",
    "grad_clip": "clip", "wd": "weight_decay", "epsilon": "eps", "num_layers": "layers",
    "hidden_size": "d_model", "width": "d_model", "num_heads": "heads", "ffn_size": "ffn",
    "num_experts": "experts", "top_k": "k", "capacity_factor": "capacity", "max_length": "length",
    "accumulation": "accumulate", "gradient_accumulation_steps": "accumulate",
}  # fmt: skip
# keys that were switches: what False and True meant
EARLIER_BOOLEANS = {"config.compute.remat": ("none", "full")}
# hardware, and what is only seen of a run; datasets and what the run starts from count by their
# content, not by their paths
OUTSIDE_IDENTITY = (
    "mesh", "compute", "checkpoint", "log", "data.path", "data.simulated_pairs", "train.init"
)  # fmt: skip


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Checks a ConfigDict (or any nested mapping) and freezes it.

    Raises:
      UserError: a key is unknown or missing, a value has the wrong type or lies out of range.
    """
    config = _build(Config, tree, "config")
    _check(config)
    return config


def encoder_of_run(model: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of the section `model` of a run's `config.json`.

    Keys that the run's version did not have yet take their defaults, which do what it did.

    Raises:
      UserError: a key is unknown, or a value wrong.
    """
    if not isinstance(model, Mapping) or not isinstance(model.get("moe", {}), Mapping):
        raise UserError("config.model: expected a section with keys")
    later = {"activation": EncoderSpec.activation, "tied": EncoderSpec.tied}
    stored = dict(model.get("moe", {}))
    moe = dataclasses.asdict(MoEConfig()) | {"l2_scale": _earlier_l2_scale(stored)} | stored
    config = _build(ModelConfig, later | dict(model) | {"moe": moe}, "config.model")
    _check_model(config)
    return config.spec()


def stored_encoder(spec: EncoderSpec) -> dict[str, Any]:
    """`encoder_to_mapping` with the rates of dropout, as written to `model.json`."""
    rates = {name: getattr(spec, name) for name in DROPOUTS}
    return encoder_to_mapping(spec) | {name: rate for name, rate in rates.items() if rate}


def encoder_to_mapping(spec: EncoderSpec) -> dict[str, Any]:
    """Plain nested dict of what decides the function of an encoder: dropout acts in training."""
    tree = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    moe = dataclasses.asdict(MoEConfig.of(spec.moe))
    if moe["l2_scale"] == _earlier_l2_scale(moe):
        del moe["l2_scale"]
    if spec.layer_norm_eps == EncoderSpec.layer_norm_eps:  # earlier versions had no other
        del tree["layer_norm_eps"]
    return {k: v for k, v in tree.items() if k not in DROPOUTS} | {"moe": moe}


def encoder_from_mapping(tree: Mapping[str, Any]) -> EncoderSpec:
    """An encoder from `stored_encoder` or `encoder_to_mapping`, checked.

    Raises:
      UserError: a key is unknown or missing, or a value wrong.
    """
    tree = dict(tree)
    vocabulary = tree.pop("vocabulary", None)
    _require(vocabulary == EncoderSpec.vocabulary, "model.vocabulary", vocabulary,
             f"{EncoderSpec.vocabulary}, ESM-2's")  # fmt: skip
    model = _build(ModelConfig, {"size": "stored", **tree}, "config.model")
    _check_model(model)
    return model.spec()


def to_dict(config: Config) -> dict:
    """Nested plain dict of a config, as written to `config.json`."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> `{"a.b": value}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def identity(config: Config, dataset: str) -> dict[str, Any]:
    """The part of a config that decides the result, flat, with the dataset's content hash."""
    tree = to_dict(config)
    kept = {
        key: value
        for key, value in flatten(tree).items()
        if not any(key == out or key.startswith(f"{out}.") for out in OUTSIDE_IDENTITY)
        and (f"config.{key}" not in LATER or value != _earlier(f"config.{key}", tree))
    }
    return kept | {"dataset": dataset}


def _earlier(name: str, tree: Mapping[str, Any]) -> Any:
    """What versions did that did not have the key `name`; `tree` is the whole config."""
    value = LATER[name]
    if not callable(value):
        return value
    for part in name.split(".")[1:-1]:
        tree = tree[part]
    return value(tree)


def fingerprint(config: Config, dataset: str) -> str:
    """Identity of a run, 16 hexadecimal digits: equal for runs that must end with equal results."""
    text = json.dumps(identity(config, dataset), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_argument(
    arg: str | None,
    defaults: Mapping[str, str],
    allowed: Mapping[str, Collection[str]] | None = None,
) -> dict[str, str]:
    """`size=35m,data=half` of `--config=file.py:size=35m,data=half` over `defaults`.

    Args:
      arg: what stands after the colon.
      defaults: value by name.
      allowed: values by name; any where the name is absent.

    Raises:
      UserError: a part is not `name=value`, or its name or value is unknown.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            raise UserError(
                f"--config=...:{arg}: {part!r} is not understood{suggestion(name, defaults)}; "
                f"expected name=value with name one of {', '.join(defaults)}"
            )
        values[name] = value
    for name, known in (allowed or {}).items():
        if values[name] not in known:
            raise UserError(
                f"--config=...:{arg}: {name}={values[name]!r}{suggestion(values[name], known)}: "
                f"expected one of {', '.join(known)}"
            )
    return values


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping) and not hasattr(tree, "items"):
        raise UserError(f"{where}: found {tree!r}, expected a section with keys")
    tree = dict(tree.items())
    fields = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise UserError(_no_key(where, key, fields))
    values = {}
    for name, kind in fields.items():
        if isinstance(tree.get(name), bool) and f"{where}.{name}" in EARLIER_BOOLEANS:
            tree[name] = EARLIER_BOOLEANS[f"{where}.{name}"][tree[name]]
        if name not in tree and f"{where}.{name}" in LATER:
            value = LATER[f"{where}.{name}"]
            tree[name] = value(tree) if callable(value) else value
        if name not in tree:
            raise UserError(f"{where}.{name} is missing: start from configs/base.py")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[name] = _build(kind, tree[name], f"{where}.{name}")
        else:
            values[name] = _typed(tree[name], kind, f"{where}.{name}")
    return cls(**values)


def _no_key(where: str, key: str, fields: Collection[str]) -> str:
    """That a section has no such key, and which was meant, if that can be guessed."""
    named = ELSEWHERE.get(key.lower(), key)
    in_others = [k for k in keys(Config, "config") if k.endswith(f".{named}")]
    if named in fields:
        near = f" (did you mean {named!r}?)"
    elif in_others:
        near = f" (did you mean {in_others[0]!r}?)"
    else:
        near = suggestion(key, fields) or f"; known keys: {', '.join(fields)}"
    return f"{where}.{key} is not a config key{near}"


def keys(cls: type, where: str) -> dict[str, Any]:
    """Type of every key of a section and of those within, by name."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        inner = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found |= keys(kind, f"{where}.{name}") if inner else {f"{where}.{name}": kind}
    return found


def require_key(name: str) -> None:
    """UserError unless there is a key such as "config.train.lr"."""
    cls: Any = Config
    parts = name.split(".")
    for place, part in enumerate(parts[1:], 1):
        fields = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in fields:
            raise UserError(_no_key(".".join(parts[:place]), part, fields))
        cls = fields[part]
    if dataclasses.is_dataclass(cls):
        first = next(iter(typing.get_type_hints(cls)))
        raise UserError(f"{name} is a section: set its keys, as --{name}.{first}=...")


def expected(name: str) -> str:
    """What values a key takes, in words, such as "int"."""
    return _names(keys(Config, "config")[name])


def _names(kind: Any) -> str:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(_name(k) for k in kinds if k is not type(None))


def _typed(value: Any, kind: Any, where: str) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value!r}: expected a finite number")
    if isinstance(value, int) and abs(value) > MOST:
        raise UserError(f"{where}={value!r}: expected at most {MOST:,}")
    for each in kinds:
        if each is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is each:
            return value
        if typing.get_origin(each) is tuple and isinstance(value, (tuple, list)):  # list: from JSON
            element = typing.get_args(each)[0]
            return tuple(_typed(v, element, f"{where}[{i}]") for i, v in enumerate(value))
    raise UserError(f"{where}={value!r}: expected {_names(kind)}")


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"several ({typing.get_args(kind)[0].__name__}, ...)"
    return kind.__name__


def _choice(where: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(
            f"config.{where}={value!r}{suggestion(value, choices)}: expected one of "
            f"{', '.join(choices)}"
        )


def _require(holds: bool, where: str, value: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"config.{where}={value!r}: expected {expected}")


def _check(c: Config) -> None:
    _choice("data.fraction", c.data.fraction, FRACTIONS)
    _choice("data.layout", c.data.layout, LAYOUTS)
    _choice("data.batching", c.data.batching, BATCHINGS)
    _parse("data.regime", c.data.regime, REGIMES, parse_regime)
    _parse("data.mask", c.data.mask, MASKS, parse_policy)
    _check_data(c.data)
    _choice("train.schedule", c.train.schedule, SCHEDULES)
    _choice("compute.precision", c.compute.precision, ("auto", *PRECISIONS))
    if c.compute.remat is not None:
        _choice("compute.remat", c.compute.remat, REMAT)
    for name, most in (("compute.loader_threads", MOST_THREADS), ("train.steps", MOST_STEPS),
                       ("data.simulated_pairs", MOST_SIMULATED)):  # fmt: skip
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        _require(value <= most, name, value, f"at most {most:,}")
    _require(0 <= c.seed < 2**32, "seed", c.seed, "0 to 2^32 - 1")
    _require(0 < c.data.mask_rate < 1, "data.mask_rate", c.data.mask_rate, "between 0 and 1")
    for name in ("data.length", "data.simulated_pairs", "train.steps", "train.batch",
                 "train.accumulate", "eval.every", "eval.pairs", "checkpoint.every",
                 "checkpoint.keep", "log.every", "mesh.expert", "mesh.fsdp",
                 "compute.loader_threads"):  # fmt: skip
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        _require(value > 0, name, value, "a positive number")
    _require(c.mesh.data > 0 or c.mesh.data == -1, "mesh.data", c.mesh.data, "-1 or positive")
    _check_optimizer(c.train)
    _require(0 <= c.train.ema < 1, "train.ema", c.train.ema, "0 (off) to below 1")
    _require(0 < c.train.decay_share <= 1, "train.decay_share", c.train.decay_share, "in (0, 1]")
    _check_wsd(c.train)
    if c.log.tracker is not None:
        _choice("log.tracker", c.log.tracker, TRACKERS)
    _check_profile(c.log.profile, c.train.steps)
    _require(c.train.patience >= 0, "train.patience", c.train.patience, "0 (off) or more")
    _require(c.train.batch % c.train.accumulate == 0, "train.accumulate", c.train.accumulate,
             f"a divisor of train.batch ({c.train.batch})")  # fmt: skip
    _check_model(c.model)
    spec = c.model.spec()
    layers = spec.layers
    _require(0 <= c.train.freeze <= layers, "train.freeze", c.train.freeze,
             f"0 (off) to the number of layers ({layers})")  # fmt: skip
    _require(spec.moe is not None or c.train.router_lr == 1, "train.router_lr", c.train.router_lr,
             "1 with model.moe.router='none', which has no routers")  # fmt: skip
    _require(not (c.train.freeze and c.model.moe.balance_rate), "model.moe.balance_rate",
             c.model.moe.balance_rate, "0 with train.freeze, which it would not obey")  # fmt: skip


def _check_profile(profile: str | None, steps: int) -> None:
    if profile is None:
        return
    found = re.fullmatch(r"([1-9]\d{0,11}):([1-9]\d{0,11})", profile, re.ASCII)
    holds = found is not None and int(found[1]) <= int(found[2]) <= steps
    _require(holds, "log.profile", profile, "FROM:TO, the first and the last update to trace, such "
             f"as 20:24, out of 1 to train.steps ({steps})")  # fmt: skip


def _check_optimizer(t: TrainConfig) -> None:
    """Values at which an optimizer is another algorithm, or none, without a word."""
    _choice("train.optimizer", t.optimizer, OPTIMIZERS)
    for name in ("lr", "muon_lr"):
        _require(getattr(t, name) > 0, f"train.{name}", getattr(t, name), "a positive number")
    default = LATER["config.train.muon_lr"]
    _require(t.optimizer == "muon" or t.muon_lr == default, "train.muon_lr", t.muon_lr,
             f"{default} with train.optimizer={t.optimizer!r}, which does not use it")  # fmt: skip
    for name in ("beta1", "beta2"):
        _require(0 <= getattr(t, name) < 1, f"train.{name}", getattr(t, name), "0 to below 1")
    _require(t.skip_spikes == 0 or t.skip_spikes >= 1, "train.skip_spikes", t.skip_spikes,
             "0 (off), or standard deviations, 1 or more")  # fmt: skip
    _require(t.eps > 0, "train.eps", t.eps, "a positive number")
    for name in ("weight_decay", "clip", "z_loss", "router_lr"):
        _require(getattr(t, name) >= 0, f"train.{name}", getattr(t, name), "0 (off) or more")
    rising = sorted(set(t.restarts)) == list(t.restarts) and min(t.restarts, default=1) > 0
    _require(rising and max(t.restarts, default=0) < t.steps, "train.restarts", t.restarts,
             f"rising numbers of updates, from 1 to below train.steps ({t.steps})")  # fmt: skip
    shortest = min(t.cycles)
    within = f"the shortest course between train.restarts ({shortest})"
    _require(0 <= t.warmup <= shortest, "train.warmup", t.warmup,
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
    _require(bool(paths) and "" not in paths and len(set(paths)) == len(paths), "data.path", d.path,
             "one dataset or several different ones")  # fmt: skip
    if d.weights is not None:
        _require(len(d.weights) == len(paths), "data.weights", d.weights,
                 f"one number for each dataset of data.path ({len(paths)})")  # fmt: skip
        _require(min(d.weights) >= 0 and max(d.weights) > 0, "data.weights", d.weights,
                 "numbers of 0 or more, at least one above 0")  # fmt: skip
    _require(d.length < 2**16, "data.length", d.length, "less than 65,536 tokens")
    if d.batching == "bucketed":
        rising = sorted(set(d.buckets)) == list(d.buckets) and min(d.buckets, default=0) > 0
        _require(rising and d.buckets[-1] == d.length, "data.buckets", d.buckets,
                 f"rising lengths, the last one data.length ({d.length})")  # fmt: skip


def _check_model(m: ModelConfig) -> None:
    given = (m.layers, m.d_model, m.ffn, m.heads)
    if m.size not in SIZES and None in given:
        raise UserError(
            f"config.model.size={m.size!r}{suggestion(m.size, SIZES)}: expected one of "
            f"{', '.join(SIZES)}, or another name with model.layers, d_model, ffn and heads given"
        )
    _choice("model.activation", m.activation, ACTIVATIONS)
    if counted := re.fullmatch(r"top[-_ ]?([1-9]\d?)", m.moe.router, re.IGNORECASE):
        raise UserError(
            f"config.model.moe.router={m.moe.router!r}: expected model.moe.router='topk' with "
            f"model.moe.k={counted[1]}"
        )
    _choice("model.moe.router", m.moe.router, ("none", *FAMILIES))
    for name in DROPOUTS:
        _require(0 <= getattr(m, name) < 1, f"model.{name}", getattr(m, name), "0 (off) to below 1")
    spec = m.spec()
    for name in ("layers", "d_model", "ffn", "heads"):
        _require(getattr(spec, name) > 0, f"model.{name}", getattr(spec, name), "a positive number")
    _require(0 < spec.layer_norm_eps <= 0.01, "model.layer_norm_eps", spec.layer_norm_eps,
             "above 0, at most .01")  # fmt: skip
    _require(spec.layers <= MOST_LAYERS, "model.layers", spec.layers, f"1 to {MOST_LAYERS:,}")
    if spec.d_model % spec.heads:
        raise UserError(
            f"config.model.heads={spec.heads} does not divide model.d_model={spec.d_model}"
        )
    _require(spec.head_dim % 2 == 0, "model.heads", spec.heads,
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
        layers = spec.moe_layers
    except ValueError as error:
        raise UserError(f"config.{error}") from error
    if not layers:
        raise UserError(
            f"config.model.moe: placement={moe.placement!r} with first_dense={moe.first_dense} "
            f"leaves none of the {spec.layers} layers to experts; use router='none' or change them"
        )
