"""The antibodies of an evaluation: chains, and what is known of every residue."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.dataset import ROWS_PER_BATCH, Dataset
from moe_ablm.data.masking import mix
from moe_ablm.data.regions import CHAINS, FR4
from moe_ablm.data.tokenizer import decode

COLUMNS = ("tokens", "germline", "region", "mutated", "segment")


@dataclass(frozen=True, eq=False)
class Chain:
    """One chain; arrays are uint8 `[n]`, all 0 where the dataset does not know.

    Attributes:
      letters: amino acids.
      germline: the same with mutations of V and J reverted; of the same length.
      region: codes of `data.regions.REGIONS`, 0 without annotation.
      mutated: 1 where a residue of V or J is not the germline's; CDR3 of real data is 0.
      segment: codes of `data.regions.SEGMENTS`, known of simulated chains.
      v_gene, j_gene: "" where not known.
    """

    letters: str
    germline: str
    region: np.ndarray
    mutated: np.ndarray
    segment: np.ndarray
    v_gene: str
    j_gene: str

    def __len__(self) -> int:
        return len(self.letters)

    @property
    def mutations(self) -> int:
        """Mutated residues."""
        return int(self.mutated.sum())


NO_CHAIN = Chain("", "", *(np.zeros(0, np.uint8),) * 3, "", "")


@dataclass(frozen=True, eq=False)
class Annotated:
    """An antibody of a dataset.

    Attributes:
      name: its id, or its row.
      unit: what is drawn in a bootstrap: the clonal cluster, as text.
      heavy, light: `NO_CHAIN` where there is none.
      key: identity of the record: masks are drawn from it, so that they are the same ones for
        every model, whatever else is in the cohort.
      label: of the dataset, or "".
    """

    name: str
    unit: str
    key: int
    heavy: Chain
    light: Chain
    label: str = ""

    @property
    def antibody(self) -> Antibody:
        """As the encoder reads it."""
        return Antibody(self.name, self.heavy.letters, self.light.letters)

    @property
    def paired(self) -> bool:
        """Whether both chains are there."""
        return bool(self.heavy.letters and self.light.letters)

    def chains(self) -> list[tuple[str, Chain]]:
        """(name, chain) of the chains that are there, heavy first: the order of all residues."""
        both = zip(CHAINS, (self.heavy, self.light), strict=True)
        return [(name, chain) for name, chain in both if chain.letters]

    def along(self, column: str) -> np.ndarray:
        """`region`, `mutated` or `segment` of all residues, heavy chain first, uint8 `[n]`."""
        return np.concatenate([getattr(chain, column) for _, chain in self.chains()])

    def region_index(self) -> np.ndarray:
        """Index in `region_names` of all residues, int64 `[n]`; -1 where not known."""
        parts = [
            np.where(chain.region > 0, CHAINS.index(name) * FR4 + chain.region.astype(int) - 1, -1)
            for name, chain in self.chains()
        ]
        return np.concatenate(parts)


def sample_rows(
    dataset: Dataset, split: str, count: int, seed: int, within: np.ndarray | None = None
) -> np.ndarray:
    """Up to `count` rows of a split (int64, ascending), drawn by a hash of record and seed.

    Args:
      dataset, split: where they are drawn from.
      count: how many.
      seed: of the draw.
      within: int64, rows that qualify, instead of a whole split.
    """
    rows = dataset.rows(split) if within is None else within
    return np.sort(rows[hashed_order(dataset.key[rows], seed)[:count]])


def hashed_order(keys: np.ndarray, seed: int) -> np.ndarray:
    """Order of records by a hash of key (uint64 `[n]`) and seed: the first are a random draw."""
    with np.errstate(over="ignore"):
        return np.argsort(mix(keys + mix(np.asarray(seed, np.uint64))), kind="stable")


def mutation_counts(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Mutated residues of the chains of rows, int64 `[2, n]`, heavy first: cheaper than a cohort.

    A residue counts that is marked as mutated and differs from a germline residue that is known.
    """
    counts = np.zeros((len(CHAINS), len(rows)), np.int64)
    for first in range(0, len(rows), ROWS_PER_BATCH):
        part = slice(first, first + ROWS_PER_BATCH)
        for count, chain in zip(counts, CHAINS, strict=True):
            flat = dataset.gather(rows[part], chain, ("tokens", "germline", "mutated"))
            owner = np.repeat(np.arange(len(rows[part])), dataset.lengths[chain][rows[part]])
            mutated = (flat["mutated"] > 0) & (flat["tokens"] != flat["germline"])
            count[part] = np.bincount(owner[mutated], minlength=len(rows[part]))
    return counts


def annotated(dataset: Dataset, rows: np.ndarray) -> list[Annotated]:
    """Rows of a dataset with all that it knows of them, in the order of `rows`."""
    names, clusters, labels = (dataset.column(c, rows) for c in ("id", "cluster", "label"))
    keys = dataset.key[rows].tolist()
    heavy, light = (_chains(dataset, rows, chain) for chain in CHAINS)
    return [
        Annotated(name or str(row), str(cluster), key, heavy_chain, light_chain, label)
        for name, row, cluster, key, heavy_chain, light_chain, label in zip(
            names, rows.tolist(), clusters, keys, heavy, light, labels, strict=True
        )
    ]


def _chains(dataset: Dataset, rows: np.ndarray, chain: str) -> Sequence[Chain]:
    flat = dataset.gather(rows, chain, COLUMNS)
    ends = np.cumsum(dataset.lengths[chain][rows])[:-1]
    parts = zip(*(np.split(flat[column], ends) for column in COLUMNS), strict=True)
    genes = zip(*(dataset.column(f"{chain}_{gene}_gene", rows) for gene in "vj"), strict=True)
    return [
        Chain(decode(tokens), decode(germline), region, mutated, segment, v, j)
        if len(tokens)
        else NO_CHAIN
        for (tokens, germline, region, mutated, segment), (v, j) in zip(parts, genes, strict=True)
    ]
