"""Single mutants by the three rules of ESM-1v."""

import re

import numpy as np
import pytest
from tiny_models import engine

from moe_ablm.data.antibody import row_of
from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID, LAYOUTS, MASK
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.heatmap import draw_scan, figure_path
from moe_ablm.inference.logits import EveryPosition
from moe_ablm.inference.scan import METHODS, passes, scan, table

ESM = LAYOUTS["esm"]


def antibodies():
    return given([("EVX", "DI"), ("QV", "")], ESM, 64)


def log_probabilities(rows: list[np.ndarray]) -> list[np.ndarray]:
    found = dict(engine().run(EveryPosition(), rows))
    return [found[i] for i in range(len(rows))]


def with_token(tokens: np.ndarray, place: int, token: int) -> np.ndarray:
    tokens = tokens.copy()
    tokens[place] = token
    return tokens


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_log_odds_by_definition(method):
    (found,) = scan(engine(), antibodies()[:1], method)
    row = row_of(antibodies()[0], ESM)
    assert found.shape == (5, 20) and np.isnan(found[2]).all()
    for residue, mutant in [(0, "A"), (1, "W"), (3, "K"), (4, "V")]:
        place, wild = row.places[residue], row.tokens[row.places[residue]]
        token = FIRST_AMINO_ACID + AMINO_ACIDS.index(mutant)
        seen = {"masked-marginal": MASK, "wild-type-marginal": wild, "mutant-marginal": token}
        (odds,) = log_probabilities([with_token(row.tokens, place, seen[method])])
        expected = odds[place, token] - odds[place, wild]
        assert found[residue, token - FIRST_AMINO_ACID] == pytest.approx(expected, abs=2e-5)
        assert found[residue, wild - FIRST_AMINO_ACID] == 0


def test_passes_through_the_encoder():
    antibody = antibodies()[1]
    assert [passes(antibody, method) for method in METHODS] == [2, 1, 38]


def test_a_line_for_each_mutant():
    scores = scan(engine(), antibodies(), "wild-type-marginal")
    lines = table(antibodies(), scores).to_pylist()
    assert len(lines) == 19 * (4 + 2)
    assert all(line["mutant"] != line["residue"] for line in lines)
    last = lines[-1]
    assert (last["sequence_id"], last["chain"], last["position"], last["residue"]) == (
        *("2", "heavy", 2, "V"),
    )
    assert last["score"] == scores[1][1, AMINO_ACIDS.index(last["mutant"])]


def test_heat_map(tmp_path):
    scores = scan(engine(), antibodies(), "wild-type-marginal")
    path = figure_path(tmp_path, antibodies()[0])
    draw_scan(antibodies()[0], scores[0], "wild-type-marginal", path)
    assert re.fullmatch(r"1-[0-9a-f]{8}\.png", path.name) and path.read_bytes().startswith(
        b"\x89PNG"
    )
    assert list(tmp_path.iterdir()) == [path]


def test_no_name_points_out_of_the_directory(tmp_path):
    from moe_ablm.data.antibody import Antibody

    path = figure_path(tmp_path, Antibody("../../etc/" + "x" * 300, "E", ""))
    assert path.parent == tmp_path and len(path.name) < 100
