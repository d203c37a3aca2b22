"""Masked language models as transformers loads them, to be asked about antibodies beside ours.

Nothing is converted: torch computes them (`inference.torch_engine`). What differs between them is
the vocabulary and the special tokens around the chains. Both are read from the tokenizer, and said
in our tokens: a row of ours becomes one of theirs by looking each token up, place by place.
"""

import hashlib
import importlib
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_ablm.data.tokenizer import (
    AMINO_ACIDS,
    CLS,
    EOS,
    MASK,
    NULL,
    PAD,
    UNK,
    VOCABULARY,
    Layout,
)
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.interop.saved import Model, read_json
from moe_ablm.interop.tensors import open_tensors
from moe_ablm.model.spec import EncoderSpec

PREFIX = "transformers:"  # of a `--run` that names a directory of transformers
BASE_FILE = "base.json"  # beside a head: where the encoder is that it was trained on
_BASE_SCHEMA = "moe_ablm.base/1"

# separators of pairs where they are not what the tokenizer itself puts between two texts: ESM-2 has
# none, and takes ft-ESM's; ESM-C has a token for the end of a chain; BALM has one </s>
_BETWEEN = {
    "esm": ("cls_token", "cls_token"),
    "esmc": ("chain_break_token",),
    "roberta": ("sep_token",),
}
# RoFormer's own tokenizer wants a library that splits Chinese words; over letters it is BERT's
_TOKENIZERS = {"roformer": "BertTokenizer"}
# AntiBERTa2 begins each chain with a token for its kind
_MARKS = ("Ḣ", "Ḷ")
# absolute positions of these begin after that of the padding token
_AFTER_PADDING = ("camembert", "esm", "roberta", "xlm-roberta")
# our tokens that stand for special ones of theirs
_SPARE = (CLS, EOS, NULL, UNK, VOCABULARY.index("."), VOCABULARY.index("-"))


@dataclass(frozen=True)
class Pretrained(Model):
    """A model of transformers; it has the shape of an encoder of ours, but no parameters of one.

    Attributes:
      network: a `torch.nn.Module` for masked language modelling, float32.
      ids: int64 `[V]`, the id in its vocabulary that is read for each of our tokens.
      known: bool `[V]`, which of our tokens its vocabulary has.
      sha256: of weights, vocabulary and layout.
      directory: where it is.
    """

    network: Any = None
    ids: np.ndarray = field(default_factory=lambda: np.zeros(len(VOCABULARY), np.int64))
    known: np.ndarray = field(default_factory=lambda: np.zeros(len(VOCABULARY), bool))
    sha256: str = ""
    directory: Path = Path()

    def digest(self) -> str:
        """SHA-256 of the weights, the vocabulary and the layout."""
        return self.sha256

    def params_counts(self) -> tuple[int, int]:
        """Parameters, and again, as all of them are active."""
        total = sum(p.numel() for p in self.network.parameters())
        return total, total


