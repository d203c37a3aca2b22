"""What an encoder is (its identity) and how it is computed (its execution), as frozen dataclasses.

Axis letters, the same in the whole package:
`B` batch, `L` length, `D` model width, `F` FFN width, `H` heads, `E` experts, `K` experts per
token, `C` capacity, `S` slots of an expert in soft-MoE, `V` vocabulary, `M` MoE layers.
"""

from dataclasses import dataclass
from math import gcd

from moe_ablm.model.families import Router

# layers, D, F, H of the ESM-2 ladder (facebookresearch/esm); 350m is the AbLM scaling study's
SIZES = {
    "8m": (6, 320, 1280, 20),
    "35m": (12, 480, 1920, 20),
    "150m": (30, 640, 2560, 20),
    "350m": (32, 960, 3840, 20),
    "650m": (33, 1280, 5120, 20),
}
ACTIVATIONS = ("gelu", "swiglu")
PLACEMENTS = "every, alternate, last_N (N a number) or layer numbers such as 1,3,5"


@dataclass(frozen=True)
class EncoderSpec:
    """An ESM-2 encoder, with some of its FFNs replaced by experts.

    With `learned_positions` it is ESM-1v, with `embedding_norm` too ESM-1b, and with `post_norm`
    RoBERTa.

    Attributes:
      learned_positions: number of positions, each with a learned vector that is added to the
        embedding; 0: rotary positions.
      embedding_norm: whether the embedding is normalised before the first layer.
      post_norm: whether layers normalise after each addition to the residual stream, and nothing at
        the end, instead of before attention and FFN.
      moe: the experts and their router; None: dense.
      attention_dropout, hidden_dropout, embedding_dropout: dropout rates in training of attention
        weights, of what attention and FFN add to the residual stream, and of the embedding.
    """

    layers: int
    d_model: int
    ffn: int
    heads: int
    vocabulary: int = 33
    layer_norm_eps: float = 1e-5
    token_dropout: bool = True
    activation: str = "gelu"
    tied: bool = True  # the decoder is the embedding
    moe: Router | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    learned_positions: int = 0
    embedding_norm: bool = False
    post_norm: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    @property
    def drops(self) -> bool:
        """Whether training has dropout."""
        return any((self.attention_dropout, self.hidden_dropout, self.embedding_dropout))

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """F of every expert; empty for a dense encoder."""
        return self.moe.expert_widths(self.ffn) if self.moe else ()

    @property
    def chunk(self) -> int:
        """Greatest common divisor of the widths; wider experts are stored as several of it."""
        return gcd(*self.expert_widths)

    @property
    def shared_ffn(self) -> int:
        """F of all shared experts together, each as wide as the mean of the routed ones."""
        if not self.moe:
            return 0
        return self.moe.shared * round(sum(self.expert_widths) / self.moe.experts)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold experts, ascending.

        Raises:
          ValueError: `moe.placement` is unknown or names a layer that does not exist.
        """
        if not self.moe:
            return ()
        return tuple(
            i for i in _placed(self.moe.placement, self.layers) if i >= self.moe.first_dense
        )

    def require_moe_layers(self) -> tuple[int, ...]:
        """`moe_layers` of an encoder with experts.

        Raises:
          ValueError: as `moe_layers`, or no layer is left to the experts.
        """
        layers = self.moe_layers
        if self.moe and not layers:
            raise ValueError(
                f"model.moe.placement={self.moe.placement!r} with first_dense="
                f"{self.moe.first_dense} leaves none of the {self.layers} layers to experts: "
                "change one of them, or use no experts"
            )
        return layers


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


BACKENDS = ("cpu", "gpu", "tpu")
REMAT = ("none", "matmuls", "full")


@dataclass(frozen=True)
class Execution:
    """How an encoder is computed; not part of its identity.

    Attributes:
      activations: dtype of activations between operations, "float32" or "bfloat16". Sums and
        statistics are at least float32 in any case. "float64" is for tests.
      operands: dtype of matmul operands. "bfloat16" with float32 activations is the policy for
        CPUs with AMX: products are of bfloat16 numbers; sums and everything else are float32.
      scan: run equal layers by `lax.scan`, which compiles faster, instead of unrolled, which runs
        faster: a scan stacks and unstacks weights and what the backward pass keeps.
      remat: what the backward pass recomputes. "none": nothing; "matmuls": everything but the
        outputs of matmuls and attention; "full": whole layers.
      backend: one of `BACKENDS`, the kind of device to compile for; it may be absent.
      grouped: implementation of `experts.grouped_matmul`; None: the default of the backend.
    """

    activations: str = "float32"
    operands: str = "float32"
    scan: bool = False
    remat: str = "none"
    backend: str = "cpu"
    grouped: str | None = None


PRECISIONS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16_operands": ("float32", "bfloat16"),
}
