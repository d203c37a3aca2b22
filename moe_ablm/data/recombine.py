"""V(D)J recombination: trimmed germline segments joined by random nucleotides, kept if productive.

A whole block of cells is recombined at once. The V and J alleles of every cell are given; trimming,
D gene and N nucleotides are drawn again and again until the junction is productive, so the V and J
usage of the result is exactly the usage that was drawn.

Axis letters: n cells, T tries per cell, W nucleotides of the widest junction, R residues.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.germline import DAllele, JAllele, VAllele, encode_nucleotides, translate_codes

_SEGMENT_OF_PIECE = np.array([0, 1, 2, 1, 3], np.uint8)  # V, N1, D, N2, J
_TRIES = 8
_MAX_ROUNDS = 500


@dataclass(frozen=True)
class JunctionParams:
    """How the ends of one locus are cut and filled.

    Every pair is (mean, dispersion) of a negative binomial number of nucleotides, with variance
    mean + mean^2 / dispersion; D trimming and `n2` are unused where there is no D segment.
    """

    v_trim: tuple[float, float]
    j_trim: tuple[float, float]
    n1: tuple[float, float]
    d5_trim: tuple[float, float] = (0.0, 1.0)
    d3_trim: tuple[float, float] = (0.0, 1.0)
    n2: tuple[float, float] = (0.0, 1.0)
    n_composition: tuple[float, float, float, float] = (0.21, 0.29, 0.29, 0.21)  # A, C, G, T
    cdr3_length: tuple[int, int] = (5, 40)  # shortest and longest CDR3 kept, residues


class AlleleTable:
    """Nucleotides of many alleles in one flat array, for gathering by (allele, position)."""

    def __init__(self, alleles: Sequence[VAllele | DAllele | JAllele]):
        self.alleles = tuple(alleles)
        self.codes = np.concatenate([encode_nucleotides(a.nucleotides) for a in alleles])
        self.length = np.array([len(a.nucleotides) for a in alleles])
        self.start = np.cumsum(self.length) - self.length


@dataclass(frozen=True, eq=False)
class Rearrangements:
    """n productive rearrangements, before hypermutation.

    codes      [n, 3 R] int8: nucleotides 0-3 in frame, -1 past the end
    length     [n] residues of each chain
    cdr3       [n, 2] first residue of the CDR3 and first residue after it
    segment    [n, R] uint8: index in "VNDJ" of each residue's middle nucleotide
    d          [n] index of the D allele; -1 where nothing of a D segment is left
    """

    codes: np.ndarray
    length: np.ndarray
    cdr3: np.ndarray
    segment: np.ndarray
    d: np.ndarray


def place(out: np.ndarray, at: np.ndarray, source: np.ndarray, start: np.ndarray, size: np.ndarray):
    """Copy `source[start[i] : start[i] + size[i]]` into `out[i, at[i] :]`, for every row i."""
    rows = np.repeat(np.arange(len(size)), size)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(size) - size, size)
    out[rows, at[rows] + within] = source[start[rows] + within]


class Assembler:
    """Whole V domains from V up to C104, a junction, and J from W/F118."""

    def __init__(self, v: Sequence[VAllele], j: Sequence[JAllele]):
        self.v, self.j = AlleleTable(v), AlleleTable(j)
        self.v_codons = np.array([allele.c104 + 1 for allele in v])
        self.j_motif = np.array([allele.motif_nucleotide for allele in j])
        self.j_codons = (self.j.length - self.j_motif) // 3

    def assemble(
        self,
        v: np.ndarray,
        j: np.ndarray,
        junction: np.ndarray,
        pieces: np.ndarray,
        d: np.ndarray,
        width: int,
    ) -> Rearrangements:
        """V domains of the alleles `v`, `j` `[n]`.

        junction: `[n, W]` nucleotides between C104 and W/F118. pieces: `[n, 5]` how many of them
        are of V, N1, D, N2, J; the sum is a multiple of 3. width: R of the result.
        """
        zero = np.zeros(len(v), np.int64)
        cdr3_codons = pieces.sum(1) // 3
        cdr3_start = self.v_codons[v]
        cdr3_end = cdr3_start + cdr3_codons
        length = cdr3_end + self.j_codons[j]
        codes = np.full((len(v), 3 * width), -1, np.int8)
        place(codes, zero, self.v.codes, self.v.start[v], 3 * cdr3_start)
        row_start = np.arange(len(v)) * junction.shape[1]
        place(codes, 3 * cdr3_start, junction.ravel(), row_start, 3 * cdr3_codons)
        j_start = self.j.start[j] + self.j_motif[j]
        place(codes, 3 * cdr3_end, self.j.codes, j_start, 3 * self.j_codons[j])
        # Within the junction, the middle nucleotide of residue r is number 3 (r - start) + 1.
        middle = 3 * (np.arange(width) - cdr3_start[:, None]) + 1
        piece = np.zeros(middle.shape, np.uint8)
        for end in np.cumsum(pieces, axis=1)[:, :4].T:
            piece += middle >= end[:, None]
        cdr3 = np.stack([cdr3_start, cdr3_end], 1)
        return Rearrangements(codes, length, cdr3, _SEGMENT_OF_PIECE[piece], d)


def length_survival(selection, residues):
    """Probability that a cell with a CDR3 of so many residues is kept: exp(-s max(0, L - 12))."""
    return np.exp(-selection * np.maximum(residues - 12, 0))


class Recombiner:
    """Recombination of one locus with fixed parameters and fixed tables of alleles."""

    def __init__(
        self,
        v: Sequence[VAllele],
        d: Sequence[DAllele],
        j: Sequence[JAllele],
        params: JunctionParams,
        d_usage: np.ndarray | None = None,
    ):
        """`d` is empty for a light chain; `d_usage` `[len(d)]` sums to 1."""
        self.params = params
        self.domains = Assembler(v, j)
        self.d = AlleleTable(d) if d else None
        self.v_tail = self.domains.v.length - 3 * self.domains.v_codons
        self._d_cdf = np.cumsum(() if d_usage is None else d_usage)
        self._n_cdf = np.cumsum(params.n_composition)
        names = ("v_trim", "j_trim", "n1", "n2", "d5_trim", "d3_trim")
        self._cdf = {name: _negative_binomial_cdf(*getattr(params, name)) for name in names}

    def _draw(self, name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.searchsorted(self._cdf[name], rng.random(shape), side="right")

    def recombine(
        self,
        v: np.ndarray,
        j: np.ndarray,
        length_selection: np.ndarray,
        width: int,
        rng: np.random.Generator,
    ) -> Rearrangements:
        """Productive rearrangements of the V alleles `v` `[n]` with the J alleles `j` `[n]`.

        length_selection: `[n]`, see `length_survival`; 0 keeps all. width: residues R of the
        result's arrays.
        """
        cells = len(v)
        longest = 3 * self.params.cdr3_length[1]
        junction = np.zeros((cells, longest), np.int8)
        pieces = np.zeros((cells, 5), np.int64)
        d = np.full(cells, -1)
        left = np.arange(cells)
        for _ in range(_MAX_ROUNDS):
            if not len(left):
                break
            done, *productive = self._try(v[left], j[left], length_selection[left], longest, rng)
            accepted = left[done]
            junction[accepted], pieces[accepted], d[accepted] = productive
            left = np.delete(left, done)
        else:
            raise RuntimeError(f"no productive junction after {_MAX_ROUNDS * _TRIES} tries")
        return self.domains.assemble(v, j, junction, pieces, d, width)

    def _try(self, v, j, length_selection, longest, rng):
        """One round: the rows of v that got a productive junction, and their junctions."""
        shape = (len(v), _TRIES)
        v_rest = self.v_tail[v][:, None] - self._draw("v_trim", rng, shape)
        j_cut = self._draw("j_trim", rng, shape)
        sizes = np.zeros((*shape, 5), np.int64)
        sizes[..., 0] = np.maximum(v_rest, 0)
        sizes[..., 1] = self._draw("n1", rng, shape)
        sizes[..., 4] = np.maximum(self.domains.j_motif[j][:, None] - j_cut, 0)
        d = np.full(shape, -1)
        d_cut = np.zeros(shape, np.int64)
        if self.d is not None:
            d = np.searchsorted(self._d_cdf[:-1], rng.random(shape), side="right")
            d_cut = self._draw("d5_trim", rng, shape)
            d_rest = self.d.length[d] - d_cut - self._draw("d3_trim", rng, shape)
            sizes[..., 2] = np.maximum(d_rest, 0)
            sizes[..., 3] = self._draw("n2", rng, shape)
            d[sizes[..., 2] == 0] = -1
        total = sizes.sum(-1)
        shortest = 3 * self.params.cdr3_length[0]
        possible = (total % 3 == 0) & (total >= shortest) & (total <= longest)
        possible &= rng.random(shape) < length_survival(length_selection[:, None], total // 3)
        row, attempt = np.nonzero(possible)
        sizes, total, d, d_cut = (a[row, attempt] for a in (sizes, total, d, d_cut))
        codes = self._junctions(v[row], d, d_cut, j[row], sizes, longest, rng)
        productive = np.nonzero(~_has_stop(codes, total))[0]
        done, first = np.unique(row[productive], return_index=True)
        chosen = productive[first]
        return done, codes[chosen], sizes[chosen], d[chosen]

    def _junctions(self, v, d, d_cut, j, sizes, longest, rng) -> np.ndarray:
        """Nucleotides between C104 and W/F118: V end, N1, D, N2, J start, as `[m, W]`."""
        ends = np.cumsum(sizes, axis=1)
        # Every position starts as an N nucleotide; the germline pieces are laid over them.
        codes = np.searchsorted(
            self._n_cdf[:3], rng.random((len(v), longest), np.float32), side="right"
        ).astype(np.int8)
        zero = np.zeros(len(v), np.int64)
        v_table, j_table = self.domains.v, self.domains.j
        v_start = v_table.start[v] + 3 * self.domains.v_codons[v]
        place(codes, zero, v_table.codes, v_start, sizes[:, 0])
        if self.d is not None:
            place(codes, ends[:, 1], self.d.codes, self.d.start[d] + d_cut, sizes[:, 2])
        j_start = j_table.start[j] + self.domains.j_motif[j] - sizes[:, 4]
        place(codes, ends[:, 3], j_table.codes, j_start, sizes[:, 4])
        return codes


def _negative_binomial_cdf(mean: float, dispersion: float, tail: float = 1e-6) -> np.ndarray:
    """P(X <= k) for k = 0 .. K - 1, where `searchsorted` of a uniform number draws X <= K."""
    if mean == 0:
        return np.zeros(0)
    from scipy import stats  # takes long to import

    distribution = stats.nbinom(dispersion, dispersion / (dispersion + mean))
    return distribution.cdf(np.arange(int(distribution.isf(tail))))


def _has_stop(codes: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether a stop codon lies in the first `length[i]` nucleotides of row i."""
    inside = np.arange(codes.shape[1] // 3) < (length // 3)[:, None]
    return ((translate_codes(codes) == ord("*")) & inside).any(1)
