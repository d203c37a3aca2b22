import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from marginals import marginals, total_variation

import moe_ablm.data
from moe_ablm.data.simulate import BLOCK, SimulationParams, pairing_information, simulate, v_pairing
from moe_ablm.errors import UserError
from moe_ablm.verbs import simulate as verb

# Measured on the 319,124 pairs of Jaffe et al. 2022, donor 3: value, tolerance of the simulation
REAL_SCALARS = {
    "CDRH3 length, mean": (16.319, 0.5),
    "CDRH3 length, sd": (3.977, 0.5),
    "CDRH3 of unmutated pairs length, mean": (16.839, 0.5),
    "CDRH3 of pairs with 5 mutations or more length, mean": (14.699, 0.5),
    "kappa CDR3 length, mean": (9.288, 0.25),
    "lambda CDR3 length, mean": (10.731, 0.25),
    "kappa share": (0.6042, 0.02),
    "heavy V identity, mean": (0.9777, 0.003),
    "heavy V identity, sd": (0.0487, 0.005),
    "light V identity, mean": (0.9873, 0.003),
    "light V identity, sd": (0.0324, 0.005),
    "heavy unmutated": (0.7391, 0.02),
    "light unmutated": (0.7687, 0.02),
    "both chains unmutated": (0.7222, 0.02),
    "correlation of mutation counts": (0.790, 0.06),
    "heavy mutation rate, FR1": (0.0093, 0.0015),
    "heavy mutation rate, CDR1": (0.0444, 0.005),
    "heavy mutation rate, FR2": (0.0162, 0.002),
    "heavy mutation rate, CDR2": (0.0597, 0.006),
    "heavy mutation rate, FR3": (0.0210, 0.002),
    "heavy mutation rate, FR4": (0.0107, 0.002),
    "light mutation rate, FR1": (0.0056, 0.0015),
    "light mutation rate, CDR1": (0.0414, 0.005),
    "light mutation rate, FR2": (0.0140, 0.002),
    "light mutation rate, CDR2": (0.0386, 0.006),
    "light mutation rate, FR3": (0.0090, 0.0015),
    "light mutation rate, FR4": (0.0083, 0.002),
}
REAL_GENES = {
    "heavy V gene": {"IGHV3-23": 0.0930, "IGHV3-30": 0.0734, "IGHV1-69": 0.0627},
    "heavy J gene": {"IGHJ4": 0.4712, "IGHJ3": 0.1782, "IGHJ6": 0.1633},
    "light V gene": {"IGKV3-20": 0.0937, "IGKV1-39": 0.0887, "IGLV2-14": 0.0544},
    "light J gene": {"IGLJ2": 0.2116, "IGKJ1": 0.1723, "IGLJ1": 0.0776},
}
CHAINS = ("heavy", "light")
UNMUTATED = SimulationParams(memory_share=0.0, naive_load=0.0)


def table_of(*args, **kwargs) -> pa.Table:
    return pa.Table.from_batches(simulate(*args, **kwargs))


@pytest.fixture(scope="module")
def simulated() -> pa.Table:
    return table_of(2 * BLOCK, 7)


@pytest.fixture(scope="module")
def raw_germlines() -> dict[str, str]:
    """Alleles of the packaged FASTA files, read without the package's parser."""
    folder = Path(moe_ablm.data.__file__).parent / "germlines" / "human"
    text = "\n".join((folder / f"{segment}.fasta").read_text().strip() for segment in "vdj")
    records = (record.partition("\n") for record in text.split(">")[1:])
    return {name.split("__")[0]: body.replace("\n", "") for name, _, body in records}


def translated(nucleotides: str) -> str:
    table = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
    codons = (nucleotides[i : i + 3] for i in range(0, len(nucleotides) - 2, 3))
    return "".join(
        table["TCAG".index(a) * 16 + "TCAG".index(b) * 4 + "TCAG".index(c)] for a, b, c in codons
    )


