"""Import and export of RoBERTa in Hugging Face's form (`RobertaForMaskedLM`, `RobertaModel`).

BALM-paired (Burbach & Briney 2024) and AntiBERTa (Leem et al. 2022) are such. A model's vocabulary
is that of its tokenizer: rows of the embedding and of the decoder are put into the order of ours.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_ablm.data.tokenizer import AMINO_ACIDS, CLS, EOS, MASK, PAD, UNK, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.interop import huggingface
from moe_ablm.interop.card import model_card, row_text
from moe_ablm.interop.huggingface import ABSENT, CONFIG, HuggingFaceConfig
from moe_ablm.interop.naming import DECODER, OFFSET, ROBERTA
from moe_ablm.interop.saved import Model, new_directory, parameter_shapes, read_json
from moe_ablm.interop.tensors import (
    AS_COMPUTED,
    SINGLE,
    Storage,
    Tensors,
    open_tensors,
    write_weights,
)
from moe_ablm.model.spec import EncoderSpec

ARCHITECTURE = "RobertaForMaskedLM"
HEADLESS = "RobertaModel"  # its names lack the first part of `RobertaForMaskedLM`'s
_THEIRS = {"<cls>": "<s>", "<eos>": "</s>"}  # names of tokens, where they differ
_SEGMENTS = "roberta.embeddings.token_type_embeddings.weight"
_BY_TOKEN = (ROBERTA.embedding, DECODER, "lm_head.bias")  # tensors with a row for each token


def import_roberta(directory: Path, layout: str | None = None) -> Model:
    """Imports a `RobertaForMaskedLM` directory, or one of `RobertaModel`, which has no head.

    Segment ids are 0, as in training on antibodies, so that the vector of this segment is added to
    every position.

    Args:
      directory: with config.json, weights as safetensors, and vocab.json or tokenizer.json of
        the tokenizer.
      layout: name of the layout by which chains become a row; None: that of an export by moe_ablm,
        else "balm" (`<s>H</s>L</s>`).

    Raises:
      UserError: the model has settings that have no counterpart here, its tokenizer does not read
        amino acids one by one, or the files are damaged.
    """
    config = HuggingFaceConfig(directory)
    architecture = config.architecture(ARCHITECTURE, HEADLESS)
    head = architecture == ARCHITECTURE
    size = config.number("vocab_size")
    ids, notes = _ids(directory, size)
    config.expect("pad_token_id", 1, ids[VOCABULARY[PAD]])
    spec = _spec(config)
    tensors = open_tensors(directory)
    names, ignored = huggingface.sorted_out(tensors, partial(_canonical, head=head))
    copies = {"lm_head.decoder.bias": "lm_head.bias"}
    copies |= {DECODER: ROBERTA.embedding} if spec.tied else {}
    for copy, original in copies.items():
        if copy in names:
            file_name = names.pop(copy)
            _check_same(tensors, file_name, names.setdefault(original, file_name))
    if ignored:
        notes.append(
            f"ignored, as the language model does not use them: {huggingface.some(ignored)}"
        )
    shapes = parameter_shapes(spec)
    expected = ROBERTA.shapes(shapes)
    expected |= {n: (size, *expected[n][1:]) for n in _BY_TOKEN if n in expected}
    expected[_SEGMENTS] = (config.number("type_vocab_size", 2), spec.d_model)
    absent = {} if head else {n: s for n, s in expected.items() if n.startswith("lm_head.")}
    huggingface.check_tensors(
        tensors, names, {n: s for n, s in expected.items() if n not in absent}
    )
    notes += huggingface.dtype_notes(tensors, names.values())
    notes += [] if head else ["the model has no language-model head: it only embeds"]
    model = huggingface.imported(
        config,
        spec,
        ROBERTA.read(shapes, _Translated(tensors, names, ids, absent)),
        architecture=architecture,
        layout=layout,
        default=("balm", spec.learned_positions),
        offset=OFFSET,
        notes=notes,
    )
    return replace(model, head=head)


def _spec(config: HuggingFaceConfig) -> EncoderSpec:
    config.expect("position_embedding_type", "absolute", "absolute")
    config.expect("hidden_act", "gelu", "gelu")
    config.expect("pad_token_id", 1, PAD, why="positions begin after that of the padding token")
    for key in ("is_decoder", "add_cross_attention"):
        config.expect(key, False, False, why="only the encoder with a language-model head is read")
    config.heads_divide()
    rates = huggingface.dropout_rates(config, "hidden_dropout_prob", "attention_probs_dropout_prob")
    if not huggingface.ours(config):  # RoBERTa has one rate for both
        rates["embedding_dropout"] = rates["hidden_dropout"]
    return EncoderSpec(
        layers=config.number("num_hidden_layers"),
        d_model=config.number("hidden_size"),
        ffn=config.number("intermediate_size"),
        heads=config.number("num_attention_heads"),
        token_dropout=False,
        layer_norm_eps=huggingface.layer_norm_eps(config),
        tied=config.expect("tie_word_embeddings", True, True, False),
        learned_positions=huggingface.positions(config, OFFSET),
        embedding_norm=True,
        post_norm=True,
        **rates,
    )


def _canonical(name: str, head: bool) -> str | None:
    """None for tensors that are ignored, else the name in its newer spelling.

    Names of `RobertaModel`, without a head, lack the first part.
    """
    if not head and not name.startswith(("roberta.", "lm_head.")):
        name = f"roberta.{name}"
    if name.startswith("roberta.pooler.") or name.endswith("position_ids"):
        return None
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_same(tensors: Tensors, copy: str, original: str) -> None:
    if not np.array_equal(tensors[copy], tensors[original]):
        raise UserError(
            f"{tensors.path}: {copy} differs from {original}, though {CONFIG} ties them: set "
            '"tie_word_embeddings": false there if the decoder is the model\'s own'
        )


# its vocabulary


def _ids(directory: Path, size: int) -> tuple[dict[str, int], list[str]]:
    """The row in its tables of each of our tokens that its vocabulary has, and notes.

    Raises:
      UserError: there are no files of a tokenizer, or it is none of amino acids.
    """
    file, vocabulary = _vocabulary(directory)
    whole = all(type(i) is int and 0 <= i < size for i in vocabulary.values())
    if not whole or len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{file}: expected different ids from 0 to vocab_size - 1 ({size - 1})")
    joined = next((t for t in vocabulary if re.fullmatch("[A-Z]{2,}", t)), None)
    if joined:
        raise UserError(f"{file}: its token {joined!r} is several residues, expected one each")
    ids = {t: vocabulary[n] for t in VOCABULARY if (n := _THEIRS.get(t, t)) in vocabulary}
    needed = [*AMINO_ACIDS, *(VOCABULARY[i] for i in (CLS, PAD, EOS, MASK))]
    lacking = [_THEIRS.get(t, t) for t in needed if t not in ids]
    if lacking:
        raise UserError(f"{file} lacks {huggingface.some(lacking)}: no tokenizer of antibodies")
    other = [t for t, i in vocabulary.items() if i not in ids.values()]
    notes = [f"tokens that have no place here were left out: {huggingface.some(other)}"]
    return ids, notes * bool(other)


def _vocabulary(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the vocabulary of a byte-level BPE, and id by token."""
    file = directory / "vocab.json"
    if file.exists():
        return file, read_json(file)
    file = directory / "tokenizer.json"
    if not file.exists():
        raise UserError(
            f"--input {directory} has neither vocab.json nor tokenizer.json, which say which row "
            "of the embedding is which amino acid: copy the files of its tokenizer there"
        )
    content = read_json(file)
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return file, dict(content["model"]["vocab"]) | added
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: expected model.vocab with an id for each token") from error


