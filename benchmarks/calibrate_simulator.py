"""Fits the constants of `moe_ablm/data/usage.py` to a parquet file of real annotated pairs.

`python benchmarks/simulate.py --calibrate FILE` prints the module; takes about five minutes.

1. V and J usage and the kappa share are counted. Genes never seen are left out.
2. Mutation counts of the pairs are fitted by maximum likelihood: a share of memory cells with a
   gamma load that both chains share, times a gamma of the light chain's own, and naive cells with
   a small Poisson background (variants missing from the germline table, errors, early cells).
3. Trimming and N addition of each locus are fitted, on pairs without any mutation, to three
   histograms - CDR3 length, residues at its start that are the V gene's, residues at its end that
   are the J gene's - and D usage to the genes that own the 4-mers found in CDRH3.
4. The selection of memory cells against long CDRH3 is the tilt that moves the mean length of
   unmutated pairs to that of pairs with five mutations or more.
5. Survival of replacements is scaled region by region until simulated mutation rates are the real
   ones; the region that keeps most is set to 1 by scaling the load. The CDR3, where mutations
   cannot be seen, is given the mean of CDR1 and CDR2.
"""

import textwrap
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from marginals import marginals
from scipy import stats
from scipy.optimize import brentq, minimize

from moe_ablm.data.germline import load_germlines, translate, translate_codes
from moe_ablm.data.recombine import JunctionParams, Recombiner
from moe_ablm.data.regions import CDR3, CHAINS, REGIONS
from moe_ablm.data.simulate import SimulationParams, allele_frequencies, simulate

LOCI = {"IGH": "heavy", "IGK": "light", "IGL": "light"}
START = {  # means and dispersions: V trim, J trim, N; for IGH then D trim
    "IGH": (1.4, 1.5, 4.5, 2.0, 7.0, 4.0, 2.8, 2.0),
    "IGK": (2.0, 12.0, 1.4, 12.0, 0.9, 0.22),
    "IGL": (2.1, 12.0, 1.2, 12.0, 1.2, 0.3),
}
CDR3_LENGTH = {"IGH": (4, 40), "IGK": (4, 21), "IGL": (4, 21)}


HEAD = '''"""Gene usage and constants of the simulator, fitted to {rows:,} real pairs.

Written by `python benchmarks/simulate.py --calibrate {source}`; how each number is derived
stands in `benchmarks/calibrate_simulator.py`. The pairs are those of donor 3 of Jaffe et al. 2022.
V and J usage are counts of pairs, D usage is what explains the CDRH3; the other names are the
fields of `SimulationParams`.
"""

from typing import Any

# fmt: off
'''


def main(path: str) -> None:
    table = pq.read_table(path)
    mutations = np.stack(
        [
            pc.count_substring(table[f"nongermline_mask_aa_{chain}"], "1").to_numpy()
            for chain in CHAINS
        ]
    )
    total = mutations.sum(0)
    unmutated = table.filter(pa.array(total == 0))
    genes = {
        segment: {locus: count_genes(table, segment, locus) for locus in LOCI} for segment in "vj"
    }
    kappa, lambda_ = (sum(genes["v"][locus].values()) for locus in ("IGK", "IGL"))
    load = fit_load(mutations)
    d_usage, junctions = fit_heavy_junctions(unmutated, genes)
    junctions |= {
        locus: fit_junctions(locus, unmutated, genes, {}, START[locus]) for locus in ("IGK", "IGL")
    }
    params = SimulationParams(
        v_usage=genes["v"],
        j_usage=genes["j"],
        d_usage=d_usage,
        kappa_share=round(kappa / (kappa + lambda_), 4),
        memory_share=round(load["memory"], 4),
        load=(2 * load["heavy"], round(load["shape"], 3)),
        light_load=(load["light"] / load["heavy"], round(load["light_shape"], 3)),
        memory_cdrh3_selection=round(fit_length_selection(table, total), 4),
        junctions=junctions,
    )
    params = fit_survival(params, table, load["naive"] / load["heavy"])
    print(module_text(params, path.rsplit("/", 1)[-1], len(table)), end="")