def germline_v(gapped: str) -> tuple[str, str]:
    """Residues of a gapped V allele up to C104, and their `cdr_mask` digits."""
    residues, mask = "", ""
    for position in range(1, 105):
        codon = gapped[3 * position - 3 : 3 * position]
        if codon != "...":
            residues += translated(codon)
            mask += "1" if 27 <= position <= 38 else "2" if 56 <= position <= 65 else "0"
    return residues, mask


def germline_j(nucleotides: str) -> str:
    """Residues of a J allele from W/F118 on."""
    for frame in range(3):
        found = re.search("[WF]G.G.*", translated(nucleotides[frame:]))
        if found and "*" not in found[0]:
            return found[0]
    raise AssertionError(nucleotides)


def test_same_seed_same_bytes(simulated):
    assert simulated.equals(table_of(2 * BLOCK, 7))
    other = table_of(10, 8)["sequence_aa_heavy"]
    assert other != simulated["sequence_aa_heavy"].slice(0, 10)


def test_hardly_any_chain_comes_twice(simulated):
    assert len(simulated["cdr3_aa_heavy"].unique()) > 0.999 * len(simulated)


@pytest.mark.parametrize(("first", "pairs"), [(0, 10), (0, BLOCK + 3), (BLOCK - 2, 5), (5000, 1)])
def test_any_range_is_a_slice_of_the_whole(simulated, first, pairs):
    part = table_of(pairs, 7, first=first)
    assert part.equals(simulated.slice(first, pairs))
    assert part["sequence_id"][0].as_py() == f"sim-7-{first}"


def test_no_pairs_no_batches():
    assert list(simulate(0, 1)) == []


@pytest.mark.parametrize("wrong", [{"pairs": -1}, {"seed": -1}, {"first": -3}])
def test_negative_numbers_are_refused(wrong):
    with pytest.raises(UserError, match="is -"):
        simulate(**({"pairs": 1, "seed": 0} | wrong))


def check_truth(row: dict, chain: str, germlines: dict[str, str]) -> None:
    """Every mask of a chain follows from its sequence, its CDR3 and the alleles it names."""
    sequence, cdr3 = row[f"sequence_aa_{chain}"], row[f"cdr3_aa_{chain}"]
    v, v_mask = germline_v(germlines[row[f"v_call_{chain}"]])
    j = germline_j(germlines[row[f"j_call_{chain}"]])
    start, end = len(v), len(v) + len(cdr3)
    assert len(sequence) == end + len(j)
    assert sequence[start:end] == cdr3
    assert set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY")
    assert sequence[start - 1] == "C" and sequence[end] == j[0]
    germline = v + cdr3 + j
    assert row[f"germline_aa_{chain}"] == germline
    mutated = "".join("01"[a != b] for a, b in zip(sequence, germline, strict=True))
    assert row[f"nongermline_mask_aa_{chain}"] == mutated
    assert row[f"cdr_mask_aa_{chain}"] == v_mask + "3" * len(cdr3) + "0" * len(j)
    identity = 1 - mutated[:start].count("1") / start
    assert row[f"v_identity_aa_{chain}"] == pytest.approx(identity, abs=1e-12)
    segments = row[f"gene_segment_mask_aa_{chain}"]
    assert segments[:start] == "V" * start and segments[end:] == "J" * len(j)
    order = "V*N*D*N*J*" if chain == "heavy" else "V*N*J*"
    assert re.fullmatch(order, segments[start:end])
    assert row[f"v_gene_{chain}"] == row[f"v_call_{chain}"].split("*")[0]
    assert row[f"j_gene_{chain}"] == row[f"j_call_{chain}"].split("*")[0]


