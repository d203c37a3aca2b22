"""Pseudo-log-likelihoods against the definition, and what is made of them."""

import math

import numpy as np
import pyarrow as pa
import pytest
from tiny_models import HEAVY, LIGHT, MOE, engine

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.tokenizer import LAYOUTS, MASK
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.logits import EveryPosition
from moe_ablm.inference.score import perplexity, regions, score, summary, table

PAIRS = [("EVQLV", "DIQM"), ("EVXLV", "")]
ESM = LAYOUTS["esm"]


def antibodies() -> list[Antibody]:
    return given(PAIRS, ESM, 64)


@pytest.mark.parametrize("router", MOE)
def test_exact_scores_mask_every_residue_in_turn(router):
    """Against the whole forward pass of every masked copy; the last layer is no exception."""
    (found,) = score(engine(router), antibodies()[:1])
    row = row_of(antibodies()[0], ESM)
    copies = []
    for place in row.places:
        copies.append(row.tokens.copy())
        copies[-1][place] = MASK
    everywhere = dict(engine(router).run(EveryPosition(), copies))
    expected = [everywhere[i][p, row.tokens[p]] for i, p in enumerate(row.places)]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_in_one_pass_nothing_is_masked():
    found = score(engine(), antibodies(), one_pass=True)
    rows = [row_of(a, ESM) for a in antibodies()]
    everywhere = dict(engine().run(EveryPosition(), [row.tokens for row in rows]))
    for i, row in enumerate(rows):
        expected = everywhere[i][row.places, row.tokens[row.places]]
        known = ~np.isnan(found[i])
        np.testing.assert_array_equal(found[i][known], expected[known])
    assert np.isnan(found[1]).tolist() == [False, False, True, False, False]


def test_ambiguous_residues_are_context_only():
    exact = score(engine(), antibodies())[1]
    assert np.isnan(exact).tolist() == [False, False, True, False, False]
    (other,) = score(engine(), given([("EVALV", "")], ESM, 64))
    assert not np.allclose(exact[[0, 1, 3, 4]], other[[0, 1, 3, 4]])


def test_perplexity_is_the_exponent_of_the_mean_loss():
    assert perplexity(np.log(np.array([0.5, 0.125], np.float32))) == pytest.approx(4)
    assert perplexity(np.array([np.nan, math.log(0.5)])) == pytest.approx(2)
    assert math.isnan(perplexity(np.array([np.nan]))) and math.isnan(perplexity(np.zeros(0)))


def test_sums_of_both_chains():
    pair = Antibody("a", "EV", "D")
    alone = Antibody("b", "EX", "")
    scores = [np.log([0.5, 0.25, 0.125]), np.array([math.log(0.5), np.nan])]
    found = summary([pair, alone], scores)
    assert found["sequence_id"] == ["a", "b"] and found["residues"] == [3, 1]
    nan = float("nan")
    for name, expected in {
        "pll": [math.log(0.5 * 0.25 * 0.125), math.log(0.5)],
        "perplexity": [4, 2],
        "pll_heavy": [math.log(0.125), math.log(0.5)],
        "perplexity_heavy": [math.sqrt(8), 2],
        "pll_light": [math.log(0.125), nan],
        "perplexity_light": [8, nan],
    }.items():
        np.testing.assert_allclose(found[name], expected, err_msg=name)


def test_regions_of_the_source_come_first():
    masks = "0011022033004"[:11] + "00", ""
    (found,) = regions([Antibody("a", "EVQLVESGGGLVQ", "DI", cdr_masks=masks)])
    # FR1 FR1 CDR1 CDR1 FR2 CDR2 CDR2 FR3 CDR3 CDR3 FR4 ...; the light chain is no domain
    assert found.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 6, -1, -1]


def test_regions_are_computed_where_the_source_has_none():
    leader = "MKTAYIAK"
    plain, shifted = regions([Antibody("a", HEAVY, LIGHT), Antibody("b", leader + HEAVY, LIGHT)])
    heavy = plain[: len(HEAVY)]
    assert "".join(np.array(list(HEAVY))[heavy == 5]) == "AKDRGYSYGFDY"  # CDRH3, IMGT
    assert "".join(np.array(list(LIGHT))[plain[len(HEAVY) :] == 12]) == "QQSYSTPLT"
    assert (shifted[:8] == -1).all() and (shifted[8:] == plain).all()
    assert (regions([Antibody("c", "EVQXX", "")])[0] == -1).all()


def test_perplexity_by_region():
    antibody = Antibody("a", HEAVY, "")
    (cells,) = regions([antibody])
    scores = np.where(cells == 5, math.log(0.25), math.log(0.5))
    found = summary([antibody], [scores], by_region=True)
    assert found["perplexity_CDRH3"][0] == pytest.approx(4)
    assert found["perplexity_FRH2"][0] == pytest.approx(2)
    assert math.isnan(found["perplexity_CDRL3"][0])


def test_tables_of_antibodies_and_residues():
    by_antibody = table(engine(), antibodies(), one_pass=True)
    assert by_antibody.num_rows == 2
    residues = table(engine(), antibodies(), "residue", one_pass=True, by_region=True)
    assert residues.num_rows == 14 and set(residues["region"].to_pylist()) == {""}
    sums = np.nansum(residues["log_likelihood"].to_numpy()[:9], dtype=np.float64)
    assert by_antibody["pll"][0].as_py() == pytest.approx(sums)
    kinds = {field.name: field.type for field in by_antibody.schema}
    assert kinds.pop("sequence_id") == pa.string() and kinds.pop("residues") == pa.int64()
    assert set(kinds.values()) == {pa.float32()}, "as many digits as the model computed"
