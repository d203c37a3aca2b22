"""What this version of jax computes on this machine: the operations of an update.

    python benchmarks/versions.py

Each is compiled as one program, and compared with float64, operation by operation. Hashes are equal
where two versions agree in every bit. Ends with code 1 where an error is beyond the limit.
"""

import argparse
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from moe_ablm.model.layers import LayerNorm
from moe_ablm.model.linear import dot

Operation = tuple[Callable[..., jax.Array], tuple[np.ndarray, ...]]
LIMIT = 1e-5  # of the error of an operation


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer norm over the last axis as one would write it, without scale and bias."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def gradient(function: Callable) -> Callable:
    """(x, cotangent) -> gradient in x."""
    return lambda x, cotangent: jax.vjp(function, x)[1](cotangent)[0]


def operations(tokens: int) -> dict[str, Operation]:
    """Operations of an update on so many tokens, and what they are applied to."""
    rng = np.random.default_rng(0)
    x, g, w = (rng.standard_normal((n, 128)).astype("f4") for n in (tokens, tokens, 128))
    narrow = [np.asarray(jnp.asarray(a, "bfloat16").astype("f4")) for a in (x.T.copy(), g)]
    norm = LayerNorm(128, 1e-5)
    return {
        "x @ w": (lambda a, b: a @ b, (x, w)),
        "x.T @ g, a sum over tokens": (lambda a, b: a @ b, (x.T.copy(), g)),
        "the same of bfloat16": (_of_bfloat16, tuple(narrow)),
        "sum over tokens": (lambda a: a.sum(0), (x,)),
        "softmax": (jax.nn.softmax, (x,)),
        "gradient of GELU": (gradient(lambda a: jax.nn.gelu(a, approximate=False)), (x, g)),
        "gradient of a plain layer norm": (gradient(layer_norm), (x, g)),
        "gradient of LayerNorm": (gradient(norm), (x, g)),
    }


def _of_bfloat16(a: jax.Array, b: jax.Array) -> jax.Array:
    # values are those of bfloat16 already: in float64 they are multiplied as they are
    return dot(a, b, "bfloat16") if a.dtype == jnp.float32 else a @ b


def error_of(function: Callable, arguments: tuple[np.ndarray, ...]) -> tuple[float, str]:
    """RMS error over the RMS of float64, and the hash of what is computed."""
    found = np.asarray(jax.jit(function)(*arguments))
    with jax.enable_x64(True), jax.disable_jit():
        exact = np.asarray(function(*(a.astype("f8") for a in arguments)))
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
    return float(error), hashlib.sha256(found.tobytes()).hexdigest()[:8]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 where an error is beyond the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args(arguments)
    title = f"jax {jax.__version__}, {jax.default_backend()}"
    table = Table("operation", "error", "hash", title=f"{title}: operations, {args.tokens} tokens")
    worst = 0.0
    for name, operation in operations(args.tokens).items():
        error, digest = error_of(*operation)
        worst = max(worst, error)
        table.add_row(name, f"{error:.1e}", digest)
    Console().print(table)
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
