"""Whether a run may start from a model: the same encoder, up to what only training knows."""

from dataclasses import fields

from moe_ablm.errors import UserError
from moe_ablm.interop.huggingface import some
from moe_ablm.interop.saved import Model
from moe_ablm.model.spec import EncoderSpec, MoESpec

# what training may change: who competes for how many places, and the router losses
_FREE = ("capacity", "group", "pads", "jitter", "load_balance", "z_loss", "entropy_loss")
# compared by what they mean instead
_MEANT = ("ffn", "widths", "placement", "first_dense", "renormalise")


def require_same_function(model: Model, spec: EncoderSpec) -> None:
    """UserError unless the encoder of a config computes what `model` computes.

    The first settings that differ are named. Capacity, the group that competes, pad policy, jitter
    and router losses may differ: they act in training alone.
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
    """What decides an encoder's function, by config key."""
    dense = [f.name for f in fields(EncoderSpec) if f.name not in ("moe", "vocabulary")]
    settings = {f"model.{name}": getattr(spec, name) for name in dense}
    sparse, moe = bool(spec.moe_layers), spec.moe
    names = [f.name for f in fields(MoESpec) if f.name not in _FREE + _MEANT]
    settings |= {f"model.moe.{name}": getattr(moe, name) if sparse else None for name in names}
    default = moe.router in ("topk", "sequence") and moe.k > 1
    renormalised = default if moe.renormalise is None else moe.renormalise
    settings["model.moe.router"] = moe.router if sparse else "none"
    settings["model.moe.renormalise"] = renormalised if sparse else None
    settings["model.moe.placement"] = spec.moe_layers
    settings["model.moe.ffn"] = spec.expert_widths if sparse else None
    return settings
