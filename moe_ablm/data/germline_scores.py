"""Germline V and J proteins as tables of log-odds scores, for placing amino-acid V domains.

A score says how much better a residue is explained by a germline codon than by chance:

    log( P(residue | codon) / background(residue) ),   in units of 1 / SCORE_SCALE nat, rounded.

P follows somatic hypermutation: the codon is kept with probability 1 - m, m depending on the
region; otherwise a single-nucleotide neighbour is drawn (a transition twice as likely as each
transversion), or, in one replacement out of five, any residue. Whole numbers make sums exact, so
that a tie between alleles is a tie on every machine and in every batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import numpy as np

from moe_ablm.data.germline import (
    CODON_TABLE,
    HUMAN,
    LOCI,
    LOCI_OF_CHAIN,
    Allele,
    JAllele,
    VAllele,
    load_germlines,
    translate,
)
from moe_ablm.data.semiglobal import AMINO_ACIDS, OTHER, Profile, profile

CODES = OTHER + 1
K = 3  # length of the words that find a domain
WORDS = CODES**K

SCORE_SCALE = 16
# Expected share of replaced residues in framework and in CDRs of a typical repertoire.
FRAMEWORK_MUTATION_RATE = 0.03
CDR_MUTATION_RATE = 0.08
MULTIPLE_HIT_SHARE = 0.2
# Probability that a residue of the germline V after C104 survives trimming, by its distance from
# the V's last whole codon (0 is that codon).
CDR3_KEPT = (0.4, 0.7, 0.85, 0.9, 0.95)
# Share of residues at a trimmed end that follow neither nucleotides of the J nor chance alone.
CUT_MISSED = 0.1
TRIMMED = np.int16(-1000)  # a codon that a J does not have
# Share of the J genes of a locus in human repertoires, roughly. Without their trimmed 5' ends and
# with mutations some J cannot be told apart by protein (IGHJ1, 4 and 5); then usage decides which
# one is named first.
J_USAGE: dict[str, dict[str, float]] = {
    "IGH": {"IGHJ4": 48, "IGHJ6": 20, "IGHJ3": 13, "IGHJ5": 13, "IGHJ2": 3, "IGHJ1": 2},
    "IGK": {"IGKJ1": 29, "IGKJ2": 26, "IGKJ4": 25, "IGKJ5": 11, "IGKJ3": 9},
    "IGL": {
        **{"IGLJ2": 45, "IGLJ3": 33, "IGLJ1": 19, "IGLJ7": 1.5},
        **{"IGLJ6": 0.2, "IGLJ5": 0.1, "IGLJ4": 0.05},
    },
}
# Nucleotides that a J loses before it is joined: mean and dispersion of a negative binomial, with
# the moments of OLGA's models of human B cells (Sethna et al. 2019), which were inferred from
# nucleotides; palindromic ones count as none lost.
J_TRIM = {"IGH": (6.3, 3.0), "IGK": (3.1, 2.7), "IGL": (2.5, 1.9)}
# V alleles whose nucleotides are also an allele of a second gene that the germline set leaves out.
GENE_OF_SAME_SEQUENCE = {
    "IGKV1D-13*02": "IGKV1-13",
    "IGKV1D-33*01": "IGKV1-33",
    "IGKV2D-40*01": "IGKV2-40",
    "IGKV6D-21*01": "IGKV6-21",
}
# Residues of FR1 whose words vote for the start of a domain: IMGT 1-26 without the usual gap.
FR1_WORDS = 23

CODE_OF_BYTE = np.full(256, OTHER, np.uint8)
for _code, _letter in enumerate(AMINO_ACIDS):
    CODE_OF_BYTE[[ord(_letter), ord(_letter.lower())]] = _code
LETTER_OF_CODE = np.frombuffer((AMINO_ACIDS + "-").encode(), np.uint8)

# Frequencies of residues in UniProtKB/Swiss-Prot proteins (release notes 2023, per cent).
_BACKGROUND = np.array(
    [8.25, 1.38, 5.46, 6.71, 3.86, 7.07, 2.27, 5.91, 5.79, 9.64]
    + [2.41, 4.06, 4.74, 3.93, 5.52, 6.65, 5.36, 6.86, 1.10, 2.92]
)
BACKGROUND = _BACKGROUND / _BACKGROUND.sum()


@lru_cache(maxsize=1)
def replacement_probabilities() -> np.ndarray:
    """P(residue | a replacement happened in the codon): float64 `[64, 20]`, rows sum to one."""
    table = np.zeros((64, OTHER))
    for codon in range(64):
        for place in (16, 4, 1):
            base = codon // place % 4
            for other in set(range(4)) - {base}:
                residue = CODON_TABLE[codon + (other - base) * place]
                if residue not in (CODON_TABLE[codon], "*"):
                    is_transition = (base ^ other) == 2  # A-G and C-T in the order A, C, G, T
                    table[codon, AMINO_ACIDS.index(residue)] += 2.0 if is_transition else 1.0
        any_residue = np.ones(OTHER)
        if CODON_TABLE[codon] != "*":
            any_residue[AMINO_ACIDS.index(CODON_TABLE[codon])] = 0.0
        table[codon] /= max(table[codon].sum(), 1.0)
        table[codon] *= 1.0 - MULTIPLE_HIT_SHARE
        table[codon] += MULTIPLE_HIT_SHARE * any_residue / any_residue.sum()
    return table / table.sum(axis=1, keepdims=True)


def log_odds(codons: np.ndarray, kept: np.ndarray, otherwise: np.ndarray | None) -> np.ndarray:
    """Scores of every residue code at germline codons: int16 `[n, 21]`; code 20 scores 0.

    Args:
      codons: codes 0-63 `[n]` of codons that are no stop.
      kept: `[n]` probability that the germline residue is seen.
      otherwise: `[20]` distribution of the residue if it is not kept; None: hypermutation.
    """
    other = replacement_probabilities()[codons] if otherwise is None else otherwise[None]
    probability = (1.0 - kept[:, None]) * np.broadcast_to(other, (len(codons), OTHER))
    germline = [AMINO_ACIDS.index(CODON_TABLE[codon]) for codon in codons]
    probability[np.arange(len(codons)), germline] += kept
    scores = np.zeros((len(codons), CODES), np.int16)
    scores[:, :OTHER] = np.rint(SCORE_SCALE * np.log(probability / BACKGROUND))
    return scores


def encode(sequence: str) -> np.ndarray:
    """Residue codes of a sequence, case ignored; `OTHER` for letters that are no amino acid."""
    return CODE_OF_BYTE[np.frombuffer(sequence.encode(), np.uint8)]


def words(codes: np.ndarray) -> np.ndarray:
    """Numbers of the overlapping K-letter words along the last axis: `[..., n - K + 1]` int64."""
    codes = codes.astype(np.int64)
    return (codes[..., :-2] * CODES + codes[..., 1:-1]) * CODES + codes[..., 2:]


def _codon_codes(nucleotides: str) -> np.ndarray:
    base = np.array(["ACGT".index(letter) for letter in nucleotides[: len(nucleotides) // 3 * 3]])
    return base[0::3] * 16 + base[1::3] * 4 + base[2::3]


def _natural_order(gene: str) -> tuple:
    """Natural order of gene names: IGHV3-9 before IGHV3-23 before IGHV3-23D."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in gene).split()
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)


