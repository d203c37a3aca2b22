"""Upcycling: the FFNs of a dense encoder become experts, each a copy of the FFN it replaces."""

from dataclasses import replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.interop.saved import Model, fill, flat_arrays, parameter_shapes
from moe_ablm.model.families import TopK
from moe_ablm.model.layers import INIT_STD


def upcycle(model: Model, moe: TopK, seed: int) -> Model:
    """Sparse upcycling (Komatsuzaki et al. 2023): copied experts, fresh routers.

    With renormalised top-k the gates of a token sum to 1 and its experts are equal, so the function
    is that of the dense encoder until training makes the experts differ.

    Args:
      model: a dense model.
      moe: the experts of the result; its gates are renormalised.
      seed: seed of the routers, which are drawn from N(0, 0.02^2).

    Raises:
      UserError: the model has experts already, its function would not be preserved (K below 2), or
        no layer would get experts.
    """
    if model.spec.moe_layers:
        raise UserError(
            f"{model.source} has experts already (layers "
            f"{', '.join(map(str, model.spec.moe_layers))}): only a dense model can be upcycled"
        )
    if not 2 <= moe.k <= moe.experts:
        raise UserError(
            f"--k {moe.k}: expected 2 to --experts ({moe.experts}); the gate of a single expert "
            "would either scale the output or leave the router without a gradient"
        )
    moe = replace(moe, renormalise=True)
    spec = replace(model.spec, moe=moe)
    try:
        layers = spec.require_moe_layers()
    except ValueError as error:
        raise UserError(f"--placement {moe.placement!r}: {error}") from error
    dense = flat_arrays(model.params)
    rng = np.random.Generator(np.random.Philox(seed))
    routers = {i: rng.normal(0.0, INIT_STD, (spec.d_model, moe.experts)) for i in layers}

    def value(path: str) -> np.ndarray:
        if path in dense:
            return dense[path]
        _, number, _, name = path.split("/")
        if name == "router":
            return routers[int(number)]
        part = "bias" if name.endswith("_bias") else "kernel"
        ffn = dense[f"layers/{number}/ffn/{name.removesuffix('_bias')}/{part}"]
        return np.broadcast_to(ffn, (moe.experts, *ffn.shape))

    note = f"upcycled to {moe.experts} experts in layers {', '.join(map(str, layers))}"
    return replace(
        model,
        spec=spec,
        params=fill(parameter_shapes(spec), value),
        source=f"{model.source}; {note}",
        notes=(*model.notes, note),
        # the function is that of the dense model, so its metrics stay
    )
