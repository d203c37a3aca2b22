"""Somatic hypermutation: targeted by the 5-mer around a nucleotide, then selected on the protein.

Targeting is qualitative, after the motifs of AID and polymerase eta in the literature (Rogozin &
Kolchanov 1992; Yaari et al. 2013, Front. Immunol. 4:358): hot WRCY/RGYW and WA/TW, cold SYC/GRS.
Selection: a residue that turns into a stop, and a cysteine, a tryptophan or the W/F118 that turns
into another residue, goes back to germline; other replacements survive with a probability that
depends on the region (frameworks lose more than CDRs).
"""

import re

import numpy as np

from moe_ablm.data.germline import NUCLEOTIDES, translate_codes
from moe_ablm.data.regions import CDR3, FR4

TRANSITION_SHARE = 0.58  # of all mutations; unbiased change would give 1/3
_MOTIFS = (  # pattern on the 5-mer whose middle letter mutates, relative rate
    ("[AT][AG]C[CT].", 5.0),  # WRCY
    (".[AG]G[CT][AT]", 5.0),  # RGYW
    (".[AT]A..", 2.5),  # WA
    ("..T[AT].", 1.2),  # TW
    ("[CG][CT]C..", 0.25),  # SYC
    ("..G[AG][CG]", 0.25),  # GRS
)


def fivemer_rates() -> np.ndarray:
    """Relative mutation rate of the middle nucleotide of each 5-mer, `[4^5]`; other 5-mers: 1."""
    letters = np.array(list(NUCLEOTIDES))
    index = np.indices((4,) * 5).reshape(5, -1).T
    rates = np.ones(4**5)
    for k, fivemer in enumerate("".join(row) for row in letters[index]):
        for motif, rate in _MOTIFS:
            if re.fullmatch(motif, fivemer):
                rates[k] = rate
                break
    return rates


_LOG_RATES = np.log(fivemer_rates()).astype(np.float32)


def hypermutate(
    codes: np.ndarray,
    length: np.ndarray,
    region: np.ndarray,
    mutations: np.ndarray,
    survival: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Mutated copies of `codes`.

    codes: `[n, 3 R]` int8 nucleotides in frame, -1 past the end. length: `[n]` residues.
    region: `[n, R]` codes of `regions.REGIONS`. mutations: `[n]` nucleotides to change before
    selection, at most those that there are. survival: `[7]` probability that a replacement
    survives, FR1 to FR4. All contexts are those of the sequence before the first mutation.
    """
    inside = np.arange(codes.shape[1]) < 3 * length[:, None]
    mutated = codes.copy()
    row, position = _choose_targets(codes, inside, mutations, rng)
    old = codes[row, position]
    transition = rng.random(len(row)) < TRANSITION_SHARE
    transversion = np.where(rng.random(len(row)) < 0.5, 1, 3)
    # In the order A, C, G, T a transition (A-G, C-T) is a step of two.
    mutated[row, position] = (old + np.where(transition, 2, transversion)) % 4
    before, after = translate_codes(np.maximum(codes, 0)), translate_codes(np.maximum(mutated, 0))
    replaced = before != after
    lethal = (after == ord("*")) | (before == ord("C")) | (before == ord("W"))
    lethal[:, 1:] |= (region[:, 1:] == FR4) & (region[:, :-1] == CDR3)
    lost = replaced & (lethal | (rng.random(region.shape, np.float32) >= survival[region - 1]))
    return np.where(np.repeat(lost, 3, axis=1), codes, mutated)


def _choose_targets(codes, inside, mutations, rng) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of `mutations[i]` different nucleotides of row i, drawn by 5-mer rate.

    The largest k of log rate + Gumbel noise are a sample of k without replacement in proportion
    to the rates (Efraimidis & Spirakis 2006).
    """
    columns = codes.shape[1]
    padded = np.pad(np.maximum(codes, 0), ((0, 0), (2, 2))).astype(np.int16)
    context = np.zeros(codes.shape, np.int16)
    for shift in range(5):
        context = context * 4 + padded[:, shift : shift + columns]
    noise = rng.random(codes.shape, np.float32)
    key = _LOG_RATES[context] - np.log(-np.log(noise + 1e-12) + 1e-12)
    key[~inside] = -np.inf
    most = int(mutations.max(initial=0))
    best = np.argpartition(-key, min(most, columns - 1), axis=1)[:, :most]
    order = np.argsort(-np.take_along_axis(key, best, 1), axis=1)
    best = np.take_along_axis(best, order, 1)
    row, rank = np.nonzero(np.arange(most) < mutations[:, None])
    return row, best[row, rank]
