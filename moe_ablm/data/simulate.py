"""Simulated native pairs of human antibodies, with the exact truth for every residue.

A cell is naive (next to no mutation) or memory. Both chains of a memory cell share one mutation
load, and memory cells have shorter CDRH3, so the mutation counts of a pair are correlated, as in
real cells. The genes of the two chains are independent unless `pairing_tilt` is set (see
`tilted_pairing`). Regions are IMGT's; the gene segment of a residue is that of its codon's middle
nucleotide. Insertions, deletions and P nucleotides are not simulated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from moe_ablm.data import usage
from moe_ablm.data.germline import LOCI, Germlines, load_germlines, translate_codes
from moe_ablm.data.hypermutate import hypermutate
from moe_ablm.data.olga_backend import OlgaRecombiner
from moe_ablm.data.recombine import JunctionParams, Recombiner
from moe_ablm.data.regions import CDR3, REGIONS
from moe_ablm.errors import UserError

BACKENDS = ("germline", "olga")
MAX_TILT = 20  # natural log odds; more changes nothing that a repertoire could show
BLOCK = 4096  # cells that share one random stream: the unit of reproducibility
WIDTH = 160  # residues of the arrays; the longest V domain has 101 to C104, 40 of CDR3, 11 of J
_SEGMENTS = np.frombuffer(b"VNDJ", np.uint8)
_CDR_OF_REGION = np.frombuffer(b"00102030", np.uint8)  # in the order of REGIONS


@dataclass(frozen=True)
class SimulationParams:
    """What the simulated repertoire is like; the defaults are fitted to real pairs (see `usage`).

    v_usage, j_usage    weights of the genes, by locus; the alleles of a gene are equally likely
    d_usage             weights of the D genes before the productive filter
    kappa_share         share of kappa among light chains
    memory_share        share of cells that went through hypermutation
    load                (mean, shape) of the gamma distribution of a memory cell's load: nucleotides
                        of the heavy chain that are hit, before selection
    naive_load          the same of every naive cell: variants that the germline table lacks,
                        sequencing errors, cells that have just begun to mutate
    light_load          (mean, shape) of the gamma distribution of a light chain's load over the
                        heavy chain's: the part that the two do not share
    survival            by chain: the probability that a replacement survives, by region
                        (FR1, CDR1, FR2, CDR2, FR3, CDR3, FR4)
    memory_cdrh3_selection  memory cells keep a CDRH3 of L residues with the probability
                        exp(-s max(0, L - 12)): the longest are selected against
    junctions           trimming and N addition, by locus
    pairing_tilt        log odds by which heavy and light V genes of one class pair more often than
                        genes of different classes
    backend             "germline" recombines with `recombine.py`; "olga" with OLGA's models, whose
                        own usage and junctions take the place of those above
    """

    v_usage: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: dict(usage.V_USAGE))
    j_usage: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: dict(usage.J_USAGE))
    d_usage: Mapping[str, float] = field(default_factory=lambda: dict(usage.D_USAGE))
    kappa_share: float = usage.KAPPA_SHARE
    memory_share: float = usage.MEMORY_SHARE
    load: tuple[float, float] = usage.LOAD
    naive_load: float = usage.NAIVE_LOAD
    light_load: tuple[float, float] = usage.LIGHT_LOAD
    survival: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(usage.SURVIVAL))
    memory_cdrh3_selection: float = usage.MEMORY_CDRH3_SELECTION
    junctions: dict[str, JunctionParams] = field(
        default_factory=lambda: {
            locus: JunctionParams(**constants) for locus, constants in usage.JUNCTIONS.items()
        }
    )
    pairing_tilt: float = 0.0
    backend: str = "germline"

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise UserError(f"simulate: backend is {self.backend!r}; expected one of {BACKENDS}")
        for name in ("kappa_share", "memory_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"simulate: {name} is {getattr(self, name)}; expected 0 to 1")
        if not abs(self.pairing_tilt) <= MAX_TILT:
            raise UserError(
                f"simulate: pairing tilt is {self.pairing_tilt}; "
                f"expected a number from -{MAX_TILT} to {MAX_TILT}"
            )
        if self.backend == "olga" and self.pairing_tilt:
            raise UserError("simulate: backend olga draws its own V genes: pairing_tilt must be 0")


def simulate(
    pairs: int, seed: int, params: SimulationParams | None = None, first: int = 0
) -> Iterator[pa.RecordBatch]:
    """Records `first` to `first + pairs - 1` of the simulated repertoire `seed`, in batches.

    A record depends on the seed, the parameters and its own number only, so any range can be made
    alone. Columns: those of the annotated table with `gene_segment_mask_aa_*`, the true alleles
    (`v_call_*`, `j_call_*`, `d_call_heavy`, "" where no D is left), and `source` = "simulated".
    Raises UserError where `pairs`, `seed` or `first` is negative.
    """
    for name, value in (("pairs", pairs), ("seed", seed), ("first", first)):
        if value < 0:
            raise UserError(f"simulate: {name} is {value}; expected a number that is not negative")
    return _slices(_Repertoire(params or SimulationParams()), seed, first, first + pairs)


def pairing_information(params: SimulationParams) -> float:
    """Mutual information of a pair's heavy and light V genes in bits, from the parameters alone."""
    return mutual_information(v_pairing(params)[2])


