"""Translation of the settings of BALM and BALM-MoE to and from those of an encoder.

The units differ: BALM counts shared experts among the experts, its capacity is a multiple of tokens
/ experts whatever k is, and its router losses are means over layers (configs/balm_moe.py).
"""

from dataclasses import replace
from typing import Any

from moe_ablm.config_schema import MoEConfig
from moe_ablm.data.tokenizer import NULL, PAD, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.interop.huggingface import HuggingFaceConfig, dropout_rates
from moe_ablm.interop.saved import Model
from moe_ablm.model.families import Queued, Router, TopK
from moe_ablm.model.spec import EncoderSpec

BALM_VOCABULARY = tuple(t for i, t in enumerate(VOCABULARY) if i != NULL)
BALM_MASK = BALM_VOCABULARY.index("<mask>")
_ROUTERS = {"top-k": "topk", "top-p": "topp", "expert-choice": "expert_choice"}
_PADS = {
    "router_mask_pad_logits": "logits",
    "router_mask_pad_probs": "probabilities",
    "router_mask_aux_loss": "aux",
}


def encoder_spec(config: HuggingFaceConfig) -> tuple[EncoderSpec, list[str]]:
    """The encoder that a BALM config.json describes, and notes for the user.

    Raises:
      UserError: a setting has no counterpart here.
    """
    config.expect("vocab_size", 32, len(BALM_VOCABULARY))
    config.expect("position_embedding_type", "rotary", "rotary")
    config.expect("layer_norm_eps", 1e-5, 1e-5)
    config.expect("mask_token_id", BALM_MASK, BALM_MASK)
    config.expect("pad_token_id", PAD, PAD)
    config.expect("mlm_activation", "gelu", "gelu")
    config.heads_divide()
    width = config.number("hidden_size")
    spec = EncoderSpec(
        layers=config.number("num_hidden_layers"),
        d_model=width,
        ffn=config.number("intermediate_size", 4 * width),
        heads=config.number("num_attention_heads"),
        token_dropout=False,
        activation=config.expect("activation", "swiglu", "swiglu", "gelu"),
        tied=False,
        **dropout_rates(config, "hidden_dropout", "attention_dropout", config.real("dropout", 0.1)),
    )
    if config["model_type"] == "balm":
        return spec, []
    config.expect("expert_activation", "swiglu", spec.activation, why="the activation of all FFNs")
    moe, notes = _moe_spec(config, spec)
    return replace(spec, moe=moe), notes


def _moe_spec(config: HuggingFaceConfig, spec: EncoderSpec) -> tuple[Router | None, list[str]]:
    written = str(config["router_type"] or "top-k").lower().replace("_", "-").replace(" ", "-")
    router = {"topk": "top-k", "topp": "top-p"}.get(written, written)
    if router not in _ROUTERS:
        raise UserError(
            f"{config.file}: router_type is {config['router_type']!r}, expected one of "
            f"{', '.join(_ROUTERS)}"
        )
    config.expect("router_bias", False, False, why="routers have no bias here")
    shared = config["num_shared_experts"] or 0
    experts = config.number("num_experts", 8) - shared
    if not isinstance(shared, int) or shared < 0 or experts < 1:
        raise UserError(
            f"{config.file}: num_shared_experts is {shared!r}, expected 0 to less than num_experts "
            f"({experts + shared}), among which BALM counts them"
        )
    widths = _widths(config, spec, experts, shared)
    k = {
        "top-k": min(config.number("num_experts_per_tok", 1), experts),
        "top-p": experts,
        "expert-choice": 1,
    }[router]
    placement, first_dense = _placement(config, spec.layers)
    placed = TopK(placement=placement, first_dense=first_dense)
    sparse = len(replace(spec, moe=placed).moe_layers)
    if not sparse:
        raise UserError(f"{config.file}: num_initial_dense_layers leaves no layer to experts")
    load_balance, z_loss, entropy_loss = _losses(config, router, k, sparse)
    moe = MoEConfig(
        router=_ROUTERS[router],
        experts=experts,
        k=k,
        threshold=config.real("top_p_threshold", 0.7),
        exceed=router != "top-p",
        gate="tokens" if router == "expert-choice" else "softmax",
        renormalise=router == "top-k",
        capacity=_capacity(config, router, k),
        group="sequence" if router == "expert-choice" else "batch",
        widths=widths if len(set(widths)) > 1 else None,
        ffn=widths[0] if len(set(widths)) == 1 else None,
        shared=shared,
        placement=placement,
        first_dense=first_dense,
        pads=",".join(p for key, p in _PADS.items() if config[key]) or "none",
        jitter=config.real("router_jitter", 0.0),
        load_balance=load_balance,
        z_loss=z_loss,
        entropy_loss=entropy_loss,
    )
    if router == "expert-choice":
        # unlike BALM's, results must not depend on what else is in the batch
        moe = replace(moe, pads="excluded")
    return moe.spec(), _notes(config, router, moe)