class _Translated(Mapping):
    """Tensors by expected name, rows in the order of our tokens; read when they are looked up.

    Those that are absent are zeros.
    """

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str],
        ids: Mapping[str, int],
        absent: Mapping[str, tuple[int, ...]],
    ):
        self._tensors, self._names, self._ids, self._absent = tensors, names, ids, absent

    def __iter__(self):
        return iter([*self._names, *self._absent])

    def __len__(self) -> int:
        return len(self._names) + len(self._absent)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._absent:
            array = np.zeros(self._absent[name], np.float32)
        else:
            array = self._tensors[self._names[name]]
        if name == ROBERTA.positions:
            return array + self._tensors[self._names[_SEGMENTS]][0]
        if name not in _BY_TOKEN:
            return array
        # letters that it lacks are read as its X, as transformers' engine reads them, or as unknown
        unknown = self._ids.get(VOCABULARY[UNK])
        rows = [self._ids.get(t, self._ids.get("X", unknown) if t.isalpha() else unknown)
                for t in VOCABULARY]  # fmt: skip
        found = np.stack([np.zeros_like(array[0]) if i is None else array[i] for i in rows])
        if name == "lm_head.bias":
            found[[token not in self._ids for token in VOCABULARY]] = ABSENT
        return found


# to a directory


