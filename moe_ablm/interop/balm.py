"""Import and export of BALM and BALM-MoE (github.com/brineylab/BALM, commit 36a8001).

Both are in Hugging Face's form. `balm_config` translates settings, `balm_ffn` FFNs and experts, and
this file everything else.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from flax import nnx

from moe_ablm.data.tokenizer import NULL
from moe_ablm.files import write_json
from moe_ablm.interop import huggingface
from moe_ablm.interop.balm_config import BALM_VOCABULARY, balm_settings, encoder_spec
from moe_ablm.interop.balm_ffn import expected_ffns, ffns_from_balm, ffns_to_balm
from moe_ablm.interop.card import model_card
from moe_ablm.interop.huggingface import ABSENT, CONFIG, OURS, HuggingFaceConfig
from moe_ablm.interop.saved import Model, fill, flat_arrays, new_directory, parameter_shapes
from moe_ablm.interop.tensors import AS_COMPUTED, SINGLE, Storage, open_tensors, write_weights
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.training.state import path_name

ARCHITECTURES = {"balm": "BalmForMaskedLM", "balm_moe": "BalmMoEForMaskedLM"}

# encoder path -> BALM's name; BALM stores kernels transposed
_OUTSIDE_LAYERS = {
    "embedding": "{model}.word_embeddings.weight",
    "final_norm/scale": "{model}.final_norm.weight",
    "final_norm/bias": "{model}.final_norm.bias",
    "head/dense/kernel": "lm_head.dense.weight",
    "head/dense/bias": "lm_head.dense.bias",
    "head/norm/scale": "lm_head.layer_norm.weight",
    "head/norm/bias": "lm_head.layer_norm.bias",
    "head/bias": "lm_head.bias",
    "head/decoder": "lm_head.decoder.weight",
}
_IN_LAYER = {
    "attention_norm/scale": "attn_layer_norm.weight",
    "attention_norm/bias": "attn_layer_norm.bias",
    "attention/qkv/kernel": "attention.in_proj.weight",
    "attention/qkv/bias": "attention.in_proj.bias",
    "attention/out/kernel": "attention.out_proj.weight",
    "attention/out/bias": "attention.out_proj.bias",
    "ffn_norm/scale": "ffn_layer_norm.weight",
    "ffn_norm/bias": "ffn_layer_norm.bias",
    "ffn/router": "sparse_ffn.router.linear.weight",
}
# arrays with a row for each token, and the value of the row of <null_1>
_BY_TOKEN = {"embedding": 0.0, "head/decoder": 0.0, "head/bias": ABSENT}


def import_balm(directory: Path, layout: str | None = None) -> Model:
    """Imports a `BalmForMaskedLM` or `BalmMoEForMaskedLM` directory.

    Args:
      directory: with config.json, and model.safetensors in one or several files.
      layout: name of the layout by which chains become a row; None: that of an export by moe_ablm,
        else "balm" (`<cls>H<eos>L<eos>`).

    Raises:
      UserError: the model has settings that have no counterpart here, or the files are damaged.
    """
    config = HuggingFaceConfig(directory)
    model = config.expect("model_type", None, *ARCHITECTURES)
    config.architecture(ARCHITECTURES[model])
    spec, notes = encoder_spec(config)
    huggingface.check_vocabulary(directory, config, BALM_VOCABULARY)
    tensors = open_tensors(directory)
    names, ignored = huggingface.sorted_out(
        tensors, lambda n: None if n.endswith("inv_freq") else n
    )
    if ignored:
        notes.append(f"ignored, as they are computed anew: {huggingface.some(ignored)}")
    shapes = parameter_shapes(spec)
    biases = config["ffn_bias"] is not False, config["expert_bias"] is not False
    huggingface.check_tensors(tensors, names, _expected(shapes, spec, model, biases))
    notes += huggingface.dtype_notes(tensors, names)
    return huggingface.imported(
        config,
        spec,
        _params(shapes, spec, model, tensors),
        architecture=ARCHITECTURES[model],
        layout=layout,
        default=("balm", 256),
        notes=notes,
    )


def _params(
    shapes: nnx.State, spec: EncoderSpec, model: str, tensors: Mapping[str, np.ndarray]
) -> nnx.State:
    @lru_cache(maxsize=1)  # the arrays of a layer are read one after the other
    def ffns(number: int) -> dict[str, np.ndarray]:
        return ffns_from_balm(_layer(model, number), tensors, spec, number in spec.moe_layers)

    def value(path: str) -> np.ndarray:
        name = _name(path, model)
        if name is None:
            _, number, inner = path.split("/", 2)
            return ffns(int(number))[inner]
        array = tensors[name]
        if path in _BY_TOKEN:
            return np.insert(array, NULL, _BY_TOKEN[path], axis=0)
        return array.T if array.ndim == 2 else array

    return fill(shapes, value)


def _layer(model: str, number: int) -> str:
    return f"{model}.layers.{number}."


def _name(path: str, model: str) -> str | None:
    """BALM's name for an array of the encoder; None for arrays of an FFN."""
    if path in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[path].format(model=model)
    _, number, inner = path.split("/", 2)
    return _layer(model, int(number)) + _IN_LAYER[inner] if inner in _IN_LAYER else None


