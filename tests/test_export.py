"""Export to `EsmForMaskedLM` directories, and back."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import run_command
from random_models import logits_of, random_model, same
from strict_json import read_all_strictly

from moe_ablm.data.tokenizer import VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.interop.esm2 import export_esm2
from moe_ablm.interop.load import import_directory, load_model
from moe_ablm.interop.saved import save_model
from moe_ablm.model.families import TopK

FILES = ["README.md", "config.json", "model.safetensors", "special_tokens_map.json",
         "tokenizer_config.json", "vocab.txt"]  # fmt: skip
TIED = {
    "tied": {},
    "the study's": {
        "layer_norm_eps": 1e-12, "token_dropout": False, "hidden_dropout": 0.1,
        "attention_dropout": 0.1, "embedding_dropout": 0.2,
    },
    "large eps": {"layer_norm_eps": 0.01},
    "ESM-1b": {"learned_positions": 90, "embedding_norm": True},
    "ESM-1v": {"learned_positions": 90},
    "own decoder": {"tied": False},
    "no dropout": {"token_dropout": False},
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_a_round_trip_is_bitwise(tmp_path, name):
    model = random_model(**TIED[name], layout="sep", length=77)
    export_esm2(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    found = import_directory(tmp_path / "out")
    assert same(found, model)
    assert (found.layout_name, found.length, found.regime) == ("sep", 77, "paired")
    assert found.facts == model.facts
    assert import_directory(tmp_path / "out", "balm").layout_name == "balm"
    save_model(found, tmp_path / "saved")
    assert same(load_model(tmp_path / "saved"), model)


def test_the_card_tells_what_a_reader_needs(tmp_path):
    facts = {
        "config": {"seed": 7},
        "data": {"fraction": "half"},
        "metrics": {"step": 3, "loss": 1.25, "loss_by_region": {"CDRH3": 2.5}},
        "licence": "mit",
    }
    model = replace(random_model(), facts=facts, notes=("weights were converted",))
    export_esm2(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for words in ("fraction: half", "loss: 1.25", "| CDRH3 |", "| 2.5 |", '"seed": 7', "up to 64",
                  "<cls>HEAVY<cls><cls>LIGHT<eos>", "EsmTokenizer", "paired",
                  "Weights were converted", "## Intended use", "## Licence\n\nmit"):  # fmt: skip
        assert words in card, words
    export_esm2(replace(model, facts={}), tmp_path / "bare")
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "license: other" in bare and "Not stated" in bare and "Not known" in bare
    export_esm2(model, tmp_path / "named", "cc-by-4.0")
    assert "license: cc-by-4.0" in (tmp_path / "named" / "README.md").read_text()
    assert import_directory(tmp_path / "named").facts["licence"] == "cc-by-4.0"


def test_every_json_of_a_model_is_valid(tmp_path):
    model = replace(random_model(), facts={"metrics": {"loss": math.nan}})
    export_esm2(model, tmp_path / "out")
    save_model(model, tmp_path / "saved")
    assert read_all_strictly(tmp_path / "out") == {
        "config.json", "special_tokens_map.json", "tokenizer_config.json"
    }  # fmt: skip
    assert read_all_strictly(tmp_path / "saved") == {"model.json"}
    assert import_directory(tmp_path / "out").facts["metrics"] == {"loss": None}


def test_the_tokenizer_files_hold_the_vocabulary(tmp_path):
    export_esm2(random_model(), tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text().split("\n") == list(VOCABULARY)
    special = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert special["mask_token"] == "<mask>" and special["cls_token"] == "<cls>"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": TopK(experts=4)}, "experts in layers 1.*--format balm"),
        ({"activation": "swiglu"}, "activation swiglu.*--format balm"),
        ({"post_norm": True}, "norms after attention and FFN.*--format transformers"),
    ],
)
def test_what_esm2_has_no_place_for_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        export_esm2(random_model(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_verbs(tmp_path):
    """A model goes out and comes back through the command line."""
    model = random_model()
    save_model(model, tmp_path / "run")
    out = ["--out", tmp_path / "hf"]
    done = run_command("moe_ablm", "export", "--run", tmp_path / "run", "--format", "hf", *out)
    assert done.returncode == 0, done.stderr
    done = run_command("moe_ablm", "import", "--input", tmp_path / "hf", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert "rows of up to 64 tokens, layout esm" in done.stdout
    assert same(load_model(tmp_path / "back"), model)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "hf", "--run", "nowhere", "--out", "x"], "nowhere is not there"),
        (["--format", "hf", "--run", "{run}", "--out", "{run}"], "is there already"),
        (["--format", "hf", "--run", "{run}", "--out", "{run}/model.json/x"], "is not a directory"),
        (["--format", "onnx", "--run", "{run}", "--out", "x"], "invalid choice: 'onnx'"),
    ],
)
def test_the_verb_refuses(tmp_path, run_quickly, flags, words):
    save_model(random_model(), tmp_path / "run")
    flags = [f.replace("{run}", str(tmp_path / "run")) for f in flags]
    result = run_quickly("moe_ablm", "export", *flags)
    assert result.returncode == 2 and words in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs the extra `hf`")
    return pytest.importorskip("transformers", reason="needs the extra `hf`")


def rows():
    """Tokens [3, 20] of unequal lengths with masks, and which of them are no padding."""
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(4, 24, (3, 20)), np.array([20, 13, 7])
    valid = np.arange(20) < lengths[:, None]
    tokens[:, 0], tokens[np.arange(3), lengths - 1], tokens[:, [2, 5]] = 0, 2, 32
    return np.where(valid, tokens, 1), valid


@pytest.mark.hf
@pytest.mark.parametrize("name", TIED)
def test_transformers_computes_the_same_logits(tmp_path, transformers, name):
    import torch

    model = random_model(**TIED[name])
    export_esm2(model, tmp_path / "out")
    theirs, info = transformers.EsmForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    # no language model's: a head for contacts, and a table that is computed
    computed = "esm.rotary_embeddings.inv_freq"
    missing = [k for k in info["missing_keys"] if "contact_head" not in k and k != computed]
    assert not missing and not info["unexpected_keys"]
    tokens, valid = rows()
    with torch.no_grad():
        expected = theirs.eval()(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(valid).long()
        ).logits.numpy()
    np.testing.assert_allclose(logits_of(model, tokens, valid)[valid], expected[valid], atol=1e-5)
    # and what transformers saves comes back as the same model
    theirs.save_pretrained(tmp_path / "again")
    assert same(import_directory(tmp_path / "again"), model)


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["esm", "balm", "sep"])
def test_the_tokenizer_makes_the_rows_that_the_model_was_trained_on(tmp_path, transformers, layout):
    from moe_ablm.interop.card import row_text

    heavy, light = "EVQLX", "DIQMT"
    model = random_model(layout=layout)
    export_esm2(model, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(tokenizer).__name__ == "EsmTokenizer"
    ids = [[VOCABULARY.index(letter) for letter in chain] for chain in (heavy, light)]
    row = model.layout
    expected = [*row.before, *ids[0], *row.between, *ids[1], *row.after]
    assert tokenizer(row_text(model, heavy, light))["input_ids"] == expected
    assert tokenizer.mask_token_id == 32 and tokenizer.pad_token_id == 1
    assert tokenizer("EV<mask>L")["input_ids"] == [0, 9, 7, 32, 4, 2]
