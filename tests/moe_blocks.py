"""Blocks of every router for tests, the same program in float64, and what it must compute.

The reference is plain numpy in float64, one antibody and one token at a time, and lets every expert
compute for every token.
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_ablm.model.families import ExpertChoice, Router, Sequence, Soft, TopK, TopP
from moe_ablm.model.moe import MoE
from moe_ablm.model.spec import EncoderSpec, Execution

D, F, E = 6, 8, 4
CAPACITY = {"experts": E, "capacity": 0.75}
BLOCKS = {
    "top1": TopK(experts=E, k=1),
    "topk": TopK(experts=E),
    "topk capacity": TopK(**CAPACITY),
    "topk sigmoid": TopK(experts=E, gate="sigmoid", renormalise=False, balance_rate=0.1),
    "topk batch": TopK(group="batch", **CAPACITY),
    "topp": TopP(experts=E, k=3, threshold=0.6),
    "topp capacity": TopP(experts=E, k=3, threshold=0.9, renormalise=True, capacity=0.5),
    "expert choice": ExpertChoice(experts=E),
    "expert choice batch": ExpertChoice(group="batch", **CAPACITY),
    "soft": Soft(experts=E, slots=3),
    "soft l2": Soft(experts=E, slots=3, l2=True),
    "sequence": Sequence(experts=E),
    "shared": TopK(shared=2, **CAPACITY),
    "unequal": TopK(widths=(4, 8, 12, 4), shared=1, **CAPACITY),
}
SWIGLU = ("shared", "unequal")
ALONE = tuple(name for name in BLOCKS if "batch" not in name)  # no antibody sees another

B, L = 4, 12
DRAWS = np.random.default_rng(7)
VALID = np.arange(L) < np.array([12, 5, 1, 9])[:, None]
X = DRAWS.standard_normal((B, L, D)).astype(np.float32).astype("f8")
COTANGENT = DRAWS.standard_normal((B, L, D)).astype(np.float32).astype("f8")


def encoder_spec(name: str, **changes) -> EncoderSpec:
    """The encoder whose block is called `name`."""
    activation = "swiglu" if name in SWIGLU else "gelu"
    return EncoderSpec(1, D, F, 2, activation=activation, moe=BLOCKS[name], **changes)


FLOAT64 = Execution("float64", "float64")
in_float64 = partial(jax.enable_x64, True)  # where arrays of FLOAT64 can be made


@cache
def arrays(spec: EncoderSpec) -> dict[tuple, np.ndarray]:
    """Weights far from their start, so that routing and biases matter, in float64.

    They are of float32's precision: rounding them changes nothing.
    """
    rng = np.random.default_rng(8)
    module = nnx.eval_shape(lambda: MoE(spec, Execution(), nnx.Rngs(0)))
    found = {}
    for path, variable in sorted(nnx.to_flat_state(nnx.state(module)), key=lambda item: item[0]):
        draw = rng.standard_normal(variable.shape)
        if len(variable.shape) > 1:
            draw /= math.sqrt(variable.shape[0 if path[0] == "router" else -2])
        if path == ("scale",):
            draw = np.array(2.0)
        if path == ("balance",):
            draw /= 8
        found[path] = draw.astype(np.float32).astype("f8")
    return found


def block(spec: EncoderSpec, execution: Execution = Execution()):  # noqa: B008
    """Definition and parameters of a block with the weights of `arrays`."""
    definition, params = nnx.split(nnx.eval_shape(lambda: MoE(spec, execution, nnx.Rngs(0))))
    dtype = jnp.float64 if execution.operands == "float64" else jnp.float32
    given = arrays(spec)
    return definition, nnx.from_flat_state(
        {p: v.replace(jnp.asarray(given[p], dtype)) for p, v in nnx.to_flat_state(params)}
    )


# the machine code of these small programs is not worth a compiler's time
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnums=(0, 1))
def forward(definition, training, params, x, valid, packing=None):
    return nnx.merge(definition, params)(x, valid, packing, training)


@partial(jit, static_argnums=(0, 1))
def value_and_grad(definition, training, params, x, valid, cotangent, packing=None):
    """Everything that a loss may look at as one scalar, `(output, routing)`, and gradients."""

    def objective(params, x):
        out, routed = nnx.merge(definition, params)(x, valid, packing, training)
        stats = routed.stats
        value = (out * cotangent).sum() + stats.load_balance
        return value + 0.1 * stats.z_loss + 0.3 * stats.entropy_loss, (out, routed)

    return jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)


def named(params: nnx.State) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by name."""
    flat = nnx.to_flat_state(params)
    return {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}