def load_pretrained(directory: Path, name: str = "--run") -> Pretrained:
    """A masked language model of a directory that transformers wrote; no code of it is run.

    Args:
      directory: with config.json, weights as safetensors, and files of a tokenizer.
      name: flag that gave it, for messages.

    Raises:
      UserError: there is none, its code or weights cannot be trusted, weights are missing, or its
        tokenizer does not read amino acids one by one.
    """
    where = f"{name} {PREFIX}{directory}"
    if not (directory / "config.json").is_file():
        raise UserError(f"{where}: no config.json there; expected a directory of transformers")
    open_tensors(directory)  # raises where weights are pickled, damaged or missing
    torch, transformers = (_library(each, where) for each in ("torch", "transformers"))
    with _quiet(transformers):
        network = _network(directory, torch, transformers, where)
        kind = network.config.model_type
        tokenizer = _tokenizer(directory, transformers, kind, where)
    ids, known, layout = _vocabulary(tokenizer, kind, where)
    config = network.config
    try:
        layers, width, heads = (
            int(getattr(config, key))
            for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
    except (AttributeError, TypeError) as error:
        raise UserError(f"{where}: a {kind} without the sizes of an encoder ({error})") from error
    spec = EncoderSpec(layers, width, getattr(config, "intermediate_size", 4 * width), heads)
    return Pretrained(
        *(spec, nnx.State({}), layout, _longest(tokenizer, config)),
        source=f"{directory} ({type(network).__name__}, computed by transformers)",
        network=network,
        ids=ids,
        known=known,
        sha256=_digest(directory, ids, layout),
        directory=directory,
    )


def write_base(model: Pretrained, directory: Path) -> None:
    """Writes where a model is into a directory that is to stand for it; weights are not copied."""
    content = {"schema": _BASE_SCHEMA, "run": f"{PREFIX}{model.directory.resolve()}"}
    write_json(directory / BASE_FILE, content)


def base_of(directory: Path) -> Path | None:
    """The directory of transformers that one stands for; None where it stands for none.

    Raises:
      UserError: the file that says so is damaged.
    """
    file = directory / BASE_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    run = content.get("run")
    if content.get("schema") != _BASE_SCHEMA or not str(run).startswith(PREFIX):
        raise UserError(
            f"{file}: expected schema {_BASE_SCHEMA!r} and a run {PREFIX}DIR: run finetune again"
        )
    return Path(str(run).removeprefix(PREFIX))


def _library(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{where} needs {name}: pip install 'moe_ablm[hf]'") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and notes of transformers."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _network(directory: Path, torch: Any, transformers: Any, where: str) -> Any:
    try:
        network, report = transformers.AutoModelForMaskedLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds; all say that these files are no such model
        raise UserError(
            f"{where}: transformers does not load it ({_line(error)}); expected a masked language "
            "model whose code is in transformers itself"
        ) from error
    for key in ("missing_keys", "mismatched_keys"):
        if report[key]:
            first = sorted(map(str, report[key]))[0]
            raise UserError(
                f"{where}: {len(report[key])} weights of {type(network).__name__} are missing or "
                f"of another shape, first {first}: without its head nothing can be scored"
            )
    return network.eval()


def _tokenizer(directory: Path, transformers: Any, kind: str, where: str) -> Any:
    try:
        return getattr(transformers, _TOKENIZERS.get(kind, "AutoTokenizer")).from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise UserError(f"{where}: its tokenizer cannot be loaded ({_line(error)})") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _vocabulary(tokenizer: Any, kind: str, where: str) -> tuple[np.ndarray, np.ndarray, Layout]:
    """`ids`, `known` and the layout of a tokenizer."""
    letters, text = _letters(tokenizer, where)
    before, after = _around(tokenizer(text)["input_ids"], letters, where)
    marks = _marks(tokenizer)
    between = _between(tokenizer, kind, text, letters, before, after, where)
    special = sorted({*before, *between, *after, *marks})
    if len(special) > len(_SPARE) or tokenizer.mask_token_id is None:
        raise UserError(f"{where}: its tokenizer has no mask, or {len(special)} special tokens")
    stand_in = dict(zip(special, _SPARE, strict=False))
    unknown = tokenizer.unk_token_id
    found = {t: _id(tokenizer, t) for t in VOCABULARY if len(t) == 1 and t.isalpha()}
    other = found["X"] if found["X"] is not None else unknown
    ids = np.full(len(VOCABULARY), other if other is not None else tokenizer.mask_token_id)
    known = np.zeros(len(VOCABULARY), bool)
    exact = {VOCABULARY.index(t): i for t, i in found.items() if i is not None}
    exact |= {token: i for i, token in stand_in.items()} | {MASK: tokenizer.mask_token_id}
    for token, i in exact.items():
        ids[token], known[token] = i, True
    if tokenizer.pad_token_id is not None:
        ids[PAD] = tokenizer.pad_token_id

    def ours(theirs: Sequence[int]) -> tuple[int, ...]:
        return tuple(stand_in[i] for i in theirs)

    heavy, light = ([m] for m in marks) if marks else ([], [])
    layout = Layout(
        *(ours([*before, *heavy]), ours([*between, *light]), ours(after)),
        lone_light=ours([*before, *light]) if marks else (),
    )
    return ids.astype(np.int64), known, layout


def _id(tokenizer: Any, token: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def _letters(tokenizer: Any, where: str) -> tuple[list[int], str]:
    """Ids of the amino acids, and the text from which the tokenizer makes them."""
    ids = [_id(tokenizer, letter) for letter in AMINO_ACIDS]
    for text in (AMINO_ACIDS, " ".join(AMINO_ACIDS)):
        if None not in ids and tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            return [i for i in ids if i is not None], text
    raise UserError(
        f"{where}: its tokenizer does not read amino acids one by one, with or without spaces; "
        "expected a model of proteins or antibodies with the files of its tokenizer"
    )


def _around(ids: list[int], letters: list[int], where: str) -> tuple[list[int], list[int]]:
    """Special tokens before and after a chain."""
    for first in range(len(ids) - len(letters) + 1):
        if ids[first : first + len(letters)] == letters:
            return ids[:first], ids[first + len(letters) :]
    raise UserError(f"{where}: its tokenizer does not keep a chain together")


def _between(
    tokenizer: Any,
    kind: str,
    text: str,
    letters: list[int],
    before: list[int],
    after: list[int],
    where: str,
) -> list[int]:
    """Special tokens between the chains of a pair."""
    found: list[Any]
    if kind in _BETWEEN:
        found = [getattr(tokenizer, f"{name}_id", None) for name in _BETWEEN[kind]]
    else:
        found = tokenizer(text, text)["input_ids"]
        first = len(before) + len(letters)
        last = len(found) - len(after) - len(letters)
        if found != [*before, *letters, *found[first:last], *letters, *after]:
            raise UserError(f"{where}: its tokenizer has no form of pairs")
        found = found[first:last]
    if None in found or not found:
        raise UserError(f"{where}: its tokenizer has no separator of chains")
    return found


def _marks(tokenizer: Any) -> list[int]:
    """Ids of the tokens with which heavy and light chains begin, [] where there are none."""
    for form in ("NFC", "NFD"):
        found = [_id(tokenizer, unicodedata.normalize(form, mark)) for mark in _MARKS]
        if None not in found:
            return [i for i in found if i is not None]
    return []


def _longest(tokenizer: Any, config: Any) -> int:
    """Tokens of the longest row; of most this is what their positions hold."""
    limits = [int(min(tokenizer.model_max_length, 1 << 20))]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        skipped = (config.pad_token_id or 0) + 1 if config.model_type in _AFTER_PADDING else 0
        limits.append(positions - skipped)
    return min(limits)


def _digest(directory: Path, ids: np.ndarray, layout: Layout) -> str:
    digest = hashlib.sha256(repr((ids.tolist(), layout, layout.lone_light)).encode())
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
