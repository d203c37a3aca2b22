"""Makes tests/fixtures/balm_*.npz: tiny random BALM models, as BALM saves them, and their logits.

    git clone https://github.com/brineylab/BALM
    pip install -e .[hf] && python tests/programs/make_balm_fixtures.py BALM

Run once with BALM 36a8001, transformers 5.23.0 and torch 2.13.0. Of BALM only the model is
imported: its package's __init__ is passed by, as it needs libraries for data and logging, and with
transformers 5 its base class gets the attribute `all_tied_weights_keys`, which is looked up before
it is set.
"""

import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,  # BALM applies attention dropout in evaluation, too
}
EXPERTS = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "expert_capacity": -1}
LENGTHS = (20, 12, 8)  # with 4 experts every capacity below is a whole number
CASES = {
    "dense": TINY,
    "dense_gelu": TINY | {"activation": "gelu", "ffn_bias": False},
    "topk": EXPERTS,
    "topk_capacity": EXPERTS
    | {"expert_capacity": 1.0, "router_mask_pad_probs": True, "router_mask_aux_loss": True},
    "topk_shared": EXPERTS
    | {
        "num_experts": 6,
        "num_shared_experts": 2,
        "num_experts_per_tok": 1,
        "expert_intermediate_size": [8, 16, 8, 8],
        "shared_expert_intermediate_size": 10,
        "num_initial_dense_layers": 0,
    },
    "topp": EXPERTS | {"router_type": "top-p", "alternate_sparsity": False},
    "topp_capacity": EXPERTS
    | {"router_type": "top-p", "expert_capacity": 1.0, "router_mask_pad_logits": True},
    "expert_choice": EXPERTS | {"router_type": "expert-choice", "expert_capacity": 1.0},
}


def models(checkout: Path):
    """BALM's modules `config` and `models`."""
    package = types.ModuleType("balm")
    package.__path__ = [str(checkout / "src" / "balm")]
    sys.modules["balm"] = package
    from balm import config
    from balm import models as found
    from balm.models.base import BalmPreTrainedModel

    BalmPreTrainedModel.all_tied_weights_keys = {}
    return config, found


def make(checkout: Path, settings: dict):
    """A model whose every parameter is random, and large enough to tell tokens apart."""
    config, found = models(checkout)
    kind = "BalmMoE" if "num_experts" in settings else "Balm"
    model = getattr(found, f"{kind}ForMaskedLM")(getattr(config, f"{kind}Config")(**settings))
    generator = torch.Generator().manual_seed(len(settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (parameter.ndim == 1))
    return model.eval()


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, 20] in BALM's vocabulary, with masks, and which of them are no padding."""
    rng = np.random.default_rng(0)
    length = max(LENGTHS)
    tokens = rng.integers(4, 31, (len(LENGTHS), length))
    valid = np.arange(length) < np.array(LENGTHS)[:, None]
    tokens[:, 0] = 0
    tokens[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = 2
    tokens[:, [2, 5]] = 31
    return np.where(valid, tokens, 1), valid


def logits(model, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        mask = torch.from_numpy(valid).long()
        return model(torch.from_numpy(tokens), attention_mask=mask).logits.numpy()


def main() -> None:
    checkout = Path(sys.argv[1])
    tokens, valid = inputs()
    for name, settings in CASES.items():
        model = make(checkout, settings)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            weights = load_file(Path(folder) / "model.safetensors")
        arrays = {"tokens": tokens, "valid": valid, "logits": logits(model, tokens, valid)}
        # every row alone, without its padding
        for i, length in enumerate(LENGTHS):
            row = tokens[i : i + 1, :length]
            arrays[f"alone_{i}"] = logits(model, row, np.ones_like(row, bool))
        # all rows of one length: a batch without padding
        whole = np.where(tokens == 1, 7, tokens)
        arrays |= {"whole": whole, "whole_logits": logits(model, whole, np.ones_like(valid))}
        arrays |= {f"w/{key}": value for key, value in weights.items()}
        np.savez_compressed(FIXTURES / f"balm_{name}.npz", config=json.dumps(config), **arrays)


if __name__ == "__main__":
    main()