@dataclass(frozen=True, eq=False)
class VTable:
    """The distinct germline V proteins (`G`) of a chain, `W` residues wide, CDR3 start included.

    They stand in the order in which tied genes are named: the natural order of the genes.
    """

    genes: tuple[tuple[str, ...], ...]  # [G] genes whose alleles have this protein
    locus: np.ndarray  # [G] uint8, index into LOCI
    residues: np.ndarray  # [G, W] uint8 codes, OTHER beyond the end
    imgt: np.ndarray  # [G, W] uint8, 0 beyond the end
    c104: np.ndarray  # [G] index of C104
    layout: np.ndarray  # [G] equal where proteins have their gaps at the same IMGT positions
    scores: np.ndarray  # [W, 21, G] int16
    has_word: np.ndarray  # [WORDS, G] uint8: 1 where the word occurs up to C104
    fr1_words: np.ndarray  # [WORDS] uint32: bit i is set if a protein has the word at index i
    profiles: tuple[Profile, ...]  # [G] of the proteins up to C104, for alignments


@dataclass(frozen=True, eq=False)
class JTable:
    """The J alleles of a chain (`J`), split at W/F118, the most used gene first."""

    genes: tuple[tuple[str, ...], ...]  # [J] of one gene each
    locus: np.ndarray  # [J] uint8, index into LOCI
    prior: np.ndarray  # [J] int32: score of a gene's usage in its locus
    fr4: np.ndarray  # [J, 11] uint8 codes from 118 on, OTHER beyond the end
    fr4_length: np.ndarray  # [J]
    fr4_scores: np.ndarray  # [11, 21, J] int16
    cdr3_scores: np.ndarray  # [9, 21, J] int16; index i is i + 1 residues before 118
    # Of a J that keeps k = 0, 1, ... whole codons before 118:
    whole_prior: np.ndarray  # [10, J] int32: it lost all nucleotides before them
    cut_prior: np.ndarray  # [10, J] int32: it keeps one or two of the codon before them
    cut_scores: np.ndarray  # [10, 21, J] int16: the residue of that codon, trimmed in part


