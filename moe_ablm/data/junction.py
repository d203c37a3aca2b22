"""Finds the end of the CDR3, framework 4 and the J gene behind a placed V gene."""

from dataclasses import dataclass

import numpy as np

from moe_ablm.data.align import MAX_MISSING, window
from moe_ablm.data.germline_scores import OTHER, SCORE_SCALE, JTable

MIN_CDR3, MAX_CDR3 = 3, 50  # residues between C104 and W/F118
# Log-odds that a framework 4 must reach. The best place in a random tail or in a constant region
# stays below 5 nats; 1 in 10,000 real domains is below 6 (docs/annotation.md).
MIN_FR4_SCORE = 6 * SCORE_SCALE
IMPOSSIBLE = np.int16(np.iinfo(np.int16).min)


@dataclass(frozen=True, eq=False)
class Junction:
    """The junction of each of `n` chains; only rows with `found` mean anything."""

    found: np.ndarray  # [n] bool
    resembling: np.ndarray  # [n] bool: something like a framework 4 is there, of any locus
    cdr3_length: np.ndarray  # [n]
    fr4_length: np.ndarray  # [n] residues of framework 4 that the chain has
    fr4: np.ndarray  # [n, 11] uint8 germline residues of framework 4, OTHER behind its end
    best: np.ndarray  # [n, J] bool: the named J, and all that explain the chain as well or better


def find_junction(
    codes: np.ndarray,
    lengths: np.ndarray,
    after_c104: np.ndarray,
    locus: np.ndarray,
    table: JTable,
) -> Junction:
    """The best framework 4 behind C104, and the J alleles that may have made it and the CDR3's end.

    The J that is named (the first of `best`) is the most probable one, usage included.

    Args:
      codes: residue codes `[n, L]`, OTHER behind the end of a chain.
      lengths: `[n]`.
      after_c104: `[n]` index of the residue after C104.
      locus: `[n]` locus of the V gene (index into LOCI): a kappa V is joined to a kappa J.
      table: J alleles of the chain.
    """
    n, rows = len(codes), np.arange(len(codes))
    width = len(table.fr4_scores)
    tail = window(codes, after_c104, MAX_CDR3 + 1 + width)
    room = np.maximum(lengths - after_c104, 0)
    scores = np.zeros((n, MAX_CDR3 + 1, len(table.genes)), np.int16)
    for i, by_code in enumerate(table.fr4_scores):
        scores += by_code[tail[:, i : i + MAX_CDR3 + 1]]
    cdr3_lengths = np.arange(MAX_CDR3 + 1)
    fits = cdr3_lengths[:, None] + table.fr4_length - MAX_MISSING <= room[:, None, None]
    fits &= cdr3_lengths[:, None] >= MIN_CDR3
    resembling = np.where(fits, scores, IMPOSSIBLE).max(axis=(1, 2)) >= 0
    fits &= table.locus == locus[:, None, None]
    scores = np.where(fits, scores, IMPOSSIBLE)
    cdr3_length = scores.max(axis=2).argmax(axis=1)
    at_best = scores[rows, cdr3_length].astype(np.int32)
    found = at_best.max(axis=1) >= MIN_FR4_SCORE
    with_cdr3 = at_best + _cdr3_scores(tail, cdr3_length, table)
    j = (with_cdr3 + table.prior).argmax(axis=1)
    fr4_length = np.minimum(table.fr4_length[j], room - cdr3_length)
    ends_here = cdr3_length + fr4_length == room
    found &= ends_here | _ends_alike(window(tail, cdr3_length, width), table.fr4[j], fr4_length)
    return Junction(
        found=found,
        resembling=resembling,
        cdr3_length=cdr3_length,
        fr4_length=fr4_length,
        fr4=table.fr4[j],
        best=with_cdr3 >= with_cdr3[rows, j][:, None],
    )


def _ends_alike(seen: np.ndarray, germline: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether one of the last four residues of framework 4 is as in the germline.

    In a longer chain none of them is where the framework was cut short and a constant region
    follows.
    """
    index = np.arange(seen.shape[1])
    last = (index < length[:, None]) & (index >= length[:, None] - 4)
    return ((seen == germline) & last).any(axis=1)


def _cdr3_scores(tail: np.ndarray, cdr3_length: np.ndarray, table: JTable) -> np.ndarray:
    """Log-odds `[n, J]` of the CDR3's end under each J, trimmed where that explains it best."""
    before, _, alleles = table.cdr3_scores.shape
    best = np.zeros((len(tail), alleles), np.int32)
    total = np.zeros_like(best)
    for i in range(before):
        at = cdr3_length - 1 - i
        code = np.where(at >= 0, tail[np.arange(len(tail)), np.maximum(at, 0)], OTHER)
        total += table.cdr3_scores[i, code]
        np.maximum(best, total, out=best)
    return best
