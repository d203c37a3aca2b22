"""User's ConfigDict -> frozen, checked dataclasses; and the fingerprint that identifies a run.

Sections are in config_schema.py, names of keys in config_keys.py, checks in config_checks.py.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from moe_ablm.config_checks import check, check_model
from moe_ablm.config_keys import LATER, LATER_OF_ENCODER, build, earlier_l2_scale
from moe_ablm.config_schema import DROPOUTS, Config, ModelConfig, MoEConfig, require
from moe_ablm.errors import UserError, suggestion
from moe_ablm.model.spec import EncoderSpec

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
    config = build(Config, tree, "config")
    check(config)
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
    moe = dataclasses.asdict(MoEConfig()) | {"l2_scale": earlier_l2_scale(stored)} | stored
    config = build(ModelConfig, later | dict(model) | {"moe": moe}, "config.model")
    check_model(config)
    return config.spec()


def stored_encoder(spec: EncoderSpec) -> dict[str, Any]:
    """`encoder_to_mapping` with the rates of dropout, as written to `model.json`."""
    rates = {name: getattr(spec, name) for name in DROPOUTS}
    return encoder_to_mapping(spec) | {name: rate for name, rate in rates.items() if rate}


def encoder_to_mapping(spec: EncoderSpec) -> dict[str, Any]:
    """Plain nested dict of what decides the function of an encoder: dropout acts in training."""
    tree = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    moe = dataclasses.asdict(MoEConfig.of(spec.moe))
    if moe["l2_scale"] == earlier_l2_scale(moe):
        del moe["l2_scale"]
    for name in LATER_OF_ENCODER:
        if tree[name] == getattr(EncoderSpec, name):  # earlier versions had no other
            del tree[name]
    return {k: v for k, v in tree.items() if k not in DROPOUTS} | {"moe": moe}


def encoder_from_mapping(tree: Mapping[str, Any]) -> EncoderSpec:
    """An encoder from `stored_encoder` or `encoder_to_mapping`, checked.

    Raises:
      UserError: a key is unknown or missing, or a value wrong.
    """
    tree = dict(tree)
    vocabulary = tree.pop("vocabulary", None)
    require(vocabulary == EncoderSpec.vocabulary, "model.vocabulary", vocabulary,
             f"{EncoderSpec.vocabulary}, ESM-2's")  # fmt: skip
    model = build(ModelConfig, {"size": "stored", **tree}, "config.model")
    check_model(model)
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
