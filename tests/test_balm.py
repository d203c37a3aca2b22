"""BALM and BALM-MoE against their own code (programs/make_balm_fixtures.py), and back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_models import logits_of, random_model, same
from safetensors.numpy import load_file, save_file

from moe_ablm.config_schema import MoEConfig
from moe_ablm.data.tokenizer import VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.interop.balm import export_balm
from moe_ablm.interop.balm_config import BALM_VOCABULARY
from moe_ablm.interop.load import import_directory
from moe_ablm.model.families import ExpertChoice, Soft, TopK, TopP

FIXTURES = Path(__file__).parent / "fixtures"
KEPT = np.array([VOCABULARY.index(token) for token in BALM_VOCABULARY])  # our ids of BALM's tokens
NULL = VOCABULARY.index("<null_1>")
CASES = ("dense", "dense_gelu", "topk", "topk_capacity", "topk_shared", "topp", "topp_capacity",
         "expert_choice")  # fmt: skip


def stored(name):
    return np.load(FIXTURES / f"balm_{name}.npz", allow_pickle=False)


def directory(path, name, drop=(), **changes):
    """A fixture as the directory that BALM saved; `changes` of its config."""
    file = stored(name)
    path.mkdir(exist_ok=True)
    config = json.loads(str(file["config"])) | changes
    (path / "config.json").write_text(json.dumps(config))
    weights = {k[2:]: file[k] for k in file.files if k.startswith("w/") and k[2:] not in drop}
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, path / "model.safetensors")
    return path


def close(model, tokens, valid, expected, **options):
    found = logits_of(model, KEPT[tokens], valid, **options)
    assert found[valid][:, NULL].max() < -1e3
    np.testing.assert_allclose(found[valid][:, KEPT], expected[valid], atol=1e-4)
    assert np.ptp(expected[valid]) > 1  # worth comparing


@pytest.mark.parametrize("name", ["dense", "dense_gelu", "topk", "topk_shared", "topp"])
def test_logits_are_those_of_balm(tmp_path, name):
    """Rows with padding, without a capacity."""
    file, model = stored(name), import_directory(directory(tmp_path / "d", name))
    close(model, file["tokens"], file["valid"], file["logits"])


@pytest.mark.parametrize(
    "name", ["topk_capacity", pytest.param("topp_capacity", marks=pytest.mark.slow)]
)
def test_a_capacity_drops_what_balm_drops(tmp_path, name):
    """In training, as here inference is dropless: a batch competes for places, as one of BALM's."""
    file, model = stored(name), import_directory(directory(tmp_path / "d", name))
    valid = np.ones_like(file["valid"])
    close(model, file["whole"], valid, file["whole_logits"], training=True)
    dropless = logits_of(model, KEPT[file["whole"]], valid)[..., KEPT]
    assert np.abs(dropless - file["whole_logits"]).max() > 0.01  # it did drop some
    assert "holds in training" in model.notes[0]


def test_padding_comes_last_in_the_queues(tmp_path):
    """BALM's policy of its final model: pads ask for places when all others have theirs."""
    file = stored("topk_capacity")
    model = import_directory(directory(tmp_path / "d", "topk_capacity"))
    assert model.spec.moe.pads == "probabilities,aux"
    close(model, file["tokens"], file["valid"], file["logits"], training=True)


def test_expert_choice_of_one_antibody_is_that_of_balm(tmp_path):
    file = stored("expert_choice")
    model = import_directory(directory(tmp_path / "d", "expert_choice"))
    assert "of one antibody" in model.notes[0]
    for i, length in enumerate(file["valid"].sum(1)):
        tokens = file["tokens"][i : i + 1, :length]
        close(model, tokens, np.ones_like(tokens, bool), file[f"alone_{i}"])
    # and with the neighbours that BALM would let it see
    moe = replace(model.spec.moe, group="batch", pads="none")
    together = replace(model, spec=replace(model.spec, moe=moe))
    close(together, file["whole"], np.ones_like(file["valid"]), file["whole_logits"])


def test_no_neighbour_or_padding_changes_expert_choice(tmp_path):
    file = stored("expert_choice")
    model = import_directory(directory(tmp_path / "d", "expert_choice"))
    together = logits_of(model, KEPT[file["tokens"]], file["valid"])
    for i, length in enumerate(file["valid"].sum(1)):
        np.testing.assert_allclose(together[i, :length][:, KEPT], file[f"alone_{i}"][0], atol=1e-4)


