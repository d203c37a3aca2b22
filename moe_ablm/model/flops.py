"""Parameters and FLOPs of an encoder from its spec alone; no jax needed.

FLOPs are those of the matmuls (a multiply-add is 2), the usual count behind model FLOPs
utilisation; norms, softmax and gathers are left out.
"""

from moe_ablm.model.spec import EncoderSpec


def params_total(spec: EncoderSpec) -> int:
    """Number of parameters, all experts included."""
    return _params(spec, spec.moe.experts)


def params_active(spec: EncoderSpec) -> int:
    """Number of parameters that one token meets: of each MoE layer, its router and K experts."""
    return _params(spec, spec.moe.k)


def _params(spec: EncoderSpec, experts: int) -> int:
    d, f, v = spec.d_model, spec.ffn, spec.vocabulary
    ffn = 2 * d * f + f + d
    sparse = len(spec.moe_layers)
    attention_and_norms = 4 * (d * d + d) + 4 * d
    moe = experts * ffn + d * spec.moe.experts
    layers = spec.layers * attention_and_norms + (spec.layers - sparse) * ffn + sparse * moe
    head = d * d + d + 2 * d + v
    return v * d + layers + 2 * d + head


def forward_flops_per_token(spec: EncoderSpec, length: float) -> float:
    """FLOPs of a forward pass for one token among `length` that attend to each other."""
    d, f = spec.d_model, spec.ffn
    sparse = len(spec.moe_layers)
    weights = spec.layers * 4 * d * d + (spec.layers - sparse) * 2 * d * f
    weights += sparse * (spec.moe.k * 2 * d * f + d * spec.moe.experts)
    weights += d * d + d * spec.vocabulary
    return 2 * weights + 4 * spec.layers * d * length


def train_flops_per_token(spec: EncoderSpec, length: float) -> float:
    """FLOPs of forward and backward pass for one token: three times the forward pass."""
    return 3 * forward_flops_per_token(spec, length)
