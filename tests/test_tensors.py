"""How weights are written: shards and bfloat16, in every format, read back by us and by others."""

import json

import numpy as np
import pytest
from random_models import logits_of, random_model, same
from safetensors import safe_open

from moe_ablm.errors import UserError
from moe_ablm.interop.balm import export_balm
from moe_ablm.interop.esm2 import export_esm2
from moe_ablm.interop.load import import_directory, load_model
from moe_ablm.interop.native import export_native
from moe_ablm.interop.saved import flat_arrays, save_model
from moe_ablm.interop.tensors import Storage
from moe_ablm.interop.transformers_moe import export_transformers
from moe_ablm.model.families import TopK

# format -> (what writes it, what reads it, a model that it holds)
FORMATS = {
    "native": (export_native, load_model, {"moe": TopK(experts=4)}),
    "transformers": (export_transformers, import_directory, {"moe": TopK(experts=4)}),
    "hf": (export_esm2, import_directory, {"hidden_dropout": 0.1}),
    "balm": (export_balm, import_directory, {"token_dropout": False, "tied": False,
                                             "attention_dropout": 0.1}),
}  # fmt: skip
KIB = 1024


def model_for(kind):
    return random_model("balm" if kind == "balm" else "esm", **FORMATS[kind][2])


def rounded(array: np.ndarray) -> np.ndarray:
    """To bfloat16, the upper half of the bits of a float32: to the nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_are_the_same_model(tmp_path, kind):
    write, read, _ = FORMATS[kind]
    model = model_for(kind)
    write(model, tmp_path / "out", storage=Storage(shard_bytes=20 * KIB))
    write(model, tmp_path / "whole")
    assert same(read(tmp_path / "out"), read(tmp_path / "whole"))
    (index,) = tmp_path.glob("out/*.safetensors.index.json")
    content = json.loads(index.read_text())
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert sorted(set(content["weight_map"].values())) == [file.name for file in files]
    stem = index.name.partition(".")[0]
    named = [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2 and [file.name for file in files] == named
    total = 0
    for file in files:
        with safe_open(file, "numpy") as tensors:
            sizes = [tensors.get_tensor(name).nbytes for name in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20 * KIB or len(sizes) == 1
        total += sum(sizes)
    assert content["metadata"]["total_size"] == total


@pytest.mark.parametrize("kind", FORMATS)
def test_bfloat16_is_read_back_as_rounded(tmp_path, kind):
    write, read, _ = FORMATS[kind]
    model = model_for(kind)
    write(model, tmp_path / "out", storage=Storage("bfloat16"))
    found, expected = (flat_arrays(m.params) for m in (read(tmp_path / "out"), model))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        kept = rounded(array)
        if kind == "balm" and name in ("head/bias", "embedding", "head/decoder"):
            kept, found[name] = (np.delete(a, 31, axis=0) for a in (kept, found[name]))
        np.testing.assert_array_equal(found[name], kept, err_msg=name)


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["transformers", "hf"])
def test_transformers_reads_shards_of_bfloat16(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    write, read, _ = FORMATS[kind]
    write(model_for(kind), tmp_path / "out", storage=Storage("bfloat16", 10 * KIB))
    load = transformers.AutoModelForMaskedLM.from_pretrained
    told = {"trust_remote_code": True} if kind == "transformers" else {}
    assert next(load(tmp_path / "out", **told).parameters()).dtype == torch.bfloat16
    loaded = load(tmp_path / "out", dtype=torch.float32, **told).eval()
    tokens = np.random.default_rng(0).integers(4, 24, (2, 15))
    valid = np.ones_like(tokens, bool)
    with torch.no_grad():
        found = loaded(torch.tensor(tokens), torch.tensor(valid)).logits.numpy()
    expected = logits_of(read(tmp_path / "out"), tokens, valid)
    assert np.abs(found - expected).max() < 1e-5
    if kind == "hf":
        assert loaded.config.hidden_dropout_prob == 0.1
        assert loaded.config.attention_probs_dropout_prob == 0.0


def test_the_verb(tmp_path, main):
    save_model(random_model(), tmp_path / "run")
    flags = ["export", "--run", tmp_path / "run", "--format", "native"]
    done = main(*flags, "--out", tmp_path / "a", "--dtype", "bfloat16", "--shard-size", "20kb")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "a").notes == ("weights were rounded to bfloat16",)
    assert "Weights were rounded to bfloat16." in (tmp_path / "a" / "README.md").read_text()
    assert len(list(tmp_path.glob("a/params-*.safetensors"))) > 1
    done = main(*flags, "--out", tmp_path / "b", "--shard-size", "5")
    assert done.returncode == 2 and "expected a size such as 500MB or 5GB" in done.stderr
    for path in tmp_path.glob("a/params-*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"params-0000\d-of-0000\d.safetensors is not there"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize(("rate", "kind"), [(1.0, "hf"), (1.5, "balm")])
def test_a_dropout_that_is_no_rate_is_refused(tmp_path, rate, kind):
    FORMATS[kind][0](model_for(kind), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    key = {"hf": "hidden_dropout_prob", "balm": "attention_dropout"}[kind]
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: rate}))
    with pytest.raises(UserError, match=f"config.json: a dropout of {rate}, expected 0 to below 1"):
        import_directory(tmp_path / "out")