def check_pieces(row: dict, chain: str, germlines: dict[str, str]) -> dict[str, int]:
    """What V, D and J left in an unmutated CDR3 is in the alleles; returns residues checked.

    The outermost residue of a piece is left out: one nucleotide of its codon may be foreign.
    """
    cdr3, start = row[f"cdr3_aa_{chain}"], row[f"cdr_mask_aa_{chain}"].index("3")
    segments = row[f"gene_segment_mask_aa_{chain}"][start : start + len(cdr3)]
    checked = dict.fromkeys("VDJ", 0)
    in_v, in_d, in_j = (segments.count(name) for name in "VDJ")
    if in_v > 1:
        v = germlines[row[f"v_call_{chain}"]]
        assert translated(v[3 * 104 :]).startswith(cdr3[: in_v - 1])
        checked["V"] = in_v - 1
    if in_j > 1:
        j = germlines[row[f"j_call_{chain}"]]
        tail = cdr3[len(cdr3) - in_j + 1 :] + row[f"sequence_aa_{chain}"][start + len(cdr3) :]
        assert any(tail in translated(j[frame:]) for frame in range(3))
        checked["J"] = in_j - 1
    if in_d:
        name, first = row["d_call_heavy"], segments.index("D")
        assert name
        if in_d > 2 and name in germlines:
            piece = cdr3[first + 1 : first + in_d - 1]
            assert any(piece in translated(germlines[name][frame:]) for frame in range(3))
            checked["D"] = in_d - 2
    return checked


@pytest.mark.parametrize("chain", CHAINS)
def test_every_mask_follows_from_the_germline_files(simulated, raw_germlines, chain):
    rows = simulated.slice(0, 3000).to_pylist()
    for row in rows:
        check_truth(row, chain, raw_germlines)
    assert sum("1" in row[f"nongermline_mask_aa_{chain}"] for row in rows) > 500


@pytest.mark.parametrize(("chain", "pieces"), [("heavy", "VDJ"), ("light", "VJ")])
def test_segments_of_the_cdr3_are_pieces_of_their_genes(raw_germlines, chain, pieces):
    seen = dict.fromkeys("VDJ", 0)
    for row in table_of(2000, 3, UNMUTATED).to_pylist():
        for name, residues in check_pieces(row, chain, raw_germlines).items():
            seen[name] += residues
    assert min(seen[name] for name in pieces) > 1500


def test_without_mutation_every_chain_is_germline():
    table = table_of(500, 0, UNMUTATED)
    for chain in CHAINS:
        assert table[f"sequence_aa_{chain}"].equals(table[f"germline_aa_{chain}"])
        assert set(table[f"v_identity_aa_{chain}"].to_pylist()) == {1.0}


def test_marginals_are_those_of_the_real_pairs(simulated):
    found = marginals(simulated)
    wrong = {
        name: (round(found.scalars[name], 4), value)
        for name, (value, tolerance) in REAL_SCALARS.items()
        if abs(found.scalars[name] - value) > tolerance
    }
    assert not wrong
    for name, genes in REAL_GENES.items():
        for gene, share in genes.items():
            assert found.distributions[name][gene] == pytest.approx(share, abs=0.02)


def test_reference_numbers_are_those_of_the_real_file(shared_data):
    path = shared_data / "pairs.parquet"
    columns = ["v_gene", "j_gene", "sequence_aa", "cdr3_aa", "v_identity_aa", "cdr_mask_aa"]
    columns = [f"{c}_{chain}" for c in [*columns, "nongermline_mask_aa"] for chain in CHAINS]
    real = pq.read_table(path, columns=columns)
    found = marginals(real.take(np.arange(0, len(real), 10)))
    for name, (value, tolerance) in REAL_SCALARS.items():
        assert found.scalars[name] == pytest.approx(value, abs=tolerance / 3), name
    for name, genes in REAL_GENES.items():
        for gene, share in genes.items():
            assert found.distributions[name][gene] == pytest.approx(share, abs=0.006)
    ours = marginals(table_of(2 * BLOCK, 11))
    for name in REAL_GENES:
        assert total_variation(ours.distributions[name], found.distributions[name]) < 0.05
    assert total_variation(*(m.distributions["CDRH3 length"] for m in (ours, found))) < 0.06


