"""Low-rank adapters: a weight is W + 2 A B with factors of a small rank (Hu et al. 2021, eq. 3).

They are added to the parameters, not to the layers: attention, FFNs, routers and experts are
adapted by one rule, and the encoder computes as it always does. Each expert has factors of its own,
and of experts of several widths each of their equal pieces.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ADAPTED = ("kernel", "router", "up", "down")  # weights of layers; not biases and norms
SCALE = 2.0  # alpha / rank

Path = tuple[Any, ...]
Factors = dict[str, tuple[jax.Array, jax.Array]]


def adapters(params: nnx.State, rank: int, seed: int) -> Factors:
    """Factors `A [..., N, rank]` and `B [..., rank, M]` of every weight `[..., N, M]` of a layer.

    `A` is drawn from N(0, 1/N) and `B` is 0: at first nothing is changed.

    Args:
      params: of the encoder.
      rank: of the products.
      seed: of the draws.
    """
    rng = np.random.default_rng([seed, 2])
    found = {}
    for path, variable in sorted(nnx.to_flat_state(params), key=lambda item: _name(item[0])):
        if path[0] != "layers" or path[-1] not in ADAPTED:
            continue
        *before, rows, columns = _matrices(path, variable.get_value()).shape
        drawn = rng.standard_normal((*before, rows, rank)) / np.sqrt(rows)
        empty = jnp.zeros((*before, rank, columns), jnp.float32)
        found[_name(path)] = jnp.asarray(drawn, jnp.float32), empty
    return found


def adapted(params: nnx.State, factors: Factors) -> nnx.State:
    """The parameters with all products added."""
    flat = dict(nnx.to_flat_state(params))
    for path, variable in flat.items():
        if _name(path) in factors:
            a, b = factors[_name(path)]
            weight = variable.get_value()
            added = SCALE * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            flat[path] = variable.replace(weight + added.reshape(weight.shape))
    return nnx.from_flat_state(flat)


def _matrices(path: Path, weight: jax.Array) -> jax.Array:
    """A weight as `[..., N, M]`; a router of soft-MoE, `[D, E, S]`, as `[D, E S]`."""
    return weight.reshape(len(weight), -1) if path[-1] == "router" else weight


def _name(path: Path) -> str:
    return "/".join(map(str, path))