def test_packed_antibodies_do_not_share_a_softmax_over_tokens(tmp_path):
    import jax.numpy as jnp

    from moe_ablm.model.routers import shares_of_tokens

    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10, 3)) * 40, jnp.float32)
    antibody = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0]])
    found = np.asarray(shares_of_tokens(logits, antibody > 0, antibody))[0]
    for start, end in [(0, 3), (3, 7), (7, 8)]:
        alone = np.exp(logits[0, start:end] - logits[0, start:end].max(0))
        np.testing.assert_allclose(found[start:end], alone / alone.sum(0), rtol=1e-5)
    assert (found[8:] == 0).all()


SPECS = {
    "dense": ({}, {"ffn": 24, "layers": 3, "d_model": 16, "heads": 2}),
    "topk": ({}, {"router": "topk", "k": 2, "experts": 4, "capacity": None, "pads": "none"}),
    "topk_capacity": ({}, {"capacity": 0.5, "group": "batch", "load_balance": 0.02}),
    "topk_shared": ({}, {"experts": 4, "shared": 2, "widths": (8, 16, 8, 8), "first_dense": 0}),
    "topp": ({}, {"router": "topp", "k": 4, "exceed": False, "placement": "every"}),
    "topp_capacity": ({}, {"capacity": 0.25, "pads": "logits", "entropy_loss": 1e-4}),
    "expert_choice": ({}, {"router": "expert_choice", "gate": "tokens", "capacity": 1.0}),
}


