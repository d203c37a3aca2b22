"""Tiny models whose every parameter is random, biases and norms included."""

from functools import cache

import jax
import numpy as np
from flax import nnx

from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.interop.saved import Model, fill, flat_arrays, parameter_shapes
from moe_ablm.model.encoder import make_definition
from moe_ablm.model.spec import EncoderSpec, Execution


def random_params(spec: EncoderSpec, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(spec)
    arrays = {
        "/".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(shapes)
    }
    ones = {name for name in arrays if name.endswith("scale")}
    drawn = {n: 0.2 * rng.standard_normal(s) + (n in ones) for n, s in arrays.items()}
    return fill(shapes, drawn.__getitem__)


def random_model(layout: str = "esm", length: int = 64, **changes) -> Model:
    """A dense model of 2 layers and width 24, or as told."""
    spec = EncoderSpec(**({"layers": 2, "d_model": 24, "ffn": 48, "heads": 4} | changes))
    facts = {"licence": "cc-by-4.0", "data": {"fraction": "full"}, "metrics": {"loss": 0.25}}
    return Model(spec, random_params(spec), LAYOUTS[layout], length, "a test", "paired", (), facts)


def same(a: Model, b: Model) -> bool:
    """Whether two models have the same parameters, bit for bit, and the same encoder."""
    one, other = flat_arrays(a.params), flat_arrays(b.params)
    equal = all(one[name].tobytes() == other[name].tobytes() for name in one)
    return equal and one.keys() == other.keys() and a.spec == b.spec


@cache
def _encode(spec: EncoderSpec, training: bool):
    """`(params, tokens, valid) -> logits`, compiled once an encoder; quickly, as rows are few."""
    definition = make_definition(spec, Execution())

    def run(params, tokens, valid):
        return nnx.merge(definition, params)(tokens, valid, None, training).logits

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def logits_of(model: Model, tokens, valid, training: bool = False) -> np.ndarray:
    """Logits in strict float32."""
    return np.asarray(_encode(model.spec, training)(model.params, tokens, valid))
