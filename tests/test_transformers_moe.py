"""Export to a directory that transformers loads with its own code, and back."""

from dataclasses import replace

import numpy as np
import pytest
from random_models import logits_of, random_model, same

from moe_ablm.errors import UserError
from moe_ablm.interop.load import import_directory
from moe_ablm.interop.transformers_moe import export_transformers
from moe_ablm.model.families import ExpertChoice, Sequence, Soft, TopK, TopP

EVERY = {"placement": "every", "first_dense": 0}
ENCODERS = {
    "dense": {},
    "own decoder, swiglu": {"tied": False, "activation": "swiglu", "token_dropout": False},
    "large eps": {"layer_norm_eps": 0.01},
    "ESM-1b": {"learned_positions": 77, "embedding_norm": True},
    "RoBERTa with experts": {
        "learned_positions": 77, "embedding_norm": True, "post_norm": True,
        "token_dropout": False, "moe": TopK(experts=4),
    },
    "top2": {"moe": TopK(experts=4)},
    "top1, capacity of training": {"moe": TopK(experts=4, k=1, capacity=0.5, **EVERY)},
    "sigmoid, biased, shared": {
        "moe": TopK(experts=4, gate="sigmoid", balance_rate=0.1, shared=1, **EVERY)
    },
    "unequal widths, swiglu": {
        "moe": TopK(experts=4, widths=(8, 16, 24, 8), **EVERY), "activation": "swiglu"
    },
    "top-p": {"moe": TopP(experts=4, k=3, **EVERY)},
    "top-p below": {"moe": TopP(experts=4, k=4, exceed=False, renormalise=True, **EVERY)},
    "sequence": {"moe": Sequence(experts=4, **EVERY)},
    "expert choice": {"moe": ExpertChoice(experts=4, **EVERY)},
    "expert choice, sigmoid, of a batch": {
        "moe": ExpertChoice(experts=4, gate="sigmoid", capacity=0.7, group="batch", **EVERY)
    },
    "expert choice, over tokens": {"moe": ExpertChoice(experts=4, gate="tokens", **EVERY)},
    "soft": {"moe": Soft(experts=4, slots=3, **EVERY)},
    "soft, normalised": {"moe": Soft(experts=4, slots=3, l2=True, **EVERY)},
}  # fmt: skip


@pytest.fixture(params=ENCODERS)
def model(request):
    return random_model(**ENCODERS[request.param], layout="sep", length=77)


def test_a_round_trip_is_bitwise(tmp_path, model):
    export_transformers(model, tmp_path / "out")
    found = import_directory(tmp_path / "out")
    assert same(found, model) and found.layout_name == "sep" and found.length == 77
    assert found.facts == model.facts


def alone(model):
    """The model as it answers in inference."""
    return replace(model, spec=replace(model.spec, moe=model.spec.moe and model.spec.moe.alone()))


def rows():
    """Three rows of 21, 13 and 5 tokens, with masks."""
    rng = np.random.default_rng(3)
    valid = np.arange(21) < np.array([21, 13, 5])[:, None]
    tokens = np.where(valid, rng.integers(4, 24, valid.shape), 1)
    tokens[:, 2] = 32
    return tokens, valid


@pytest.mark.hf
def test_transformers_gives_the_same_logits(tmp_path, model):
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    export_transformers(model, tmp_path / "out")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    tokens, valid = rows()
    given = torch.tensor(tokens), torch.tensor(valid)
    with torch.no_grad():
        found = loaded(*given).logits.numpy()
    expected = logits_of(alone(model), tokens, valid)
    assert np.abs(found - expected)[valid].max() < 1e-5
    # a step of training, and what was saved is loaded again
    labels = torch.where(given[1], given[0], -100)
    loaded.train()
    loaded(*given, labels=labels).loss.backward()
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "balance" not in n)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(*given).logits, loaded.eval()(*given).logits)
    body = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        hidden = body(*given).last_hidden_state
    assert hidden.shape == (3, 21, 24) and torch.isfinite(hidden).all()
    if model.spec.learned_positions:  # 77; rows may be padded beyond them
        long, whole = torch.full((1, 80), 5), torch.ones(1, 80, dtype=torch.bool)
        with torch.no_grad():
            body(long, torch.arange(80)[None] < 77)
        with pytest.raises(ValueError, match="longer than 77 learned positions"):
            body(long, whole)


def test_a_config_without_the_encoder_is_refused(tmp_path):
    export_transformers(random_model(), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace('"encoder"', '"another"'))
    with pytest.raises(UserError, match="lacks the encoder"):
        import_directory(tmp_path / "out")
