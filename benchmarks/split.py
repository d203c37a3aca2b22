"""How typical the held-out sets of a split are.

    python benchmarks/split.py --input pairs.parquet [--search N]
    python benchmarks/split.py --dataset DIR

prints the share of valid and test, and how far (total variation, 0 to 1) their CDRH3 lengths,
V genes and J genes are from those of all rows: for `--split group` on a parquet file with the
study's columns, or for a dataset as it is. `--search` tries N salts of the hash and prints the best
ones; the salt in `moe_ablm/data/split.py` was found so.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_ablm.data import split as splits
from moe_ablm.data.dataset import SPLITS, Dataset
from moe_ablm.data.regions import CDR3

COLUMNS = ("v_gene_heavy", "j_gene_heavy", "cdr3_aa_heavy")
PROPERTIES = ("CDRH3 length", "V gene", "J gene")


def groups(path: Path) -> tuple[list[tuple[str, str, int]], np.ndarray]:
    """Clonal groups (V gene, J gene, CDRH3 length) of a table and their shares `[groups]`."""
    table = pq.read_table(path, columns=list(COLUMNS))
    v, j, cdr3 = (table[name] for name in COLUMNS)
    columns = (v.to_pylist(), j.to_pylist(), pc.utf8_length(cdr3).to_pylist())
    counts = Counter(zip(*columns, strict=True))
    return list(counts), np.array(list(counts.values())) / len(table)


def distances(split: np.ndarray, shares: np.ndarray, properties: list[np.ndarray]) -> np.ndarray:
    """`[2, 4]`: for valid and test, the share held and the total variation of each property."""
    rows = []
    for code in (1, 2):
        held = np.where(split == code, shares, 0)
        total = max(held.sum(), 1e-12)
        variation = [
            0.5 * np.abs(np.bincount(p, held) / total - np.bincount(p, shares)).sum()
            for p in properties
        ]
        rows.append([held.sum(), *variation])
    return np.array(rows)


def score(found: np.ndarray) -> float:
    """What the search makes small: variation of the worse set, and shares off 5 %."""
    off = np.maximum(np.abs(found[:, 0] - 0.05) - 0.001, 0)
    return float((found[:, 1:].sum(axis=1) + 20 * off).max())


def show(name: str, found: np.ndarray) -> None:
    """Prints a line for valid and one for test."""
    for split, (share, *variation) in zip(SPLITS[1:], found, strict=True):
        cells = "  ".join(f"{x:12.3f}" for x in variation)
        print(f"{name:18} {split:6} {share:7.2%}  {cells}")


def show_dataset(path: Path) -> None:
    """Distances of a dataset's own split."""
    dataset = Dataset(path)
    columns = []
    for batch in dataset.batches():
        region = batch["heavy_region"]
        sums = np.concatenate([[0], np.cumsum(region.values.to_numpy() == CDR3)])
        genes = [batch[f"heavy_{g}_gene"].to_pylist() for g in "vj"]
        columns.append([np.diff(sums[region.offsets.to_numpy()]), *genes])
    properties = [
        np.unique(np.concatenate(c), return_inverse=True)[1] for c in zip(*columns, strict=True)
    ]
    shares = np.full(len(dataset), 1 / len(dataset))
    show(path.name, distances(dataset.split, shares, properties))


def show_search(path: Path, salts: int) -> None:
    """Distances of the rule `group` on a table, with its salt and with the best of others."""
    names, shares = groups(path)
    properties = [np.unique([n[i] for n in names], return_inverse=True)[1] for i in (2, 0, 1)]
    v, j, length = zip(*names, strict=True)

    def measure(salt: bytes) -> np.ndarray:
        hashes = splits.group_hashes(v, j, np.array(length), salt)
        return distances(splits.split_of(hashes), shares, properties)

    print(f"{len(names)} groups, as many as {1 / (shares**2).sum():.0f} equal ones")
    show(splits.SALT.decode(), measure(splits.SALT))
    tried = [(measure(salt), salt) for salt in (b"ablm-split-%d" % i for i in range(salts))]
    tried.sort(key=lambda t: score(t[0]))
    for found, salt in tried[:3]:
        show(salt.decode(), found)
    if tried:
        median = np.median([t[0] for t in tried], (0, 1))
        print(
            f"{'median':18} {'':6} {median[0]:7.2%}  " + "  ".join(f"{x:12.3f}" for x in median[1:])
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--search", type=int, default=0)
    args = parser.parse_args()
    print(f"{'':18} {'split':6} {'share':>7}  " + "  ".join(f"{p:>12}" for p in PROPERTIES))
    if args.input:
        show_search(args.input, args.search)
    if args.dataset:
        show_dataset(args.dataset)


if __name__ == "__main__":
    main()