# the reference


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def entropy(p: np.ndarray) -> float:
    """In nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def capacity_of(moe: Router) -> float | None:
    """Limit on what experts take, as it is asked for."""
    return getattr(moe, "capacity", None)


def gate_table(logits, moe: Router, training: bool, balance=0.0):
    """Gates `[n, E]` of n tokens that compete, before and after a capacity, and the distribution.

    Args:
      logits: `[n, E]`.
      moe: of any router but soft-MoE.
      training: whether token choice has its capacity.
      balance: `[E]`, added for the choice.
    """
    n, count = logits.shape
    affinity = softmax(logits) if moe.gate == "softmax" else 1 / (1 + np.exp(-logits))
    distribution = affinity / affinity.sum(-1, keepdims=True)
    asked = np.zeros((n, count))
    for t in range(n):
        together = 0.0
        for e in sorted(range(count), key=lambda e: (-(affinity[t] + balance)[e], e))[: moe.k]:  # noqa: B023
            if not isinstance(moe, TopP) or together < moe.threshold:
                asked[t, e] = affinity[t, e]
            together += distribution[t, e]
    if isinstance(moe, ExpertChoice):
        asked = affinity.copy()
    kept = asked.copy()
    if isinstance(moe, ExpertChoice) or (capacity_of(moe) and training):
        limit = 1.0 if moe.capacity is None else moe.capacity
        places = math.ceil(round(limit * moe.k * n / count, 6))
        for e in range(count):
            askers = [t for t in range(n) if asked[t, e] > 0]
            for t in sorted(askers, key=lambda t: (-asked[t, e], t))[places:]:  # noqa: B023
                kept[t, e] = 0
    by_default = type(moe) in (TopK, Sequence) and moe.k > 1
    asked_for = getattr(moe, "renormalise", False)
    if asked_for or (asked_for is None and by_default):
        kept /= asked.sum(-1, keepdims=True)
    if isinstance(moe, ExpertChoice):
        asked = kept
    return asked, kept, distribution


def ffn(x, up, up_bias, down, down_bias, activation):
    h = x @ up + up_bias
    if activation == "swiglu":
        gate, value = np.split(h, 2, axis=-1)
        h = gate / (1 + np.exp(-gate)) * value
    else:
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    return h @ down + down_bias


def expert_outputs(x, weights, spec: EncoderSpec):
    """`[E, n, D]`: every expert on every row; a wide expert is joined from its parts."""
    outputs, start = [], 0
    for e, width in enumerate(spec.expert_widths):
        parts = range(start, start := start + width // spec.chunk)
        halves = 2 if spec.activation == "swiglu" else 1
        up, up_bias = (
            np.concatenate(
                [np.split(weights[name,][p], halves, -1)[h] for h in range(halves) for p in parts],
                axis=-1,
            )
            for name in ("up", "up_bias")
        )
        down = np.concatenate([weights["down",][p] for p in parts])
        outputs.append(ffn(x, up, up_bias, down, weights["down_bias",][e], spec.activation))
    return np.stack(outputs)


def soft_reference(x, weights, spec):
    """Output of one antibody `[n, D]`, shares of the experts `[n, E]`, logits, dispatch."""
    kernel = weights["router",]
    seen = x
    if spec.moe.l2:
        seen = x / np.linalg.norm(x, axis=-1, keepdims=True)
        kernel = weights["scale",] * kernel / np.linalg.norm(kernel, axis=0, keepdims=True)
    logits = np.einsum("td,des->tes", seen, kernel)
    dispatch = softmax(logits, axis=0)
    combine = softmax(logits.reshape(len(x), -1)).reshape(logits.shape)
    out = np.zeros_like(x)
    for e in range(logits.shape[1]):
        slots = dispatch[:, e].T @ x
        out += combine[:, e] @ expert_outputs(slots, weights, spec)[e]
    return out, combine.sum(-1), logits.reshape(len(x), -1), dispatch


def reference(spec: EncoderSpec, x, antibody, training: bool):
    """Output `[B, L, D]`, assigned `[B, L, E]` and statistics by name; `antibody`: 0 at padding."""
    weights, moe = arrays(spec), spec.moe
    in_batch = getattr(moe, "group", "sequence") == "batch"
    flat, ids = x.reshape(-1, D), antibody.copy()
    ids += np.arange(len(ids))[:, None] * (ids.max() + 1) * (not in_batch)
    ids = np.where(antibody > 0, 1 if in_batch else ids, 0).reshape(-1)
    out, assigned = np.zeros_like(flat), np.zeros((len(flat), E))
    found = {"asked": [], "kept": [], "distribution": [], "logits": []}
    for number in sorted(set(ids) - {0}):
        here = np.flatnonzero(ids == number)
        if isinstance(moe, Soft):
            out[here], share, logits, _ = soft_reference(flat[here], weights, spec)
            table = (share,) * 3
            assigned[here] = share
        else:
            seen = flat[here]
            if isinstance(moe, Sequence):
                seen = np.broadcast_to(seen.mean(0), seen.shape)
            logits = seen @ weights["router",]
            table = gate_table(logits, moe, training, weights.get(("balance",), 0.0))
            gates = table[1]
            outputs = expert_outputs(flat[here], weights, spec)
            out[here] = (gates.T[..., None] * outputs).sum(0)
            assigned[here] = gates > 0
        for name, values in zip(found, (*table, logits), strict=True):
            found[name].append(values)
    if moe.shared:
        linears = [("shared", *p) for p in (("up", "kernel"), ("up", "bias"), ("down", "kernel"))]
        shared = [weights[p] for p in [*linears, ("shared", "down", "bias")]]
        out += ffn(flat, *shared, spec.activation)
    stats = statistics(moe, *(np.concatenate(values) for values in found.values()))
    return out.reshape(x.shape), assigned.reshape(*x.shape[:2], E), stats


def statistics(moe: Router, asked, kept, distribution, logits) -> dict[str, float]:
    """Loads, losses and the share dropped from tables `[tokens, E]`."""
    counts = [t.sum(0) if isinstance(moe, Soft) else (t > 0).sum(0) for t in (asked, kept)]
    load, share = counts[1] / counts[1].sum(), counts[0] / counts[0].sum()
    dropped = 1 - counts[1].sum() / counts[0].sum()
    if isinstance(moe, ExpertChoice):
        dropped = (kept.sum(-1) == 0).mean()
    z = np.log(np.exp(logits).sum(-1)) ** 2
    balanced = isinstance(moe, (TopK, Sequence))
    return {
        "load": load,
        "asked": share,
        "choices": counts[1].sum() / len(kept),
        "entropy": entropy(load) / math.log(E),
        "dropped": dropped,
        "logit_rms": math.sqrt((logits**2).mean()),
        "load_balance": E * (share * distribution.mean(0)).sum() if balanced else 0.0,
        "z_loss": z.mean(),
        "entropy_loss": np.mean([entropy(p) for p in distribution]),
    }
