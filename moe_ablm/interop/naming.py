"""Arrays of a dense encoder by the names that transformers gives them in ESM and RoBERTa.

transformers stores kernels transposed, queries, keys and values apart, and two rows before the
first position, of which nothing is read (one is the padding's).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flax import nnx

from moe_ablm.interop.saved import fill, flat_arrays
from moe_ablm.training.state import path_name

OFFSET = 2  # rows of learned positions before the first; max_position_embeddings counts them
DECODER = "lm_head.decoder.weight"

_HEAD = {
    "head/dense/kernel": "lm_head.dense.weight",
    "head/dense/bias": "lm_head.dense.bias",
    "head/norm/scale": "lm_head.layer_norm.weight",
    "head/norm/bias": "lm_head.layer_norm.bias",
    "head/bias": "lm_head.bias",
    "head/decoder": DECODER,
}
_IN_LAYER = {
    "attention/out/kernel": "attention.output.dense.weight",
    "attention/out/bias": "attention.output.dense.bias",
    "ffn/up/kernel": "intermediate.dense.weight",
    "ffn/up/bias": "intermediate.dense.bias",
    "ffn/down/kernel": "output.dense.weight",
    "ffn/down/bias": "output.dense.bias",
}
_QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Naming:
    """How a class of transformers names the arrays of an encoder.

    Attributes:
      model: name of the encoder within the class.
      norms: name of each layer norm: of the embedding, at the end, and the two of a layer.
    """

    model: str
    norms: Mapping[str, str]

    @property
    def embedding(self) -> str:
        """Name of the token embedding."""
        return f"{self.model}.embeddings.word_embeddings.weight"

    @property
    def positions(self) -> str:
        """Name of the learned positions."""
        return f"{self.model}.embeddings.position_embeddings.weight"

    def names(self, path: str) -> list[str]:
        """Names of the tensors that make up an array of the encoder."""
        outside = _HEAD | {"embedding": self.embedding, "positions": self.positions}
        if path in outside:
            return [outside[path]]
        inner, layer = path, f"{self.model}."
        if path.startswith("layers/"):
            _, number, inner = path.split("/", 2)
            layer = f"{self.model}.encoder.layer.{number}."
        if inner.startswith("attention/qkv/"):
            part = "weight" if inner.endswith("kernel") else "bias"
            return [f"{layer}attention.self.{which}.{part}" for which in _QKV]
        norm, _, part = inner.partition("/")
        if norm in self.norms:
            return [f"{layer}{self.norms[norm]}.{'weight' if part == 'scale' else part}"]
        return [layer + _IN_LAYER[inner]]

    def read(self, params: nnx.State, tensors: Mapping[str, np.ndarray]) -> nnx.State:
        """Parameters of a dense encoder with the values of a state dict.

        Args:
          params: of an encoder of the same sizes; only their shapes are used.
          tensors: arrays by name.

        Raises:
          KeyError: a tensor is missing.
          ValueError: a tensor has another shape than the encoder's.
        """

        def value(path: str) -> np.ndarray:
            parts = [tensors[name] for name in self.names(path)]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if path == "positions":
                return array[OFFSET:]
            return array.T if path.endswith("kernel") else array

        return fill(params, value)

    def written(self, params: nnx.State) -> dict[str, np.ndarray]:
        """The state dict of a dense encoder; layer norms have `weight` and `bias`."""
        tensors: dict[str, np.ndarray] = {}
        for path, array in flat_arrays(params).items():
            if path == "positions":
                array = np.pad(array, ((OFFSET, 0), (0, 0)))
            array = array.T if path.endswith("kernel") else array
            names = self.names(path)
            parts = np.split(array, len(names)) if len(names) > 1 else [array]
            tensors |= {n: np.ascontiguousarray(p) for n, p in zip(names, parts, strict=True)}
        return tensors

    def shapes(self, params: nnx.State) -> dict[str, tuple[int, ...]]:
        """Shapes that the arrays of an encoder have in a state dict, by name."""
        expected: dict[str, tuple[int, ...]] = {}
        for path, variable in nnx.to_flat_state(params):
            name = path_name(path)
            shape = variable.get_value().shape
            if name == "positions":
                shape = (shape[0] + OFFSET, *shape[1:])
            shape = shape[::-1] if name.endswith("kernel") else shape
            names = self.names(name)
            expected |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
        return expected


ESM = Naming("esm", {
    "embedding_norm": "embeddings.layer_norm",
    "final_norm": "encoder.emb_layer_norm_after",
    "attention_norm": "attention.LayerNorm",
    "ffn_norm": "LayerNorm",
})  # fmt: skip
ROBERTA = Naming("roberta", {
    "embedding_norm": "embeddings.LayerNorm",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
})  # fmt: skip
