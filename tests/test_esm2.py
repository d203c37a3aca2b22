"""Import of Hugging Face ESM-2 directories: spellings, shards, dtypes, and every refusal."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import run_command
from random_models import logits_of
from safetensors.numpy import load_file, save_file

from moe_ablm import api
from moe_ablm.antibody_model import AntibodyModel
from moe_ablm.data.tokenizer import AMINO_ACIDS, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.interop.load import import_directory, load_model
from moe_ablm.interop.saved import flat_arrays, save_model

FIXTURE = Path(__file__).parent / "fixtures" / "esm2_tiny.npz"
CONFIG = {
    "architectures": ["EsmForMaskedLM"],
    "model_type": "esm",
    "vocab_size": 33,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 1026,
    "position_embedding_type": "rotary",
    "layer_norm_eps": 1e-5,
    "emb_layer_norm_before": False,
    "token_dropout": True,
    "mask_token_id": 32,
    "pad_token_id": 1,
}
WORDS = "esm.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def stored():
    return np.load(FIXTURE, allow_pickle=False)


@pytest.fixture(scope="module")
def tensors(stored):
    return {k[2:]: stored[k] for k in stored.files if k[:2] == "w/" and "contact_head" not in k}


def directory(path, tensors, config=CONFIG, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config | changes))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path / "model.safetensors")
    return path


def older(tensors):
    """With gamma and beta in the encoder's layers, as some versions write them."""
    renamed = {}
    for name, value in tensors.items():
        if "esm.encoder.layer." in name and "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        renamed[name] = value
    assert sum(n.endswith((".gamma", ".beta")) for n in renamed) == 8
    return renamed


@pytest.mark.parametrize("spelling", ["weight", "gamma"])
def test_logits_are_those_of_transformers(tmp_path, stored, tensors, spelling):
    tensors = older(tensors) if spelling == "gamma" else tensors
    for dropout in (True, False):
        path = directory(tmp_path / str(dropout), tensors, token_dropout=dropout)
        model = import_directory(path)
        found = logits_of(model, stored["tokens"], stored["valid"])
        expected = stored[f"logits_dropout_{dropout}".lower()]
        np.testing.assert_allclose(found[stored["valid"]], expected[stored["valid"]], atol=1e-5)
    assert (model.layout_name, model.length, model.notes) == ("esm", 1024, ())


EXTRA = {
    "contact_head.regression.weight": np.zeros((1, 8), np.float32),
    "contact_head.regression.bias": np.zeros(1, np.float32),
    "esm.contact_head.regression.weight": np.zeros((1, 8), np.float32),
    "esm.embeddings.position_ids": np.zeros((1, 1026), np.int64),
    "esm.embeddings.position_embeddings.weight": np.zeros((1026, 24), np.float32),
    "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq": np.zeros(3, np.float32),
    "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq": np.zeros(3, np.float32),
}


@pytest.fixture
def headless(tmp_path, tensors):
    """A directory as `EsmModel` saves it."""
    body = {k.removeprefix("esm."): v for k, v in tensors.items() if k.startswith("esm.")}
    changes = {"architectures": ["EsmModel"], "hidden_dropout_prob": 0.1}
    return directory(tmp_path / "headless", body, **changes)


def test_a_model_without_a_head_embeds_and_does_nothing_else(tmp_path, tensors, headless, main):
    found, whole = import_directory(headless), import_directory(directory(tmp_path / "d", tensors))
    body, expected = flat_arrays(found.params), flat_arrays(whole.params)
    for name in body:
        if not name.startswith("head/"):
            np.testing.assert_array_equal(body[name], expected[name], err_msg=name)
    assert found.spec.hidden_dropout == 0.1 and not found.head and whole.head
    assert any("it only embeds" in note for note in found.notes)
    save_model(found, tmp_path / "run")
    again = load_model(tmp_path / "run")
    assert not again.head and again.spec == found.spec
    run = ["--run", tmp_path / "run"]
    for command in (
        ["score", *run, "--heavy", "EVQ"],
        ["scan", *run, "--heavy", "EVQ", "--method", "wild-type-marginal"],
        ["export", *run, "--format", "hf", "--out", tmp_path / "out"],
    ):
        done = main(*command)
        assert done.returncode == 2 and "has no language-model head: it only" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.hf
