"""The training step (forward, backward, update) against transformers' EsmForMaskedLM in torch.

    pip install -e .[hf] && python benchmarks/train_step.py --sizes 8m 35m

Prints tokens/s of each contender, the ratio to torch round by round, and CPU seconds. Ours runs
with huge pages, as the trainer does by itself; torch as it comes, and again with huge pages.
"""

import argparse
import statistics
import sys

import numpy as np
from contest import contest, ratio, serve

from moe_ablm.allocator import TUNABLES
from moe_ablm.model.spec import PRECISIONS, SIZES

BATCH, LENGTH = 8, 256
OURS = ("auto", "float32")
TORCH = ("torch float32", "torch float32 huge", "torch bfloat16")
PLAIN = ("torch float32", "torch bfloat16")


def batch() -> dict[str, np.ndarray]:
    """Random full rows, 15 % masked."""
    rng = np.random.default_rng(0)
    targets = rng.integers(4, 24, (BATCH, LENGTH)).astype(np.uint8)
    loss_mask = rng.random((BATCH, LENGTH)) < 0.15
    ones = np.ones((BATCH, LENGTH), np.uint8)
    tokens = np.where(loss_mask, np.uint8(32), targets)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": loss_mask,
        "segment": ones,
        "region": ones,
    }


def work_in_jax(size: str, precision: str):
    """One update of ours."""
    import jax

    from moe_ablm.model.spec import EncoderSpec, Execution
    from moe_ablm.parallel.mesh import global_batch, make_mesh
    from moe_ablm.training import state as states
    from moe_ablm.training.execution import default_precision
    from moe_ablm.training.optimizer import make_optimizer
    from moe_ablm.training.spec import OptimizerSpec
    from moe_ablm.training.step import make_train_step

    spec = EncoderSpec(*SIZES[size])
    precision = default_precision("cpu") if precision == "auto" else precision
    execution = Execution(*PRECISIONS[precision])
    optimizer = make_optimizer(
        OptimizerSpec(1000, 1e-4, 10, "linear", 0.1, 0.9, 0.98, 1e-6, 0.01, 1.0)
    )
    mesh = make_mesh(-1, 1, 1)
    jax.set_mesh(mesh)
    step = jax.jit(
        make_train_step(states.make_definition(spec, execution), optimizer, spec, 1, 0.0),
        donate_argnums=0,
    )
    state = states.init_state(spec, optimizer, 0, False, mesh)
    rows = batch()

    def work():
        nonlocal state
        state, metrics = step(state, global_batch(rows, mesh))
        jax.block_until_ready((state, metrics))

    return work


def work_in_torch(size: str, dtype: str):
    """One update of `EsmForMaskedLM` with SDPA and fused AdamW."""
    import torch
    from transformers import EsmConfig, EsmForMaskedLM

    layers, d_model, ffn, heads = SIZES[size]
    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model = EsmForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, (0.9, 0.98), 1e-6, weight_decay=0.01, fused=True
    )
    rows = batch()
    tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
    targets = rows["targets"].astype(np.int64)
    labels = torch.from_numpy(np.where(rows["loss_mask"], targets, -100))
    mask = torch.ones_like(tokens)

    def work():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["8m", "35m"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "CONTENDER"))
    arguments = parser.parse_args()
    if arguments.worker:
        size, name = arguments.worker
        kind, dtype, *_ = (*name.split(), "")
        serve(work_in_torch(size, dtype) if kind == "torch" else work_in_jax(size, name))
        return
    tokens = BATCH * LENGTH
    for size in arguments.sizes:
        commands = {
            name: ["env", f"GLIBC_TUNABLES={'' if name in PLAIN else TUNABLES}"]
            + [sys.executable, __file__, "--worker", size, name]
            for name in (*OURS, *TORCH)
        }
        times = contest(commands, arguments.rounds)
        print(f"\n{size}, {BATCH} x {LENGTH} tokens, {arguments.rounds} rounds")
        print(f"{'':20}{'tokens/s':>10}{'CPU s':>8}" + "".join(f"{'x ' + t:>24}" for t in TORCH))
        for name in times:
            wall = statistics.median(w for w, _ in times[name])
            cpu = statistics.median(c for _, c in times[name])
            ratios = [ratio(times, name, other) for other in TORCH]
            cells = "".join(f"{r:24.2f}" for r in ratios)
            print(f"{name:20}{tokens / wall:10,.0f}{cpu:8.2f}{cells}")


if __name__ == "__main__":
    main()
