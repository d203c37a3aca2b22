"""RoBERTa, as BALM-paired is, comes in, goes out and trains."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_config
from foreign_forward import roberta
from pretrained_models import FAMILIES, ROBERTA, save
from random_models import logits_of, random_model, same
from safetensors.numpy import load_file, save_file

from moe_ablm import trainer
from moe_ablm.antibody_model import AntibodyModel
from moe_ablm.data.tokenizer import AMINO_ACIDS, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.inference.torch_engine import TorchEngine
from moe_ablm.interop.load import import_directory, load_model
from moe_ablm.interop.pretrained import load_pretrained
from moe_ablm.interop.roberta import export_roberta
from moe_ablm.interop.saved import flat_arrays, save_model

RUNS = {"learned_positions": 40, "embedding_norm": True, "post_norm": True, "token_dropout": False}
PAIR = ("EVQLVESGG", "DIQMTQ")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 42, "type_vocab_size": 2}  # fmt: skip


def random_tensors(vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict of transformers' `RobertaForMaskedLM`, every number random."""
    draws, d, f = np.random.default_rng(seed), 16, 32
    shapes = {
        "roberta.embeddings.word_embeddings.weight": (vocabulary, d),
        "roberta.embeddings.position_embeddings.weight": (42, d),
        "roberta.embeddings.token_type_embeddings.weight": (2, d),
        "lm_head.dense.weight": (d, d),
        "lm_head.dense.bias": (d,),
        "lm_head.bias": (vocabulary,),
    }
    norms = ["roberta.embeddings.LayerNorm", "lm_head.layer_norm"]
    for layer in range(2):
        start = f"roberta.encoder.layer.{layer}."
        norms += [f"{start}attention.output.LayerNorm", f"{start}output.LayerNorm"]
        linear = {f"attention.self.{n}": (d, d) for n in ("query", "key", "value")}
        linear |= {"attention.output.dense": (d, d), "intermediate.dense": (f, d)}
        for name, shape in (linear | {"output.dense": (d, f)}).items():
            shapes |= {f"{start}{name}.weight": shape, f"{start}{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}
    ones = {f"{norm}.weight" for norm in norms}
    return {
        n: (0.4 * draws.standard_normal(s) + (n in ones)).astype("f4") for n, s in shapes.items()
    }


# BALM-paired's has 25 tokens; ours are in another order, and some are in neither
BALM = ["<s>", "<pad>", "</s>", "<unk>", *sorted(AMINO_ACIDS), "<mask>"]


def directory(path, vocabulary=BALM, tensors=None, **changes):
    """What `RobertaForMaskedLM.save_pretrained` and a tokenizer leave."""
    path.mkdir()
    config = {
        "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "pad_token_id": 1, "vocab_size": len(vocabulary),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | SIZES | changes))
    save_file(tensors or random_tensors(len(vocabulary)), path / "model.safetensors")
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    return path


def row_of(tokens: str, vocabulary=VOCABULARY) -> np.ndarray:
    """Ids of words, where `<s>` and `</s>` are ours too."""
    ours = {"<s>": "<cls>", "</s>": "<eos>"} if vocabulary is VOCABULARY else {}
    return np.array([vocabulary.index(ours.get(t, t)) for t in tokens.split()])


ROW = f"<s> {' '.join('EVQLV')} <mask> {' '.join('SGG')} </s> {' '.join('DIQ')} <mask> </s>"


OTHER_ORDER = ["<s>", "<pad>", *BALM[:1:-1]]


@pytest.mark.parametrize(("vocabulary", "tied"), [(BALM, True), (OTHER_ORDER, False)])
def test_logits_are_those_of_the_paper(tmp_path, vocabulary, tied):
    """Whatever the order of its tokens; the probability of those that it lacks is 0."""
    tensors = random_tensors(len(vocabulary))
    if not tied:
        draws = np.random.default_rng(5).standard_normal((len(vocabulary), 16))
        tensors["lm_head.decoder.weight"] = draws.astype("f4")
    path = directory(tmp_path / "hf", vocabulary, tensors, tie_word_embeddings=tied)
    model = import_directory(path)
    assert (model.layout_name, model.length, model.notes) == ("balm", 40, ())
    row = row_of(ROW)
    found = logits_of(model, row[None], np.ones((1, len(row)), bool))[0]
    expected = roberta(tensors, row_of(ROW, vocabulary), heads=2, eps=1e-12)
    order = row_of(" ".join(vocabulary))
    np.testing.assert_allclose(found[:, order], expected, atol=1e-5)
    others = np.setdiff1d(np.arange(33), order)
    assert len(others) == 8 and (found[:, others] < -9000).all()


def test_a_model_without_a_head_embeds_and_does_nothing_else(tmp_path):
    """As `RobertaModel` saves it, with a pooler: the encoder is that of the whole model."""
    tensors = random_tensors(len(BALM))
    body = {n.removeprefix("roberta."): x for n, x in tensors.items() if "lm_head" not in n}
    body |= {"pooler.dense.weight": np.ones((16, 16), "f4"), "pooler.dense.bias": np.ones(16, "f4")}
    changes = {"architectures": ["RobertaModel"]}
    found = import_directory(directory(tmp_path / "body", tensors=body, **changes))
    whole = import_directory(directory(tmp_path / "whole", tensors=tensors))
    body_of, expected = flat_arrays(found.params), flat_arrays(whole.params)
    for name in body_of:
        if not name.startswith("head/"):
            np.testing.assert_array_equal(body_of[name], expected[name], err_msg=name)
    assert not found.head and whole.head and any("it only embeds" in n for n in found.notes)
    save_model(found, tmp_path / "run")
    with pytest.raises(UserError, match="no language-model head"):
        load_model(tmp_path / "run").require_head("--run")
    del body["encoder.layer.0.output.dense.bias"]
    with pytest.raises(UserError, match=r"encoder\.layer\.0\.output\.dense\.bias"):
        import_directory(directory(tmp_path / "part", tensors=body, **changes))


def test_letters_that_it_lacks_are_read_as_its_x(tmp_path):
    tensors = random_tensors(len(ROBERTA))
    model = import_directory(directory(tmp_path / "hf", ROBERTA, tensors))
    embedding = flat_arrays(model.params)["embedding"]
    x = tensors["roberta.embeddings.word_embeddings.weight"][ROBERTA.index("X")]
    for letter in "XBUZO":
        np.testing.assert_array_equal(embedding[VOCABULARY.index(letter)], x)


def test_more_tokens_and_copies_are_told_and_left_out(tmp_path):
    tensors = random_tensors(27)
    words, bias = "roberta.embeddings.word_embeddings.weight", "lm_head.bias"
    twice = {"lm_head.decoder.weight": tensors[words], "lm_head.decoder.bias": tensors[bias],
             "roberta.embeddings.position_ids": np.zeros((1, 42), np.int64)}  # fmt: skip
    model = import_directory(directory(tmp_path / "a", [*BALM, "1", "2"], tensors | twice))
    assert model.notes == (
        "tokens that have no place here were left out: 1, 2",
        "ignored, as the language model does not use them: roberta.embeddings.position_ids",
    )
    plain = import_directory(directory(tmp_path / "b", [*BALM, "1", "2"], tensors))
    assert same(model, plain)
    # the files of newer tokenizers
    path = directory(tmp_path / "c", [*BALM, "1", "2"], tensors)
    ids = json.loads((path / "vocab.json").read_text())
    mask = ids.pop("<mask>")
    content = {"model": {"vocab": ids}, "added_tokens": [{"content": "<mask>", "id": mask}]}
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "vocab.json").unlink()
    assert same(import_directory(path), plain)


REFUSED = {
    "architecture": ({"architectures": ["RobertaForTokenClassification"]}, "architectures is"),
    "base model with a head": ({"architectures": ["RobertaModel"]}, "holds lm_head.*no place"),
    "relative": ({"position_embedding_type": "relative_key"}, "position_embedding_type is"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "padding": ({"pad_token_id": 0}, "pad_token_id is 0, expected 1"),
    "decoder": ({"is_decoder": True}, "is_decoder is True"),
    "positions": ({"max_position_embeddings": 2}, "max_position_embeddings is 2, expected more"),
    "segments": ({"type_vocab_size": 1}, r"token_type_embeddings.weight has shape \(2, 16\)"),
    "eps": ({"layer_norm_eps": 0.5}, "layer_norm_eps is 0.5"),
    "layers": ({"num_hidden_layers": 3}, "lacks roberta.encoder.layer.2"),
    "fewer tokens": ({"vocab_size": 20}, "ids from 0 to vocab_size - 1 .19."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_are_refused(tmp_path, name):
    changes, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as error:
        import_directory(directory(tmp_path / "d", **changes))
    assert "\n" not in str(error.value)


VOCABULARIES = {
    "none": (None, "neither vocab.json nor tokenizer.json"),
    "words": ({"the": 0}, "lacks L, A, G and 21 more: no tokenizer of antibodies"),
    "joined": ({t: i for i, t in enumerate(BALM)} | {"EV": 24}, "'EV' is several residues"),
    "twice": (dict.fromkeys(BALM, 3), "expected different ids"),
    "no number": (dict.fromkeys(BALM, "3"), "expected different ids"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_other_tokenizers_are_refused(tmp_path, name):
    content, words = VOCABULARIES[name]
    path = directory(tmp_path / "d")
    (path / "vocab.json").unlink()
    if content is not None:
        content = {t: i for t, i in content.items() if name != "joined" or i != 24 or t == "EV"}
        (path / "vocab.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        import_directory(path)


def test_a_decoder_that_differs_is_refused_where_it_is_tied(tmp_path):
    tensors = random_tensors(len(BALM))
    own = {"lm_head.decoder.weight": 2 * tensors["roberta.embeddings.word_embeddings.weight"]}
    with pytest.raises(UserError, match="decoder.weight differs from .*tie_word_embeddings"):
        import_directory(directory(tmp_path / "d", tensors=tensors | own))


@pytest.mark.parametrize("changes", [{}, {"tied": False, "hidden_dropout": 0.1}], ids=str)
def test_a_round_trip_is_bitwise(tmp_path, changes):
    model = random_model("balm", 30, **RUNS | changes)
    export_roberta(model, tmp_path / "out")
    found = import_directory(tmp_path / "out")
    assert same(found, model) and (found.layout_name, found.length) == ("balm", 30)
    assert "EVQLVESGGG</s>DIQMTQSPSS" in (tmp_path / "out" / "README.md").read_text()
    if changes:
        return
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = roberta(tensors, row_of(ROW), heads=4, eps=1e-5)
    found = logits_of(model, row_of(ROW)[None], np.ones((1, len(expected)), bool))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"token_dropout": True}, "token dropout"), ({"activation": "swiglu"}, "activation swiglu")],
)
def test_what_roberta_has_no_place_for_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        export_roberta(random_model(**RUNS | changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_import_trains_on(tmp_path):
    """Packed rows; without the embedding and its positions, which are frozen."""
    path = directory(tmp_path / "hf", max_position_embeddings=322, tensors=long_tensors())
    start = import_directory(path)
    save_model(start, tmp_path / "start")
    sizes = {"size": "own", "layers": 2, "d_model": 16, "ffn": 32, "heads": 2}
    settings = sizes | RUNS | {"learned_positions": 320, "layer_norm_eps": 1e-12}
    config = tiny_config(
        **{f"model__{name}": value for name, value in settings.items()},
        train__init=str(tmp_path / "start"), train__freeze=1, train__steps=2, train__warmup=1,
        eval__every=2, checkpoint__every=2, data__layout="balm", data__batching="packed",
        model__moe__router="none",
    )  # fmt: skip
    trainer.run(config, tmp_path / "run")
    before, after = flat_arrays(start.params), flat_arrays(load_model(tmp_path / "run").params)
    frozen = {n for n in before if before[n].tobytes() == after[n].tobytes()}
    kept = ("embedding", "positions", "layers/0/")
    assert frozen == {n for n in before if n.startswith(kept)}
    assert {"embedding_norm/scale", "positions"} < frozen and len(after) - len(frozen) > 12


def long_tensors():
    tensors = random_tensors(len(BALM))
    name = "roberta.embeddings.position_embeddings.weight"
    tensors[name] = np.random.default_rng(9).standard_normal((322, 16)).astype("f4")
    return tensors


# live


@pytest.mark.hf
def test_answers_are_those_of_transformers(tmp_path):
    """Of what transformers saves, asked both ways; and of what goes back to it."""
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    pytest.importorskip("torch", reason="needs the extra `hf`")
    path = save(FAMILIES["BALM"], tmp_path / "hf")
    theirs = TorchEngine(load_pretrained(path))
    model = import_directory(path)
    export_roberta(replace(model, facts={}), tmp_path / "back")
    back = TorchEngine(load_pretrained(tmp_path / "back"))
    ours = AntibodyModel(model)
    for level in ("residue", "chain"):
        expected = answers(theirs, level)
        np.testing.assert_allclose(answers(ours, level), expected, atol=1e-5)
        np.testing.assert_allclose(answers(back, level), expected, atol=1e-5)


def answers(engine, level):
    """Hidden states and exact log-probabilities of a pair and of its chains, in one array."""
    from moe_ablm import api

    found = []
    for antibody in (PAIR, (PAIR[0], ""), ("", PAIR[1])):
        found += [np.ravel(a) for a in api.embed(engine, [antibody], level)]
        found += [np.ravel(a) for a in api.score(engine, [antibody], "residue")]
    return np.concatenate(found)
