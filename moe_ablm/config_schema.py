"""The sections of a config as frozen dataclasses, and the encoder that one describes.

Keys are documented in configs/base.py.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from moe_ablm.errors import UserError, suggestion
from moe_ablm.model.families import FAMILIES, Router, TokenChoice
from moe_ablm.model.spec import SIZES, EncoderSpec
from moe_ablm.training.spec import OptimizerSpec

DROPOUTS = ("attention_dropout", "hidden_dropout", "embedding_dropout")


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
        choice("model.moe.gate", self.gate, family.gates)
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
    learned_positions: int
    embedding_norm: bool
    post_norm: bool
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
            learned_positions=self.learned_positions,
            embedding_norm=self.embedding_norm,
            post_norm=self.post_norm,
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


def choice(where: str, value: str, choices: Collection[str]) -> None:
    """UserError unless the value of the key `where` is one of the choices."""
    if value not in choices:
        raise UserError(
            f"config.{where}={value!r}{suggestion(value, choices)}: expected one of "
            f"{', '.join(choices)}"
        )


def require(holds: bool, where: str, value: Any, expected: str) -> None:
    """UserError, with what was expected, unless the value of the key `where` holds."""
    if not holds:
        raise UserError(f"config.{where}={value!r}: expected {expected}")
