"""Directories of transformers as models that are asked: what is read of them, what is refused."""

import json

import numpy as np
import pytest
from pretrained_models import FAMILIES, save

from moe_ablm.errors import UserError
from moe_ablm.interop.load import load_model
from moe_ablm.interop.pretrained import PREFIX, load_pretrained

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    pytest.importorskip("torch", reason="needs the extra `hf`")
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    return save(FAMILIES["IgBert"], tmp_path_factory.mktemp("pretrained") / "igbert")


@pytest.fixture
def copied(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        load_pretrained(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"--run {PREFIX}{path}")
    return message


def test_what_a_model_is_known_by(directory, copied):
    model, other = load_pretrained(directory), load_pretrained(copied)
    assert model.digest() == other.digest()
    assert (model.spec.layers, model.spec.d_model, model.spec.heads) == (2, 16, 2)
    assert model.length == 512
    total, active = model.params_counts()
    assert total == active == sum(p.numel() for p in model.network.parameters())
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert load_pretrained(copied).digest() != model.digest()


@pytest.mark.parametrize(
    ("family", "longest"),
    [("AntiBERTa2", 256), ("BALM", 320), ("ESM-2", 1024), ("ESM-C", 2048)],
)
def test_the_longest_row_is_what_positions_hold(directory, tmp_path, family, longest):
    assert load_pretrained(save(FAMILIES[family], tmp_path)).length == longest


def without(copied, *names):
    for name in names:
        (copied / name).unlink()


def change(copied, name, **values):
    content = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(content | values))


def test_directories_that_are_no_masked_language_model(copied):
    without(copied, "config.json")
    assert "no config.json" in refused(copied)


def test_code_of_others_is_not_run(copied):
    code = "raise SystemExit('it ran')"
    (copied / "theirs.py").write_text(code)
    change(copied, "config.json", model_type="theirs", architectures=["Theirs"],
           auto_map={"AutoConfig": "theirs.C", "AutoModelForMaskedLM": "theirs.M"})  # fmt: skip
    assert "transformers does not load it" in refused(copied)


def test_words_instead_of_residues_are_no_tokens(copied):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "protein"]
    (copied / "vocab.txt").write_text("\n".join(words) + "\n")
    assert "does not read amino acids one by one" in refused(copied)


def test_a_model_without_its_head_is_refused(copied):
    from safetensors.numpy import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "cls.predictions.transform" not in k}
    assert len(kept) < len(weights)
    save_file(kept, copied / "model.safetensors", {"format": "pt"})
    assert "cls.predictions.transform" in refused(copied)


def test_pickled_weights_are_not_read(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin.*can run code"):
        load_pretrained(copied)


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    assert "pip install 'moe_ablm[hf]'" in refused(tmp_path)


def test_where_a_run_is_needed_it_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"only asked .*expected a run, or what"):
        load_model(f"{PREFIX}anywhere", "config.train.init")
