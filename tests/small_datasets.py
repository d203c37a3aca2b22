"""Small datasets made by hand for tests of the data room."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.dataset import Dataset, DatasetWriter, encode_batch
from moe_ablm.data.tokenizer import AMINO_ACIDS


@dataclass(frozen=True)
class Record:
    """An antibody; masks as in the columns of the study, empty for an unannotated protein."""

    heavy: str
    light: str
    heavy_cdr: str = ""
    light_cdr: str = ""
    heavy_mutated: str = ""
    light_mutated: str = ""


def random_records(n: int, seed: int, shortest: int = 9, longest: int = 16) -> list[Record]:
    """Antibodies with chains of random letters, each with CDR1, 2 and 3 and a few mutations."""
    rng = np.random.default_rng(seed)

    def chain() -> tuple[str, str, str]:
        size = int(rng.integers(shortest, longest + 1))
        letters = "".join(rng.choice(list(AMINO_ACIDS), size))
        cdr = "0102033" + "3" * (size - 9) + "00"
        return letters, cdr, "".join(rng.choice(list("01"), size, p=[0.8, 0.2]))

    records = []
    for _ in range(n):
        heavy, light = chain(), chain()
        records.append(Record(heavy[0], light[0], heavy[1], light[1], heavy[2], light[2]))
    return records


def table(records: list[Record]) -> pa.RecordBatch:
    """Records as columns of the study."""
    columns = {"sequence_id": [f"r{i}" for i in range(len(records))]}
    for chain in ("heavy", "light"):
        letters = [getattr(r, chain) for r in records]
        columns[f"sequence_aa_{chain}"] = letters
        for column, name in (("cdr_mask_aa", "cdr"), ("nongermline_mask_aa", "mutated")):
            columns[f"{column}_{chain}"] = [
                getattr(r, f"{chain}_{name}") or "0" * len(s)
                for r, s in zip(records, letters, strict=True)
            ]
    return pa.RecordBatch.from_pydict(columns)


def stored_rows(records: list[Record], split: np.ndarray | int = 0) -> pa.RecordBatch:
    """Records as stored rows, all in one split unless an array says which."""
    n = len(records)
    return encode_batch(
        table(records),
        key=np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        cluster=np.arange(n),
        split=np.broadcast_to(split, n),
        fraction_key=(np.arange(n) * 2**32 // n).astype(np.uint32),
    )


def write_dataset(path: Path, records: list[Record], split: np.ndarray | int = 0) -> Dataset:
    """A dataset of these records, opened."""
    with DatasetWriter(path) as writer:
        writer.add(stored_rows(records, split))
        writer.finish({"licence": "none"})
    return Dataset(path)
