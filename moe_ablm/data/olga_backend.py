"""Recombination by OLGA's generative models instead of ours (extra `olga`; OLGA is GPL-3).

Sethna et al. 2019, Bioinformatics 35:2974. V, D and J usage, trimming, palindromic and N
nucleotides are those of the models that OLGA ships for human B cells; a V or J allele that our
germline table lacks, or has with other nucleotides in the CDR3, is drawn again. Palindromic
nucleotides count as N.
"""

import contextlib
from pathlib import Path

import numpy as np

from moe_ablm.data.germline import JAllele, VAllele, encode_nucleotides, translate
from moe_ablm.data.recombine import Assembler, Rearrangements, length_survival
from moe_ablm.errors import UserError

_MODELS = {"IGH": "human_B_heavy", "IGK": "human_B_kappa", "IGL": "human_B_lambda"}


class OlgaRecombiner:
    """Draws productive rearrangements of one locus from OLGA's model."""

    def __init__(
        self,
        locus: str,
        v: tuple[VAllele, ...],
        j: tuple[JAllele, ...],
        cdr3_length: tuple[int, int],
    ):
        self._domains = Assembler(v, j)
        self._cdr3_length = cdr3_length
        self._has_d = locus == "IGH"
        genomic, self._draw, self._insert = _load_model(locus)
        v_index = {(a.name, a.nucleotides[3 * a.c104 :]): i for i, a in enumerate(v)}
        j_index = {(a.name, a.nucleotides[: a.motif_nucleotide + 3]): i for i, a in enumerate(j)}
        self._v = [v_index.get((name, segment)) for name, segment, _ in genomic.genV]
        self._j = [j_index.get((name, segment)) for name, segment, _ in genomic.genJ]
        self._v_ends = _palindromes(genomic.cutV_genomic_CDR3_segs, genomic.genV)
        self._j_ends = _palindromes(genomic.cutJ_genomic_CDR3_segs, genomic.genJ)
        self.d_names = np.array([""], object)
        if self._has_d:
            self._d_ends = _palindromes(genomic.cutD_genomic_CDR3_segs, genomic.genD)
            self.d_names = np.array([d[0] for d in genomic.genD] + [""], object)

    def recombine(
        self, length_selection: np.ndarray, width: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, Rearrangements]:
        """V alleles `[n]`, J alleles `[n]` and rearrangements; see `Recombiner.recombine`."""
        cells = len(length_selection)
        v, j, d = (np.full(cells, -1) for _ in range(3))
        pieces = np.zeros((cells, 5), np.int64)
        junction = np.zeros((cells, 3 * self._cdr3_length[1]), np.int8)
        with _global_seed(int(rng.integers(2**32))):
            for i, selection in enumerate(length_selection):
                v[i], j[i], d[i], pieces[i], sequence = self._productive(selection, rng)
                junction[i, : len(sequence)] = encode_nucleotides(sequence)
        return v, j, self._domains.assemble(v, j, junction, pieces, d, width)

    def _productive(self, selection: float, rng: np.random.Generator):
        while True:
            draw = self._attempt()
            if draw is None:
                continue
            residues = len(draw[-1]) // 3
            if rng.random() < length_survival(selection, residues):
                return draw

    def _attempt(self):
        """(v, j, d, sizes of the pieces, nucleotides between C104 and W/F118), or None."""
        event = self._draw()
        v, j = self._v[event["V"]], self._j[event["J"]]
        if v is None or j is None:
            return None
        v_segment, v_own = self._v_ends[event["V"]]
        j_segment, j_own = self._j_ends[event["J"]]
        v_segment = v_segment[3 : max(len(v_segment) - event["delV"], 3)]
        j_segment = j_segment[event["delJ"] : -3]
        v_size, j_size = min(len(v_segment), v_own - 3), min(len(j_segment), j_own - 3)
        d, d_size, before, after = -1, 0, len(v_segment) - v_size, len(j_segment) - j_size
        if self._has_d:
            segment, own = self._d_ends[event["D"]]
            start, stop = event["delDl"], len(segment) - event["delDr"]
            if start > stop:
                return None
            palindrome = (len(segment) - own) // 2
            first = min(max(start, palindrome), stop)
            last = max(min(stop, palindrome + own), first)
            middle = self._insert(event["insVD"], 0) + segment[start:stop]
            middle += self._insert(event["insDJ"], 1)
            d_size = last - first
            d = event["D"] if d_size else -1
            before += event["insVD"] + first - start
            after += event["insDJ"] + stop - last
        else:
            middle = self._insert(event["insVJ"], 0)
            before += event["insVJ"]
        sequence = v_segment + middle + j_segment
        shortest, longest = self._cdr3_length
        possible = len(sequence) % 3 == 0 and shortest <= len(sequence) // 3 <= longest
        if not possible or "*" in translate(sequence):
            return None
        return v, j, d, (v_size, before, d_size, after, j_size), sequence


def _palindromes(cut: list[str], genes: list[list[str]]) -> list[tuple[str, int]]:
    """A segment with OLGA's palindromic ends, and the length of the segment without them."""
    return [(segment, len(gene[1])) for segment, gene in zip(cut, genes, strict=True)]


def _load_model(locus: str):
    """OLGA's genomic data, a function that draws events, and one that draws N nucleotides."""
    try:
        import olga
        from olga import load_model, sequence_generation
    except ImportError as error:
        raise UserError(
            "simulate: backend olga needs the package olga (GPL-3): pip install 'moe_ablm[olga]'"
        ) from error
    kind = "VDJ" if locus == "IGH" else "VJ"
    folder = Path(olga.__file__).parent / "default_models" / _MODELS[locus]
    names = ("model_params.txt", "V_gene_CDR3_anchors.csv", "J_gene_CDR3_anchors.csv")
    genomic = getattr(load_model, f"GenomicData{kind}")()
    genomic.load_igor_genomic_data(*(str(folder / name) for name in names))
    model = getattr(load_model, f"GenerativeModel{kind}")()
    model.load_and_process_igor_model(str(folder / "model_marginals.txt"))
    draw = getattr(sequence_generation, f"SequenceGeneration{kind}")(model, genomic)
    if kind == "VDJ":
        chains = [
            (draw.C_Rvd, draw.C_first_nt_bias_insVD),
            (draw.C_Rdj, draw.C_first_nt_bias_insDJ),
        ]
    else:
        chains = [(draw.C_Rvj, draw.C_first_nt_bias_insVJ)]

    def insert(size: int, junction: int) -> str:
        # The Markov chain of the DJ junction runs backwards from J.
        sequence = sequence_generation.rnd_ins_seq(size, *chains[junction])
        return sequence[::-1] if junction else sequence

    return genomic, draw.choose_random_recomb_events, insert


@contextlib.contextmanager
def _global_seed(seed: int):
    """OLGA draws from numpy's global stream: seed it, and leave it as it was."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
