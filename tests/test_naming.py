"""ESM-1b and ESM-1v come in, go out and train: positions that are learned, a norm before."""

import json

import numpy as np
import pytest
from foreign_forward import esm1
from random_models import logits_of, random_model, same
from safetensors.numpy import load_file

from moe_ablm.antibody_model import AntibodyModel
from moe_ablm.errors import UserError
from moe_ablm.inference.embed import HiddenStates
from moe_ablm.interop.esm2 import export_esm2
from moe_ablm.interop.load import import_directory
from moe_ablm.interop.naming import ESM, ROBERTA
from moe_ablm.interop.saved import parameter_shapes

KINDS = {"ESM-1b": True, "ESM-1v": False}  # whether the embedding is normalised
ROW = np.array([0, 5, 9, 32, 7, 16, 4, 23, 32, 10, 2])


def of_kind(kind: str, **changes):
    settings = {"learned_positions": 40, "embedding_norm": KINDS[kind], "length": 40} | changes
    return random_model(**settings)


def row_of(logits, row=ROW):
    """Logits of a row that is padded to 16 tokens."""
    tokens = np.pad(row, (0, 16 - len(row)), constant_values=1)[None]
    return logits(tokens, np.arange(16)[None] < len(row))[0, : len(row)]


@pytest.mark.parametrize(("kind", "token_dropout"), [("ESM-1b", True), ("ESM-1v", False)])
def test_logits_are_those_of_the_paper(tmp_path, kind, token_dropout):
    model = of_kind(kind, token_dropout=token_dropout, layer_norm_eps=1e-3)
    export_esm2(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = esm1(tensors, ROW, heads=4, eps=1e-3, token_dropout=token_dropout)
    found = import_directory(tmp_path / "out")
    assert same(found, model) and found.length == 40
    logits = row_of(lambda *given: logits_of(found, *given))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.hf
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(tmp_path, kind):
    """Of random weights that transformers itself saves, and of what goes back to it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=42,
        position_embedding_type="absolute", emb_layer_norm_before=KINDS[kind], token_dropout=True,
        layer_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.EsmForMaskedLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = import_directory(tmp_path / "hf")
    assert (model.length, model.layout_name, model.spec.learned_positions) == (40, "esm", 40)
    export_esm2(model, tmp_path / "back")
    again = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "back").eval()

    def of(network):
        def logits(tokens, valid):
            given = torch.tensor(tokens), torch.tensor(valid).long()
            with torch.no_grad():
                return network(given[0], attention_mask=given[1]).logits.numpy()

        return logits

    expected = row_of(of(theirs))
    found = row_of(lambda *given: logits_of(model, *given))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(row_of(of(again)), expected, atol=1e-6)


def test_names_are_those_of_every_parameter():
    """None is forgotten, and none twice."""
    for naming, settings in (
        (ESM, {"learned_positions": 3, "embedding_norm": True}),
        (ROBERTA, {"learned_positions": 3, "embedding_norm": True, "post_norm": True}),
    ):
        model = random_model(tied=False, **settings)
        written = naming.written(model.params)
        assert {n: a.shape for n, a in written.items()} == naming.shapes(
            parameter_shapes(model.spec)
        )
        assert all(n.startswith((f"{naming.model}.", "lm_head.")) for n in written)
        back = naming.read(parameter_shapes(model.spec), written)
        assert same(model, type(model)(**vars(model) | {"params": back}))


def test_rows_beyond_the_learned_positions_are_refused():
    model = AntibodyModel(of_kind("ESM-1b"))
    chains = "EVQLVESGGGLVQPGGSLR", "DIQMTQSPSSLSASVGD"
    found = model.embed([chains], level="residue")[0]  # 40 tokens, padded to 48
    assert np.isfinite(found).all()
    with pytest.raises(UserError, match="too long for this model: 41 tokens"):
        model.embed([(chains[0] + "L", chains[1])])
    with pytest.raises(UserError, match="a row of 41 tokens: a test learned 40 positions"):
        list(model.run(HiddenStates(-1), [np.full(41, 4, np.uint8)]))


def test_what_is_left_out_is_told(tmp_path):
    """Rotary models of some versions hold positions that they do not use."""
    export_esm2(of_kind("ESM-1v"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["position_embedding_type"] = "rotary"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model = import_directory(tmp_path / "out")
    assert not model.spec.learned_positions and "position_embeddings" in model.notes[0]
