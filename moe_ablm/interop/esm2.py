"""ESM-2 weights under Hugging Face's names, in and out of the encoder's parameters."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

# encoder path -> Hugging Face name; kernels are stored transposed there
_OUTSIDE_LAYERS = {
    "embedding": "esm.embeddings.word_embeddings.weight",
    "final_norm/scale": "esm.encoder.emb_layer_norm_after.weight",
    "final_norm/bias": "esm.encoder.emb_layer_norm_after.bias",
    "head/dense/kernel": "lm_head.dense.weight",
    "head/dense/bias": "lm_head.dense.bias",
    "head/norm/scale": "lm_head.layer_norm.weight",
    "head/norm/bias": "lm_head.layer_norm.bias",
    "head/bias": "lm_head.bias",
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


def params_from_huggingface(params: nnx.State, tensors: Mapping[str, np.ndarray]) -> nnx.State:
    """Parameters of a dense encoder with the values of an `EsmForMaskedLM` state dict.

    Args:
      params: of an encoder of the same sizes (values are ignored; shapes are checked).
      tensors: arrays by Hugging Face name.

    Raises:
      KeyError: a tensor is missing. ValueError: one has another shape than the encoder's.
    """
    flat = {}
    for path, variable in nnx.to_flat_state(params):
        name = "/".join(map(str, path))
        value = _value(name, tensors)
        if value.shape != variable.get_value().shape:
            raise ValueError(f"{name}: found {value.shape}, expected {variable.get_value().shape}")
        flat[path] = variable.replace(jnp.asarray(value, jnp.float32))
    return nnx.from_flat_state(flat)


def _value(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    if name in _OUTSIDE_LAYERS:
        return _transposed(name, tensors[_OUTSIDE_LAYERS[name]])
    _, number, inner = name.split("/", 2)
    layer = f"esm.encoder.layer.{number}."
    if inner.startswith("attention/qkv/"):
        part = "weight" if inner.endswith("kernel") else "bias"
        three = [
            _transposed(name, tensors[f"{layer}attention.self.{which}.{part}"])
            for which in ("query", "key", "value")
        ]
        return np.concatenate(three, axis=-1)
    return _transposed(name, tensors[layer + _IN_LAYER[inner]])


def _transposed(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.asarray(tensor).T if name.endswith("kernel") else np.asarray(tensor)