def fits(spec: EncoderSpec) -> bool:
    """Whether an encoder has RoBERTa's positions and norms."""
    return bool(spec.post_norm and spec.embedding_norm and spec.learned_positions)


def export_roberta(
    model: Model, out: Path, licence: str | None = None, storage: Storage = AS_COMPUTED
) -> None:
    """Writes a `RobertaForMaskedLM` directory with its tokenizer and a model card.

    Args:
      model: one for which `fits` holds.
      out: a new directory.
      licence: for the model card; None: that of the model's facts.
      storage: of the weights.

    Raises:
      UserError: the model has experts, another activation or token dropout, or `out` cannot be
        written.
    """
    huggingface.require_dense_gelu(model, ARCHITECTURE)
    if model.spec.token_dropout:
        raise UserError(
            f"--format hf: {model.source} has token dropout, which {ARCHITECTURE} has no place "
            "for: use --format transformers, or train with model.token_dropout=False"
        )
    with new_directory(out) as directory:
        tensors = ROBERTA.written(model.params)
        tensors[_SEGMENTS] = np.zeros((1, model.spec.d_model), np.float32)
        write_weights(directory / SINGLE, tensors, storage)
        write_json(directory / CONFIG, _config(model) | {"torch_dtype": storage.dtype})
        _write_tokenizer(directory)
        use = _USE.replace("{row}", _named(row_text(model, "EVQLVESGGG", "DIQMTQSPSS")))
        (directory / "README.md").write_text(model_card(model, ARCHITECTURE, use, licence))


def _named(text: str) -> str:
    """Text with RoBERTa's names of tokens."""
    for ours, theirs in _THEIRS.items():
        text = text.replace(ours, theirs)
    return text


def _write_tokenizer(directory: Path) -> None:
    write_json(directory / "vocab.json", {_named(t): i for i, t in enumerate(VOCABULARY)})
    (directory / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>",
               "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
    config = {"tokenizer_class": "RobertaTokenizer", "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", config | special)
    write_json(directory / "special_tokens_map.json", special)


def _config(model: Model) -> dict:
    spec = model.spec
    return huggingface.written_config(model, ARCHITECTURE, "roberta") | {
        "max_position_embeddings": spec.learned_positions + OFFSET,
        "type_vocab_size": 1,
        "bos_token_id": CLS,
        "eos_token_id": EOS,
    }


_USE = """from transformers import RobertaForMaskedLM, RobertaTokenizer

model = RobertaForMaskedLM.from_pretrained("{directory}").eval()
tokenizer = RobertaTokenizer.from_pretrained("{directory}")
row = tokenizer("{row}", return_tensors="pt")
logits = model(**row).logits"""