def _slices(repertoire: "_Repertoire", seed: int, first: int, end: int):
    for block in range(first // BLOCK, -(-end // BLOCK)):
        start, stop = max(first - block * BLOCK, 0), min(end - block * BLOCK, BLOCK)
        if stop > start:
            yield repertoire.block(seed, block).slice(start, stop - start)


def v_pairing(params: SimulationParams) -> tuple[list[str], list[str], np.ndarray]:
    """Heavy V genes, light V genes (kappa, then lambda), and their joint probability `[H, L]`."""
    genes = {locus: sorted(params.v_usage[locus]) for locus in LOCI}
    kappa = gene_frequencies(params.v_usage["IGK"]) * params.kappa_share
    lambda_ = gene_frequencies(params.v_usage["IGL"]) * (1 - params.kappa_share)
    heavy = gene_frequencies(params.v_usage["IGH"])
    joint = tilted_pairing(heavy, np.concatenate([kappa, lambda_]), params.pairing_tilt)
    return genes["IGH"], genes["IGK"] + genes["IGL"], joint


def gene_frequencies(gene_usage: Mapping[str, float]) -> np.ndarray:
    """Frequencies of the genes of a usage table, in the order of their names."""
    weights = np.array([gene_usage[gene] for gene in sorted(gene_usage)], float)
    return weights / weights.sum()


def tilted_pairing(heavy: np.ndarray, light: np.ndarray, tilt: float) -> np.ndarray:
    """Joint probability `[H, L]` with the marginals `heavy` `[H]` and `light` `[L]`.

    In the order of falling frequency, the genes of either chain go by turns to one of two classes.
    The joint probability of genes h and l is a_h b_l exp(+tilt / 2) where their classes agree and
    a_h b_l exp(-tilt / 2) where they differ; a and b are such that the marginals hold (Sinkhorn
    1967, Am. Math. Mon. 74:402). So the log odds ratio of any two genes of different classes on
    either side is 2 tilt, tilt 0 is independence, and the mutual information stays below one bit.
    """
    agree = np.equal.outer(_classes(heavy), _classes(light))
    kernel = np.exp(tilt * (agree - 0.5))
    b = np.ones(len(light))
    for _ in range(10_000):
        a = heavy / (kernel @ b)
        previous, b = b, light / (a @ kernel)
        if np.allclose(previous, b, rtol=1e-13, atol=0):
            break
    return a[:, None] * kernel * b


def _classes(frequencies: np.ndarray) -> np.ndarray:
    rank = np.empty(len(frequencies), np.int64)
    rank[np.argsort(-frequencies, kind="stable")] = np.arange(len(frequencies))
    return rank % 2


def mutual_information(joint: np.ndarray) -> float:
    """Mutual information in bits of a joint probability `[H, L]`."""
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    positive = joint > 0
    bits = (joint[positive] * np.log2(joint[positive] / independent[positive])).sum()
    return max(float(bits), 0.0)  # rounding can leave an independent table just below zero


@dataclass(eq=False)
class _Chains:
    """One chain of n cells: nucleotides `[n, 3 WIDTH]`, and the annotation of each residue."""

    codes: np.ndarray
    length: np.ndarray
    segment: np.ndarray
    region: np.ndarray
    names: dict[str, np.ndarray]

    @classmethod
    def merge(cls, parts: list[tuple[np.ndarray, "_Chains"]]) -> "_Chains":
        """The chains of all parts, each at the rows given with it; the rows are a partition."""
        back = np.argsort(np.concatenate([rows for rows, _ in parts]))

        def join(arrays):
            return np.concatenate(list(arrays))[back]

        chains = [chain for _, chain in parts]
        return cls(
            codes=join(c.codes for c in chains),
            length=join(c.length for c in chains),
            segment=join(c.segment for c in chains),
            region=join(c.region for c in chains),
            names={key: join(c.names[key] for c in chains) for key in chains[0].names},
        )


class _Locus:
    """V, D and J of one locus, ready to recombine."""

    def __init__(self, name: str, germlines: Germlines, params: SimulationParams):
        v, j = germlines.v_of(name), germlines.j_of(name)
        d = germlines.d if name == "IGH" else ()
        d_usage = allele_frequencies(d, params.d_usage) if d else None
        self._recombiner = Recombiner(v, d, j, params.junctions[name], d_usage)
        self._j_cdf = np.cumsum(allele_frequencies(j, params.j_usage[name]))
        self._region_starts = np.array([allele.region_starts() for allele in v])
        self._v_names, self._v_genes = _names(v)
        self._j_names, self._j_genes = _names(j)
        self._d_names = np.array([allele.name for allele in d] + [""], object)  # [-1]: none is left
        self._olga = None
        if params.backend == "olga":
            self._olga = OlgaRecombiner(name, v, j, params.junctions[name].cdr3_length)
            self._d_names = self._olga.d_names
        owner = [allele.gene for allele in v]
        genes = sorted(params.v_usage[name])
        self._first_allele = np.array([owner.index(gene) for gene in genes])
        self._alleles = np.array([owner.count(gene) for gene in genes])

    def rearrange(self, gene: np.ndarray, selection: np.ndarray, rng) -> _Chains:
        """Unmutated chains with the given V genes (OLGA draws its own)."""
        if self._olga:
            v, j, cells = self._olga.recombine(selection, WIDTH, rng)
        else:
            offset = (rng.random(len(gene)) * self._alleles[gene]).astype(np.int64)
            v = self._first_allele[gene] + offset
            j = np.searchsorted(self._j_cdf[:-1], rng.random(len(gene)), side="right")
            cells = self._recombiner.recombine(v, j, selection, WIDTH, rng)
        starts = np.concatenate([self._region_starts[v], cells.cdr3[:, 1:]], axis=1)
        region = np.full((len(v), WIDTH), REGIONS.index("FR1"), np.uint8)
        for boundary in starts.T:
            region += np.arange(WIDTH) >= boundary[:, None]
        names = {
            "v_call": self._v_names[v],
            "v_gene": self._v_genes[v],
            "j_call": self._j_names[j],
            "j_gene": self._j_genes[j],
            "d_call": self._d_names[cells.d],
        }
        return _Chains(cells.codes, cells.length, cells.segment, region, names)


class _Repertoire:
    """Everything that the blocks of one set of parameters share."""

    def __init__(self, params: SimulationParams):
        self.params = params
        germlines = load_germlines()
        self._loci = {name: _Locus(name, germlines, params) for name in LOCI}
        joint = v_pairing(params)[2]
        self._pair_cdf = np.cumsum(joint)
        self._light_genes = joint.shape[1]
        self._kappa_genes = len(params.v_usage["IGK"])

    def block(self, seed: int, block: int) -> pa.RecordBatch:
        """Records `block * BLOCK` to `(block + 1) * BLOCK - 1`."""
        params = self.params
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, block])))
        pair = np.searchsorted(self._pair_cdf[:-1], rng.random(BLOCK), side="right")
        heavy_gene, light_gene = np.divmod(pair, self._light_genes)
        memory = rng.random(BLOCK) < params.memory_share
        load = np.where(memory, _gamma(params.load, rng), params.naive_load)
        selection = np.where(memory, params.memory_cdrh3_selection, 0.0)
        heavy = self._loci["IGH"].rearrange(heavy_gene, selection, rng)
        light = self._light(light_gene, rng)
        first = block * BLOCK
        columns = {"sequence_id": [f"sim-{seed}-{i}" for i in range(first, first + BLOCK)]}
        columns |= _columns(heavy, "heavy", load, params, rng)
        columns |= _columns(light, "light", load * _gamma(params.light_load, rng), params, rng)
        del columns["d_call_light"]
        return pa.RecordBatch.from_pydict(columns | {"source": ["simulated"] * BLOCK})

    def _light(self, gene: np.ndarray, rng) -> _Chains:
        """Light chains; `gene` counts the kappa genes first, then the lambda genes."""
        is_lambda = gene >= self._kappa_genes
        parts = []
        for name, rows in (("IGK", np.nonzero(~is_lambda)[0]), ("IGL", np.nonzero(is_lambda)[0])):
            within = gene[rows] - (self._kappa_genes if name == "IGL" else 0)
            parts.append((rows, self._loci[name].rearrange(within, np.zeros(len(rows)), rng)))
        return _Chains.merge(parts)


