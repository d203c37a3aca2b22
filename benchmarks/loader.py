"""Sequences a second and core that the input pipeline makes, masking included, through grain.

    python benchmarks/loader.py --input data/pairs

Rates are per second of process CPU time (all threads), so that other work on the machine matters
little; each is the best of several rounds. `fill` is the share of places that are not padding,
`start` the CPU time until the first batch.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_ablm.data.assemble import Masking
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import parse_policy
from moe_ablm.data.mixture import Batching, Mixture, parse_regime
from moe_ablm.data.packing import first_fit_decreasing
from moe_ablm.data.pipeline import TrainBatches, train_iterator
from moe_ablm.data.sequences import chains, pairs
from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.data.tokenizer import LAYOUTS

ROUNDS = 5
FILL_LENGTHS = (256, 320, 480, 512, 720, 960, 1024)
CASES = (  # kind, regime, mask, rows, length
    *(("padded", "paired", "uniform", rows, 256) for rows in (32, 128, 512)),
    ("bucketed", "paired", "uniform", 128, 256),
    ("bucketed", "mixed:0.625", "uniform", 128, 256),
    ("packed", "paired", "uniform", 32, 960),
    ("packed", "mixed:0.625", "uniform", 32, 960),
    ("packed", "unpaired", "uniform", 32, 960),
    ("padded", "shuffled", "uniform", 128, 256),
    ("padded", "unpaired", "uniform", 128, 160),
    ("padded", "mixed:0.625", "uniform", 128, 256),
    ("padded", "curriculum:sigmoid", "uniform", 128, 256),
    ("padded", "paired", "cdr3:0.25", 128, 256),
    ("padded", "paired", "nongermline:0.25", 128, 256),
    ("padded", "paired", "span", 128, 256),
)


def make_source(dataset: Dataset, kind: str, regime: str, mask: str, rows: int, length: int):
    """A source of many steps, and the CPU seconds that making it took."""
    start = time.process_time()
    mixture = Mixture(
        [dataset],
        [dataset.rows("train")],
        parse_regime(regime),
        Batching(kind, rows, length, "esm", (144, 240, 256)),
        seed=0,
        steps=100_000,
    )
    source = TrainBatches(mixture, Masking(parse_policy(mask), 0.15, 0))
    source[0]  # the first epoch's order
    return source, time.process_time() - start


def measure(source: TrainBatches, sequences: int, threads: int) -> tuple[float, float, float]:
    """Best rate of sequences, rate of tokens in that round, and fill."""
    best = (0.0, 0.0, 0.0)
    batches = train_iterator(source, 0, threads)
    next(batches)
    for _ in range(ROUNDS):
        seen = tokens = places = 0
        counting = 0.0
        start = time.process_time()
        while seen < sequences:
            batch = next(batches)
            began = time.thread_time()  # counting is not loading
            seen += int(((batch["position"] == 0) & (batch["antibody"] > 0)).sum())
            tokens += np.count_nonzero(batch["antibody"])
            places += batch["antibody"].size
            counting += time.thread_time() - began
        spent = time.process_time() - start - counting
        best = max(best, (seen / spent, tokens / spent, tokens / places))
    return best


def fill_table(dataset: Dataset) -> Table:
    """Share of places that are not padding, by row length, of pairs and of chains alone."""
    rows, layout = dataset.rows("train"), LAYOUTS["esm"]
    table = Table(title="share of places that are not padding")
    table.add_column("length")
    for form, how in product(("pairs", "chains"), ("padded", "packed")):
        table.add_column(f"{form}, {how}", justify="right")
    forms = [form(dataset, rows).tokens(dataset, layout) for form in (pairs, chains)]
    for length in FILL_LENGTHS:
        cells = []
        for sizes in (tokens[tokens <= length] for tokens in forms):
            packed = len(first_fit_decreasing(sizes, length))
            cells += [f"{sizes.sum() / (n * length):.3f}" for n in (len(sizes), packed)]
        table.add_row(str(length), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="dataset directory (default: simulated)")
    parser.add_argument("--sequences", type=int, default=20_000, help="a round")
    args = parser.parse_args()
    dataset = Dataset(args.input or simulated_dataset(20_000))
    antibodies = f"{len(dataset.rows('train')):,} training antibodies"
    table = Table(title=f"{dataset.path}: {antibodies}; rates per second and core")
    for name in ("batching", "regime", "mask", "rows", "length"):
        table.add_column(name, no_wrap=True)
    for name in ("sequences", "M tokens", "fill", "start, s"):
        table.add_column(name, justify="right")
    for case in CASES:
        source, made = make_source(dataset, *case)
        sequences, tokens, fill = measure(source, args.sequences, threads=1)
        table.add_row(
            *map(str, case),
            f"{sequences:,.0f}",
            f"{tokens / 1e6:.1f}",
            f"{fill:.3f}",
            f"{made:.2f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(fill_table(dataset))


if __name__ == "__main__":
    main()
