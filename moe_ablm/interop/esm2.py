"""Import and export of ESM-2 in Hugging Face's form (`EsmForMaskedLM`, `EsmModel`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from flax import nnx

from moe_ablm.data.tokenizer import MASK, PAD, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.interop import huggingface
from moe_ablm.interop.card import model_card
from moe_ablm.interop.huggingface import CONFIG, OURS, HuggingFaceConfig
from moe_ablm.interop.saved import Model, fill, flat_arrays, new_directory, parameter_shapes
from moe_ablm.interop.tensors import (
    AS_COMPUTED,
    SINGLE,
    Storage,
    Tensors,
    open_tensors,
    write_weights,
)
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.training.state import path_name

ARCHITECTURE = "EsmForMaskedLM"
HEADLESS = "EsmModel"  # its names lack the first part of `EsmForMaskedLM`'s
OFFSET = 2  # of positions in max_position_embeddings, left over from RoBERTa
DECODER = "lm_head.decoder.weight"

# encoder path -> Hugging Face name; Hugging Face stores kernels transposed
_OUTSIDE_LAYERS = {
    "embedding": "esm.embeddings.word_embeddings.weight",
    "final_norm/scale": "esm.encoder.emb_layer_norm_after.weight",
    "final_norm/bias": "esm.encoder.emb_layer_norm_after.bias",
    "head/dense/kernel": "lm_head.dense.weight",
    "head/dense/bias": "lm_head.dense.bias",
    "head/norm/scale": "lm_head.layer_norm.weight",
    "head/norm/bias": "lm_head.layer_norm.bias",
    "head/bias": "lm_head.bias",
    "head/decoder": DECODER,
}
_IN_LAYER = {
    "attention_norm/scale": "attention.LayerNorm.weight",
    "attention_norm/bias": "attention.LayerNorm.bias",
    "attention/out/kernel": "attention.output.dense.weight",
    "attention/out/bias": "attention.output.dense.bias",
    "ffn_norm/scale": "LayerNorm.weight",
    "ffn_norm/bias": "LayerNorm.bias",
    "ffn/up/kernel": "intermediate.dense.weight",
    "ffn/up/bias": "intermediate.dense.bias",
    "ffn/down/kernel": "output.dense.weight",
    "ffn/down/bias": "output.dense.bias",
}
_QKV = ("query", "key", "value")
# tensors of files on the hub that are not part of the language model
_IGNORED_PREFIXES = ("contact_head.", "esm.contact_head.", "esm.pooler.")
_IGNORED = ("inv_freq", "position_ids", "esm.embeddings.position_embeddings.weight")


def params_from_huggingface(params: nnx.State, tensors: Mapping[str, np.ndarray]) -> nnx.State:
    """Parameters of a dense encoder with the values of an `EsmForMaskedLM` state dict.

    Args:
      params: of an encoder of the same sizes; only their shapes are used.
      tensors: arrays by Hugging Face name.

    Raises:
      KeyError: a tensor is missing.
      ValueError: a tensor has another shape than the encoder's.
    """
    return fill(params, lambda name: _value(name, tensors))


def _value(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    if name.endswith("kernel"):
        return np.concatenate([tensors[n] for n in _names(name)]).T
    parts = [tensors[n] for n in _names(name)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _names(path: str) -> list[str]:
    """Hugging Face's names of the tensors that make up an array of the encoder."""
    if path in _OUTSIDE_LAYERS:
        return [_OUTSIDE_LAYERS[path]]
    _, number, inner = path.split("/", 2)
    layer = f"esm.encoder.layer.{number}."
    if inner.startswith("attention/qkv/"):
        part = "weight" if inner.endswith("kernel") else "bias"
        return [f"{layer}attention.self.{which}.{part}" for which in _QKV]
    return [layer + _IN_LAYER[inner]]


