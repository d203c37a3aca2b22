"""Marginal statistics of an annotated table, to compare one repertoire with another."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.dataset import flat
from moe_ablm.data.regions import CDR3, CHAINS, REGIONS, regions_from_cdr_mask

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@dataclass(frozen=True)
class Marginals:
    """Numbers of a repertoire; lengths in residues, everything else a fraction.

    scalars: one number a name. distributions: name -> (category -> share, adding up to 1).
    """

    scalars: dict[str, float]
    distributions: dict[str, dict[str, float]]


def marginals(table: pa.Table) -> Marginals:
    """Marginals of the rows that have both chains; needs the columns of the annotated table.

    The lengths of a group that has no row are left out.

    Mutations are amino acids of V before the CDR3 and of J; a rate is per residue of the region.
    """
    both = [pc.greater(pc.binary_length(table[f"sequence_aa_{chain}"]), 0) for chain in CHAINS]
    table = table.filter(pc.and_(*both))
    scalars: dict[str, float] = {}
    distributions: dict[str, dict[str, float]] = {}
    mutations = {}
    for chain in CHAINS:
        mutations[chain], by_region = _mutations(table, chain)
        identity = table[f"v_identity_aa_{chain}"].to_numpy()
        scalars |= {
            f"{chain} V identity, mean": float(identity.mean()),
            f"{chain} V identity, sd": float(identity.std()),
            f"{chain} unmutated": float((mutations[chain] == 0).mean()),
        }
        scalars |= {f"{chain} mutation rate, {name}": rate for name, rate in by_region.items()}
        for gene in "VJ":
            distributions[f"{chain} {gene} gene"] = _shares(table[f"{gene.lower()}_gene_{chain}"])
    heavy, light = (mutations[chain] for chain in CHAINS)
    is_kappa = pc.starts_with(table["v_gene_light"], "IGK").to_numpy()
    scalars["both chains unmutated"] = float(((heavy == 0) & (light == 0)).mean())
    scalars["correlation of mutation counts"] = float(np.corrcoef(heavy, light)[0, 1])
    scalars["kappa share"] = float(is_kappa.mean())
    everyone = np.ones(len(heavy), bool)
    for name, chain, rows in (
        ("CDRH3", "heavy", everyone),
        ("CDRH3 of unmutated pairs", "heavy", heavy + light == 0),
        ("CDRH3 of pairs with 5 mutations or more", "heavy", heavy + light >= 5),
        ("kappa CDR3", "light", is_kappa),
        ("lambda CDR3", "light", ~is_kappa),
    ):
        if not rows.any():
            continue
        length = pc.binary_length(table[f"cdr3_aa_{chain}"]).to_numpy()[rows]
        scalars |= {f"{name} length, mean": float(length.mean())}
        scalars |= {f"{name} length, sd": float(length.std())}
        distributions[f"{name} length"] = _shares(length)
    for name, chain in (("CDRH3", "heavy"), ("CDRL3", "light")):
        letters, _ = flat(table[f"cdr3_aa_{chain}"])
        count = np.bincount(letters, minlength=128)[[ord(a) for a in AMINO_ACIDS]]
        distributions[f"{name} residues"] = dict(
            zip(AMINO_ACIDS, (count / count.sum()).tolist(), strict=True)
        )
    return Marginals(scalars, distributions)


def total_variation(p: dict[str, float], q: dict[str, float]) -> float:
    """Half the sum of |p - q|: the share of one distribution that must move to give the other."""
    return sum(abs(p.get(key, 0) - q.get(key, 0)) for key in p.keys() | q.keys()) / 2


def _shares(values) -> dict[str, float]:
    counts = pc.value_counts(values if isinstance(values, pa.ChunkedArray) else pa.array(values))
    names, numbers = (counts.field(k).to_pylist() for k in ("values", "counts"))
    return {str(name): n / sum(numbers) for name, n in zip(names, numbers, strict=True)}


def _mutations(table: pa.Table, chain: str) -> tuple[np.ndarray, dict[str, float]]:
    """Mutations of each row `[rows]`, and mutations per residue of each region but the CDR3."""
    mask, offsets = flat(table[f"cdr_mask_aa_{chain}"])
    region = regions_from_cdr_mask(mask, offsets)
    mutated = flat(table[f"nongermline_mask_aa_{chain}"])[0] == ord("1")
    rows = np.repeat(np.arange(len(table)), np.diff(offsets))
    counts = np.bincount(rows[mutated], minlength=len(table))
    residues = np.bincount(region, minlength=len(REGIONS))
    changed = np.bincount(region[mutated], minlength=len(REGIONS))
    codes = [code for code in range(1, len(REGIONS)) if code != CDR3]
    return counts, {REGIONS[code]: float(changed[code] / residues[code]) for code in codes}
