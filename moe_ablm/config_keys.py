"""The keys of a config: their names and types, and what versions did that did not have them yet."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from moe_ablm.config_schema import DROPOUTS, Config
from moe_ablm.errors import UserError, suggestion
from moe_ablm.model.spec import EncoderSpec

# settings of the encoder that later versions have, whose defaults are what earlier ones did
LATER_OF_ENCODER = ("layer_norm_eps", "learned_positions", "embedding_norm", "post_norm")
MOST = 2**32 - 1  # of whole numbers: what seeds have room for


def earlier_l2_scale(moe: Mapping[str, Any]) -> float | None:
    """`model.moe.l2_scale` as versions had it that did not have the key; `moe` is its section."""
    return 1.0 if moe.get("l2") else None


# keys of later versions, with what earlier ones did (a value, or a function of the section): a run
# that leaves them so is the same run
LATER: dict[str, Any] = {
    "config.model.moe.exceed": True,
    "config.model.moe.l2_scale": earlier_l2_scale,
    **{f"config.model.{name}": getattr(EncoderSpec, name) for name in LATER_OF_ENCODER},
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


def build(cls: type, tree: Any, where: str) -> Any:
    """A section of the class `cls`, from a mapping that has its keys.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type; `where` is the section.
    """
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
            values[name] = build(kind, tree[name], f"{where}.{name}")
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
