"""Routing of residues against what the encoder reports of its own routing."""

import numpy as np
import pytest
from tiny_models import MOE, engine, tiny_model

from moe_ablm.data.antibody import row_of
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.route import route, table

ESM = LAYOUTS["esm"]
ROUTERS = [name for name in MOE if name not in ("dense", "soft")]


def antibodies():
    return given([("EVQLVES", "DIQM"), ("EVQ", "")], ESM, 64)


class Assigned:
    """The encoder's own report, `[B, L, M, E]`."""

    def __call__(self, encoder, batch):
        return encoder(batch.tokens, batch.valid).routing.assigned.transpose(1, 2, 0, 3)


ASSIGNED = Assigned()


def reported(router: str) -> list[np.ndarray]:
    rows = [row_of(a, ESM) for a in antibodies()]
    found = dict(engine(router).run(ASSIGNED, [row.tokens for row in rows]))
    return [found[i][row.places] for i, row in enumerate(rows)]


@pytest.mark.parametrize("router", ROUTERS)
def test_choices_are_those_of_the_encoder(router):
    for choices, expected in zip(
        route(engine(router), antibodies()), reported(router), strict=True
    ):
        found = np.zeros_like(expected)
        for *place, k in np.ndindex(choices.experts.shape):
            expert = choices.experts[(*place, k)]
            if expert < 4:
                found[(*place, expert)] += 1
                assert choices.gates[(*place, k)] > 0
        np.testing.assert_array_equal(found, expected)


def test_gates_of_top_2_sum_to_one():
    for choices in route(engine("topk"), antibodies()):
        assert choices.experts.shape[1:] == (2, 2)
        np.testing.assert_allclose(choices.gates.sum(-1), 1, atol=1e-6)


def test_weights_of_soft_moe():
    for weights, expected in zip(
        route(engine("soft"), antibodies()), reported("soft"), strict=True
    ):
        assert weights.combine.shape[1:] == weights.dispatch.shape[1:] == (2, 4, 3)
        np.testing.assert_allclose(weights.combine.sum(-1), expected, atol=1e-6)
        np.testing.assert_allclose(weights.combine.sum((-1, -2)), 1, atol=1e-5)
        # special tokens have the rest
        assert (weights.dispatch.sum(0) < 1).all() and (weights.dispatch > 0).all()


def test_a_line_for_each_choice_best_first():
    lines = table(engine("topk"), antibodies()).to_pylist()
    assert len(lines) == 14 * 2 * 2
    first, second = lines[:2]
    assert first["gate"] >= second["gate"] and first["layer"] == second["layer"] == 0
    assert (first["chain"], first["position"], first["residue"]) == ("heavy", 1, "E")
    assert {line["layer"] for line in lines} == {0, 1}


def test_residues_without_an_expert_have_a_line_too():
    lines = table(engine("expert_choice"), antibodies()).to_pylist()
    places = {(r["sequence_id"], r["chain"], r["position"], r["layer"]) for r in lines}
    assert len(places) == 14 * 2
    alone = [line for line in lines if line["expert"] == -1]
    assert alone and all(line["gate"] == 0 for line in alone)


def test_table_of_soft_moe():
    found = table(engine("soft"), antibodies())
    assert found.num_rows == 14 * 2 * 4
    shares = found["share"].to_numpy().reshape(-1, 4)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    assert found.schema.field("dispatch").type.list_size == 3


def test_a_dense_model_routes_nothing():
    assert tiny_model().spec.moe_layers == ()
    with pytest.raises(UserError, match="tiny dense: a dense model"):
        route(engine(), antibodies())
