"""Export of any encoder to a directory that transformers loads with the code beside the weights."""

import re
import shutil
from pathlib import Path

import numpy as np
from flax import nnx

from moe_ablm import config as configs
from moe_ablm.data.tokenizer import MASK, PAD, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.interop.card import model_card
from moe_ablm.interop.huggingface import (
    CONFIG,
    OURS,
    HuggingFaceConfig,
    check_tensors,
    check_vocabulary,
    dtype_notes,
    imported,
    kept_for_import,
    sorted_out,
    write_tokenizer,
)
from moe_ablm.interop.saved import Model, fill, flat_arrays, new_directory, parameter_shapes
from moe_ablm.interop.tensors import AS_COMPUTED, SINGLE, Storage, open_tensors, write_weights
from moe_ablm.model.families import ExpertChoice, Soft, TokenChoice, TopP
from moe_ablm.model.spec import EncoderSpec

ARCHITECTURE = "MoeAblmForMaskedLM"
CODE = Path(__file__).with_name("hub") / "modeling_moe_ablm.py"  # no module: torch is not here


def export_transformers(
    model: Model, out: Path, licence: str | None = None, storage: Storage = AS_COMPUTED
) -> None:
    """Writes weights, config, code, tokenizer and a model card; `import` reads the directory back.

    The code routes as in inference: an antibody's result depends on that antibody alone.

    Args:
      model: what is exported, dense or with experts of any router.
      out: a new directory.
      licence: for the model card; None: that of the model's facts.
      storage: of the weights.

    Raises:
      UserError: `out` cannot be written.
    """
    with new_directory(out) as directory:
        arrays = flat_arrays(model.params).items()
        tensors = {_name(path): _turned(path, array) for path, array in arrays}
        write_weights(directory / SINGLE, tensors, storage)
        write_json(directory / CONFIG, _config(model) | {"torch_dtype": storage.dtype})
        shutil.copyfile(CODE, directory / CODE.name)
        write_tokenizer(directory, "EsmTokenizer")
        (directory / "README.md").write_text(model_card(model, ARCHITECTURE, _USE, licence))


def import_transformers(directory: Path, layout: str | None = None) -> Model:
    """Imports a directory that `export_transformers` wrote; its code is not run.

    Args:
      directory: the directory.
      layout: name of the layout by which chains become a row; None: that of the export.

    Raises:
      UserError: config.json lacks what the export keeps for an import, or the files are damaged.
    """
    config = HuggingFaceConfig(directory)
    config.architecture(ARCHITECTURE)
    check_vocabulary(directory, config, VOCABULARY)
    kept = config[OURS]
    encoder = kept.get("encoder") if isinstance(kept, dict) else None
    if not isinstance(encoder, dict):
        raise UserError(f"{config.file}: {OURS} lacks the encoder that an export keeps there")
    spec = configs.encoder_from_mapping(encoder)
    tensors, shapes = open_tensors(directory), parameter_shapes(spec)
    names, _ = sorted_out(tensors, lambda name: name)
    paths = {"/".join(map(str, p)): v.get_value().shape for p, v in nnx.to_flat_state(shapes)}
    turned = {p: s[::-1] if p.endswith("kernel") else s for p, s in paths.items()}
    check_tensors(tensors, names, {_name(path): shape for path, shape in turned.items()})
    params = fill(shapes, lambda path: _turned(path, tensors[_name(path)]))
    notes = dtype_notes(tensors, names.values())
    return imported(
        config,
        spec,
        params,
        architecture=ARCHITECTURE,
        layout=layout,
        default=("esm", 1024),
        notes=notes,
    )


def _name(path: str) -> str:
    """torch's name of a parameter, such as encoder.layers.0.attention.qkv.weight."""
    path = re.sub(r"(/kernel|norm/scale|^embedding)$", _as_weight, path)
    return ("" if path.startswith("head/") else "encoder.") + path.replace("/", ".")


def _as_weight(found: re.Match) -> str:
    return {"/kernel": "/weight", "norm/scale": "norm/weight"}.get(found[0], f"{found[0]}/weight")


def _turned(path: str, array: np.ndarray) -> np.ndarray:
    """A kernel transposed, as `torch.nn.Linear` stores it; the inverse is the same."""
    return np.ascontiguousarray(array.T) if path.endswith("kernel") else array


def _config(model: Model) -> dict:
    spec = model.spec
    code = CODE.stem
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{code}.MoeAblmConfig",
            "AutoModel": f"{code}.MoeAblmModel",
            "AutoModelForMaskedLM": f"{code}.{ARCHITECTURE}",
        },
        "model_type": "moe_ablm",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "max_position_embeddings": model.length,
        "activation": spec.activation,
        "token_dropout": spec.token_dropout,
        "tied": spec.tied,
        "layer_norm_eps": spec.layer_norm_eps,
        "learned_positions": spec.learned_positions,
        "embedding_norm": spec.embedding_norm,
        "post_norm": spec.post_norm,
        "moe": _experts(spec),
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        OURS: kept_for_import(model) | {"encoder": configs.stored_encoder(spec)},
    }


def _experts(spec: EncoderSpec) -> dict | None:
    """The keys of `MixtureOfExperts` in the exported code; None for a dense encoder."""
    if not spec.moe_layers:
        return None
    moe = spec.moe
    assert moe is not None
    moe = moe.alone()
    about = {
        "router": moe.name,
        "layers": list(spec.moe_layers),
        "experts": moe.experts,
        "widths": list(spec.expert_widths),
        "chunk": spec.chunk,
        "shared_ffn": spec.shared_ffn,
        "balanced": moe.balance_step > 0,
        "normalised": moe.initial_scale(spec.d_model) is not None,
    }
    if isinstance(moe, TokenChoice):
        about |= {"k": moe.k, "gate": moe.gate, "renormalise": moe.renormalised}
    if isinstance(moe, TopP):
        about |= {"threshold": moe.threshold, "exceed": moe.exceed}
    if isinstance(moe, ExpertChoice):
        about |= {"k": moe.k, "gate": moe.gate, "capacity": moe.limit}
    if isinstance(moe, Soft):
        about |= {"slots": moe.slots}
    return about


_USE = """from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{directory}", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("{directory}")
row = tokenizer("{row}", return_tensors="pt")
logits = model(**row).logits"""