def count_genes(table: pa.Table, segment: str, locus: str) -> dict[str, int]:
    column = table[f"{segment}_gene_{LOCI[locus]}"]
    counts = Counter(gene for gene in column.to_pylist() if gene.startswith(locus))
    return dict(sorted(counts.items()))


def fit_load(mutations: np.ndarray) -> dict[str, float]:
    """Maximum likelihood of the mutation counts (heavy, light) `[2, pairs]`.

    Naive: Poisson(e) and Poisson(e light / heavy). Memory: with x a gamma of mean 1 (midpoints of
    64 equally likely slices), Poisson(heavy x) and a negative binomial of mean (light x), which is
    a Poisson with a gamma of its own.
    """
    counts = np.zeros(mutations.max(1) + 1)
    np.add.at(counts, tuple(mutations), 1)
    h, k = (np.arange(size) for size in counts.shape)
    names = ("memory", "shape", "heavy", "light", "naive", "light_shape")

    def unpack(x):
        values = [1 / (1 + np.exp(-x[0])), *np.exp(x[1:])]
        return {name: float(value) for name, value in zip(names, values, strict=True)}

    def loss(x):
        p = unpack(x)
        load = stats.gamma.ppf((np.arange(64) + 0.5) / 64, p["shape"])[:, None] / p["shape"]
        heavy = stats.poisson.pmf(h, p["heavy"] * load)
        success = p["light_shape"] / (p["light_shape"] + p["light"] * load)
        memory = heavy.T @ stats.nbinom.pmf(k, p["light_shape"], success) / len(load)
        light_naive = p["naive"] * p["light"] / p["heavy"]
        naive = np.outer(stats.poisson.pmf(h, p["naive"]), stats.poisson.pmf(k, light_naive))
        probability = p["memory"] * memory + (1 - p["memory"]) * naive
        return -(counts * np.log(probability + 1e-300)).sum() / counts.sum()

    start = [-1.0, np.log(2), np.log(9), np.log(5), np.log(0.04), np.log(4)]
    options = {"maxiter": 2000, "maxfev": 2000, "xatol": 1e-4, "fatol": 1e-8}
    return unpack(minimize(loss, start, method="Nelder-Mead", options=options).x)


def fit_length_selection(table: pa.Table, total: np.ndarray) -> float:
    """s such that exp(-s max(0, L - 12)) turns lengths of unmutated pairs into those of memory."""
    length = pc.binary_length(table["cdr3_aa_heavy"]).to_numpy()
    before, after = length[total == 0], length[total >= 5].mean()

    def excess(s):
        weight = np.exp(-s * np.maximum(before - 12, 0))
        return (weight * before).sum() / weight.sum() - after

    return brentq(excess, -0.5, 1.0)


class Ends:
    """How much of the germline is left at both ends of a CDR3, by V and J gene."""

    def __init__(self):
        germlines = load_germlines()
        self.v, self.j = {}, {}
        for allele in germlines.v:
            self.v.setdefault(allele.gene, set()).add(allele.amino_acids[allele.c104 + 1 :])
        for allele in germlines.j:
            head = allele.amino_acids[: allele.motif]
            self.j.setdefault(allele.gene, set()).add(head[::-1])

    def histograms(self, v_genes, j_genes, cdr3s) -> list[np.ndarray]:
        """Shares of CDR3s by length, by residues shared with V, by residues shared with J."""
        left = [max(common(c, x) for x in self.v[g]) for g, c in zip(v_genes, cdr3s, strict=True)]
        right = [
            max(common(c[::-1], x) for x in self.j[g]) for g, c in zip(j_genes, cdr3s, strict=True)
        ]
        length = [len(c) for c in cdr3s]
        return [np.bincount(x, minlength=42) / len(x) for x in (length, left, right)]


def common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def d_owners() -> dict[str, str]:
    """Amino-acid 4-mers that only one D gene has, in any frame."""
    owners: dict[str, set[str]] = {}
    for allele in load_germlines().d:
        for frame in range(3):
            protein = translate(allele.nucleotides[frame:])
            for i in range(len(protein) - 3):
                owners.setdefault(protein[i : i + 4], set()).add(allele.gene)
    return {k: min(v) for k, v in owners.items() if len(v) == 1 and "*" not in k}


