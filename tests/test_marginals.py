import pyarrow as pa
import pytest
from marginals import marginals, total_variation


def row(heavy_mask: str, light_mask: str, **changed) -> dict:
    """A pair of 9-residue chains: FR1 2, CDR1 1, FR2 1, CDR2 1, FR3 1, CDR3 2, FR4 1."""
    cells = {}
    for chain, mask in (("heavy", heavy_mask), ("light", light_mask)):
        cells |= {
            f"sequence_aa_{chain}": "ACDEFGHIK",
            f"cdr_mask_aa_{chain}": "001020330",
            f"nongermline_mask_aa_{chain}": mask,
            f"cdr3_aa_{chain}": "HI",
            f"v_identity_aa_{chain}": 1 - mask[:6].count("1") / 6,
            f"v_gene_{chain}": "IGHV1-2" if chain == "heavy" else "IGKV1-5",
            f"j_gene_{chain}": "IGHJ4" if chain == "heavy" else "IGKJ1",
        }
    return cells | changed


@pytest.fixture
def table() -> pa.Table:
    return pa.Table.from_pylist(
        [
            row("000000000", "000000000"),
            row("101010001", "000000000", v_gene_light="IGLV2-14", cdr3_aa_heavy="HIK"),
            row("111111001", "100000000"),
            row("000000000", "000000000", v_gene_heavy="IGHV3-23"),
            row("111111001", "", sequence_aa_light="", cdr_mask_aa_light="", cdr3_aa_light=""),
        ]
    )


def test_scalars_made_by_hand(table):
    found = marginals(table).scalars
    expected = {
        "heavy unmutated": 0.5,
        "light unmutated": 0.75,
        "both chains unmutated": 0.5,
        "kappa share": 0.75,
        "heavy V identity, mean": (1 + 0.5 + 0 + 1) / 4,
        "heavy mutation rate, FR1": 3 / 8,
        "heavy mutation rate, CDR1": 2 / 4,
        "heavy mutation rate, FR2": 1 / 4,
        "heavy mutation rate, FR4": 2 / 4,
        "light mutation rate, FR1": 1 / 8,
        "light mutation rate, CDR2": 0,
        "CDRH3 length, mean": 2.25,
        "CDRH3 of unmutated pairs length, mean": 2,
        "CDRH3 of pairs with 5 mutations or more length, mean": 2,
        "lambda CDR3 length, sd": 0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "heavy mutation rate, CDR3" not in found


def test_distributions_made_by_hand(table):
    found = marginals(table).distributions
    assert found["heavy V gene"] == {"IGHV1-2": 0.75, "IGHV3-23": 0.25}
    assert found["light V gene"] == {"IGKV1-5": 0.75, "IGLV2-14": 0.25}
    assert found["CDRH3 length"] == {"2": 0.75, "3": 0.25}
    assert found["CDRH3 residues"]["K"] == pytest.approx(1 / 9)


def test_total_variation():
    assert total_variation({"a": 0.5, "b": 0.5}, {"b": 0.25, "c": 0.75}) == pytest.approx(0.75)
    assert total_variation({"a": 1.0}, {"a": 1.0}) == 0
