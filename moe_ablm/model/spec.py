"""What an encoder is (its identity) and how it is computed (its execution), as frozen dataclasses.

Axis letters, the same in the whole package:
`B` batch, `L` length, `D` model width, `F` FFN width, `H` heads, `E` experts, `K` choices a token,
`C` capacity, `S` soft slots of an expert, `V` vocabulary.
"""

from dataclasses import dataclass, field
from math import gcd

# layers, D, F, H of the ESM-2 ladder (facebookresearch/esm); 350m is the AbLM scaling study's
SIZES = {
    "8m": (6, 320, 1280, 20),
    "35m": (12, 480, 1920, 20),
    "150m": (30, 640, 2560, 20),
    "350m": (32, 960, 3840, 20),
    "650m": (33, 1280, 5120, 20),
}
ROUTERS = ("none", "topk", "topp", "expert_choice", "soft", "sequence")
TOKEN_ROUTERS = ("topk", "topp", "sequence")  # every token has experts of its own
GATES = ("softmax", "sigmoid", "tokens")
GROUPS = ("sequence", "batch")
PADS = ("logits", "probabilities", "aux")  # BALM-MoE's partial policies
ACTIVATIONS = ("gelu", "swiglu")
PLACEMENTS = "every, alternate, last_N (N a number) or layer numbers such as 1,3,5"


@dataclass(frozen=True)
class MoESpec:
    """Mixture-of-experts layers of an encoder. `router="none"` makes it dense.

    configs/base.py explains every key.
    """

    router: str = "none"
    experts: int = 8  # E
    k: int = 2  # K
    threshold: float = 0.7
    exceed: bool = True
    gate: str = "softmax"
    renormalise: bool | None = None
    capacity: float | None = None
    group: str = "sequence"
    slots: int = 64  # S
    l2: bool = False
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

    @property
    def choices(self) -> int:
        """Most experts that one token may have: the length of a plan's last axis."""
        return self.experts if self.router == "expert_choice" else self.k

    @property
    def limit(self) -> float | None:
        """Slots of an expert over its fair share of the assignments; None: unlimited."""
        return 1.0 if self.router == "expert_choice" and self.capacity is None else self.capacity

    @property
    def mean_choices(self) -> float:
        """Experts that compute for an average token in training (top-p: at most)."""
        return self.k if self.limit is None else self.k * min(self.limit, 1.0)

    def policies(self) -> frozenset[str]:
        """The partial pad policies that are on; padding takes part in all else.

        Raises:
          ValueError: `pads` is neither "excluded", "none" nor a list of `PADS`.
        """
        parts = frozenset(p.strip() for p in self.pads.split(",")) - {"none"}
        if self.pads == "excluded" or parts <= set(PADS):
            return parts
        raise ValueError(
            f"model.moe.pads={self.pads!r}: expected excluded, none, or some of {', '.join(PADS)} "
            "with commas between"
        )


@dataclass(frozen=True)
class EncoderSpec:
    """An ESM-2 encoder, with some of its FFNs replaced by experts."""

    layers: int
    d_model: int
    ffn: int
    heads: int
    vocabulary: int = 33
    token_dropout: bool = True
    activation: str = "gelu"
    tied: bool = True  # the decoder is the embedding
    moe: MoESpec = field(default_factory=MoESpec)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """F of every expert."""
        return self.moe.widths or (self.moe.ffn or self.ffn,) * self.moe.experts

    @property
    def chunk(self) -> int:
        """Width that divides all experts: wider ones are kept as several of this width."""
        return gcd(*self.expert_widths)

    @property
    def shared_ffn(self) -> int:
        """F of all shared experts together, each as wide as the mean of the others."""
        return self.moe.shared * round(sum(self.expert_widths) / self.moe.experts)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold experts, ascending.

        Raises:
          ValueError: `moe.placement` is unknown or names a layer that does not exist.
        """
        if self.moe.router == "none":
            return ()
        return tuple(
            i for i in _placed(self.moe.placement, self.layers) if i >= self.moe.first_dense
        )


def _placed(placement: str, layers: int) -> list[int]:
    if placement == "every":
        return list(range(layers))
    if placement == "alternate":  # BALM-MoE: dense, sparse, dense, sparse, ...
        return list(range(1, layers, 2))
    number = placement.removeprefix("last_")
    if placement.startswith("last_") and number.isdecimal() and 0 < int(number) <= layers:
        return list(range(layers - int(number), layers))
    parts = [p.strip() for p in placement.split(",")]
    if all(p.isdecimal() and int(p) < layers for p in parts):
        return sorted({int(p) for p in parts})
    raise ValueError(
        f"model.moe.placement={placement!r}, {layers} layers: expected {PLACEMENTS} below {layers}"
    )


@dataclass(frozen=True)
class Execution:
    """How an encoder is computed; never part of what it is.

    Attributes:
      activations: dtype of activations between operations, "float32" or "bfloat16".
      operands: dtype of matmul operands. "bfloat16" with float32 activations is the policy for
        CPUs with AMX: products of bfloat16, sums and everything else in float32.
      scan: run equal layers by `lax.scan` (quicker to compile) instead of unrolled (quicker to run
        on CPU).
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    activations: str = "float32"
    operands: str = "float32"
    scan: bool = False
    remat: bool = False


PRECISIONS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16_operands": ("float32", "bfloat16"),
}