def d_shares(cdr3s, owners, genes) -> np.ndarray:
    """Share of CDR3s whose 4-mers point to each D gene and to no other."""
    found = Counter()
    for c in cdr3s:
        hits = {owners[c[i : i + 4]] for i in range(len(c) - 3) if c[i : i + 4] in owners}
        if len(hits) == 1:
            found[hits.pop()] += 1
    return np.array([found[gene] for gene in genes]) / len(cdr3s)


def junction_params(locus: str, x: np.ndarray) -> JunctionParams:
    """Parameters from the logarithms of means and dispersions, in the order of START."""
    e = [round(float(value), 3) for value in np.exp(np.clip(x, -6, 4))]
    extra = {}
    if locus == "IGH":
        extra = {"n2": (e[4], e[5]), "d5_trim": (e[6], e[7]), "d3_trim": (e[6], e[7])}
    pairs = {"v_trim": (e[0], e[1]), "j_trim": (e[2], e[3]), "n1": (e[4], e[5])}
    return JunctionParams(**pairs, **extra, cdr3_length=CDR3_LENGTH[locus])


def recombine_genes(locus, params, genes, d_usage, n, seed):
    """V genes, J genes and CDR3s of n simulated naive chains."""
    germlines, rng = load_germlines(), np.random.default_rng(seed)
    v, j = germlines.v_of(locus), germlines.j_of(locus)
    d = germlines.d if locus == "IGH" else ()
    d_frequencies = allele_frequencies(d, d_usage) if d else None
    iv = rng.choice(len(v), n, p=allele_frequencies(v, genes["v"][locus]))
    ij = rng.choice(len(j), n, p=allele_frequencies(j, genes["j"][locus]))
    cells = Recombiner(v, d, j, params, d_frequencies).recombine(iv, ij, np.zeros(n), 160, rng)
    letters = translate_codes(np.maximum(cells.codes, 0))
    cdr3s = [row[a:b].tobytes().decode() for row, (a, b) in zip(letters, cells.cdr3, strict=True)]
    return [v[i].gene for i in iv], [j[i].gene for i in ij], cdr3s


def real_genes(table: pa.Table, locus: str, n: int):
    """V genes, J genes and CDR3s of n real chains of a locus, drawn at random."""
    chain = LOCI[locus]
    rows = np.nonzero(pc.starts_with(table[f"v_gene_{chain}"], locus).to_numpy())[0]
    rows = np.random.default_rng(0).permutation(rows)[:n]
    return [
        table[f"{column}_{chain}"].take(rows).to_pylist()
        for column in ("v_gene", "j_gene", "cdr3_aa")
    ]


def fit_junctions(locus, table, genes, d_usage, start, evaluations=300) -> JunctionParams:
    """Nelder-Mead on squared differences of the three histograms, and of the mean and sd length."""
    ends, owners = Ends(), d_owners()
    real = real_genes(table, locus, 30_000)
    target = ends.histograms(*real)
    d_genes = sorted(d_usage)
    d_target = d_shares(real[2], owners, d_genes).sum()
    centre = np.log(start)

    def loss(x):
        cells = recombine_genes(locus, junction_params(locus, x), genes, d_usage, 4000, 1)
        found = ends.histograms(*cells)
        value = 10 * sum(((a - b) ** 2).sum() for a, b in zip(found, target, strict=True))
        value += 0.5 * ((moments(found[0]) - moments(target[0])) ** 2).sum()
        value += 5 * (d_shares(cells[2], owners, d_genes).sum() - d_target) ** 2
        return value + 1e-4 * ((x - centre) ** 2).sum()

    simplex = np.vstack([centre, centre + 0.35 * np.eye(len(centre))])
    options = {"maxfev": evaluations, "initial_simplex": simplex}
    return junction_params(locus, minimize(loss, centre, method="Nelder-Mead", options=options).x)


def moments(histogram: np.ndarray) -> np.ndarray:
    """Mean and standard deviation."""
    values = np.arange(len(histogram))
    mean = histogram @ values
    return np.array([mean, np.sqrt(histogram @ values**2 - mean**2)])


