"""What all directories in Hugging Face's form share: reading config.json, and checks of tensors."""

from collections.abc import Callable, Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any, TypedDict

from flax import nnx

from moe_ablm.data.tokenizer import LAYOUTS, PAD, VOCABULARY
from moe_ablm.errors import UserError
from moe_ablm.files import require_local, write_json
from moe_ablm.interop.saved import Model, read_json
from moe_ablm.interop.tensors import PICKLES, SINGLE, Tensors
from moe_ablm.model.spec import EncoderSpec

CONFIG = "config.json"
OURS = "moe_ablm"  # key of config.json for what Hugging Face's keys cannot hold
ABSENT = -1e4  # logit of a token of ours that a vocabulary lacks; its probability is 0
_NAMED = 3  # tensors that a message names


class HuggingFaceConfig:
    """config.json of a directory; its methods check the values that they return.

    Raises:
      UserError: the directory or its config.json is missing.
    """

    def __init__(self, directory: Path):
        require_local(directory, "--input")
        if not directory.is_dir():
            found = "is a file" if directory.exists() else "is not there"
            refused = "; pickled weights can run code and are not read"
            refused = refused if directory.suffix in PICKLES else ""
            raise UserError(
                f"--input {directory} {found}: expected a Hugging Face directory with {CONFIG} and "
                f"{SINGLE}{refused}"
            )
        if not (directory / CONFIG).exists():
            raise UserError(
                f"--input {directory} has no {CONFIG}: expected a Hugging Face directory with "
                f"{CONFIG} and {SINGLE}"
            )
        self.directory, self.file = directory, directory / CONFIG
        self._values = read_json(self.file)

    def __getitem__(self, key: str) -> Any:
        return self._values.get(key)

    def expect(self, key: str, default: Any, *allowed: Any, why: str = "") -> Any:
        """The value of a key, or the default if it is absent or null.

        Raises:
          UserError: the value is not one of `allowed`; `why` is added to the message.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if value not in allowed:
            expected = " or ".join(repr(a) for a in allowed)
            absent = "" if key in self._values else f" (the default, as {key} is absent)"
            raise UserError(
                f"{self.file}: {key} is {value!r}{absent}, expected {expected}"
                f"{': ' + why if why else ''}"
            )
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """The value of a key, or the default if it is absent; UserError unless it is 1 or more."""
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = repr(value) if key in self._values else "missing"
            raise UserError(f"{self.file}: {key} is {found}, expected a positive whole number")
        return value

    def real(self, key: str, default: float) -> float:
        """The value of a key (absent or null: the default); UserError unless it is 0 or more."""
        value = default if self._values.get(key) is None else self._values[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < inf:
            raise UserError(f"{self.file}: {key} is {value!r}, expected a number of 0 or more")
        return float(value)

    def architecture(self, *expected: str) -> str:
        """The only one of `architectures`; UserError unless it is one of those expected."""
        found = self._values.get("architectures")
        if not isinstance(found, list) or len(found) != 1 or found[0] not in expected:
            raise UserError(
                f"{self.file}: architectures is {found!r}, expected "
                f"{' or '.join(repr([name]) for name in expected)}"
            )
        return found[0]

    def heads_divide(self) -> None:
        """UserError unless the heads divide the width into parts of an even width."""
        width, heads = self.number("hidden_size"), self.number("num_attention_heads")
        if width % heads or width // heads % 2:
            raise UserError(
                f"{self.file}: num_attention_heads is {heads}, expected a divisor of hidden_size "
                f"({width}) that gives heads of an even width"
            )


def check_vocabulary(directory: Path, config: HuggingFaceConfig, expected: tuple) -> None:
    """UserError if `vocab_list` or vocab.txt differs from the expected tokens."""
    file = directory / "vocab.txt"
    vocabularies = {f"{config.file}: vocab_list": config["vocab_list"]}
    if file.exists():
        vocabularies[str(file)] = file.read_text(errors="replace").split()
    for where, tokens in vocabularies.items():
        if tokens is None or tuple(tokens) == expected:
            continue
        pairs = list(zip(tokens, expected, strict=False))
        differs = [i for i, (a, b) in enumerate(pairs) if a != b]
        what = (
            f"token {differs[0]} is {pairs[differs[0]][0]!r}, expected {pairs[differs[0]][1]!r}"
            if differs
            else f"{len(tokens)} tokens, expected {len(expected)}"
        )
        raise UserError(f"{where}: {what}: the weights belong to another vocabulary")


def check_tensors(
    tensors: Tensors, names: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """UserError unless the tensors and their shapes are those expected; it names the first few.

    Args:
      tensors: those of the directory.
      names: expected name -> name in the file, for all tensors that are not ignored.
      expected: shape of every tensor, by expected name.
    """
    missing = [n for n in expected if n not in names]
    if missing:
        raise UserError(f"{tensors.path} lacks {some(missing)}, which {CONFIG} asks for")
    leftover = [names[n] for n in names if n not in expected]
    if leftover:
        raise UserError(
            f"{tensors.path} holds {some(leftover)}, for which the model of {CONFIG} has no place"
        )
    for name, shape in expected.items():
        if tensors.shape(names[name]) != shape:
            raise UserError(
                f"{tensors.path}: {names[name]} has shape {tensors.shape(names[name])}, expected "
                f"{shape} by {CONFIG}"
            )


def some(names: Iterable[str]) -> str:
    """The first few names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def dtype_notes(tensors: Tensors, names: Iterable[str]) -> list[str]:
    """A note on tensors that were not float32; empty if there are none."""
    dtypes = sorted({tensors.dtype(name) for name in names} - {"F32"})
    return [f"weights of {' and '.join(dtypes)} were converted to float32"] if dtypes else []


