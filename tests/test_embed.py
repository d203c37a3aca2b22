"""Embeddings at every level and layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_blocks import jit
from tiny_models import engine, tiny_model, tiny_spec

from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.embed import embed, layer_number, table
from moe_ablm.model.encoder import Observe, make_definition
from moe_ablm.model.spec import Execution

PAIRS = [("EVQLVES", "DIQM"), ("", "DIQMTQ"), ("EVQLX", "DI")]


@pytest.fixture(scope="module")
def antibodies():
    model = tiny_model()
    return given(PAIRS, model.layout, model.length)


@jit
def hidden(params, tokens):
    """Hidden states of all layers of the tiny model."""
    definition = make_definition(tiny_spec(), Execution())
    valid = jnp.ones(tokens.shape, bool)
    return nnx.merge(definition, params)(tokens, valid, observe=Observe(hidden=True)).hidden


def states(antibody, layer: int) -> np.ndarray:
    """What the encoder says, residues alone: <cls> H <cls><cls> L <eos>."""
    from moe_ablm.data.antibody import row_of

    model = tiny_model()
    tokens = row_of(antibody, model.layout).tokens.astype(int)[None]
    found = hidden(model.params, jnp.asarray(tokens))[layer][0]
    heavy = len(antibody.heavy)
    keep = list(range(1, 1 + heavy)) if heavy else []
    first = 1 + heavy + 2 if heavy else 1
    keep += range(first, first + len(antibody.light))
    return np.asarray(found)[keep]


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_residues_are_the_encoders_hidden_states(antibodies, layer):
    found = embed(engine(), antibodies[:2], "residue", layer)
    for antibody, array in zip(antibodies, found, strict=False):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, states(antibody, layer), atol=2e-5)


def test_chains_and_antibodies_are_means_over_residues(antibodies):
    residues = embed(engine(), antibodies, "residue")
    chains = embed(engine(), antibodies, "chain")
    whole = embed(engine(), antibodies, "antibody")
    assert [c.shape for c in chains] == [(2, 16), (1, 16), (2, 16)]
    for antibody, r, c, w in zip(antibodies, residues, chains, whole, strict=True):
        np.testing.assert_allclose(w[0], r.mean(0), atol=1e-6)
        parts = [p for p in (r[: len(antibody.heavy)], r[len(antibody.heavy) :]) if len(p)]
        np.testing.assert_allclose(c, [p.mean(0) for p in parts], atol=1e-6)


@pytest.mark.parametrize(("level", "lines"), [("antibody", 3), ("chain", 5), ("residue", 24)])
def test_tables_have_a_line_for_each(antibodies, level, lines):
    found = table(engine(), antibodies, level)
    assert found.num_rows == lines
    vectors = np.array(found["embedding"].to_pylist(), np.float32)
    np.testing.assert_array_equal(vectors, np.concatenate(embed(engine(), antibodies, level)))
    assert found["sequence_id"][-1].as_py() == "3"
    if level != "antibody":
        assert found["chain"].to_pylist()[-1] == "light"


@pytest.mark.parametrize(("layer", "expected"), [(0, 0), (6, 6), (-1, 6), (-7, 0)])
def test_layers_count_from_both_ends(layer, expected):
    assert layer_number(layer, 6) == expected


@pytest.mark.parametrize("layer", [7, -8])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(UserError, match=f"--layer {layer}: expected 0.*to 6"):
        layer_number(layer, 6)