@pytest.mark.parametrize("name", SPECS)
def test_settings_are_translated(tmp_path, name):
    changes, expected = SPECS[name]
    spec = import_directory(directory(tmp_path / "d", name, **changes)).spec
    for key, value in expected.items():
        owner = spec if name == "dense" else MoEConfig.of(spec.moe)
        assert getattr(owner, key) == value, key
    assert not spec.token_dropout and not spec.tied
    layers = {"dense": (), "topp": (1, 2), "topk_shared": (0, 2)}
    assert spec.moe_layers == layers.get(name, (1,))


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_is_bitwise(tmp_path, name):
    model = import_directory(directory(tmp_path / "d", name))
    export_balm(model, tmp_path / "out")
    assert same(import_directory(tmp_path / "out"), model)
    before = load_file(tmp_path / "d" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    biases = {n for n in after.keys() - before.keys() if n.endswith(".bias")}
    assert after.keys() - biases == before.keys()
    for tensor in after.keys() - biases:
        if tensor.endswith("inv_freq"):  # which transformers does not compute
            np.testing.assert_allclose(after[tensor], before[tensor], rtol=1e-6)
        elif "shared_experts" not in tensor:  # whose second biases are summed into the first
            np.testing.assert_array_equal(after[tensor], before[tensor])
    assert all((after[tensor] == 0).all() for tensor in biases)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "BalmMoEForMaskedLM" in card or name.startswith("dense")
    assert (tmp_path / "out" / "vocab.txt").read_text().split("\n") == list(BALM_VOCABULARY)


OURS = {
    "dense, tied": {},
    "top-2": {"moe": TopK(experts=4)},
    "shared": {"moe": TopK(experts=4, shared=2, ffn=8, placement="every")},
    "unequal": {"moe": TopK(experts=3, widths=(8, 24, 16), shared=1)},
    "every other": {"layers": 5, "moe": TopK(experts=2, placement="2,4")},
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("activation", ["gelu", pytest.param("swiglu", marks=pytest.mark.slow)])
def test_models_of_ours_go_out_and_come_back(tmp_path, name, activation):
    changes = {"token_dropout": False, "activation": activation} | OURS[name]
    model = random_model(layout="balm", **changes)
    export_balm(model, tmp_path / "out")
    found = import_directory(tmp_path / "out")
    assert (found.layout_name, found.length) == ("balm", 64)
    rng = np.random.default_rng(0)
    tokens, valid = KEPT[rng.integers(4, 30, (2, 12))], np.ones((2, 12), bool)
    before, after = (logits_of(m, tokens, valid)[..., KEPT] for m in (model, found))
    np.testing.assert_allclose(after, before, atol=1e-5)


NO_PLACE = {
    "token dropout": ({}, "token dropout.*--format hf"),
    "token dropout, experts": (
        {"token_dropout": True, "moe": TopK(experts=4)},
        "train with model.token_dropout=False",
    ),
    "separator": ({"token_dropout": False, "layout": "sep"}, "<null_1> between chains"),
    "soft": ({"moe": Soft(experts=2, slots=2)}, "router soft"),
    "top-1": ({"moe": TopK(experts=2, k=1)}, "not renormalised"),
    "top-p": ({"moe": TopP(experts=2)}, "counts the expert"),
    "top-p of k": ({"moe": TopP(experts=4, exceed=False)}, "at most k experts"),
    "expert choice": ({"moe": ExpertChoice(experts=2)}, "no softmax over tokens"),
    "sigmoid": ({"moe": TopK(experts=2, gate="sigmoid")}, "sigmoid gates"),
    "balance": ({"moe": TopK(experts=2, balance_rate=0.1)}, "auxiliary-loss-free"),
    "placement": ({"layers": 5, "moe": TopK(experts=2, placement="1,4")}, "layers 1, 4"),
    "few": ({"layers": 5, "moe": TopK(experts=2, placement="1,2")}, "layers 1, 2"),
}


@pytest.mark.parametrize("name", NO_PLACE)
def test_what_balm_has_no_place_for_is_refused(tmp_path, name):
    changes, words = NO_PLACE[name]
    changes = {"token_dropout": name == "token dropout"} | changes
    with pytest.raises(UserError, match=words):
        export_balm(random_model(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


CONFIGS = {
    "activation": ({"activation": "geglu"}, "activation is 'geglu', expected 'swiglu' or 'gelu'"),
    "experts' activation": ({"expert_activation": "gelu"}, "expert_activation is 'gelu'"),
    "positions": ({"position_embedding_type": "absolute"}, "expected 'rotary'"),
    "vocabulary": ({"vocab_size": 25}, "vocab_size is 25, expected 32"),
    "head": ({"mlm_activation": "relu"}, "mlm_activation is 'relu'"),
    "router": ({"router_type": "hash"}, "router_type is 'hash', expected one of top-k"),
    "router bias": ({"router_bias": True}, "router_bias is True"),
    "classifier": (
        {"architectures": ["BalmMoEForSequenceClassification"]},
        "expected .*ForMaskedLM",
    ),
    "capacity": ({"expert_capacity": 0}, "expert_capacity is 0"),
    "unlimited choice": ({"router_type": "expert-choice"}, "expert choice needs one"),
    "absolute": (
        {"expert_capacity": 64, "expert_capacity_type": "absolute"},
        "depends on the size of the batch",
    ),
    "experts": ({"num_experts": 3}, "expected a positive whole number, or one for each of the 1"),
    "no experts": ({"num_experts": 2}, "num_shared_experts is 2"),
    "shared width": ({"shared_expert_intermediate_size": 8}, "expected 10, the mean width"),
    "dense": ({"num_initial_dense_layers": 3}, "leaves no layer to experts"),
    "dense layers": ({"num_initial_dense_layers": "1"}, "expected a whole number"),
    "missing": ({"num_hidden_layers": 4}, "lacks balm_moe.layers.3"),
    "other widths": ({"expert_intermediate_size": [8, 8, 16, 8]}, "shape"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_settings_are_refused(tmp_path, name):
    changes, words = CONFIGS[name]
    with pytest.raises(UserError, match=words) as error:
        import_directory(directory(tmp_path / "d", "topk_shared", **changes))
    assert "\n" not in str(error.value)


def test_missing_tensors_are_named(tmp_path):
    drop = ["lm_head.decoder.weight"]
    with pytest.raises(UserError, match="lacks lm_head.decoder.weight"):
        import_directory(directory(tmp_path / "d", "dense", drop=drop))


@pytest.mark.hf
def test_balm_itself_loads_an_export(tmp_path):
    """Needs a checkout of BALM (MOE_ABLM_BALM)."""
    import os

    if "MOE_ABLM_BALM" not in os.environ:
        pytest.skip("no checkout of github.com/brineylab/BALM in $MOE_ABLM_BALM")
    pytest.importorskip("torch", reason="needs the extra `hf`")
    from programs.make_balm_fixtures import logits, models

    _, found = models(Path(os.environ["MOE_ABLM_BALM"]))
    model = random_model("balm", token_dropout=False, activation="swiglu", **OURS["unequal"])
    export_balm(model, tmp_path / "out")
    theirs = found.BalmMoEForMaskedLM.from_pretrained(tmp_path / "out").eval()
    tokens = np.random.default_rng(0).integers(4, 31, (2, 12))
    valid = np.ones_like(tokens, bool)
    mine = logits_of(model, KEPT[tokens], valid)[..., KEPT]
    np.testing.assert_allclose(mine, logits(theirs, tokens, valid), atol=1e-4)
