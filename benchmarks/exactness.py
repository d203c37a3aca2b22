"""The kernels of this device, forward and backward, against plain float64 and float32 on CPU.

An error is the largest difference over the largest value of the reference; every check has a limit.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from steps import Rows, make_batch

from moe_ablm.model.attention import attend
from moe_ablm.model.encoder import Encoder, make_definition
from moe_ablm.model.experts import IMPLEMENTATIONS, grouped_matmul, sort_by_expert
from moe_ablm.model.families import Soft, TopK
from moe_ablm.model.linear import dot, dot_transposed
from moe_ablm.model.packing import Packing
from moe_ablm.model.spec import PRECISIONS, EncoderSpec, Execution
from moe_ablm.training.step import forward, region_sums

# bfloat16 has 8 bits: factors and results are rounded by up to 0.4 %, sums less
LIMITS = {"bfloat16": 2e-2, "float32": 1e-5}
ENCODER_LIMITS = {"bfloat16": 5e-2, "float32": 1e-4}  # relative norms, after some layers
HEAD_DIMS = (24, 64)  # of the encoders 35m and 650m
Check = Callable[[], dict]


def judged(errors: dict[str, float], limit: float) -> dict:
    """Errors with their limit and whether all keep it; one that is not a number does not."""
    told = {name: e if math.isfinite(e) else str(e) for name, e in errors.items()}
    return {**told, "limit": limit, "passed": all(e <= limit for e in errors.values())}


def error(found: jax.Array, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    found = np.asarray(found).astype("f8")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# float32


def float32_products() -> dict:
    """Products in the project's float32, and (not judged) in the default of jax's `matmul`."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1024, 1024)).astype("f4") for _ in range(2))
    exact = a.astype("f8") @ b.astype("f8")
    products = {
        "dot": dot(jnp.asarray(a), jnp.asarray(b), "float32"),
        "dot_transposed": dot_transposed(jnp.asarray(a), jnp.asarray(b.T.copy()), "float32"),
    }
    found = judged({n: error(x, exact) for n, x in products.items()}, LIMITS["float32"])
    return found | {"jax_default": error(jnp.asarray(a) @ jnp.asarray(b), exact)}


# attention


def plain_attention(q, k, v, g, allowed) -> tuple[np.ndarray, ...]:
    """Output and gradients of q, k, v in float64 numpy, by the definition.

    Args: q, k, v, g `[B, L, H, N]`; allowed bool `[B, L, L]`, at least one key for every query.
    """
    q, k, v, g = (np.asarray(x).astype("f8") for x in (q, k, v, g))
    scores = np.where(allowed[:, None], np.einsum("bqhn,bkhn->bhqk", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("bqhn,bkhn->bhqk", g, v)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True))
    return (
        np.einsum("bhqk,bkhn->bqhn", weights, v),
        np.einsum("bhqk,bkhn->bqhn", dscores, k),
        np.einsum("bhqk,bqhn->bkhn", dscores, q),
        np.einsum("bhqk,bqhn->bkhn", weights, g),
    )


