"""The routing of other antibodies' chains of the same length: a router without its residues."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.cohort import Annotated


def recipients(antibodies: Sequence[Annotated]) -> np.ndarray:
    """To whose chain the routing of a chain goes, int64 `[antibodies, chain]`, heavy first.

    A permutation among chains of one length, of other clones as far as there are enough of them; a
    chain whose length no other clone has keeps its own, and one that is not there has -1.
    """
    others = np.full((len(antibodies), len(CHAINS)), -1)
    for c, chain in enumerate(CHAINS):
        lengths = np.array([len(getattr(a, chain)) for a in antibodies])
        for length in np.unique(lengths[lengths > 0]).tolist():
            members = np.flatnonzero(lengths == length).tolist()
            ring = sorted(members, key=lambda i: (antibodies[i].unit, i))
            largest = max(Counter(antibodies[i].unit for i in ring).values())
            others[ring, c] = np.roll(ring, -(largest % len(ring)))
    return others


def chain_places(antibodies: Sequence[Annotated]) -> np.ndarray:
    """Where chains begin and end among all residues, int64 `[antibodies, chain, 2]`."""
    lengths = np.array([[len(getattr(a, chain)) for chain in CHAINS] for a in antibodies])
    ends = np.cumsum(lengths).reshape(lengths.shape)
    return np.stack([ends - lengths, ends], -1)


def shuffle(antibodies: Sequence[Annotated], plans: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Plans `[residues, ...]` of each antibody, after chains have given theirs away."""
    given = [np.empty_like(plan) for plan in plans]
    for source, targets in enumerate(recipients(antibodies).tolist()):
        first = len(antibodies[source].heavy)
        for c, target in enumerate(targets):
            if target >= 0:
                start = len(antibodies[target].heavy) * c
                part = plans[source][first:] if c else plans[source][:first]
                given[target][start : start + len(part)] = part
    return given