def ours(config: HuggingFaceConfig) -> dict[str, Any]:
    """What an export by moe_ablm keeps in config.json under `OURS`; empty for other directories.

    Raises:
      UserError: it is damaged.
    """
    kept = config[OURS]
    if kept is None:
        return {}
    valid = isinstance(kept, dict) and kept.get("layout") in LAYOUTS
    if not valid or not isinstance(kept.get("length"), int):
        raise UserError(
            f"{config.file}: {OURS} is damaged: expected an object with layout and length; remove "
            "it, or export again"
        )
    return kept


def layer_norm_eps(config: HuggingFaceConfig) -> float:
    """`layer_norm_eps`; UserError unless it is above 0 and at most .01."""
    eps = config.real("layer_norm_eps", 1e-12)
    if not 0 < eps <= 0.01:
        raise UserError(f"{config.file}: layer_norm_eps is {eps}, expected above 0, at most .01")
    return eps


def positions(config: HuggingFaceConfig, offset: int) -> int:
    """Number of learned positions; UserError unless `max_position_embeddings` is above `offset`."""
    count = config.number("max_position_embeddings")
    if count <= offset:
        raise UserError(
            f"{config.file}: max_position_embeddings is {count}, expected more than the {offset} "
            "rows before the first position"
        )
    return count - offset


class Dropouts(TypedDict):
    """Rates of dropout of an `EncoderSpec`."""

    hidden_dropout: float
    attention_dropout: float
    embedding_dropout: float


def dropout_rates(
    config: HuggingFaceConfig, hidden: str, attention: str, default: float = 0.1
) -> Dropouts:
    """Rates of dropout of an `EncoderSpec`; that of the embedding is of exports by moe_ablm alone.

    Args:
      config: config.json of the directory.
      hidden, attention: its keys of what layers add to the residual stream, of attention weights.
      default: rate where a key is absent.

    Raises:
      UserError: a rate is not from 0 to below 1.
    """
    rates = Dropouts(
        hidden_dropout=config.real(hidden, default),
        attention_dropout=config.real(attention, default),
        embedding_dropout=ours(config).get("embedding_dropout", 0.0),
    )
    for rate in rates.values():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise UserError(f"{config.file}: a dropout of {rate!r}, expected 0 to below 1")
    return rates