def test_pairing_tilt_is_as_strong_as_it_says():
    assert pairing_information(SimulationParams()) == pytest.approx(0, abs=1e-9)
    params = SimulationParams(pairing_tilt=3.0)
    heavy, light, joint = v_pairing(params)
    table = table_of(2 * BLOCK, 0, params)
    rows = [heavy.index(gene) for gene in table["v_gene_heavy"].to_pylist()]
    columns = [light.index(gene) for gene in table["v_gene_light"].to_pylist()]
    ratio = joint / np.outer(joint.sum(1), joint.sum(0))
    # The mean logarithm of this ratio over pairs drawn from `joint` is the mutual information.
    bits = np.log2(ratio[rows, columns])
    assert pairing_information(params) > 0.5
    assert bits.mean() == pytest.approx(
        pairing_information(params), abs=4 * bits.std() / np.sqrt(len(bits))
    )


def test_olga_backend_has_exact_truth_too(raw_germlines):
    pytest.importorskip("olga")
    params = replace(UNMUTATED, backend="olga")
    table = table_of(800, 5, params)
    seen = dict.fromkeys("VDJ", 0)
    for row in table.to_pylist():
        for chain in CHAINS:
            check_truth(row, chain, raw_germlines)
        for name, residues in check_pieces(row, "heavy", raw_germlines).items():
            seen[name] += residues
    assert min(seen.values()) > 500
    state = np.random.get_state()[1].copy()
    assert table.equals(table_of(800, 5, params))
    assert (np.random.get_state()[1] == state).all()


def test_olga_backend_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "olga", None)
    with pytest.raises(UserError, match=r"moe_ablm\[olga\]"):
        table_of(1, 0, SimulationParams(backend="olga"))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"backend": "igor"}, "backend"),
        ({"backend": "olga", "pairing_tilt": 1.0}, "backend"),
        ({"pairing_tilt": float("nan")}, "pairing tilt"),
        ({"pairing_tilt": 1000.0}, "pairing tilt"),
        ({"kappa_share": 1.5}, "kappa_share"),
        ({"memory_share": -0.1}, "memory_share"),
    ],
)
def test_parameters_that_cannot_be_are_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        SimulationParams(**wrong)


@pytest.mark.parametrize(("share", "locus"), [(0.0, "IGL"), (1.0, "IGK")])
def test_one_light_locus_alone(share, locus):
    genes = table_of(50, 0, SimulationParams(kappa_share=share))["v_gene_light"].to_pylist()
    assert {gene[:3] for gene in genes} == {locus}


def run_verb(*argv: str) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    verb.run(parser.parse_args([str(a) for a in argv]))


def test_verb_writes_tables(tmp_path, capsys):
    for name in ("a.parquet", "new/b.csv"):
        run_verb("--pairs", 20, "--seed", 5, "--out", tmp_path / name)
    expected = table_of(20, 5)
    assert pq.read_table(tmp_path / "a.parquet").equals(expected)
    letters = {n: pa.string() for n in expected.column_names if not n.startswith("v_identity")}
    options = pa.csv.ConvertOptions(column_types=letters, strings_can_be_null=False)
    assert pa.csv.read_csv(tmp_path / "new/b.csv", convert_options=options).equals(expected)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert "0.0000 bits" in capsys.readouterr().out


def test_verb_refuses_no_pairs(tmp_path):
    with pytest.raises(UserError, match="--pairs 0"):
        run_verb("--pairs", 0, "--out", tmp_path / "a.csv")


def test_interrupted_table_leaves_nothing(tmp_path):
    def broken():
        yield from simulate(3, 0)
        raise OSError("disk full")

    with pytest.raises(UserError, match="a.parquet cannot be written: disk full"):
        verb.write_table(broken(), tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run_verb("--pairs", 1, "--out", tmp_path / "file" / "a.csv")
    assert "file is not a directory" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(SystemExit, match="2"):
        run_verb("--pairs", 1, "--out", tmp_path / "dir.csv")
    assert "dir.csv is a directory" in capsys.readouterr().err.splitlines()[-1]
