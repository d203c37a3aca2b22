"""Import and export of ESM in Hugging Face's form (`EsmForMaskedLM`, `EsmModel`).

ESM-2, and ESM-1b and ESM-1v, whose positions are learned.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from moe_ablm.data.tokenizer import MASK, PAD, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.interop import huggingface
from moe_ablm.interop.card import model_card
from moe_ablm.interop.huggingface import CONFIG, HuggingFaceConfig
from moe_ablm.interop.naming import DECODER, ESM, OFFSET
from moe_ablm.interop.saved import Model, new_directory, parameter_shapes
from moe_ablm.interop.tensors import (
    AS_COMPUTED,
    SINGLE,
    Storage,
    Tensors,
    open_tensors,
    write_weights,
)
from moe_ablm.model.spec import EncoderSpec

ARCHITECTURE = "EsmForMaskedLM"
HEADLESS = "EsmModel"  # its names lack the first part of `EsmForMaskedLM`'s
# tensors of files on the hub that are not part of the language model
_IGNORED_PREFIXES = ("contact_head.", "esm.contact_head.", "esm.pooler.")
_IGNORED = ("inv_freq", "position_ids")


# from a directory


def import_esm2(directory: Path, layout: str | None = None) -> Model:
    """Imports an `EsmForMaskedLM` directory, or one of `EsmModel`, which has no head.

    Args:
      directory: with config.json, and model.safetensors in one or several files.
      layout: name of the layout by which chains become a row; None: that of an export by moe_ablm,
        else "esm" (`<cls>H<cls><cls>L<eos>`).

    Raises:
      UserError: the model is no ESM of these, or the files are damaged.
    """
    config = HuggingFaceConfig(directory)
    architecture = config.architecture(ARCHITECTURE, HEADLESS)
    spec, head = _spec(config), architecture == ARCHITECTURE
    huggingface.check_vocabulary(directory, config, VOCABULARY)
    tensors = open_tensors(directory)
    names, ignored = huggingface.sorted_out(tensors, partial(_canonical, spec=spec, head=head))
    notes = [
        f"ignored, as the language model does not use them: {huggingface.some(ignored)}"
    ] * bool(ignored)
    if spec.tied and DECODER in names:
        _check_tied(tensors, names)
    shapes = parameter_shapes(spec)
    expected = ESM.shapes(shapes)
    absent = {} if head else {n: s for n, s in expected.items() if n.startswith("lm_head.")}
    huggingface.check_tensors(
        tensors, names, {n: s for n, s in expected.items() if n not in absent}
    )
    notes += huggingface.dtype_notes(tensors, names.values())
    notes += [] if head else ["the model has no language-model head: it only embeds"]
    model = huggingface.imported(
        config,
        spec,
        ESM.read(shapes, _Renamed(tensors, names, absent)),
        architecture=architecture,
        layout=layout,
        default=("esm", 1024),
        offset=OFFSET,
        notes=notes,
    )
    return replace(model, head=head)


class _Renamed(dict):
    """Tensors by expected name, read when they are looked up; zeros for those that are absent."""

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str],
        absent: Mapping[str, tuple[int, ...]],
    ):
        super().__init__(names)
        self._tensors, self._absent = tensors, absent

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._absent:
            return np.zeros(self._absent[name], np.float32)
        return self._tensors[super().__getitem__(name)]


def _spec(config: HuggingFaceConfig) -> EncoderSpec:
    """The encoder that config.json describes; UserError if it has no counterpart here."""
    config.expect("model_type", "esm", "esm")
    config.expect("vocab_size", None, len(VOCABULARY), why="ESM-2's vocabulary")
    learned = config.expect("position_embedding_type", "absolute", "rotary", "absolute")
    config.expect("hidden_act", "gelu", "gelu")
    config.expect("mask_token_id", MASK, MASK)
    config.expect("pad_token_id", PAD, PAD)
    for key in ("is_folding_model", "is_decoder", "add_cross_attention"):
        config.expect(key, False, False, why="only the encoder with a language-model head is read")
    rope = config["rope_parameters"] or {}
    if rope.get("rope_theta", config["rope_theta"] or 10_000.0) != 10_000.0:
        raise UserError(
            f"{config.file}: rope_theta is {rope or config['rope_theta']}, expected 10000"
        )
    config.heads_divide()
    return EncoderSpec(
        layers=config.number("num_hidden_layers"),
        d_model=config.number("hidden_size"),
        ffn=config.number("intermediate_size"),
        heads=config.number("num_attention_heads"),
        token_dropout=config.expect("token_dropout", False, True, False),
        layer_norm_eps=huggingface.layer_norm_eps(config),
        **huggingface.dropout_rates(config, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        tied=config.expect("tie_word_embeddings", True, True, False),
        learned_positions=huggingface.positions(config, OFFSET) if learned == "absolute" else 0,
        embedding_norm=config.expect("emb_layer_norm_before", False, True, False),
    )


def _canonical(name: str, spec: EncoderSpec, head: bool) -> str | None:
    """Hugging Face's name in its newer spelling; None for tensors that are ignored.

    Names of `EsmModel`, without a head, lack the first part.
    """
    if not head and not name.startswith(("esm.", "lm_head.")):
        name = f"esm.{name}"
    if name.startswith(_IGNORED_PREFIXES) or name.endswith(_IGNORED):
        return None
    if name == ESM.positions and not spec.learned_positions:
        return None
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return "lm_head.bias" if name == "lm_head.decoder.bias" else name


def _check_tied(tensors: Tensors, names: dict[str, str]) -> None:
    """Drops the decoder from `names`; UserError if it differs from the embedding."""
    decoder, embedding = names.pop(DECODER), names.get(ESM.embedding)
    if embedding and not np.array_equal(tensors[decoder], tensors[embedding]):
        raise UserError(
            f"{tensors.path}: {decoder} differs from {embedding}, though {CONFIG} ties them: set "
            '"tie_word_embeddings": false there if the decoder is the model\'s own'
        )


# to a directory


def export_esm2(
    model: Model, out: Path, licence: str | None = None, storage: Storage = AS_COMPUTED
) -> None:
    """Writes an `EsmForMaskedLM` directory with its tokenizer and a model card.

    Args:
      model: what is exported.
      out: a new directory.
      licence: for the model card; None: that of the model's facts.
      storage: of the weights.

    Raises:
      UserError: the model has experts, another activation than GELU, or other norms, or `out`
        cannot be written.
    """
    huggingface.require_dense_gelu(model, ARCHITECTURE)
    if model.spec.post_norm:
        raise UserError(
            f"--format hf: {model.source} has norms after attention and FFN, {ARCHITECTURE} before "
            "them: use --format transformers"
        )
    with new_directory(out) as directory:
        write_weights(directory / SINGLE, ESM.written(model.params), storage)
        write_json(directory / CONFIG, _config(model) | {"torch_dtype": storage.dtype})
        huggingface.write_tokenizer(directory, "EsmTokenizer")
        card = model_card(model, ARCHITECTURE, _USE, licence)
        (directory / "README.md").write_text(card)


def _config(model: Model) -> dict:
    spec = model.spec
    return huggingface.written_config(model, ARCHITECTURE, "esm") | {
        "max_position_embeddings": (spec.learned_positions or model.length) + OFFSET,
        "position_embedding_type": "absolute" if spec.learned_positions else "rotary",
        "emb_layer_norm_before": spec.embedding_norm,
        "token_dropout": spec.token_dropout,
        "is_folding_model": False,
        "mask_token_id": MASK,
    }


_USE = """from transformers import EsmForMaskedLM, EsmTokenizer

model = EsmForMaskedLM.from_pretrained("{directory}").eval()
tokenizer = EsmTokenizer.from_pretrained("{directory}")
row = tokenizer("{row}", return_tensors="pt")
logits = model(**row).logits"""