def _notes(config: HuggingFaceConfig, router: str, moe: MoEConfig) -> list[str]:
    notes = []
    if router == "expert-choice":
        notes.append(
            "experts choose among the tokens of one antibody (BALM: of the whole batch, its "
            "padding included), so that no result depends on its neighbours"
        )
    elif moe.capacity is not None:
        notes.append(
            f"the capacity ({moe.capacity:g} of a fair share) holds in training; in inference "
            "every token reaches its experts (BALM drops those beyond the capacity)"
        )
    if (config["router_dtype"] or "float32") != "float32":
        notes.append(f"the router computes in float32 (BALM: in {config['router_dtype']})")
    return notes


def _widths(
    config: HuggingFaceConfig, spec: EncoderSpec, experts: int, shared: int
) -> tuple[int, ...]:
    """Width of every routed expert; checks that the shared ones have their mean width."""
    setting = config["expert_intermediate_size"] or spec.ffn
    widths = tuple(setting) if isinstance(setting, list) else (setting,) * experts
    whole = all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in widths)
    if len(widths) != experts or not whole:
        raise UserError(
            f"{config.file}: expert_intermediate_size is {setting!r}, expected a positive whole "
            f"number, or one for each of the {experts} experts that are not shared"
        )
    mean = round(sum(widths) / experts)
    default = setting if isinstance(setting, int) else spec.ffn
    width = config["shared_expert_intermediate_size"] or default
    if shared and width != mean:
        raise UserError(
            f"{config.file}: shared_expert_intermediate_size is {width!r}, expected {mean}, the "
            "mean width of the other experts, which shared ones have here"
        )
    return widths


def _capacity(config: HuggingFaceConfig, router: str, k: int) -> float | None:
    """Capacity as a multiple of an expert's fair share of all assignments; None: unlimited."""
    capacity = 1 if config["expert_capacity"] is None else config["expert_capacity"]
    if not isinstance(capacity, (int, float)) or isinstance(capacity, bool) or capacity == 0:
        raise UserError(
            f"{config.file}: expert_capacity is {capacity!r}, expected a positive number, or -1 "
            "for none"
        )
    if capacity < 0:
        if router == "expert-choice":
            raise UserError(
                f"{config.file}: expert_capacity is {capacity}, expected a positive number: expert "
                "choice needs one"
            )
        return None
    config.expect("expert_capacity_type", "multiplier", "multiplier",
        why="an absolute capacity depends on the size of the batch; write it as a multiple of "
        "tokens / experts")  # fmt: skip
    return capacity / k


def _placement(config: HuggingFaceConfig, layers: int) -> tuple[str, int]:
    dense = config["num_initial_dense_layers"]
    dense = 1 if dense is None else dense
    if not isinstance(dense, int) or dense < 0:
        raise UserError(
            f"{config.file}: num_initial_dense_layers is {dense!r}, expected a whole number"
        )
    if config["alternate_sparsity"] is False:
        return "every", dense
    if dense == 1:
        return "alternate", 1
    return ",".join(map(str, range(dense, layers, 2))) or "every", dense


def _counted(router: str, k: int) -> int:
    """Number of a token's choices that BALM's load-balance loss counts."""
    return k if router == "top-k" else 1


def _losses(
    config: HuggingFaceConfig, router: str, k: int, sparse: int
) -> tuple[float, float, float]:
    """Weights of load balance, z-loss and entropy for losses summed over layers (BALM: means)."""

    def weight(key: str, default: float) -> float:
        return config.real(key, default) / sparse

    choice, topp = router == "expert-choice", router == "top-p"
    masked = bool(config["router_mask_pad_logits"])  # then BALM has no z-loss
    return (
        0.0 if choice else weight("router_aux_loss_coef", 0.01) * _counted(router, k),
        0.0 if topp or masked else weight("router_z_loss_coef", 0.001),
        weight("router_dynamic_loss_coef", 1e-4) if topp else 0.0,
    )


# export