def params_to_huggingface(params: nnx.State) -> dict[str, np.ndarray]:
    """The `EsmForMaskedLM` state dict of a dense encoder; layer norms have `weight` and `bias`."""
    tensors: dict[str, np.ndarray] = {}
    for path, array in flat_arrays(params).items():
        array = array.T if path.endswith("kernel") else array
        names = _names(path)
        parts = np.split(array, len(names)) if len(names) > 1 else [array]
        tensors |= {n: np.ascontiguousarray(p) for n, p in zip(names, parts, strict=True)}
    return tensors


# from a directory


def import_esm2(directory: Path, layout: str | None = None) -> Model:
    """Imports an `EsmForMaskedLM` directory, or one of `EsmModel`, which has no head.

    Args:
      directory: with config.json, and model.safetensors in one or several files.
      layout: name of the layout by which chains become a row; None: that of an export by moe_ablm,
        else "esm" (`<cls>H<cls><cls>L<eos>`).

    Raises:
      UserError: the model is no ESM-2, or the files are damaged.
    """
    config = HuggingFaceConfig(directory)
    architecture = config.architecture(ARCHITECTURE, HEADLESS)
    spec, head = _spec(config), architecture == ARCHITECTURE
    huggingface.check_vocabulary(directory, config, VOCABULARY)
    tensors = open_tensors(directory)
    names, ignored = huggingface.sorted_out(tensors, _canonical if head else _canonical_headless)
    notes = [
        f"ignored, as the language model does not use them: {huggingface.some(ignored)}"
    ] * bool(ignored)
    if spec.tied and DECODER in names:
        _check_tied(tensors, names)
    shapes = parameter_shapes(spec)
    expected = _expected(shapes)
    absent = {} if head else {n: s for n, s in expected.items() if n.startswith("lm_head.")}
    huggingface.check_tensors(
        tensors, names, {n: s for n, s in expected.items() if n not in absent}
    )
    notes += huggingface.dtype_notes(tensors, names.values())
    notes += [] if head else ["the model has no language-model head: it only embeds"]
    model = huggingface.imported(
        config,
        spec,
        params_from_huggingface(shapes, _Renamed(tensors, names, absent)),
        architecture=architecture,
        layout=layout,
        default=("esm", 1024),
        offset=OFFSET,
        notes=notes,
    )
    return replace(model, head=head)


class _Renamed(dict):
    """Tensors by expected name, read when they are looked up; zeros for those that are absent."""

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str],
        absent: Mapping[str, tuple[int, ...]],
    ):
        super().__init__(names)
        self._tensors, self._absent = tensors, absent

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._absent:
            return np.zeros(self._absent[name], np.float32)
        return self._tensors[super().__getitem__(name)]


