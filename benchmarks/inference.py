"""Scoring and embedding against transformers: same weights, same antibodies, same cores.

    pip install -e .[hf] && python benchmarks/inference.py --size 8m

Exact pseudo-log-likelihood: transformers masks one position a forward pass, without padding; ours
batches all masked copies. A turn scores a few antibodies, of which a thousand are extrapolated
(`--score 1000` times them all). Embeddings: means over residues, transformers in padded batches.
Prints antibodies/s and the ratio to transformers, round by round, and CPU seconds; before that, how
much the results differ.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from contest import contest, ratio, serve

from moe_ablm.allocator import TUNABLES
from moe_ablm.data.tokenizer import LAYOUTS, MASK, PAD
from moe_ablm.model.spec import SIZES

TORCH, TORCH_HUGE = "torch float32", "torch float32 huge"
OURS = ("float32", "bfloat16_operands")
BATCH = 16  # antibodies of a padded batch in torch


def antibodies(count: int) -> list:
    """Simulated pairs."""
    from moe_ablm.data.antibody import Antibody
    from moe_ablm.data.simulate import simulate

    rows = [row for batch in simulate(count, 0) for row in batch.to_pylist()]
    return [
        Antibody(r["sequence_id"], r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in rows
    ]


def work_in_jax(task: str, precision: str, count: int, directory: str):
    """Ours, as the verbs and `moe_ablm.api` compute it."""
    from pathlib import Path

    from moe_ablm.inference.buckets import Engine
    from moe_ablm.inference.embed import embed
    from moe_ablm.inference.score import score
    from moe_ablm.interop.esm2 import import_esm2

    engine, some = Engine(import_esm2(Path(directory), "esm"), precision), antibodies(count)
    if task == "score":
        return lambda: np.array([found.sum() for found in score(engine, some)])
    return lambda: np.concatenate(embed(engine, some, "antibody"))


def work_in_torch(task: str, count: int, directory: str):
    """`EsmForMaskedLM` with SDPA."""
    import torch
    from transformers import EsmForMaskedLM

    from moe_ablm.data.antibody import row_of

    model = EsmForMaskedLM.from_pretrained(directory, attn_implementation="sdpa").eval()
    rows = [row_of(antibody, LAYOUTS["esm"]) for antibody in antibodies(count)]

    def score_one(row) -> float:
        total, tokens = 0.0, torch.from_numpy(row.tokens.astype(np.int64))[None]
        mask = torch.ones_like(tokens)
        for place in row.places.tolist():
            masked = tokens.clone()
            masked[0, place] = MASK
            logits = model(masked, attention_mask=mask).logits[0, place]
            total += float(torch.log_softmax(logits, -1)[tokens[0, place]])
        return total

    def embed_batch(part) -> np.ndarray:
        longest = max(len(row.tokens) for row in part)
        tokens = np.full((len(part), longest), PAD, np.int64)
        for i, row in enumerate(part):
            tokens[i, : len(row.tokens)] = row.tokens
        mask = torch.from_numpy((tokens != PAD).astype(np.int64))
        states = model.esm(torch.from_numpy(tokens), attention_mask=mask).last_hidden_state
        return np.stack([states[i, row.places].mean(0).numpy() for i, row in enumerate(part)])

    def work() -> np.ndarray:
        with torch.inference_mode():
            if task == "score":
                return np.array([score_one(row) for row in rows])
            parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            return np.concatenate([embed_batch(part) for part in parts])

    return work


def make_weights(size: str, directory: str) -> None:
    """Random weights of a real size, as `transformers` saves them."""
    import torch
    from transformers import EsmConfig, EsmForMaskedLM

    layers, d_model, ffn, heads = SIZES[size]
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        layer_norm_eps=1e-5,
        hidden_size=d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
    )
    EsmForMaskedLM(config).save_pretrained(directory)


def worker(task: str, name: str, count: str, directory: str, once: str | None = None) -> None:
    """One contender; with `once`, its results are saved under that name instead."""
    if name.startswith("torch"):
        work = work_in_torch(task, int(count), directory)
    else:
        work = work_in_jax(task, name, int(count), directory)
    if once:
        np.save(once, work())
    else:
        serve(work)


def command(name: str, *arguments: str) -> list[str]:
    """The command line of a contender; ours runs with huge pages, as the verbs do by themselves."""
    tunables = "" if name == TORCH else TUNABLES
    return [
        *("env", f"GLIBC_TUNABLES={tunables}"),
        *(sys.executable, __file__, "--worker", *arguments),
    ]


def difference(task: str, name: str, count: str, directory: str) -> float:
    """Largest difference of one result from transformers', relative to the largest result."""
    results = []
    for who in (name, TORCH):
        file = f"{directory}/result.npy"
        subprocess.run(command(who, task, who, count, directory, file), check=True)
        results.append(np.load(file))
    return float(np.abs(results[0] - results[1]).max() / np.abs(results[1]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="8m", choices=SIZES)
    parser.add_argument("--score", type=int, default=2, help="antibodies scored in a turn")
    parser.add_argument("--embed", type=int, default=256, help="antibodies embedded in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    names = (*OURS, TORCH, TORCH_HUGE)
    with tempfile.TemporaryDirectory(prefix="moe_ablm-bench-") as directory:
        make_weights(arguments.size, directory)
        for task, count in (("score", arguments.score), ("embed", arguments.embed)):
            commands = {n: command(n, task, n, str(count), directory) for n in names}
            differ = {n: difference(task, n, "1", directory) for n in OURS}
            times = contest(commands, arguments.rounds)
            print(f"\n{arguments.size}, {task} {count} antibodies, {arguments.rounds} rounds")
            head = (
                "antibodies/s",
                "1,000 take s",
                "CPU s",
                f"x {TORCH}",
                f"x {TORCH_HUGE}",
                "differs",
            )
            print(f"{'':20}" + "".join(f"{h:>22}" for h in head))
            for name in names:
                wall = statistics.median(w for w, _ in times[name])
                cpu = statistics.median(c for _, c in times[name])
                cells = [f"{count / wall:,.2f}", f"{1000 * wall / count:,.0f}", f"{cpu:.2f}"]
                cells += [f"{ratio(times, name, other):.2f}" for other in (TORCH, TORCH_HUGE)]
                cells += [f"{differ[name]:.1e}" if name in differ else ""]
                print(f"{name:20}" + "".join(f"{c:>22}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