def fit_heavy_junctions(table, genes) -> tuple[dict[str, float], dict[str, JunctionParams]]:
    """D usage and the junctions of IGH, in turns."""
    owners = d_owners()
    names = sorted({allele.gene for allele in load_germlines().d})
    target = d_shares(real_genes(table, "IGH", 30_000)[2], owners, names)
    weights = np.full(len(names), 1 / len(names))
    params = junction_params("IGH", np.log(START["IGH"]))
    for _ in range(3):
        for seed in range(4):
            d_usage = dict(zip(names, weights, strict=True))
            cells = recombine_genes("IGH", params, genes, d_usage, 10_000, seed)
            found = d_shares(cells[2], owners, names)
            weights *= (target + 2e-4) / (found + 2e-4)
            weights /= weights.sum()
        d_usage = {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}
        params = fit_junctions("IGH", table, genes, d_usage, START["IGH"])
    return d_usage, {"IGH": params}


def fit_survival(params, table, naive_share, rounds=8) -> SimulationParams:
    """Survival by region, load and light load; `naive_share` is naive load over memory load."""
    real = marginals(table).scalars
    survival = {chain: np.full(7, 0.6) for chain in CHAINS}
    mean, light_load = params.load[0], params.light_load[0]
    for seed in range(rounds):
        params = replace(
            params,
            load=(round(float(mean), 3), params.load[1]),
            naive_load=round(float(mean * naive_share), 4),
            light_load=(round(float(light_load), 4), params.light_load[1]),
            survival={c: tuple(round(float(x), 4) for x in s) for c, s in survival.items()},
        )
        found = marginals(pa.Table.from_batches(simulate(61_440, seed, params))).scalars
        scale = {}
        for chain in CHAINS:
            s = survival[chain]
            for code, name in enumerate(REGIONS[1:]):
                if code + 1 != CDR3:
                    key = f"{chain} mutation rate, {name}"
                    s[code] *= real[key] / found[key]
            s[CDR3 - 1] = (s[1] + s[3]) / 2
            scale[chain] = s.max()
            s /= scale[chain]
        mean *= scale["heavy"]
        light_load *= scale["light"] / scale["heavy"]
    return params


def module_text(params, source: str, rows: int) -> str:
    """Source code of `moe_ablm/data/usage.py`."""
    constants = {
        "V_USAGE": params.v_usage,
        "J_USAGE": params.j_usage,
        "D_USAGE": params.d_usage,
        "KAPPA_SHARE": params.kappa_share,
        "MEMORY_SHARE": params.memory_share,
        "LOAD": params.load,
        "NAIVE_LOAD": params.naive_load,
        "LIGHT_LOAD": params.light_load,
        "SURVIVAL": params.survival,
        "MEMORY_CDRH3_SELECTION": params.memory_cdrh3_selection,
        "JUNCTIONS: dict[str, dict[str, Any]]": {
            locus: {
                name: getattr(p, name)
                for name in ("v_trim", "j_trim", "n1", "d5_trim", "d3_trim", "n2", "cdr3_length")
                if locus == "IGH" or name not in ("d5_trim", "d3_trim", "n2")
            }
            for locus, p in params.junctions.items()
        },
    }
    head = HEAD.format(rows=rows, source=source)
    return (
        head + "\n".join(f"{name} = {literal(value)}" for name, value in constants.items()) + "\n"
    )


def literal(value, indent: str = "    ") -> str:
    """A dictionary's source code, filled to 100 columns; any other value's is its repr."""
    if not isinstance(value, dict):
        return repr(value)
    if any(isinstance(inner, dict) for inner in value.values()):
        rows = (f'{indent}"{k}": {literal(v, 2 * indent)},' for k, v in value.items())
        return "{\n" + "\n".join(rows) + f"\n{indent[4:]}}}"
    items = [f'"{k}": {v!r},'.replace(" ", "\0") for k, v in value.items()]  # \0: do not break here
    filled = textwrap.fill(" ".join(items), 100, initial_indent=indent, subsequent_indent=indent)
    filled = filled.replace("\0", " ")
    return "{\n" + filled + f"\n{indent[4:]}}}"