def _expected(
    shapes: nnx.State, spec: EncoderSpec, model: str, biases: tuple[bool, bool]
) -> dict[str, tuple[int, ...]]:
    """Shapes that an encoder's arrays have in BALM, by BALM's name.

    `biases` says whether dense FFNs and experts have biases.
    """
    expected = {}
    for keys, variable in nnx.to_flat_state(shapes):
        path, shape = path_name(keys), variable.get_value().shape
        if path in _BY_TOKEN:
            shape = (shape[0] - 1, *shape[1:])
        elif len(shape) == 2:
            shape = shape[::-1]
        if name := _name(path, model):
            expected[name] = shape
    for number in range(spec.layers):
        sparse = number in spec.moe_layers
        expected |= expected_ffns(_layer(model, number), spec, sparse, biases[sparse])
    return expected


def export_balm(
    model: Model, out: Path, licence: str | None = None, storage: Storage = AS_COMPUTED
) -> None:
    """Writes a `BalmForMaskedLM` or `BalmMoEForMaskedLM` directory with a model card.

    Args:
      model: what is exported.
      out: a new directory.
      licence: for the model card; None: that of the model's facts.
      storage: of the weights.

    Raises:
      UserError: BALM's form cannot hold the model, or `out` cannot be written.
    """
    settings = balm_settings(model)
    kind = settings["model_type"]
    with new_directory(out) as directory:
        write_weights(directory / SINGLE, _to_balm(model, kind), storage)
        config = {
            "architectures": [ARCHITECTURES[kind]],
            **settings,
            "torch_dtype": storage.dtype,
            OURS: huggingface.kept_for_import(model),
        }
        write_json(directory / CONFIG, config)
        huggingface.write_tokenizer(directory, "BalmTokenizer", BALM_VOCABULARY, "bos_token")
        use = _USE.replace("{model}", ARCHITECTURES[kind])
        card = model_card(model, ARCHITECTURES[kind], use, licence)
        (directory / "README.md").write_text(card)


def _to_balm(model: Model, kind: str) -> dict[str, np.ndarray]:
    """The state dict of BALM's model."""
    spec, arrays = model.spec, flat_arrays(model.params)
    if spec.tied:  # BALM's decoder is always its own
        arrays["head/decoder"] = arrays["embedding"].copy()
    frequency = 10_000.0 ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    frequency = frequency.astype(np.float32)
    tensors = {}
    for path, array in arrays.items():
        name = _name(path, kind)
        if name is None:
            continue
        if path in _BY_TOKEN:
            array = np.delete(array, NULL, axis=0)
        elif array.ndim == 2:
            array = array.T
        tensors[name] = array
    for number in range(spec.layers):
        start = f"layers/{number}/"
        layer = {p.removeprefix(start): a for p, a in arrays.items() if p.startswith(start)}
        sparse = number in spec.moe_layers
        tensors |= ffns_to_balm(_layer(kind, number), layer, spec, sparse)
        # a buffer that BALM saves; transformers would leave it uninitialised if it were missing
        tensors[f"{_layer(kind, number)}attention.rotary_embed.inv_freq"] = frequency
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


_USE = """import torch
from balm import BalmTokenizer, {model}  # github.com/brineylab/BALM

model = {model}.from_pretrained("{directory}").eval()
for layer in model.base_model.layers:
    layer.attention.attn_dropout = 0.0  # BALM applies it in evaluation, too
row = BalmTokenizer("{directory}/vocab.txt")("{row}", return_tensors="pt")
logits = model(row.input_ids, attention_mask=row.attention_mask).logits"""
