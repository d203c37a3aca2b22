"""Checks whether a run may start from a model: both encoders must compute the same function."""

from dataclasses import fields

from moe_ablm.config_schema import DROPOUTS, MoEConfig
from moe_ablm.errors import UserError
from moe_ablm.interop.huggingface import some
from moe_ablm.interop.saved import Model
from moe_ablm.model.spec import EncoderSpec

# settings that act only in training: capacity and its group, router losses, initial scales
_FREE = (
    "capacity", "group", "pads", "jitter", "load_balance", "z_loss", "entropy_loss", "l2_scale"
)  # fmt: skip
# settings that are compared by their effect, see `_settings`
_MEANT = ("ffn", "widths", "placement", "first_dense", "renormalise")


def require_same_function(model: Model, spec: EncoderSpec) -> None:
    """UserError unless the encoder of a config computes the same function as `model`.

    The message names the first settings that differ. Settings that act only in training may differ:
    capacity, group, pad policy, jitter, router losses, initial scales and dropout.
    """
    differing = [
        f"{name}={ours!r} (there {theirs!r})"
        for (name, theirs), ours in zip(
            _settings(model.spec).items(), _settings(spec).values(), strict=True
        )
        if ours != theirs
    ]
    if differing:
        raise UserError(
            f"config.train.init: {model.source} is another encoder than the config's: "
            f"{some(differing)}; set them alike"
        )


def _settings(spec: EncoderSpec) -> dict:
    """The settings that decide an encoder's function, by config key."""
    settings = {
        f"model.{f.name}": getattr(spec, f.name)
        for f in fields(EncoderSpec)
        if f.name not in ("moe", "vocabulary", *DROPOUTS)
    }
    moe = MoEConfig.of(spec.moe if spec.moe_layers else None)
    for field in fields(MoEConfig):
        if field.name not in _FREE + _MEANT:
            settings[f"model.moe.{field.name}"] = getattr(moe, field.name)
    settings["model.moe.renormalise"] = getattr(spec.moe, "renormalised", None)
    settings["model.moe.placement"] = spec.moe_layers
    settings["model.moe.ffn"] = spec.expert_widths
    return settings
