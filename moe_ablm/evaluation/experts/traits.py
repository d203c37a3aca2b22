"""Traits of residues that experts may specialise in, and the strata they are compared within.

A contrast tests whether experts distinguish the classes of a trait (such as regions) among residues
of one stratum (such as the same amino acid).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.regions import CHAINS, REGIONS, region_names
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.evaluation.cohort import Annotated

GENES = 10  # most frequent V genes of a chain; the others are one class
STATES = ("germline", "mutated", "CDR3")
RESIDUE, CHAIN_AND_RESIDUE = "residue", "chain and residue"
FROM_START, ALIGNED = "distance from N-terminus", "aligned position"
# (trait, what it is matched on). Regions are stretches of the aligned positions, so that only the
# distance from the N-terminus, which they share where lengths vary, says anything of them.
PLANNED = (
    ("region", RESIDUE),
    ("region", CHAIN_AND_RESIDUE),
    ("region", FROM_START),
    ("chain", RESIDUE),
    ("residue", ALIGNED),
    ("germline state", ALIGNED),
    ("V gene", ALIGNED),
)
LONGEST = 4096  # of a chain: codes of positions are below twice as many


@dataclass(frozen=True, eq=False)
class Trait:
    """Codes of all residues of all antibodies, int64 `[residues]`, -1 where not known."""

    names: tuple[str, ...]
    codes: np.ndarray


@dataclass(frozen=True, eq=False)
class Contrast:
    """A trait within strata; a cell is a class of it in a stratum, and none is empty.

    Attributes:
      trait, matched: names of both.
      names: of the classes that occur.
      cell: int32 `[residues]`, cell of each residue of the cohort; -1: not compared.
      label, stratum: int64 `[cells]`, class and stratum of a cell; cells are sorted by class.
      residues: int64 `[cells]`, how many there are.
    """

    trait: str
    matched: str
    names: tuple[str, ...]
    cell: np.ndarray
    label: np.ndarray
    stratum: np.ndarray
    residues: np.ndarray

    @property
    def regional(self) -> bool:
        """Whether it is of regions by something that position does not decide.

        At the same distance from the N-terminus routers by position exceed nothing anyway.
        """
        return self.trait == "region" and self.matched != FROM_START

    def overlap(self) -> np.ndarray:
        """`[classes]`: how much of the average residue's stratum is of other classes.

        Near 0 the strata say which class it is: nothing can exceed what they predict.
        """
        same = self.residues / np.bincount(self.stratum, self.residues)[self.stratum]
        each = np.bincount(self.label, self.residues)
        return np.bincount(self.label, self.residues * (1 - same)) / each


def traits(antibodies: Sequence[Annotated]) -> dict[str, Trait]:
    """Traits by name; chains of all antibodies end to end, heavy first."""
    chains = [pair for a in antibodies for pair in a.chains()]
    lengths = [len(chain) for _, chain in chains]
    which = np.repeat([CHAINS.index(name) for name, _ in chains], lengths)
    region = np.concatenate([a.region_index() for a in antibodies])
    letters = np.frombuffer("".join(c.letters for _, c in chains).encode(), np.uint8)
    code = np.full(256, -1)
    code[[ord(letter) for letter in AMINO_ACIDS]] = range(len(AMINO_ACIDS))
    state = np.concatenate([c.mutated for _, c in chains]).astype(int)
    cdr3 = [region_names().index(name) for name in ("CDRH3", "CDRL3")]
    state = np.where(np.isin(region, cdr3), 2, np.where(region < 0, -1, state))
    names, gene = v_genes(antibodies)
    by_name = {
        "region": Trait(region_names(), region),
        "chain": Trait(CHAINS, which),
        "residue": Trait(tuple(AMINO_ACIDS), code[letters]),
        "V gene": Trait(names, np.repeat(gene, lengths)),
    }
    if (state == 1).any():
        by_name["germline state"] = Trait(STATES, state)
    return by_name


def v_genes(antibodies: Sequence[Annotated]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the frequent genes and of the rest of each chain, and int64 `[chains]` codes."""
    names: list[str] = []
    codes: dict[str, int] = {}
    for chain in CHAINS:
        count = Counter(getattr(a, chain).v_gene for a in antibodies)
        del count[""]
        genes = sorted(count, key=lambda gene: (-count[gene], gene))
        codes |= {gene: len(names) + min(i, GENES) for i, gene in enumerate(genes)}
        names += genes[:GENES] + [f"other {chain}"] * (len(genes) > GENES)
    each = [codes.get(chain.v_gene, -1) for a in antibodies for _, chain in a.chains()]
    return tuple(names), np.array(each)


def strata(antibodies: Sequence[Annotated], known: dict[str, Trait]) -> dict[str, np.ndarray]:
    """Strata by name, int64 `[residues]`, -1 where not known."""
    lengths = [len(chain) for a in antibodies for _, chain in a.chains()]
    region, chain, residue = (known[name].codes for name in ("region", "chain", "residue"))
    starts = np.concatenate([np.arange(n) for n in lengths])
    # places in a region are counted from its first residue: FRs of a chain are as good as aligned
    first = np.r_[True, (np.diff(region) != 0) | (np.diff(chain) != 0) | (np.diff(starts) != 1)]
    within = np.arange(len(region)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    return {
        RESIDUE: residue,
        CHAIN_AND_RESIDUE: np.where(residue < 0, -1, chain * len(AMINO_ACIDS) + residue),
        FROM_START: chain * LONGEST + starts,
        ALIGNED: np.where(region < 0, -1, region * LONGEST + within),
    }


def contrasts(antibodies: Sequence[Annotated]) -> list[Contrast]:
    """Those of `PLANNED` whose trait has at least two classes among the antibodies."""
    known = traits(antibodies)
    within = strata(antibodies, known)
    made = [contrast(n, m, known[n], within[m]) for n, m in PLANNED if n in known]
    return [c for c in made if len(c.names) > 1]


def contrast(name: str, matched: str, trait: Trait, stratum: np.ndarray) -> Contrast:
    """A trait within strata (int64 `[residues]`, -1 where not known)."""
    used = (trait.codes >= 0) & (stratum >= 0)
    width = LONGEST * len(REGIONS) * len(CHAINS)
    joint, cell, residues = np.unique(
        trait.codes[used] * width + stratum[used], return_inverse=True, return_counts=True
    )
    everywhere = np.full(len(used), -1, np.int32)
    everywhere[used] = cell
    classes, label = np.unique(joint // width, return_inverse=True)
    _, place = np.unique(joint % width, return_inverse=True)
    names = tuple(trait.names[i] for i in classes)
    return Contrast(name, matched, names, everywhere, label, place, residues)