def imported(
    config: HuggingFaceConfig,
    spec: EncoderSpec,
    params: nnx.State,
    *,
    architecture: str,
    layout: str | None,
    default: tuple[str, int],
    offset: int = 0,
    notes: Iterable[str] = (),
) -> Model:
    """The model of a directory.

    Args:
      config: its config.json.
      spec, params: the encoder.
      architecture: name of the class in Hugging Face's form.
      layout: name of the layout by which chains become a row; None: that of an export by moe_ablm,
        else the default.
      default: name of the layout, and length in tokens, if config.json does not have them.
      offset: difference between `max_position_embeddings` and the length.
      notes: notes for the user.
    """
    kept, licence = ours(config), licence_of(config.directory)
    return Model(
        spec,
        params,
        LAYOUTS[layout or kept.get("layout", default[0])],
        kept.get("length")
        or config.number("max_position_embeddings", default[1] + offset) - offset,
        f"{config.directory.resolve().name} ({architecture})",
        kept.get("regime"),
        tuple(notes),
        dict(kept.get("facts") or {}) | ({"licence": licence} if licence else {}),
    )


def written_config(model: Model, architecture: str, model_type: str) -> dict[str, Any]:
    """What the config.json of every dense encoder in Hugging Face's form has."""
    spec = model.spec
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn,
        "hidden_act": "gelu",
        "hidden_dropout_prob": spec.hidden_dropout,
        "attention_probs_dropout_prob": spec.attention_dropout,
        "layer_norm_eps": spec.layer_norm_eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": spec.tied,
        "pad_token_id": PAD,
        OURS: kept_for_import(model),
    }


def kept_for_import(model: Model) -> dict:
    """What an export keeps in config.json under `OURS`, for an import of it."""
    rate = model.spec.embedding_dropout
    return {
        "layout": model.layout_name,
        "length": model.length,
        "regime": model.regime,
        "facts": dict(model.facts),
        **({"embedding_dropout": rate} if rate else {}),
    }


def licence_of(directory: Path) -> str | None:
    """The licence in the front matter of README.md; None if there is none."""
    file = directory / "README.md"
    if not file.exists():
        return None
    lines = file.read_text(errors="replace").split("\n")
    if lines[0].strip() != "---" or "---" not in lines[1:]:
        return None
    for line in lines[1 : lines.index("---", 1)]:
        key, _, value = line.partition(":")
        if key.strip() == "license" and value.strip():
            return value.strip()
    return None


def write_tokenizer(
    directory: Path, kind: str, tokens: tuple[str, ...] = VOCABULARY, bos: str = "cls_token"
) -> None:
    """Writes vocab.txt, tokenizer_config.json and special_tokens_map.json of a tokenizer class.

    Args:
      directory: where to write.
      kind: name of the class.
      tokens: the vocabulary.
      bos: name that the class gives to its first token, `<cls>`.
    """
    special = {bos: "<cls>", "eos_token": "<eos>", "mask_token": "<mask>",
               "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
    # no newline at the end: Hugging Face's reader would read an empty last line as a token
    (directory / "vocab.txt").write_text("\n".join(tokens))
    config = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False, **special}
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", special)


def require_dense_gelu(model: Model, architecture: str) -> None:
    """UserError unless a class of transformers itself can hold the FFNs of a model."""
    spec = model.spec
    if spec.moe_layers:
        raise UserError(
            f"--format hf: {model.source} has experts in layers "
            f"{', '.join(map(str, spec.moe_layers))}, which {architecture} has no place for: use "
            "--format transformers, or --format balm"
        )
    if spec.activation != "gelu":
        raise UserError(
            f"--format hf: {model.source} has activation {spec.activation}, {architecture} only "
            "gelu: use --format transformers, or --format balm"
        )


Renaming = Callable[[str], str | None]


def sorted_out(tensors: Tensors, rename: Renaming) -> tuple[dict[str, str], list[str]]:
    """Splits tensors into those that are read and those that are ignored.

    Args:
      tensors: those of the directory.
      rename: returns the expected name for a name in the file; None: the tensor is ignored.

    Returns:
      A dict from expected name to name in the file, and the ignored names.

    Raises:
      UserError: two tensors have the same expected name.
    """
    names: dict[str, str] = {}
    ignored = []
    for file_name in tensors:
        name = rename(file_name)
        if name is None:
            ignored.append(file_name)
        elif name in names:
            raise UserError(
                f"{tensors.path} holds both {names[name]} and {file_name}: expected one"
            )
        else:
            names[name] = file_name
    return names, ignored