def _columns(chains: _Chains, name: str, load: np.ndarray, params: SimulationParams, rng) -> dict:
    """The annotated columns of one chain, hypermutated with the loads `load` `[n]`."""
    germline = translate_codes(np.maximum(chains.codes, 0))
    residues = germline.copy()
    hits = np.minimum(rng.poisson(load), chains.length)
    rows = np.nonzero(hits)[0]
    if len(rows):
        length = chains.length[rows]
        survival = np.array(params.survival[name])
        mutated = hypermutate(
            chains.codes[rows], length, chains.region[rows], hits[rows], survival, rng
        )
        residues[rows] = translate_codes(np.maximum(mutated, 0))
    position = np.arange(WIDTH)
    inside = position < chains.length[:, None]
    in_cdr3 = inside & (chains.region == CDR3)
    in_v = chains.region < CDR3
    changed = (residues != germline) & inside & ~in_cdr3
    masks = {
        "sequence_aa": residues,
        "germline_aa": np.where(in_cdr3, residues, germline),
        "cdr_mask_aa": _CDR_OF_REGION[chains.region],
        "nongermline_mask_aa": np.where(changed, ord("1"), ord("0")).astype(np.uint8),
        "gene_segment_mask_aa": _SEGMENTS[chains.segment],
    }
    columns = {f"{key}_{name}": string_array(letters, inside) for key, letters in masks.items()}
    columns |= {
        f"{key}_{name}": pa.array(values, pa.string()) for key, values in chains.names.items()
    }
    columns[f"cdr3_aa_{name}"] = string_array(residues, in_cdr3)
    columns[f"v_identity_aa_{name}"] = pa.array(1 - (changed & in_v).sum(1) / in_v.sum(1))
    return columns


def string_array(letters: np.ndarray, keep: np.ndarray) -> pa.StringArray:
    """Strings of the kept ASCII letters of each row of `letters` `[n, R]` uint8."""
    offsets = np.zeros(len(letters) + 1, np.int32)
    np.cumsum(keep.sum(1), out=offsets[1:])
    values = pa.py_buffer(np.ascontiguousarray(letters)[keep])
    return pa.StringArray.from_buffers(len(letters), pa.py_buffer(offsets), values)


def _gamma(mean_and_shape: tuple[float, float], rng) -> np.ndarray:
    """A gamma variate for each cell of a block."""
    mean, shape = mean_and_shape
    return rng.gamma(shape, mean / shape, BLOCK)


def allele_frequencies(alleles: tuple, gene_usage: Mapping[str, float]) -> np.ndarray:
    """Frequency of each allele: its gene's usage, shared equally by the alleles of the gene."""
    owner = [allele.gene for allele in alleles]
    weights = np.array([gene_usage.get(gene, 0) / owner.count(gene) for gene in owner])
    return weights / weights.sum()


def _names(alleles: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Names of the alleles and of their genes, as arrays of str."""
    names = np.array([allele.name for allele in alleles], object)
    return names, np.array([allele.gene for allele in alleles], object)