def _v_scores(alleles: list[VAllele], n: int) -> np.ndarray:
    """Mean scores `[n, 21]` of alleles with one protein, over its first `n` residues."""
    total = np.zeros((n, CODES))
    for allele in alleles:
        codons = _codon_codes(allele.nucleotides)[:n]
        cdr1, fr2, cdr2, fr3, _ = allele.region_starts()
        index = np.arange(n)
        in_cdr = ((index >= cdr1) & (index < fr2)) | ((index >= cdr2) & (index < fr3))
        kept = 1.0 - np.where(in_cdr, CDR_MUTATION_RATE, FRAMEWORK_MUTATION_RATE)
        scores = log_odds(codons, kept, None)
        first = allele.c104 + 1
        from_end = np.minimum(n - 1 - index[first:], len(CDR3_KEPT) - 1)
        survives = np.array(CDR3_KEPT)[from_end]
        scores[first:] = log_odds(codons[first:], survives, BACKGROUND)
        total += scores
    return np.rint(total / len(alleles)).astype(np.int16)


def _loci(alleles: Sequence[Allele]) -> np.ndarray:
    return np.array([LOCI.index(allele.locus) for allele in alleles], np.uint8)


def _genes(alleles: list[VAllele], germlines: str) -> tuple[str, ...]:
    """Genes of alleles of one protein; of duplicates, as IGKV1-33 and IGKV1D-33, the D is last."""
    of_same = GENE_OF_SAME_SEQUENCE if germlines == HUMAN else {}
    same = (of_same.get(allele.name) for allele in alleles)
    genes = {allele.gene for allele in alleles} | {gene for gene in same if gene}
    return tuple(sorted(genes, key=_natural_order))


def of_chain(chain: str, germlines: str) -> str:
    """Which germlines a chain ("heavy" or "light") has: human ones where a folder has none."""
    return germlines if load_germlines(germlines).v_of(*LOCI_OF_CHAIN[chain]) else HUMAN


def v_table(chain: str, germlines: str = HUMAN) -> VTable:
    """The V table of a chain ("heavy" or "light"), built once a process (see `of_chain`)."""
    return _v_table(chain, of_chain(chain, germlines))


def j_table(chain: str, germlines: str = HUMAN) -> JTable:
    """The J table of a chain ("heavy" or "light"), built once a process (see `of_chain`)."""
    return _j_table(chain, of_chain(chain, germlines))


@cache
def _v_table(chain: str, germlines: str) -> VTable:
    by_protein: dict[str, list[VAllele]] = {}
    alleles = load_germlines(germlines).v_of(*LOCI_OF_CHAIN[chain])
    for allele in sorted(alleles, key=lambda allele: _natural_order(allele.name)):
        by_protein.setdefault(allele.amino_acids.split("*")[0], []).append(allele)
    proteins = list(by_protein)
    n, width = len(proteins), max(map(len, proteins))
    residues = np.full((n, width), OTHER, np.uint8)
    imgt = np.zeros((n, width), np.uint8)
    scores = np.zeros((width, CODES, n), np.int16)
    has_word = np.zeros((WORDS, n), np.uint8)
    fr1_words = np.zeros(WORDS, np.uint32)
    for g, (protein, group) in enumerate(by_protein.items()):
        residues[g, : len(protein)] = encode(protein)
        imgt[g, : len(protein)] = group[0].imgt[: len(protein)]
        scores[: len(protein), :, g] = _v_scores(group, len(protein))
        numbers = words(encode(protein[: group[0].c104 + 1]))
        has_word[numbers, g] = 1
        fr1_words[numbers[:FR1_WORDS]] |= np.uint32(1) << np.arange(FR1_WORDS, dtype=np.uint32)
    c104 = np.array([group[0].c104 for group in by_protein.values()])
    to_c104 = np.arange(width) <= c104[:, None]
    _, layout = np.unique(np.where(to_c104, imgt, 0), axis=0, return_inverse=True)
    return VTable(
        genes=tuple(_genes(group, germlines) for group in by_protein.values()),
        locus=_loci([group[0] for group in by_protein.values()]),
        residues=residues,
        imgt=imgt,
        c104=c104,
        layout=layout,
        scores=scores,
        has_word=has_word,
        fr1_words=fr1_words,
        profiles=tuple(
            profile(codes[: c + 1]) for codes, c in zip(residues, c104.tolist(), strict=True)
        ),
    )