def test_a_model_without_a_head_is_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    kept = {key: CONFIG[key] for key in CONFIG if key not in ("architectures", "model_type")}
    theirs = transformers.EsmModel(transformers.EsmConfig(**kept)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = AntibodyModel(import_directory(tmp_path / "hf"))
    row = torch.tensor([[0, 9, 7, 16, 4, 2]])  # EVQL
    with torch.no_grad():
        expected = theirs(row, attention_mask=torch.ones_like(row)).last_hidden_state[0, 1:-1]
    (found,) = model.embed([("EVQL", "")], level="residue")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_what_the_language_model_does_not_use_is_ignored_with_a_note(tmp_path, tensors):
    plain = import_directory(directory(tmp_path / "a", tensors))
    twice = {"lm_head.decoder.weight": tensors[WORDS], "lm_head.decoder.bias": None}
    twice["lm_head.decoder.bias"] = tensors["lm_head.bias"]
    renamed = {k: v for k, v in tensors.items() if k != "lm_head.bias"}
    model = import_directory(directory(tmp_path / "b", renamed | EXTRA | twice))
    assert "contact_head" in model.notes[0] and "and 4 more" in model.notes[0]
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_shards_are_one_model(tmp_path, tensors):
    single = import_directory(directory(tmp_path / "single", tensors))
    path = directory(tmp_path / "shards", {})
    (path / "model.safetensors").unlink()
    write_shards(path, tensors)
    for a, b in zip(
        jax.tree.leaves(single.params), jax.tree.leaves(import_directory(path).params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def write_shards(path, tensors, **wrong):
    names = sorted(tensors)
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        part = {n: np.ascontiguousarray(tensors[n]) for n in names if files[n] == file}
        save_file(part, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files | wrong}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("dtype", "told"), [(np.float16, "F16"), (ml_dtypes.bfloat16, "BF16"), (np.float64, "F64")]
)
def test_other_floats_are_converted_and_told(tmp_path, tensors, dtype, told):
    path = directory(tmp_path / "d", {k: v.astype(dtype) for k, v in tensors.items()})
    model = import_directory(path)
    assert model.notes == (f"weights of {told} were converted to float32",)
    found = flat_arrays(model.params)["embedding"]
    np.testing.assert_array_equal(found, tensors[WORDS].astype(dtype).astype(np.float32))


def test_a_decoder_of_its_own(tmp_path, tensors):
    own = tensors | {"lm_head.decoder.weight": 2 * tensors[WORDS]}
    path = directory(tmp_path / "d", own, tie_word_embeddings=False)
    arrays = flat_arrays(import_directory(path).params)
    np.testing.assert_array_equal(arrays["head/decoder"], 2 * tensors[WORDS])
    with pytest.raises(UserError, match="lm_head.decoder.weight differs"):
        import_directory(directory(tmp_path / "e", own))


def test_the_licence_of_a_card_is_kept(tmp_path, tensors):
    path = directory(tmp_path / "d", tensors)
    (path / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\n# A model\nlicense: no\n")
    assert import_directory(path).facts == {"licence": "mit"}
    (path / "README.md").write_text("# A model\nlicense: mit\n")
    assert import_directory(path).facts == {}


def without(tensors, *names):
    return {k: v for k, v in tensors.items() if k not in names}


CONFIGS = {
    "classifier": ({"architectures": ["EsmForSequenceClassification"]}, "architectures is"),
    "base model with a head": ({"architectures": ["EsmModel"]}, "holds lm_head.*no place"),
    "other kind": (
        {"model_type": "bert"},
        "model_type is 'bert', expected 'esm' or 'balm'.*--run transformers:DIR",
    ),
    "ESM-C": ({"model_type": "esmc"}, "'esmc'.*norms of queries and keys"),
    "no kind": ({"model_type": None}, "model_type is None"),
    "vocabulary size": ({"vocab_size": 30}, "vocab_size is 30, expected 33"),
    "vocabulary": ({"vocab_list": ["<cls>", "<eos>"]}, "token 1 is '<eos>', expected '<pad>'"),
    "short vocabulary": ({"vocab_list": ["<cls>"]}, "1 tokens, expected 33"),
    "relative": ({"position_embedding_type": "relative_key"}, "expected 'rotary' or 'absolute'"),
    "no positions": ({"position_embedding_type": None}, "lacks esm.*position_embeddings"),
    "few positions": (
        {"position_embedding_type": "absolute", "max_position_embeddings": 2},
        "max_position_embeddings is 2, expected more than the 2 rows",
    ),
    "no norm before": ({"emb_layer_norm_before": True}, "lacks esm.embeddings.layer_norm"),
    "norm": ({"emb_layer_norm_before": "yes"}, "emb_layer_norm_before is 'yes'"),
    "eps": ({"layer_norm_eps": 0.5}, "layer_norm_eps is 0.5, expected above 0"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "dropout": ({"token_dropout": "yes"}, "token_dropout is 'yes', expected True or False"),
    "mask": ({"mask_token_id": 31}, "mask_token_id is 31, expected 32"),
    "folding": ({"is_folding_model": True}, "is_folding_model is True"),
    "rope": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive"),
    "width": ({"hidden_size": "24"}, "hidden_size is '24'"),
    "heads": ({"num_attention_heads": 5}, "divisor of hidden_size .24."),
    "odd heads": ({"num_attention_heads": 8}, "heads of an even width"),
    "more layers": ({"num_hidden_layers": 3}, "lacks esm.encoder.layer.2.*and 13 more"),
    "fewer layers": ({"num_hidden_layers": 1}, "holds esm.encoder.layer.1.*no place"),
    "wider": (
        {"intermediate_size": 50},
        r"output.dense.weight has shape \(24, 48\), expected \(24, 50",
    ),
    "damaged": ({"moe_ablm": {"layout": "x"}}, "moe_ablm is damaged"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_models_are_refused(tmp_path, tensors, name):
    changes, words = CONFIGS[name]
    with pytest.raises(UserError, match=words) as error:
        import_directory(directory(tmp_path / "d", tensors, **changes))
    assert "\n" not in str(error.value)


def weights_away(path):
    (path / "model.safetensors").unlink()


def pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_json(path):
    (path / "config.json").write_text("{")


def other_tokens(path):
    (path / "vocab.txt").write_text("\n".join(VOCABULARY).replace("L\nA", "A\nL"))


def shards(path, **wrong):
    tensors = load_file(path / "model.safetensors")
    weights_away(path)
    write_shards(path, tensors, **wrong)


def lost_shard(path):
    shards(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def no_index(path):
    shards(path)
    (path / "model.safetensors.index.json").write_text("[]")


FILES = {
    "no weights": (weights_away, "holds no weights: model.safetensors is not there"),
    "pickle": (pickled, "pytorch_model.bin.*convert them.*save_pretrained"),
    "cut": (cut, "not a complete safetensors file"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "no JSON": (not_json, "no valid JSON"),
    "vocab.txt": (other_tokens, "vocab.txt: token 4 is 'A', expected 'L'"),
    "lost shard": (lost_shard, "00002-of-00002.safetensors is not there"),
    "shard elsewhere": (lambda path: shards(path, x="../x"), "'../x' is not a file name beside"),
    "wrong shard": (
        lambda path: shards(path, x="model-00001-of-00002.safetensors"),
        "lacks tensor",
    ),
    "damaged index": (no_index, "index.json is damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_directories_are_refused(tmp_path, tensors, name):
    damage, words = FILES[name]
    path = directory(tmp_path / "d", tensors)
    damage(path)
    with pytest.raises(UserError, match=words) as error:
        import_directory(path)
    assert "\n" not in str(error.value)


TENSORS = {
    "missing": (lambda t: without(t, "lm_head.bias"), "lacks lm_head.bias"),
    "no head": (lambda t: {k: v for k, v in t.items() if "lm_head" not in k}, "lm_head.dense"),
    "leftover": (lambda t: t | {"classifier.weight": t["lm_head.bias"]}, "holds classifier.weight"),
    "both spellings": (
        lambda t: t | {"esm.encoder.emb_layer_norm_after.gamma": t["lm_head.bias"]},
        "holds both esm.encoder.emb_layer_norm_after",
    ),
    "shape": (lambda t: t | {WORDS: t[WORDS][:, :20]}, r"shape \(33, 20\), expected \(33, 24\)"),
    "integers": (lambda t: t | {WORDS: t[WORDS].astype(np.int8)}, "dtype I8, expected one of"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors_are_refused(tmp_path, tensors, name):
    change, words = TENSORS[name]
    with pytest.raises(UserError, match=words):
        import_directory(directory(tmp_path / "d", change(tensors)))


def test_the_verb(tmp_path, tensors, stored):
    path = directory(tmp_path / "hf", tensors | EXTRA)
    flags = ["--input", path, "--layout", "sep", "--out", tmp_path / "run"]
    done = run_command("moe_ablm", "import", *flags)
    assert done.returncode == 0, done.stderr
    assert "note: ignored" in done.stdout and "layout sep" in done.stdout
    model = load_model(tmp_path / "run")
    found = logits_of(model, stored["tokens"], stored["valid"])
    expected = stored["logits_dropout_true"]
    np.testing.assert_allclose(found[stored["valid"]], expected[stored["valid"]], atol=1e-5)


def test_pickled_weights_given_by_name_are_refused(tmp_path):
    (tmp_path / "esm2.pt").write_bytes(b"")
    words = "is a file: expected .*model.safetensors; pickled weights can run code"
    with pytest.raises(UserError, match=words):
        import_directory(tmp_path / "esm2.pt")


def test_the_verb_refuses(tmp_path, tensors, run_quickly):
    path = directory(tmp_path / "hf", tensors)
    pickled(path)
    result = run_quickly("moe_ablm", "import", "--input", path, "--out", tmp_path / "run")
    assert result.returncode == 2 and "pytorch_model.bin" in result.stderr
    result = run_quickly("moe_ablm", "import", "--input", tmp_path / "no", "--out", tmp_path / "r")
    assert result.returncode == 2 and "no is not there" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def saved_by_transformers(path, size):
    """`EsmForMaskedLM` with random weights of a real shape, which it saves; and torch."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    from moe_ablm.model.spec import SIZES

    layers, d_model, ffn, heads = SIZES[size]
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": d_model, "num_attention_heads": heads}
    config = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")}
    config |= sizes | {"intermediate_size": ffn, "attn_implementation": "eager"}
    theirs = transformers.EsmForMaskedLM(transformers.EsmConfig(**config)).eval()
    theirs.save_pretrained(path)
    return theirs, torch


@pytest.mark.hf
@pytest.mark.slow
@pytest.mark.parametrize("size", ["8m", "35m"])
def test_embeddings_logits_and_attention_are_those_of_transformers(tmp_path, size):
    """Random weights of the real shapes, as transformers itself saves them."""
    theirs, torch = saved_by_transformers(tmp_path / "hf", size)
    from flax import nnx

    from moe_ablm.model.encoder import Observe, make_definition
    from moe_ablm.model.spec import Execution

    model = import_directory(tmp_path / "hf")
    rng = np.random.default_rng(0)
    tokens, valid = rng.integers(4, 24, (2, 64)), np.arange(64) < np.array([64, 41])[:, None]
    tokens[:, [3, 9]] = 32
    tokens = np.where(valid, tokens, 1)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(valid).long(),
            output_hidden_states=True,
            output_attentions=True,
        )
    encoder = nnx.merge(make_definition(model.spec, Execution()), model.params)
    seen = encoder(tokens, valid, observe=Observe(hidden=True, attention=True))
    np.testing.assert_allclose(seen.logits[valid], expected.logits.numpy()[valid], atol=1e-5)
    pairs = zip(seen.hidden, expected.hidden_states, strict=True)
    for found, other in pairs:
        np.testing.assert_allclose(found[valid], other.numpy()[valid], atol=1e-5)
    pairs = zip(seen.attention, expected.attentions, strict=True)
    for found, other in pairs:
        mine = np.moveaxis(np.asarray(found), 1, 2)[valid]
        np.testing.assert_allclose(mine, np.moveaxis(other.numpy(), 1, 2)[valid], atol=1e-5)


@pytest.mark.hf
@pytest.mark.slow
def test_the_verbs_say_what_transformers_says(tmp_path):
    """Embeddings, exact and one-pass scores, mutants and attention of a pair."""
    theirs, torch = saved_by_transformers(tmp_path / "hf", "8m")
    save_model(import_directory(tmp_path / "hf"), tmp_path / "run")
    model, pair = api.load(tmp_path / "run"), ("EVQLVESGGGLVQPGG", "DIQMTQSPSSLS")
    chains = [[VOCABULARY.index(letter) for letter in chain] for chain in pair]
    row = np.array([0, *chains[0], 0, 0, *chains[1], 2])
    heavy, light = np.arange(1, 17), np.arange(19, 31)
    places = np.concatenate([heavy, light])
    masked = np.tile(row, (len(places), 1))
    masked[np.arange(len(places)), places] = 32
    with torch.no_grad():
        whole = theirs(
            torch.from_numpy(row[None]), output_hidden_states=True, output_attentions=True
        )
        exact = theirs(torch.from_numpy(masked)).logits.log_softmax(-1).numpy()
    for layer in (0, 3, -1):
        expected = whole.hidden_states[layer][0].numpy()[places]
        found = api.embed(model, [pair], "residue", layer)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    expected = exact[np.arange(len(places)), places, row[places]]
    found = api.score(model, [pair], "residue")[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    logs = whole.logits[0].log_softmax(-1).numpy()[places]
    wild = logs[np.arange(len(places)), row[places]]
    found = api.score(model, [pair], "residue", one_pass=True)[0]
    np.testing.assert_allclose(found, wild, atol=1e-5)
    expected = logs[:, [VOCABULARY.index(letter) for letter in AMINO_ACIDS]] - wild[:, None]
    found = api.scan(model, [pair], "wild-type-marginal")[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for layer in (0, -1):
        expected, found = whole.attentions[layer][0].numpy(), api.attention(model, [pair], layer)[0]
        for name, queries, keys in (
            ("heavy_to_light", heavy, light),
            ("light_to_heavy", light, heavy),
        ):
            between = expected[:, queries][:, :, keys]
            np.testing.assert_allclose(found[name], between, atol=1e-5)
