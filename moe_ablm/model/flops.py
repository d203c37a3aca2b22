"""Parameters and FLOPs of an encoder from its spec alone; no jax needed.

FLOPs are those of the matmuls (a multiply-add counts as 2), as usual for model FLOPs utilisation.
Norms, softmax and gathers are left out.
"""

from moe_ablm.model.families import RowShape
from moe_ablm.model.spec import EncoderSpec

MATRICES = {"gelu": 2, "swiglu": 3}  # of size D x F in one FFN


def params_total(spec: EncoderSpec) -> int:
    """Number of parameters, all experts included; the bias of loss-free balancing is not one."""
    return _params(spec, sum(ffn_params(spec, width) for width in spec.expert_widths))


def params_active(spec: EncoderSpec, choices: float | None = None) -> int:
    """Number of parameters that an average token uses in training.

    Of each MoE layer these are the router, the shared experts and `Router.active_share` of the
    routed experts. In soft-MoE all experts count.

    Args:
      spec: of the encoder.
      choices: measured mean number of experts of a token (top-p); None: not measured.
    """
    if spec.moe is None:
        return params_total(spec)
    experts = sum(ffn_params(spec, width) for width in spec.expert_widths)
    share = spec.moe.active_share if choices is None else choices / spec.moe.experts
    return _params(spec, round(experts * share))


def ffn_params(spec: EncoderSpec, width: int) -> int:
    """Number of parameters of one FFN of width F."""
    d, inputs = spec.d_model, MATRICES[spec.activation] - 1
    return inputs * (d * width + width) + width * d + d


def _params(spec: EncoderSpec, experts: int) -> int:
    d, v = spec.d_model, spec.vocabulary
    sparse = len(spec.moe_layers)
    attention_and_norms = 4 * (d * d + d) + 4 * d
    layers = spec.layers * attention_and_norms + (spec.layers - sparse) * ffn_params(spec, spec.ffn)
    if spec.moe:
        shared = ffn_params(spec, spec.shared_ffn) if spec.moe.shared else 0
        layers += sparse * (experts + shared + spec.moe.router_params(d))
    head = d * d + d + 2 * d + v + (0 if spec.tied else v * d)
    embedding = (v + spec.learned_positions) * d + 2 * d * spec.embedding_norm
    return embedding + layers + 2 * d * (not spec.post_norm) + head


def forward_flops_per_token(
    spec: EncoderSpec, row: RowShape, training: bool = False, choices: float | None = None
) -> float:
    """FLOPs of a forward pass per token that is not padding.

    Experts with a fixed number of places for each row compute all of them, filled or not, and
    padding adds places. Everything else leaves padding out.

    Args:
      spec: of the encoder.
      row: shape of the rows.
      training: whether token choice obeys its capacity.
      choices: measured mean number of experts of a token (top-p); None: not measured.
    """
    d, matrices = spec.d_model, MATRICES[spec.activation]
    sparse = len(spec.moe_layers)
    weights: float = spec.layers * 4 * d * d
    weights += (spec.layers - sparse) * matrices * d * spec.ffn
    if spec.moe:
        expert = matrices * d * sum(spec.expert_widths) / spec.moe.experts
        routed = spec.moe.multiply_adds(d, expert, row, training)
        if choices is not None:
            routed = d * spec.moe.experts + choices * expert
        weights += sparse * (routed + matrices * d * spec.shared_ffn)
    weights += d * d + d * spec.vocabulary
    return 2 * weights + 4 * spec.layers * d * row.antibody


def train_flops_per_token(spec: EncoderSpec, row: RowShape, choices: float | None = None) -> float:
    """FLOPs of forward and backward pass per token: three times those of the forward pass."""
    return 3 * forward_flops_per_token(spec, row, training=True, choices=choices)