def antibodies_of(rows: int, length: int, packed: bool) -> np.ndarray:
    """Number of the antibody of every token `[B, L]`, 0 for padding: one a row, or three.

    The last row is empty, as those that fill up the last batch of an evaluation.
    """
    rng = np.random.default_rng(1)
    ends = rng.integers(length // 2, length, (rows, 1))
    ends[-1] = 0
    if packed:
        ends = np.sort(np.concatenate([ends // 3, ends // 2, ends], axis=1), axis=1)
    place = np.arange(length)
    number = (place[:, None] >= ends[:, None]).sum(-1) + 1
    return np.where(place < ends[:, -1:], number, 0)


def attention(backend: str, precision: str, packed: bool) -> dict:
    """`attend` as a backend does it; "gpu" in bfloat16 is cuDNN, "tpu" is `attend_by_blocks`."""
    activations, operands = PRECISIONS[precision]
    execution = Execution(activations, operands, backend=backend)
    antibody = antibodies_of(rows := 4, length := 256, packed)
    valid = antibody > 0
    packing = Packing(jnp.asarray(antibody), jnp.asarray(antibody)) if packed else None
    same = antibody[:, :, None] == antibody[:, None, :]
    allowed = np.where(valid[:, :, None], same, True)  # queries of padding hold no meaning

    @jax.jit
    def run(q, k, v, g):
        attended = partial(attend, valid=jnp.asarray(valid), execution=execution, packing=packing)
        out, vjp = jax.vjp(attended, q, k, v)
        return out, *vjp(g)

    errors = {}
    for n in HEAD_DIMS:
        rng = np.random.default_rng(n)
        q, k, v, g = rng.standard_normal((4, rows, length, 4, n))
        real = valid[:, :, None, None]
        inputs = [jnp.asarray(x, activations) for x in (q * n**-0.5, k, v, g * real)]
        found, expected = run(*inputs), plain_attention(*inputs, allowed)
        # what is put out at padding holds no meaning, but must be finite; gradients are 0 there
        found = jnp.where(real, found[0], 0 * found[0]), *found[1:]
        expected = np.where(real, expected[0], 0), *expected[1:]
        for name, x, exact in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            errors[f"{name}_{n}"] = error(x, exact)
    return judged(errors, LIMITS[precision])


# experts


def grouped(name: str, precision: str) -> dict:
    """An implementation of `grouped_matmul` against a loop over experts; one of them is idle."""
    activations, operands = PRECISIONS[precision]
    execution = Execution(activations, operands, backend=jax.default_backend(), grouped=name)
    experts, block, n, m = 5, 128, 96, 160
    rng = np.random.default_rng(2)
    chosen = rng.choice([0, 1, 2, 4, 5], (900, 1), p=[0.5, 0.3, 0.05, 0.1, 0.05])  # 5: not routed
    _, assignment, groups = sort_by_expert(jnp.asarray(chosen, jnp.int32), experts, block)
    taken = np.asarray(assignment) < chosen.size
    owner = np.append(chosen[:, 0], experts)[np.asarray(assignment)]
    rows, g = (rng.standard_normal((len(owner), size)) * taken[:, None] for size in (n, m))
    weights = jnp.asarray(rng.standard_normal((experts, n, m)), "float32")
    inputs = jnp.asarray(rows, activations), weights

    @jax.jit
    def run(rows, weights, g):
        product = partial(grouped_matmul, groups=groups, block=block, execution=execution)
        out, vjp = jax.vjp(product, rows, weights)
        return jnp.where(jnp.asarray(taken)[:, None], out, 0), *vjp(g)

    g = jnp.asarray(g, activations)
    out, dx, dweights = run(*inputs, g)
    dx = jnp.where(jnp.asarray(taken)[:, None], dx, 0)
    found = {"out": out, "drows": dx, "dweights": dweights}
    expected = expert_by_expert(*inputs, g, owner)
    return judged(
        {name: error(found[name], exact) for name, exact in expected.items()}, LIMITS[precision]
    )


def expert_by_expert(rows, weights, g, owner: np.ndarray) -> dict[str, np.ndarray]:
    """What `grouped` compares, in float64 numpy; `owner [rows]` is the expert of each row."""
    rows, weights, g = (np.asarray(x).astype("f8") for x in (rows, weights, g))
    found = {
        "out": np.zeros(g.shape),
        "drows": np.zeros(rows.shape),
        "dweights": np.zeros(weights.shape),
    }
    for e in range(len(weights)):
        mine = owner == e
        found["out"][mine] = rows[mine] @ weights[e]
        found["drows"][mine] = g[mine] @ weights[e].T
        found["dweights"][e] = rows[mine].T @ g[mine]
    return found


# whole encoders, without choices that a rounding could turn over
SHAPE = (2, 64, 256, 4)
ENCODERS = {
    "dense": EncoderSpec(*SHAPE),
    "all-experts": EncoderSpec(*SHAPE, moe=TopK(experts=4, k=4)),
    "soft": EncoderSpec(*SHAPE, moe=Soft(experts=4, slots=8)),
}


def encoder(name: str, precision: str) -> dict:
    """Logits, loss and gradients of an encoder on this device against float32 on CPU."""
    here = Execution(*PRECISIONS[precision], backend=jax.default_backend())
    found, expected, errors = computed(name, here, jax.devices()[0]), reference(name), {}
    for what, exact in expected.items():
        errors[what] = float(np.linalg.norm(found[what] - exact) / np.linalg.norm(exact))
    return judged(errors, ENCODER_LIMITS[precision])


@cache
def reference(name: str) -> dict[str, np.ndarray]:
    """An encoder's values in float32 on CPU."""
    return computed(name, Execution(backend="cpu"), jax.devices("cpu")[0])


def computed(name: str, execution: Execution, device: jax.Device) -> dict[str, np.ndarray]:
    """Logits, loss and all gradients in one array, of fixed parameters and rows."""
    spec, batch = ENCODERS[name], make_batch(Rows(4, 64, (50, 60)))
    params = nnx.state(Encoder(spec, Execution(), nnx.Rngs(0)))
    # as after some training: with the initial weights, layers hardly change what they are given
    params = jax.tree.map(lambda x: np.asarray(x) * (6 if x.ndim > 1 else 1), params)
    definition = make_definition(spec, execution)

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        logits = forward(nnx.merge(definition, params), batch, training=True).logits
        return region_sums(logits, batch).loss.sum() / batch["loss_mask"].sum(), logits

    (value, logits), grads = jax.jit(loss)(*jax.device_put((params, batch), device))
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])
    found = {"logits": logits, "loss": value, "gradient": flat}
    return {what: np.asarray(x).astype("f8") for what, x in found.items()}


CHECKS: dict[str, Check] = {
    "float32/products": float32_products,
    "float32/attention": lambda: attention(jax.default_backend(), "float32", False),
    "float32/encoder": partial(encoder, "dense", "float32"),
    "attention/cudnn": partial(attention, "gpu", "bfloat16", False),
    "attention/cudnn-packed": partial(attention, "gpu", "bfloat16", True),
    "attention/blocks": partial(attention, "tpu", "bfloat16", False),
    "attention/blocks-packed": partial(attention, "tpu", "bfloat16", True),
    **{
        f"grouped/{name}/{precision}": partial(grouped, name, precision)
        for name in IMPLEMENTATIONS
        for precision in LIMITS
    },
    **{f"encoder/{name}": partial(encoder, name, "bfloat16") for name in ENCODERS},
}
