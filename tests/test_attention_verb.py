"""Attention between the chains of an antibody."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_blocks import jit
from tiny_models import engine, tiny_model

from moe_ablm.data.antibody import row_of
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.attention import attention, attention_layer, table
from moe_ablm.model.encoder import Encoder, Observe
from moe_ablm.model.spec import Execution

ESM = LAYOUTS["esm"]


def antibodies():
    return given([("EVQLVES", "DIQM"), ("EVQ", "DI")], ESM, 64)


def test_weights_are_the_encoders_between_residues():
    model = tiny_model()
    definition = nnx.split(nnx.eval_shape(lambda: Encoder(model.spec, Execution(), nnx.Rngs(0))))[0]
    tokens = jnp.asarray(row_of(antibodies()[0], ESM).tokens.astype(int))[None]
    valid = jnp.ones(tokens.shape, bool)

    @jit
    def observed(params, tokens, valid):
        seen = nnx.merge(definition, params)(tokens, valid, observe=Observe(attention=True))
        return seen.attention

    expected = observed(model.params, tokens, valid)
    heavy, light = slice(1, 8), slice(10, 14)
    for layer in (0, -1):
        found = attention(engine(), antibodies(), layer)[0]
        whole = np.asarray(expected[layer])[0]
        np.testing.assert_allclose(found.heavy_to_light, whole[:, heavy, light], atol=2e-6)
        np.testing.assert_allclose(found.light_to_heavy, whole[:, light, heavy], atol=2e-6)
    assert (found.heavy_to_light.sum(-1) < 1).all()


def test_a_line_for_each_pair_of_residues():
    found = table(engine(), antibodies(), -1, heads=True)
    assert found.num_rows == 2 * (7 * 4 + 3 * 2)
    first = attention(engine(), antibodies())[0]
    line = found.slice(1, 1).to_pylist()[0]
    assert (line["query_chain"], line["query_position"]) == ("heavy", 1)
    assert (line["key_chain"], line["key_position"]) == ("light", 2)
    assert line["heads"] == first.heavy_to_light[:, 0, 1].tolist()
    assert line["weight"] == pytest.approx(np.mean(line["heads"]))
    assert "heads" not in table(engine(), antibodies(), -1, heads=False).column_names


def test_one_chain_is_refused():
    with pytest.raises(UserError, match="one chain only"):
        attention(engine(), given(["EVQ"], ESM, 64))


def test_layers_count_from_both_ends():
    assert [attention_layer(layer, 6) for layer in (0, 5, -1, -6)] == [0, 5, 5, 0]
    for layer in (6, -7):
        with pytest.raises(UserError, match=f"--layer {layer}: expected 0 to 5"):
            attention_layer(layer, 6)
