"""The training step of a mixture of experts against BALM-MoE in torch, same cores, same model.

    git clone https://github.com/brineylab/BALM
    pip install -e .[hf] && python benchmarks/balm_moe.py --balm BALM

d_model 320, 6 layers of which 3 have 8 experts, top-2, SwiGLU, BALM's capacity 1.0 (0.5 here, see
configs/balm_moe.py), 8 rows of 256 tokens. Prints tokens/s of each contender, its CPU seconds, and
how many times faster it is, turn by turn, than BALM-MoE as it comes (float32, dropout 0.1), than
without dropout, which ours has not, and than that with the huge pages that our trainer uses; in
brackets the same of CPU seconds, which other work on the machine disturbs less. Ours lets the batch
compete for capacity as BALM does; "antibody" is our default, each row for itself.

Of BALM only the model is imported. Its package's __init__ is passed by, as it needs libraries for
data and logging, and with transformers 5 its base class gets the attribute
`all_tied_weights_keys`, which is looked up before it is set.
"""

import argparse
import statistics
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
from contest import contest, ratio, serve
from steps import make_batch
from train_step import ROWS, work_in_jax

from moe_ablm.allocator import TUNABLES
from moe_ablm.model.families import TopK
from moe_ablm.model.spec import SIZES, EncoderSpec

TARGET, STRETCH = 2.5, 4.0
# precision and routing group
OURS = {
    "auto": ("auto", "batch"),
    "float32": ("float32", "batch"),
    "auto, antibody": ("auto", "sequence"),
}
# dropout, and whether with huge pages
BALM = {
    "BALM": (0.1, False),
    "BALM, no dropout": (0.0, False),
    "the same, huge": (0.0, True),
}
BALM_MASK = 31  # its <mask>, in a vocabulary of 32


def spec(group: str) -> EncoderSpec:
    """Ours."""
    moe = TopK(experts=8, k=2, capacity=0.5, group=group)
    return EncoderSpec(*SIZES["8m"], token_dropout=False, activation="swiglu", tied=False, moe=moe)


def balm_model(checkout: Path, dropout: float):
    """`BalmMoEForMaskedLM` from a checkout of github.com/brineylab/BALM."""
    package = types.ModuleType("balm")
    package.__path__ = [str(checkout / "src" / "balm")]
    sys.modules["balm"] = package
    from balm.config import BalmMoEConfig
    from balm.models import BalmMoEForMaskedLM
    from balm.models.base import BalmPreTrainedModel

    BalmPreTrainedModel.all_tied_weights_keys = {}
    layers, d_model, ffn, heads = SIZES["8m"]
    return BalmMoEForMaskedLM(
        BalmMoEConfig(
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn,
            dropout=dropout,
            num_experts=8,
            num_experts_per_tok=2,
            router_type="top-k",
            expert_capacity_type="multiplier",
            expert_capacity=1.0,
        )
    )


def work_in_torch(checkout: Path, dropout: float):
    """One update of theirs with fused AdamW."""
    import torch

    model = balm_model(checkout, dropout).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, (0.9, 0.98), 1e-6, weight_decay=0.01, fused=True
    )
    rows = make_batch(ROWS)
    targets = rows["targets"].astype(np.int64)
    tokens = torch.from_numpy(np.where(rows["loss_mask"], BALM_MASK, targets))
    labels = torch.from_numpy(np.where(rows["loss_mask"], targets, -100))
    mask = torch.ones_like(tokens)

    def work():
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def commit_of(checkout: Path) -> str:
    """Commit of a checkout of BALM; exits where there is none."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode or not (checkout / "src" / "balm" / "models" / "balm_moe.py").exists():
        sys.exit(f"--balm={checkout}: expected a git checkout of github.com/brineylab/BALM")
    return found.stdout.strip()


def print_table(times: dict[str, list[tuple]]) -> None:
    head = "".join(f"{'x ' + t:>20}" for t in BALM)
    print(f"{'':20}{'tokens/s':>10}{'CPU s':>8}{head}   (in CPU seconds)")
    for name in times:
        wall = statistics.median(w for w, _ in times[name])
        cpu = statistics.median(c for _, c in times[name])
        cells = ""
        for other in BALM:
            work = statistics.median(c for _, c in times[other]) / cpu
            cells += f"{ratio(times, name, other):12.2f} {f'({work:.2f})':>7}"
        print(f"{name:20}{ROWS.count * ROWS.length / wall:10,.0f}{cpu:8.2f}{cells}")
    for name in ("auto", "float32"):
        reached = ratio(times, name, "BALM")
        verdict = "met" if reached >= TARGET else "missed"
        print(f"{name}: {reached:.2f} x BALM; target {TARGET} {verdict}, stretch {STRETCH}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--balm", type=Path, required=True, metavar="PATH", help="its checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", metavar="CONTENDER", choices=(*OURS, *BALM))
    arguments = parser.parse_args()
    commit, name = commit_of(arguments.balm), arguments.worker
    if name:
        if name in OURS:
            precision, group = OURS[name]
            serve(work_in_jax(spec(group), precision))
        else:
            serve(work_in_torch(arguments.balm, BALM[name][0]))
        return
    commands = {
        worker: ["env", f"GLIBC_TUNABLES={TUNABLES if worker in OURS or BALM[worker][1] else ''}"]
        + [sys.executable, __file__, "--balm", str(arguments.balm), "--worker", worker]
        for worker in (*OURS, *BALM)
    }
    print(f"BALM {commit}; {ROWS.count} x {ROWS.length} tokens, {arguments.rounds} rounds")
    print_table(contest(commands, arguments.rounds))


if __name__ == "__main__":
    main()
