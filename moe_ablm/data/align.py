"""Places germline V genes on amino-acid chains: start of the domain, gene, C104.

Nearly every chain aligns to its germline without gaps. So a batch is first scored, ungapped,
against all germline proteins at once, at the start that the words of FR1 vote for; the placement
is kept where a gapped alignment cannot be better (by a bound on the score, or by its own score).
What is left is aligned row by row (semi-global, affine gaps: `semiglobal`) to the germlines that
share most words. Nothing here depends on the other rows of a batch.
"""

from dataclasses import dataclass

import numpy as np

from moe_ablm.data.germline import REGION_STARTS
from moe_ablm.data.germline_scores import (
    FR1_WORDS,
    OTHER,
    SCORE_SCALE,
    VTable,
    words,
)
from moe_ablm.data.semiglobal import BLOSUM62, GAP_OPEN, aligned_pairs, best_score

# Why a chain has no annotation; index 0 is a chain that has one.
REASONS = (
    "",
    "too_long",
    "not_a_v_domain",
    "wrong_chain",
    "truncated_start",
    "truncated_end",
    "large_indel",
    "no_c104",
    "no_fr4",
    "nonstandard_residue",
    "ultralong_cdr3",
    "t_cell_receptor",
    "constant_region",
)
ACCEPTED = 0
CODE_OF_REASON = {reason: code for code, reason in enumerate(REASONS)}

# Residues that may lack at either end of a V domain: reads often stop that much short of it.
MAX_MISSING = 3
# Residues of one insertion or deletion; those of real antibodies are nearly always below 10.
MAX_INDEL = 18
MAX_INSERTED = 24  # residues that all insertions together add
LAYOUTS_ALIGNED = 4  # a chain is aligned to germlines of so many sets of gaps in IMGT's numbering
MIN_SHARED_WORDS = 12
MIN_FR1_VOTES = 6
MIN_IDENTITY = 0.5  # of aligned V residues; the most mutated human antibodies have 0.54
MIN_HALF_IDENTITY = 0.4  # of either half of the V; one half of another chain has about 0.3
MIN_UNGAPPED_IDENTITY = 0.7  # far above what heavy and light germlines share with each other
MIN_ALIGNED = 40
MIN_BLOSUM = 80  # half bits: what MIN_ALIGNED residues of MIN_IDENTITY score at the least
# Layouts whose BLOSUM62 score is that much below the best one cannot have the best log-odds.
BLOSUM_MARGIN = 40
# Cost of an insertion or deletion when aligned germlines are compared, in nats (they are rarer
# in hypermutation than BLOSUM62 gap costs say).
INDEL_COST, INDEL_RESIDUE_COST = 8 * SCORE_SCALE, SCORE_SCALE

