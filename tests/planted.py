"""What evaluations are tested against: small datasets with a germline, and a model that is told
what to predict."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from small_datasets import Record, random_records, table
from tiny_models import tiny_model

from moe_ablm.data.dataset import SPLITS, Dataset, DatasetWriter, encode_batch
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import AMINO_ACIDS, VOCABULARY
from moe_ablm.inference.logits import OnePosition


class StandIn:
    """An engine whose predictions are those of a function.

    Args:
      predict: tokens `[n]` -> probabilities `[n, V]`.
      stop_after: rows after which it fails.
    """

    precision = "float32"

    def __init__(self, predict: Callable[[np.ndarray], np.ndarray], stop_after: int | None = None):
        self.predict, self.model = predict, tiny_model()
        self.stop_after, self.rows = stop_after, 0

    def run(self, task, rows, at=None):
        """As `Engine.run`; the last row comes first, and what is no token is padded."""
        for i in reversed(range(len(rows))):
            self.rows += 1
            if self.stop_after is not None and self.rows > self.stop_after:
                raise KeyboardInterrupt
            found = np.log(self.predict(rows[i])).astype(np.float32)
            if isinstance(task, OnePosition):
                yield i, found[at[i]]
            else:
                yield i, np.concatenate([found, np.zeros((7, len(VOCABULARY)), np.float32)])


def arbitrary(tokens: np.ndarray) -> np.ndarray:
    """Probabilities that depend on every token of the row, as those of a model do."""
    draws = np.random.default_rng(tokens.tolist()).gamma(0.5, size=(len(tokens), len(VOCABULARY)))
    return draws / draws.sum(1, keepdims=True)


def germline_records(n: int, seed: int, share: float = 0.3, **sizes) -> tuple[list[Record], dict]:
    """Random antibodies without mutations in CDR3, and their germline by chain."""
    rng = np.random.default_rng([seed, 1])
    records, germline = [], {chain: [] for chain in CHAINS}
    for record in random_records(n, seed, **sizes):
        values = {}
        for chain in CHAINS:
            letters, cdr = getattr(record, chain), getattr(record, f"{chain}_cdr")
            mutated = (rng.random(len(letters)) < share) & (np.array(list(cdr)) != "3")
            values |= {chain: letters, f"{chain}_cdr": cdr}
            values[f"{chain}_mutated"] = "".join("01"[int(m)] for m in mutated)
            germline[chain].append(
                "".join(
                    rng.choice([aa for aa in AMINO_ACIDS if aa != letter]) if m else letter
                    for letter, m in zip(letters, mutated, strict=True)
                )
            )
        records.append(Record(**values))
    return records, germline


def write_germline_dataset(
    path: Path,
    records: list[Record],
    germline: dict[str, Sequence[str]] | None,
    clusters: Sequence[int] | None = None,
    segments: dict[str, Sequence[str]] | None = None,
) -> Dataset:
    """A dataset of which all is in the test split."""
    batch, n = table(records), len(records)
    for name, column in (("germline_aa", germline), ("gene_segment_mask_aa", segments)):
        for chain, letters in (column or {}).items():
            batch = batch.append_column(f"{name}_{chain}", pa.array(letters, pa.string()))
    rows = encode_batch(
        batch,
        key=np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        cluster=np.arange(n) if clusters is None else np.asarray(clusters),
        split=np.full(n, SPLITS.index("test")),
        fraction_key=np.zeros(n, np.uint32),
    )
    with DatasetWriter(path) as writer:
        writer.add(rows)
        writer.finish({"licence": "none"})
    return Dataset(path)