def balm_settings(model: Model) -> dict[str, Any]:
    """BALM's config.json for a model, without `architectures`.

    Raises:
      UserError: BALM's form cannot hold the model.
    """
    spec = model.spec
    _require_balm(model)
    settings = {
        "model_type": "balm",
        "vocab_size": len(BALM_VOCABULARY),
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "activation": spec.activation,
        "dropout": spec.hidden_dropout,
        "hidden_dropout": spec.hidden_dropout,
        "attention_dropout": spec.attention_dropout,
        "ffn_bias": True,
        "max_position_embeddings": model.length,
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "rotary",
        "mask_token_id": BALM_MASK,
        "pad_token_id": PAD,
        "mlm_activation": "gelu",
    }
    if not spec.moe:
        return settings
    moe = MoEConfig.of(spec.moe)
    router = next(theirs for theirs, name in _ROUTERS.items() if name == moe.router)
    first, sparse = spec.moe_layers[0], len(spec.moe_layers)
    limit = spec.moe.limit if isinstance(spec.moe, Queued) else None
    policies = spec.moe.policies()
    if "excluded" in policies:
        policies = frozenset({"probabilities", "aux"} if router == "top-k" else {"aux"})
    return settings | {
        "model_type": "balm_moe",
        "num_experts": moe.experts + moe.shared,
        "num_shared_experts": moe.shared,
        "num_experts_per_tok": moe.k if router == "top-k" else 1,
        "top_p_threshold": moe.threshold,
        "num_initial_dense_layers": first,
        "alternate_sparsity": spec.moe_layers == tuple(range(first, spec.layers, 2)),
        "router_type": router,
        "router_dtype": "float32",
        "router_jitter": moe.jitter,
        "router_bias": False,
        **{key: part in policies for key, part in _PADS.items()},
        "router_aux_loss_coef": moe.load_balance * sparse / _counted(router, moe.k),
        "router_z_loss_coef": moe.z_loss * sparse,
        "router_dynamic_loss_coef": moe.entropy_loss * sparse,
        "expert_capacity_type": "multiplier",
        "expert_capacity": -1 if limit is None else limit * moe.k,
        "expert_intermediate_size": list(moe.widths) if moe.widths else spec.expert_widths[0],
        "shared_expert_intermediate_size": spec.shared_ffn // max(moe.shared, 1) or None,
        "expert_activation": spec.activation,
        "expert_bias": True,
    }


def _require_balm(model: Model) -> None:
    spec, moe = model.spec, MoEConfig.of(model.spec.moe)
    sparse = spec.moe_layers
    strides = {b - a for a, b in zip(sparse, sparse[1:], strict=False)}
    regular = not sparse or sparse[-1] + max(strides, default=2) >= spec.layers
    topk = moe.router == "topk"
    renormalised = moe.k > 1 if moe.renormalise is None else moe.renormalise
    for wrong, feature in (
        (spec.token_dropout, "token dropout (model.token_dropout)"),
        (spec.learned_positions, "learned positions (model.learned_positions)"),
        (spec.embedding_norm or spec.post_norm, "a norm after the embedding or after layers"),
        (spec.layer_norm_eps != 1e-5, f"layer_norm_eps {spec.layer_norm_eps}"),
        (NULL in model.layout.between, f"<null_1> between chains (layout {model.layout_name})"),
        (sparse and moe.router not in _ROUTERS.values(), f"router {moe.router}"),
        (sparse and topk and not renormalised, "gates that are not renormalised"),
        (sparse and not topk and moe.renormalise, f"renormalised gates of {moe.router}"),
        (sparse and moe.router == "topp" and moe.exceed, "top-p that counts the expert with which "
         "the threshold is reached (model.moe.exceed)"),
        (sparse and moe.router == "topp" and moe.k < moe.experts, "top-p of at most k experts"),
        (sparse and moe.router == "expert_choice" and moe.gate != "tokens", "expert choice whose "
         "gates are no softmax over tokens (model.moe.gate)"),
        (sparse and moe.gate == "sigmoid", "sigmoid gates"),
        (sparse and moe.balance_rate, "auxiliary-loss-free balancing"),
        (sparse and (len(strides) > 1 or max(strides, default=1) > 2 or not regular),
         f"experts in layers {', '.join(map(str, sparse))}, neither all nor every other one from a "
         "first on"),
    ):  # fmt: skip
        if wrong:
            fits = not sparse and spec.activation == "gelu"
            other = "--format hf has it" if fits else "train with model.token_dropout=False"
            other = f", or {other}" if feature.startswith("token dropout") else ""
            raise UserError(
                f"--format balm: {model.source} has {feature}, which BALM has no place for: use "
                f"--format transformers{other}"
            )