def _cut_odds(end: str) -> np.ndarray:
    """Odds `[21]` of a residue of which the J gives the last one or two nucleotides.

    The others are drawn, from A, C, G and T alike.
    """
    codons = ["".join(c) for c in product("ACGT", repeat=3) if "".join(c).endswith(end)]
    residues = [r for r in map(translate, codons) if r != "*"]
    probability = np.zeros(OTHER)
    for residue in residues:
        probability[AMINO_ACIDS.index(residue)] += 1 / len(residues)
    probability = (1.0 - CUT_MISSED) * probability + CUT_MISSED * BACKGROUND
    return np.append(probability / BACKGROUND, 1.0)


def _trimming(locus: str, nucleotides: int) -> np.ndarray:
    """Probability that a J loses 0, 1, ... of its `nucleotides` before 118, the last: or more.

    A float64 `[nucleotides + 1]`.
    """
    mean, dispersion = J_TRIM[locus]
    lost = np.arange(nucleotides)
    growth = (lost + dispersion) / (lost + 1) * mean / (mean + dispersion)
    none = (dispersion / (mean + dispersion)) ** dispersion
    probability = none * np.cumprod([1.0, *growth])
    probability[-1] = 1.0 - probability[:-1].sum()
    return probability


def _trimmed(allele: JAllele) -> Iterator[tuple[float, float, np.ndarray]]:
    """By the whole codons 0, 1, ... that a J keeps before 118: the probability that it keeps no
    more, that it keeps a part of the codon before them, and that codon's odds `[21]`."""
    n = allele.motif_nucleotide
    lost = _trimming(allele.locus, n)
    for end in range(n, -1, -3):
        parts = range(max(end - 2, 0), end)
        cut = sum(lost[start] for start in parts)
        odds = sum(lost[start] * _cut_odds(allele.nucleotides[start:end]) for start in parts)
        yield lost[end], cut, odds / cut if parts else np.zeros(CODES)


def _scaled_log(probability: np.ndarray | float) -> np.ndarray:
    """Whole numbers in units of a score; `TRIMMED` for what cannot be."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.rint(SCORE_SCALE * np.log(probability)), TRIMMED)


def _j_prior(allele: JAllele, usage: dict[str, float]) -> int:
    return round(SCORE_SCALE * float(np.log(usage[allele.gene] / sum(usage.values()))))


def _j_usage(alleles: Sequence[JAllele], germlines: str) -> dict[str, dict[str, float]]:
    """Share of the J genes of each locus: that of human repertoires, or equal ones."""
    if germlines == HUMAN:
        return J_USAGE
    return {locus: {j.gene: 1.0 for j in alleles if j.locus == locus} for locus in LOCI}


@cache
def _j_table(chain: str, germlines: str) -> JTable:
    own = load_germlines(germlines).j_of(*LOCI_OF_CHAIN[chain])
    usage = _j_usage(own, germlines)
    prior = {j: _j_prior(j, usage[j.locus]) for j in own}
    alleles = sorted(prior, key=lambda j: -prior[j])
    lengths = np.array([len(j.amino_acids) - j.motif for j in alleles])
    before = max(j.motif + (j.frame > 0) for j in alleles)
    fr4 = np.full((len(alleles), lengths.max()), OTHER, np.uint8)
    fr4_scores = np.zeros((lengths.max(), CODES, len(alleles)), np.int16)
    cdr3_scores = np.full((before, CODES, len(alleles)), TRIMMED, np.int16)
    cut_scores = np.full((before + 1, CODES, len(alleles)), TRIMMED, np.int16)
    whole_prior = np.full((before + 1, len(alleles)), TRIMMED, np.int32)
    cut_prior = np.full((before + 1, len(alleles)), TRIMMED, np.int32)
    for i, j in enumerate(alleles):
        codons = _codon_codes(j.nucleotides[j.frame :])
        in_cdr3 = np.arange(len(codons)) < j.motif
        kept = 1.0 - np.where(in_cdr3, CDR_MUTATION_RATE, FRAMEWORK_MUTATION_RATE)
        scores = log_odds(codons, kept, None)
        fr4[i, : lengths[i]] = encode(j.amino_acids[j.motif :])
        fr4_scores[: lengths[i], :, i] = scores[j.motif :]
        cdr3_scores[: j.motif, :, i] = scores[: j.motif][::-1]
        for k, (whole, cut, odds) in enumerate(_trimmed(j)):
            whole_prior[k, i], cut_prior[k, i] = _scaled_log(whole), _scaled_log(cut)
            cut_scores[k, :, i] = _scaled_log(odds)
    return JTable(
        genes=tuple((j.gene,) for j in alleles),
        locus=_loci(alleles),
        prior=np.array([prior[j] for j in alleles], np.int32),
        fr4=fr4,
        fr4_length=lengths,
        fr4_scores=fr4_scores,
        cdr3_scores=cdr3_scores,
        whole_prior=whole_prior,
        cut_prior=cut_prior,
        cut_scores=cut_scores,
    )