# A domain goes on that far behind a germline V, whose last residues are trimmed, at the least.
MIN_BEHIND_V = 8
CDR1, CDR2 = 1, 2
_REGION_OF_IMGT = np.zeros(200, np.uint8)
_REGION_OF_IMGT[REGION_STARTS[0] : REGION_STARTS[1]] = CDR1
_REGION_OF_IMGT[REGION_STARTS[2] : REGION_STARTS[3]] = CDR2


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the V gene lies on each of `n` chains; `W` residues from the domain's start.

    Only rows with `reason == ACCEPTED` mean anything.
    """

    reason: np.ndarray  # [n] uint8, index into REASONS
    start: np.ndarray  # [n] index in the chain of the first residue of the domain
    c104: np.ndarray  # [n] index in the domain of C104
    germline: np.ndarray  # [n, W] uint8 germline residue up to C104, OTHER where there is none
    imgt: np.ndarray  # [n, W] uint8 IMGT position of that residue, 0 where there is none
    cdr: np.ndarray  # [n, W] uint8: 1 and 2 in CDR1 and CDR2, else 0
    best: np.ndarray  # [n, G] bool: the germline proteins that explain the chain best
    locus: np.ndarray  # [n] uint8: the locus of the first of these, index into LOCI

    @classmethod
    def empty(cls, n: int, table: VTable) -> "Placement":
        width = table.residues.shape[1] + MAX_INSERTED
        return cls(
            reason=np.full(n, CODE_OF_REASON["not_a_v_domain"], np.uint8),
            start=np.zeros(n, np.int64),
            c104=np.zeros(n, np.int64),
            germline=np.full((n, width), OTHER, np.uint8),
            imgt=np.zeros((n, width), np.uint8),
            cdr=np.zeros((n, width), np.uint8),
            best=np.zeros((n, len(table.genes)), bool),
            locus=np.zeros(n, np.uint8),
        )


def place(
    codes: np.ndarray, lengths: np.ndarray, own: VTable, other: VTable, *, unknown: bool = False
) -> Placement:
    """Places the V genes of a chain on a batch of chains.

    Args:
      codes: residue codes `[n, L]`, OTHER behind the end of a chain.
      lengths: `[n]`.
      own: germlines of the chain that the sequences are said to be.
      other: germlines of the other chain, to recognise a swapped chain.
      unknown: allow a C104 that is not known.
    """
    placement = Placement.empty(len(codes), own)
    if codes.shape[1] < MIN_ALIGNED:
        return placement
    start, votes = _starts(codes, own)
    done = _place_ungapped(codes, lengths, start, votes, own, placement)
    for row in np.flatnonzero(~done):
        # what stands around a domain has no say in which V gene it is
        begin = max(start[row], 0) if votes[row] >= MIN_FR1_VOTES else 0
        end = min(begin + _domain_width(own), lengths[row])
        if votes[row] >= MIN_FR1_VOTES:
            _place_gapped(codes[row, begin:end], own, other, placement, row, unknown)
            placement.start[row] += begin
        if placement.reason[row] != ACCEPTED:
            _place_gapped(codes[row, : lengths[row]], own, other, placement, row, unknown)
    return placement


def _domain_width(table: VTable) -> int:
    """Residues from the start of a domain that belong to it whatever its CDR3 and J."""
    return table.residues.shape[1] + MIN_BEHIND_V


def _starts(codes: np.ndarray, table: VTable) -> tuple[np.ndarray, np.ndarray]:
    """Start that most FR1 words vote for (negative: residues lack) and its votes, both `[n]`."""
    bits = np.pad(table.fr1_words[words(codes)], ((0, 0), (MAX_MISSING, FR1_WORDS)))
    starts = bits.shape[1] - FR1_WORDS
    votes = np.zeros((len(codes), starts), np.uint8)
    for i in range(FR1_WORDS):
        votes += ((bits[:, i : i + starts] >> np.uint32(i)) & np.uint32(1)).astype(np.uint8)
    start = votes.argmax(axis=1)
    return start - MAX_MISSING, votes[np.arange(len(codes)), start]


def window(codes: np.ndarray, start: np.ndarray, width: int, fill: int = OTHER) -> np.ndarray:
    """`[n, width]` codes from `start` `[n]` on; `fill` outside the row."""
    index = start[:, None] + np.arange(width)
    inside = (index >= 0) & (index < codes.shape[1])
    taken = np.take_along_axis(codes, np.clip(index, 0, codes.shape[1] - 1), axis=1)
    return np.where(inside, taken, np.uint8(fill))


def _ungapped_scores(seen: np.ndarray, table: VTable) -> np.ndarray:
    """Log-odds `[n, G]` (int16) of windows `[n, W]` under every germline protein."""
    total = np.zeros((len(seen), len(table.genes)), np.int16)
    for column, scores in zip(seen.T, table.scores, strict=True):
        total += scores[column]
    return total


def _place_ungapped(
    codes: np.ndarray,
    lengths: np.ndarray,
    start: np.ndarray,
    votes: np.ndarray,
    table: VTable,
    placement: Placement,
) -> np.ndarray:
    """Fills the rows that need no gap; returns `[n]` bool, True where that was done."""
    width = table.residues.shape[1]
    seen = window(codes, start, width)
    scores = _ungapped_scores(seen, table)
    g = scores.argmax(axis=1)
    done = (votes >= MIN_FR1_VOTES) & _needs_no_gap(codes, lengths, start, seen, g, table)
    missing = np.maximum(-start, 0)
    in_v = np.arange(width) <= table.c104[g][:, None]
    germline = np.where(in_v, table.residues[g], np.uint8(OTHER))
    imgt = window(np.where(in_v, table.imgt[g], np.uint8(0)), missing, width, fill=0)
    placement.reason[done] = ACCEPTED
    placement.start[done] = np.maximum(start, 0)[done]
    placement.c104[done] = (table.c104[g] - missing)[done]
    placement.germline[done, :width] = window(germline, missing, width)[done]
    placement.imgt[done, :width] = imgt[done]
    placement.cdr[done, :width] = _REGION_OF_IMGT[imgt[done]]
    placement.locus[done] = table.locus[g[done]]
    placement.best[done] = (scores == scores.max(axis=1, keepdims=True))[done]
    return done


def _needs_no_gap(
    codes: np.ndarray,
    lengths: np.ndarray,
    start: np.ndarray,
    seen: np.ndarray,
    g: np.ndarray,
    table: VTable,
) -> np.ndarray:
    """Whether the chains from `start` on, windows `seen` `[n, W]`, align to germlines `g` as is.

    False where the chain is not surely a whole V domain, too: the gapped alignment decides then.
    """
    width, c104, germline = seen.shape[1], table.c104[g], table.residues[g]
    index = np.arange(width)
    in_v = index <= c104[:, None]
    same = (seen == germline) & in_v
    first = (same & (index <= c104[:, None] // 2)).sum(axis=1)
    same = same.sum(axis=1)
    good = same >= MIN_UNGAPPED_IDENTITY * (c104 + 1)
    good &= np.minimum(first, same - first) >= MIN_HALF_IDENTITY * (c104 + 1) / 2
    good &= seen[np.arange(len(seen)), c104] == germline[np.arange(len(seen)), c104]
    mutated = np.flatnonzero(good & (same < c104 + 1))
    good[mutated] = ~_other_layout_is_nearer(seen[mutated], g[mutated], table)
    compared = in_v & (index >= -start[:, None])
    blosum = (BLOSUM62[seen, germline] * compared).sum(axis=1)
    # No substitution scores above identity, so no alignment with a gap scores above the bound;
    # where the ungapped one is below it, the gapped one decides.
    bound = (BLOSUM62[germline, germline] * compared).sum(axis=1) - GAP_OPEN
    for row in np.flatnonzero(good & (blosum < bound)):
        begin = max(start[row], 0)
        chain = codes[row, begin : min(begin + _domain_width(table), lengths[row])]
        good[row] = best_score(table.profiles[g[row]], chain)[0] <= blosum[row]
    return good


def _other_layout_is_nearer(seen: np.ndarray, g: np.ndarray, table: VTable) -> np.ndarray:
    """Whether windows `[n, W]` share more words with a germline that has gaps elsewhere than `g`.

    Such a chain may be an insertion or deletion away from that germline, which ungapped scores
    do not show.
    """
    shared = np.zeros((len(seen), len(table.genes)), np.uint8)
    for word in words(seen).T:
        shared += table.has_word[word]
    alike = table.layout == table.layout[g][:, None]
    return np.where(alike, 0, shared).max(axis=1) > np.where(alike, shared, 0).max(axis=1)


@dataclass(frozen=True, eq=False)
class _Near:
    """A germline protein that resembles a part of a chain."""

    blosum: int  # score of the semi-global alignment
    germline: int
    end: int  # index in the chain of the alignment's last residue


def _nearest(codes: np.ndarray, found_words: np.ndarray, table: VTable) -> list[_Near]:
    """The germline that shares most words, of each of the nearest layouts; best score first."""
    shared = table.has_word[found_words].sum(axis=0, dtype=np.int64)
    near: list[_Near] = []
    layouts: set[int] = set()
    for g in np.argsort(-shared, kind="stable").tolist():
        if shared[g] < MIN_SHARED_WORDS or len(layouts) == LAYOUTS_ALIGNED:
            break
        if table.layout[g] not in layouts:
            layouts.add(table.layout[g])
            blosum, end = best_score(table.profiles[g], codes)
            if blosum >= MIN_BLOSUM:
                near.append(_Near(blosum, g, end))
    return sorted(near, key=lambda n: -n.blosum)


@dataclass(frozen=True, eq=False)
class _Hit:
    """A gapped alignment of a chain to one germline protein, as pairs of aligned residues."""

    germline: int
    in_germline: np.ndarray  # [m] index in the germline
    in_chain: np.ndarray  # [m] index in the chain


def _align(codes: np.ndarray, g: int, table: VTable) -> _Hit | None:
    """Semi-global alignment to germline `g`; None where that does not look like a V domain."""
    i, j = aligned_pairs(table.profiles[g], codes)
    same = table.residues[g, i] == codes[j]
    if len(i) < MIN_ALIGNED or same.mean() < MIN_IDENTITY:
        return None
    first = i <= table.c104[g] // 2
    for half in (same[first], same[~first]):
        if len(half) >= MIN_ALIGNED // 2 and half.mean() < MIN_HALF_IDENTITY:
            return None
    return _Hit(g, i, j)


# Framework positions beside a CDR: what is inserted behind one of these belongs to the CDR. The
# framework's residues between the insertion and the CDR, of the interval's last or first position,
# move over to their neighbours: FR2 has no insertions (Lefranc et al. 2003).
_TO_THE_LEFT = ((20, 26), (48, 55))  # the CDR follows: residues behind the insertion move left
_TO_THE_RIGHT = ((39, 47), (66, 71))  # the CDR is before: residues before the insertion move right


def _with_insertions_in_cdrs(hit: _Hit, imgt: np.ndarray) -> _Hit:
    """The alignment with insertions that it has beside a CDR in the CDR (`imgt` `[W]`)."""
    i, j = hit.in_germline, hit.in_chain.copy()
    position = imgt[i]
    for k in np.flatnonzero((np.diff(j) > 1) & (np.diff(i) == 1)):
        before, behind = position[k], position[k + 1]
        for first, last in _TO_THE_RIGHT:
            if first <= before <= last:
                moved = np.flatnonzero((position >= first) & (np.arange(len(i)) <= k))
                j[moved] = j[k + 1] - (i[k + 1] - i[moved])
        for first, last in _TO_THE_LEFT:
            if first <= before and behind <= last:
                moved = np.flatnonzero((position <= last) & (np.arange(len(i)) > k))
                j[moved] = j[k] + (i[moved] - i[k])
    return _Hit(hit.germline, i, j)


def _log_odds(hit: _Hit, codes: np.ndarray, table: VTable) -> np.ndarray:
    """Log-odds `[G]` of a chain, aligned as in a hit, for all germlines of the hit's layout.

    Counts aligned residues, gaps and the start of the CDR3, which follows C104 without gaps.
    """
    i, j = hit.in_germline, hit.in_chain
    if i[-1] == table.c104[hit.germline]:
        behind = np.arange(1, min(table.residues.shape[1] - i[-1], len(codes) - j[-1]))
        i, j = np.append(i, i[-1] + behind), np.append(j, j[-1] + behind)
    skips = np.concatenate([np.diff(i) - 1, np.diff(j) - 1])
    cost = INDEL_COST * int((skips > 0).sum()) + INDEL_RESIDUE_COST * int(skips.sum())
    total = table.scores[i, codes[j]].sum(axis=0, dtype=np.int64) - cost
    return np.where(table.layout == table.layout[hit.germline], total, np.iinfo(np.int64).min)


def _place_gapped(
    codes: np.ndarray,
    own: VTable,
    other: VTable,
    placement: Placement,
    row: int | np.integer,
    unknown: bool,
) -> None:
    """Fills one row of a placement by gapped alignment."""
    if len(codes) < MIN_ALIGNED:
        return
    found_words = np.unique(words(codes))
    near = _nearest(codes, found_words, own)
    swapped = _nearest(codes, found_words, other)
    # the other chain's germline explains the same part of the chain better
    if swapped and (
        not near
        or (swapped[0].blosum > near[0].blosum and abs(swapped[0].end - near[0].end) < MIN_ALIGNED)
    ):
        if _align(codes, swapped[0].germline, other):
            placement.reason[row] = CODE_OF_REASON["wrong_chain"]
        return
    close = [n.germline for n in near if n.blosum >= near[0].blosum - BLOSUM_MARGIN]
    hits = [hit for hit in (_align(codes, g, own) for g in close) if hit]
    if not hits:
        return
    log_odds = np.max([_log_odds(hit, codes, own) for hit in hits], axis=0)
    g = int(log_odds.argmax())
    hit = next((h for h in hits if h.germline == g), None) or _align(codes, g, own)
    if hit is None:
        return
    hit = _with_insertions_in_cdrs(hit, own.imgt[g])
    placement.reason[row] = _fault(hit, codes, own, unknown)
    if placement.reason[row] != ACCEPTED:
        return
    residues = hit.in_chain - hit.in_chain[0]
    placement.start[row] = hit.in_chain[0]
    placement.c104[row] = residues[-1]
    placement.germline[row, residues] = own.residues[g, hit.in_germline]
    placement.imgt[row, residues] = own.imgt[g, hit.in_germline]
    placement.cdr[row, : residues[-1] + 1] = _cdr_of(residues, own.imgt[g, hit.in_germline])
    placement.best[row] = log_odds == log_odds[g]
    placement.locus[row] = own.locus[g]


def _cdr_of(residues: np.ndarray, imgt: np.ndarray) -> np.ndarray:
    """CDR1/CDR2 codes of the residues of a domain up to C104, from the aligned ones.

    A residue without IMGT position (an insertion) belongs to a CDR where it lies between the
    framework residues, or neighbours of those, that enclose the CDR.
    """
    cdr = np.zeros(residues[-1] + 1, np.uint8)
    for code, start, stop in ((CDR1, *REGION_STARTS[0:2]), (CDR2, *REGION_STARTS[2:4])):
        before = residues[imgt < start]
        after = residues[imgt >= stop]
        if len(before) and len(after):
            cdr[before[-1] + 1 : after[0]] = code
    return cdr


def _fault(hit: _Hit, codes: np.ndarray, table: VTable, unknown: bool) -> int:
    """Why a hit is no whole V gene (index into REASONS), or ACCEPTED."""
    c104 = table.c104[hit.germline]
    if hit.in_germline[0] > MAX_MISSING:
        return CODE_OF_REASON["truncated_start"]
    if hit.in_germline[-1] < c104:
        return CODE_OF_REASON["truncated_end"]
    if max(np.diff(hit.in_germline).max(), np.diff(hit.in_chain).max()) > MAX_INDEL + 1:
        return CODE_OF_REASON["large_indel"]
    if hit.in_chain[-1] - hit.in_chain[0] >= table.residues.shape[1] + MAX_INSERTED:
        return CODE_OF_REASON["large_indel"]
    at_c104 = codes[hit.in_chain[-1]]
    if at_c104 == table.residues[hit.germline, c104] or (unknown and at_c104 == OTHER):
        return ACCEPTED
    return CODE_OF_REASON["nonstandard_residue" if at_c104 == OTHER else "no_c104"]
