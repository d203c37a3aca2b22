"""`--run hf:ORG/NAME` and `export --push`, by the client of the hub and a hub on this machine."""

import json

import pytest
from fake_hub import TOKEN, serving
from random_models import random_model, same

from moe_ablm.errors import UserError
from moe_ablm.interop.esm2 import export_esm2
from moe_ablm.interop.hub import PREFIX
from moe_ablm.interop.load import load_model
from moe_ablm.interop.saved import save_model

WEIGHTS = "params.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client takes for the only one, with a cache of this test."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving() as (found, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_model_is_fetched_by_its_name_and_kept(hub, tmp_path, monkeypatch):
    one, other = random_model(), random_model(layers=1)
    save_model(one, tmp_path / "one")
    export_esm2(other, tmp_path / "other")
    beside = {"code.py": b"raise SystemExit", "weights.bin": b"pickled", "onnx/a.safetensors": b""}
    first = hub.commit("lab/tiny", content(tmp_path / "one") | beside)
    hub.commit("lab/tiny", content(tmp_path / "other") | beside)
    found = load_model("hf:lab/tiny")  # of another tool: imported as it is read
    assert same(found, other) and found.source.startswith("hf:lab/tiny, commit ")
    assert same(load_model(f"hf:lab/tiny@{first}"), one)
    fetched = {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert WEIGHTS in fetched and not {"code.py", "weights.bin", "a.safetensors"} & fetched
    asked = len([path for _, path in hub.asked if "/resolve/" in path])
    assert same(load_model("hf:lab/tiny"), other)
    assert len([path for _, path in hub.asked if "/resolve/" in path]) == asked
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert same(load_model("hf:lab/tiny"), other)
    with pytest.raises(UserError, match=r"^--run hf:lab/none: .* cannot be reached, .* cache \("):
        load_model("hf:lab/none")


def test_what_was_pushed_is_fetched(hub, tmp_path, main):
    model = random_model()
    save_model(model, tmp_path / "run")
    flags = ["export", "--run", tmp_path / "run", "--push", "lab/tiny", "--format"]
    done = main(*flags, "native", "--out", tmp_path / "native")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/lab/tiny: --run hf:lab/tiny")
    assert hub.private == {"lab/tiny"} and len(hub.repositories["lab/tiny"]) == 2
    assert same(load_model("hf:lab/tiny"), model)
    # another form under the same name: what is read is what was pushed last
    assert main(*flags, "hf", "--out", tmp_path / "hf").returncode == 0
    files = hub.files("lab/tiny")[1]
    assert not {"model.json", WEIGHTS} & set(files) and "model.safetensors" in files
    assert load_model("hf:lab/tiny").source.startswith("hf:lab/tiny, commit ")
    copied = main("export", "--run", "hf:lab/tiny", "--format", "native", "--out", tmp_path / "x")
    assert copied.returncode == 0, copied.stderr
    assert same(load_model(tmp_path / "x"), model)


def test_what_the_hub_refuses_is_one_line(hub, tmp_path, main, monkeypatch):
    save_model(random_model(layers=1), tmp_path / "run")
    hub.commit("lab/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.commit("lab/empty", {"config.json": b"{}", "a.safetensors": b"x"})
    for name, words in {
        "lab": "expected hf:ORG/NAME",
        "lab/none": "knows no such model, or it is private",
        "lab/empty@v9": "there is no revision v9",
        "lab/pickled": "holds no safetensors weights; pickled",
        "lab/empty": "model_type is None",
    }.items():
        done = main("score", "--run", PREFIX + name, "--heavy", "EVQ")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert words in done.stderr
    flags = ["export", "--run", tmp_path / "run", "--format", "native", "--push"]
    done = main(*flags, "lab", "--out", tmp_path / "a")
    assert done.returncode == 2 and "--push lab: expected ORG/NAME" in done.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    done = main(*flags, "lab/new", "--out", tmp_path / "b")
    assert done.returncode == 2 and f"hf upload lab/new {tmp_path / 'b'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and json.loads(
        (tmp_path / "b/model.json").read_text()
    )
    monkeypatch.delenv("HF_TOKEN")
    done = main(*flags, "lab/new", "--out", tmp_path / "c")
    assert done.returncode == 2 and "--push lab/new: no token" in done.stderr
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()
    assert "lab/new" not in hub.repositories


def test_a_client_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^--run hf:lab/tiny needs .*'moe_ablm\[hub\]'"):
        load_model("hf:lab/tiny")
