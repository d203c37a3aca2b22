"""The training step (forward, backward, update) against transformers' EsmForMaskedLM in torch.

    pip install -e .[hf] && python benchmarks/train_step.py --sizes 8m 35m

Prints tokens/s of each contender, the ratio to torch round by round, and CPU seconds. Ours runs
with huge pages, as the trainer does by itself, once with dropout of .1 everywhere, and once with
Muon; torch without dropout as it comes, and again with huge pages.
"""

import argparse
import statistics
import sys

from contest import contest, ratio, serve
from steps import OurStep, Rows, TorchStep, make_batch

from moe_ablm.allocator import TUNABLES
from moe_ablm.model.spec import PRECISIONS, SIZES, EncoderSpec, Execution

ROWS = Rows(8, 256, (256, 256))  # full ones
OURS = ("auto", "float32", "auto dropout", "auto muon")
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "embedding_dropout": 0.1}
TORCH = ("torch float32", "torch float32 huge", "torch bfloat16")
PLAIN = ("torch float32", "torch bfloat16")


def work_in_jax(spec: EncoderSpec, precision: str, optimizer: str = "adamw"):
    """One update of ours."""
    import jax

    from moe_ablm.training.execution import default_precision

    precision = default_precision("cpu") if precision == "auto" else precision
    step = OurStep(spec, Execution(*PRECISIONS[precision]), ROWS, optimizer)
    update = step.work(step.compile())
    return lambda: jax.block_until_ready(update())


def work_in_torch(size: str, dtype: str):
    """One update of `EsmForMaskedLM`."""
    return TorchStep(SIZES[size], make_batch(ROWS), "cpu").work(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["8m", "35m"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "CONTENDER"))
    arguments = parser.parse_args()
    if arguments.worker:
        size, name = arguments.worker
        kind, what, *_ = (*name.split(), "")
        spec = EncoderSpec(*SIZES[size], **(DROPOUT if what == "dropout" else {}))
        if kind == "torch":
            serve(work_in_torch(size, what))
        else:
            serve(work_in_jax(spec, kind, "muon" if what == "muon" else "adamw"))
        return
    tokens = ROWS.count * ROWS.length
    for size in arguments.sizes:
        commands = {
            name: ["env", f"GLIBC_TUNABLES={'' if name in PLAIN else TUNABLES}"]
            + [sys.executable, __file__, "--worker", size, name]
            for name in (*OURS, *TORCH)
        }
        times = contest(commands, arguments.rounds)
        print(f"\n{size}, {ROWS.count} x {ROWS.length} tokens, {arguments.rounds} rounds")
        print(f"{'':20}{'tokens/s':>10}{'CPU s':>8}" + "".join(f"{'x ' + t:>24}" for t in TORCH))
        for name in times:
            wall = statistics.median(w for w, _ in times[name])
            cpu = statistics.median(c for _, c in times[name])
            ratios = [ratio(times, name, other) for other in TORCH]
            cells = "".join(f"{r:24.2f}" for r in ratios)
            print(f"{name:20}{tokens / wall:10,.0f}{cpu:8.2f}{cells}")


if __name__ == "__main__":
    main()
