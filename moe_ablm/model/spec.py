"""What an encoder is (its identity) and how it is computed (its execution), as frozen dataclasses.

Axis letters, the same in the whole package:
`B` batch, `L` length, `D` model width, `F` FFN width, `H` heads, `E` experts, `K` choices a token,
`C` capacity, `V` vocabulary.
"""

from dataclasses import dataclass, field

# layers, D, F, H of the ESM-2 ladder (facebookresearch/esm); 350m is the AbLM scaling study's
SIZES = {
    "8m": (6, 320, 1280, 20),
    "35m": (12, 480, 1920, 20),
    "150m": (30, 640, 2560, 20),
    "350m": (32, 960, 3840, 20),
    "650m": (33, 1280, 5120, 20),
}
ROUTERS = ("none", "topk")
GROUPS = ("sequence", "batch")
PLACEMENTS = "every, alternate, last_N (N a number) or layer numbers such as 1,3,5"


@dataclass(frozen=True)
class MoESpec:
    """Mixture-of-experts layers of an encoder. `router="none"` makes it dense."""

    router: str = "none"
    experts: int = 8  # E
    k: int = 2  # K, experts a token
    capacity: float | None = None  # None: dropless
    group: str = "sequence"  # tokens that compete for capacity
    placement: str = "alternate"
    first_dense: int = 1  # the first n layers stay dense whatever `placement` says
    load_balance: float = 0.01  # weight of the load-balance loss (Switch)
    z_loss: float = 0.001  # weight of the router z-loss (ST-MoE)


@dataclass(frozen=True)
class EncoderSpec:
    """An ESM-2 encoder, with some of its FFNs replaced by experts."""

    layers: int
    d_model: int
    ffn: int
    heads: int
    vocabulary: int = 33
    token_dropout: bool = True
    moe: MoESpec = field(default_factory=MoESpec)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

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
