"""Statistics of a dataset: CDRH3 length, V gene usage, V identity, chains seen in training."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from moe_ablm.data.chains import different
from moe_ablm.data.dataset import FRACTIONS, SPLITS, Dataset
from moe_ablm.data.regions import CDR3, CHAINS, REGIONS

LONGEST_CDR3 = 40
IDENTITY_BINS = np.linspace(0.7, 1.0, 31)
_V_REGIONS = [REGIONS.index(r) for r in ("FR1", "CDR1", "FR2", "CDR2", "FR3")]


@dataclass
class Summary:
    """Counts over a dataset.

    Attributes:
      cdrh3_length: `[splits, LONGEST_CDR3 + 1]` heavy chains; longer ones count as the longest.
      v_genes: for each chain, rows by V gene.
      identity: for each chain, counts `[bins]` over `IDENTITY_BINS` of the share of V residues
        before the CDR3 that are germline; lower ones count in the first bin.
      chains: rows with that chain.
      means: for each chain, mean CDR3 length, mean V identity and share of unmutated V.
      different: for each chain, training chains that differ from each other.
      seen: for held-out split and chain, the share of its chains that a training antibody of each
        fraction has, too, and "unmutated": of those with unmutated V, with all training antibodies.
    """

    cdrh3_length: np.ndarray
    v_genes: dict[str, Counter] = field(default_factory=lambda: {c: Counter() for c in CHAINS})
    identity: dict[str, np.ndarray] = field(default_factory=dict)
    chains: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHAINS, 0))
    means: dict[str, dict[str, float]] = field(default_factory=dict)
    different: dict[str, int] = field(default_factory=dict)
    seen: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)


def summarise(dataset: Dataset) -> Summary:
    """Counts over all rows, a record batch at a time; chains without annotation are left out."""
    summary = Summary(np.zeros((len(SPLITS), LONGEST_CDR3 + 1), np.int64))
    for chain in CHAINS:
        totals, annotated, unmutated = np.zeros(3), 0, []
        summary.identity[chain] = np.zeros(len(IDENTITY_BINS) - 1, np.int64)
        for batch in dataset.batches():
            cdr3, v_length, mutated = _counts(batch, chain)
            known = v_length > 0
            unmutated.append(known & (mutated == 0))
            summary.chains[chain] += int((np.diff(batch[f"{chain}_tokens"].offsets) > 0).sum())
            identity = 1 - mutated[known] / v_length[known]
            clipped = np.maximum(identity, IDENTITY_BINS[0])
            summary.identity[chain] += np.histogram(clipped, IDENTITY_BINS)[0]
            totals += [cdr3[known].sum(), identity.sum(), (mutated[known] == 0).sum()]
            annotated += int(known.sum())
            genes = batch[f"{chain}_v_gene"].filter(pa.array(known)).value_counts().to_pylist()
            summary.v_genes[chain].update({g["values"]: g["counts"] for g in genes})
            if chain == "heavy":
                length = np.minimum(cdr3[known], LONGEST_CDR3)
                np.add.at(summary.cdrh3_length, (batch["split"].to_numpy()[known], length), 1)
        if annotated:
            names = ("cdr3_length", "v_identity", "unmutated")
            summary.means[chain] = dict(zip(names, (totals / annotated).tolist(), strict=True))
        _add_seen(summary, dataset, chain, np.concatenate(unmutated))
    return summary


def _add_seen(summary: Summary, dataset: Dataset, chain: str, unmutated: np.ndarray) -> None:
    hashes = dataset.chain_hashes[chain]
    train = {fraction: hashes[dataset.rows("train", fraction)] for fraction in FRACTIONS}
    summary.different[chain] = different(train["full"], np.zeros(len(train["full"]), np.int64))[0]
    for split in SPLITS[1:]:
        rows = dataset.rows(split)
        rows = rows[hashes[rows] != 0]
        if not len(rows):
            continue
        shares = {f: float(np.isin(hashes[rows], known).mean()) for f, known in train.items()}
        plain = rows[unmutated[rows]]
        if len(plain):
            shares["unmutated"] = float(np.isin(hashes[plain], train["full"]).mean())
        summary.seen[split, chain] = shares


def _counts(batch: pa.RecordBatch, chain: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: residues of the CDR3, of V before it, and mutated ones of the latter."""
    region = batch[f"{chain}_region"]
    values = region.values.to_numpy()
    offsets = region.offsets.to_numpy()
    in_v = np.isin(values, _V_REGIONS)
    mutated = in_v & (batch[f"{chain}_mutated"].values.to_numpy() > 0)
    sums = (np.concatenate([[0], np.cumsum(x)]) for x in (values == CDR3, in_v, mutated))
    cdr3, v_length, changed = (np.diff(s[offsets]) for s in sums)
    return cdr3, v_length, changed