def _spec(config: HuggingFaceConfig) -> EncoderSpec:
    """The encoder that config.json describes; UserError if it has no counterpart here."""
    config.expect("model_type", "esm", "esm")
    config.expect("vocab_size", None, len(VOCABULARY), why="ESM-2's vocabulary")
    learned = "ESM-1b and ESM-1v learn absolute positions, for which there is no place here"
    config.expect("position_embedding_type", "absolute", "rotary", why=learned)
    config.expect("emb_layer_norm_before", False, False, why="ESM-2 has none")
    config.expect("hidden_act", "gelu", "gelu")
    config.expect("mask_token_id", MASK, MASK)
    config.expect("pad_token_id", PAD, PAD)
    for key in ("is_folding_model", "is_decoder", "add_cross_attention"):
        config.expect(key, False, False, why="only the encoder with a language-model head is read")
    rope = config["rope_parameters"] or {}
    if rope.get("rope_theta", config["rope_theta"] or 10_000.0) != 10_000.0:
        raise UserError(
            f"{config.file}: rope_theta is {rope or config['rope_theta']}, expected 10000"
        )
    config.heads_divide()
    eps = config.real("layer_norm_eps", 1e-12)
    if not 0 < eps <= 0.01:
        raise UserError(f"{config.file}: layer_norm_eps is {eps}, expected above 0, at most .01")
    return EncoderSpec(
        layers=config.number("num_hidden_layers"),
        d_model=config.number("hidden_size"),
        ffn=config.number("intermediate_size"),
        heads=config.number("num_attention_heads"),
        token_dropout=config.expect("token_dropout", False, True, False),
        layer_norm_eps=eps,
        **huggingface.dropout_rates(config, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        tied=config.expect("tie_word_embeddings", True, True, False),
    )


def _canonical(name: str) -> str | None:
    """Hugging Face's name in its newer spelling; None for tensors that are ignored."""
    if name.startswith(_IGNORED_PREFIXES) or name.endswith(_IGNORED):
        return None
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return "lm_head.bias" if name == "lm_head.decoder.bias" else name


def _canonical_headless(name: str) -> str | None:
    """As `_canonical`, of the names of `EsmModel`, which lack the first part."""
    return _canonical(name if name.startswith(("esm.", "lm_head.")) else f"esm.{name}")


def _check_tied(tensors: Tensors, names: dict[str, str]) -> None:
    """Drops the decoder from `names`; UserError if it differs from the embedding."""
    decoder, embedding = names.pop(DECODER), names.get(_OUTSIDE_LAYERS["embedding"])
    if embedding and not np.array_equal(tensors[decoder], tensors[embedding]):
        raise UserError(
            f"{tensors.path}: {decoder} differs from {embedding}, though {CONFIG} ties them: set "
            '"tie_word_embeddings": false there if the decoder is the model\'s own'
        )


def _expected(shapes: nnx.State) -> dict[str, tuple[int, ...]]:
    """Shapes that an encoder's arrays have in Hugging Face's form, by name."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, variable in nnx.to_flat_state(shapes):
        name = path_name(path)
        shape = variable.get_value().shape
        shape = shape[::-1] if name.endswith("kernel") else shape
        names = _names(name)
        expected |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
    return expected


# to a directory


def export_esm2(
    model: Model, out: Path, licence: str | None = None, storage: Storage = AS_COMPUTED
) -> None:
    """Writes an `EsmForMaskedLM` directory with its tokenizer and a model card.

    Args:
      model: what is exported.
      out: a new directory.
      licence: for the model card; None: that of the model's facts.
      storage: of the weights.

    Raises:
      UserError: the model has experts or another activation than GELU, or `out` cannot be written.
    """
    spec = model.spec
    if spec.moe_layers:
        raise UserError(
            f"--format hf: {model.source} has experts in layers "
            f"{', '.join(map(str, spec.moe_layers))}, which {ARCHITECTURE} has no place for: use "
            "--format transformers, or --format balm"
        )
    if spec.activation != "gelu":
        raise UserError(
            f"--format hf: {model.source} has activation {spec.activation}, {ARCHITECTURE} only "
            "gelu: use --format transformers, or --format balm"
        )
    with new_directory(out) as directory:
        write_weights(directory / SINGLE, params_to_huggingface(model.params), storage)
        write_json(directory / CONFIG, _config(model) | {"torch_dtype": storage.dtype})
        huggingface.write_tokenizer(directory, "EsmTokenizer")
        card = model_card(model, ARCHITECTURE, _USE, licence)
        (directory / "README.md").write_text(card)


def _config(model: Model) -> dict:
    spec = model.spec
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "esm",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "hidden_act": "gelu",
        "hidden_dropout_prob": spec.hidden_dropout,
        "attention_probs_dropout_prob": spec.attention_dropout,
        "max_position_embeddings": model.length + OFFSET,
        "position_embedding_type": "rotary",
        "layer_norm_eps": spec.layer_norm_eps,
        "initializer_range": 0.02,
        "emb_layer_norm_before": False,
        "token_dropout": spec.token_dropout,
        "tie_word_embeddings": spec.tied,
        "is_folding_model": False,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        OURS: huggingface.kept_for_import(model),
    }


_USE = """from transformers import EsmForMaskedLM, EsmTokenizer

model = EsmForMaskedLM.from_pretrained("{directory}").eval()
tokenizer = EsmTokenizer.from_pretrained("{directory}")
row = tokenizer("{row}", return_tensors="pt")
logits = model(**row).logits"""
