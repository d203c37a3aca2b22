"""Parameters and FLOPs of an encoder from its spec alone; no jax needed.

FLOPs are those of the matmuls (a multiply-add is 2), the usual count behind model FLOPs
utilisation; norms, softmax and gathers are left out.
"""

import math

from moe_ablm.model.spec import TOKEN_ROUTERS, EncoderSpec

MATRICES = {"gelu": 2, "swiglu": 3}  # of size D x F in one FFN


def params_total(spec: EncoderSpec) -> int:
    """Number of parameters, all experts included."""
    experts = sum(ffn_params(spec, width) for width in spec.expert_widths)
    return _params(spec, experts)


def params_active(spec: EncoderSpec) -> int:
    """Number of parameters that an average token meets in training.

    Of each MoE layer: its router, its shared experts and as many of the others as compute for a
    token (`MoESpec.mean_choices`; of soft-MoE the share of the experts' work over that of a dense
    FFN on every token is not defined without a length, so all experts count).
    """
    moe = spec.moe
    experts = sum(ffn_params(spec, width) for width in spec.expert_widths)
    share = 1.0 if moe.router == "soft" else moe.mean_choices / moe.experts
    return _params(spec, round(experts * share))


def ffn_params(spec: EncoderSpec, width: int) -> int:
    """Number of parameters of one FFN of width F."""
    d, inputs = spec.d_model, MATRICES[spec.activation] - 1
    return inputs * (d * width + width) + width * d + d


def router_params(spec: EncoderSpec) -> int:
    """Number of parameters of one router."""
    moe = spec.moe
    if moe.router == "soft":
        return spec.d_model * moe.experts * moe.slots + moe.l2
    return spec.d_model * moe.experts + (moe.experts if moe.balance_rate else 0)


def _params(spec: EncoderSpec, experts: int) -> int:
    d, v = spec.d_model, spec.vocabulary
    sparse = len(spec.moe_layers)
    attention_and_norms = 4 * (d * d + d) + 4 * d
    layers = spec.layers * attention_and_norms + (spec.layers - sparse) * ffn_params(spec, spec.ffn)
    if sparse:
        shared = ffn_params(spec, spec.shared_ffn) if spec.moe.shared else 0
        layers += sparse * (experts + shared + router_params(spec))
    head = d * d + d + 2 * d + v + (0 if spec.tied else v * d)
    return v * d + layers + 2 * d + head


def forward_flops_per_token(spec: EncoderSpec, length: float, training: bool = False) -> float:
    """FLOPs of a forward pass for one token among `length` that attend to each other.

    Args:
      spec: of the encoder.
      length: tokens of an antibody; for limited experts, of a row with its padding.
      training: whether token choice obeys its capacity.
    """
    d = spec.d_model
    sparse = len(spec.moe_layers)
    weights = spec.layers * 4 * d * d
    weights += (spec.layers - sparse) * MATRICES[spec.activation] * d * spec.ffn
    if sparse:
        weights += sparse * _moe_weights(spec, length, training)
    weights += d * d + d * spec.vocabulary
    return 2 * weights + 4 * spec.layers * d * length


def _moe_weights(spec: EncoderSpec, length: float, training: bool) -> float:
    """Multiply-adds of one MoE layer for one token."""
    d, moe, matrices = spec.d_model, spec.moe, MATRICES[spec.activation]
    expert = matrices * d * sum(spec.expert_widths) / moe.experts
    shared = matrices * d * spec.shared_ffn
    if moe.router == "soft":
        slots = moe.experts * moe.slots
        # the router; tokens into slots; the experts; slots into tokens
        return 3 * d * slots + slots / length * expert + shared
    choices = float(moe.k)
    if moe.limit is not None and (training or moe.router not in TOKEN_ROUTERS):
        places = math.ceil(moe.limit * moe.k * length / moe.experts - 1e-9)
        computed = moe.experts * places / length
        # queues of a row are computed whole; other ways only what is admitted, which is at most K
        whole = moe.group == "sequence" and moe.widths is None
        choices = computed if whole else min(computed, moe.choices)
    return d * moe.experts + choices * expert + shared


def train_flops_per_token(spec: EncoderSpec, length: float) -> float:
    """FLOPs of forward and backward pass for one token: three times the forward pass."""
    return 3 * forward_flops_per_token(spec, length, training=True)
