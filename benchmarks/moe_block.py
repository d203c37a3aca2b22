"""A mixture-of-experts block against a dense FFN of the same active FLOPs, forward and backward.

    python benchmarks/moe_block.py --widths 8m 35m

Prints the time of each router over that of the dense block, turn by turn, and the temporary memory
that XLA plans. Rows are full: 4,096 tokens in rows of 256.
"""

import argparse
import statistics
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
from contest import contest, ratio, serve
from flax import nnx

from moe_ablm.allocator import TUNABLES
from moe_ablm.model.families import ExpertChoice, Soft, TopK
from moe_ablm.model.layers import FeedForward
from moe_ablm.model.moe import MoE
from moe_ablm.model.spec import PRECISIONS, SIZES, EncoderSpec, Execution
from moe_ablm.training.execution import default_precision

LENGTH, K = 256, 2
TOPK = TopK(experts=8, k=K)
CONTENDERS = {
    "dense": None,
    "top-2, capacity 1.25": replace(TOPK, capacity=1.25),
    "top-2, dropless": TOPK,
    "expert choice": ExpertChoice(experts=8, k=K),
    "soft, k * L slots": Soft(experts=8, slots=K * LENGTH // 8),
    "top-2 of 64, capacity 1.25": replace(TOPK, experts=64, capacity=1.25),
    "top-2 of 64, dropless": replace(TOPK, experts=64),
}
# (of, to, target): time of one over that of the other
TARGETS = (
    ("top-2, capacity 1.25", "dense", 1.25),
    ("top-2, dropless", "top-2, capacity 1.25", 1.1),
    ("expert choice", "dense", 1.1),
    ("soft, k * L slots", "dense", 1.3),
    ("top-2 of 64, capacity 1.25", "top-2, capacity 1.25", 1.3),
    ("top-2 of 64, dropless", "top-2, dropless", 1.6),
)


def gradient(width: str, name: str, precision: str):
    """Jitted gradient of a block in its parameters and input, and its arguments' shapes."""
    layers, d, f, heads = SIZES[width]
    moe = CONTENDERS[name]
    spec = EncoderSpec(layers, d, f, heads, moe=moe)
    execution = Execution(*PRECISIONS[precision])
    if moe is None:
        make = lambda: FeedForward(spec, K * f, execution, nnx.Rngs(0))  # noqa: E731
    else:
        make = lambda: MoE(spec, execution, nnx.Rngs(0))  # noqa: E731
    definition, params = nnx.split(make())

    def loss(params, x, cotangent):
        block = nnx.merge(definition, params)
        if moe is None:
            return (block(x) * cotangent).sum()
        out, routed = block(x, jnp.ones(x.shape[:2], bool), training=True)
        return (out * cotangent).sum() + routed.stats.load_balance + routed.stats.z_loss

    return jax.jit(jax.grad(loss, (0, 1))), params


def arguments(width: str, tokens: int, params, precision: str):
    """Random input and cotangent of `tokens` tokens."""
    shape = (tokens // LENGTH, LENGTH, SIZES[width][1])
    dtype = PRECISIONS[precision][0]
    return params, *(jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in (1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", nargs="+", default=["8m", "35m"], choices=SIZES)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default=default_precision("cpu"), choices=PRECISIONS)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--worker", nargs=2, metavar=("WIDTH", "CONTENDER"))
    a = parser.parse_args()
    if a.worker:
        width, name = a.worker
        step, params = gradient(width, name, a.precision)
        values = arguments(width, a.tokens, params, a.precision)
        serve(lambda: jax.block_until_ready(step(*values)))
        return
    for width in a.widths:
        base = ["env", f"GLIBC_TUNABLES={TUNABLES}", sys.executable, __file__]
        base += ["--tokens", str(a.tokens), "--precision", a.precision, "--worker", width]
        times = contest({name: [*base, name] for name in a.only}, a.rounds)
        device = jax.devices()[0].device_kind
        print(f"\n{width} widths, {a.tokens:,} tokens, {a.precision}, {a.rounds} rounds, {device}")
        print(f"{'':28}{'ms':>8}{'CPU ms':>8}{'x dense':>9}{'memory MB':>11}")
        for name in a.only:
            wall, cpu = (1e3 * statistics.median(t[i] for t in times[name]) for i in (0, 1))
            step, params = gradient(width, name, a.precision)
            memory = step.lower(*arguments(width, a.tokens, params, a.precision)).compile()
            megabytes = memory.memory_analysis().temp_size_in_bytes / 1e6
            slower = ratio(times, "dense", name)
            print(f"{name:28}{wall:8.1f}{cpu:8.1f}{slower:9.2f}{megabytes:11,.0f}", flush=True)
        for of, to, target in TARGETS:
            if of in times and to in times:
                print(f"{of} / {to}: {ratio(times, to, of):.2f} (target at most {target})")


if __name__ == "__main__":
    main()
