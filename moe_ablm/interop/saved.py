"""A model as a directory: `model.json` describes it, `params.safetensors` has its parameters.

`import`, `upcycle` and `export --format native` write such directories. A trained run is read from
its checkpoints instead.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_ablm import config as configs
from moe_ablm.data.tokenizer import LAYOUTS, Layout
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.interop.tensors import AS_COMPUTED, Storage, open_tensors, write_weights
from moe_ablm.model import flops
from moe_ablm.model.encoder import parameter_shapes
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.training.state import params_sha256, path_name

SCHEMA = "moe_ablm.model/1"
MODEL_FILE, PARAMS_FILE = "model.json", "params.safetensors"


@dataclass(frozen=True)
class Model:
    """An encoder with its parameters, and what is needed to use it.

    Attributes:
      spec: the encoder.
      params: float32, on the default device.
      layout: how chains become a row.
      length: tokens of the longest row that it was trained for.
      source: where it comes from, in one line.
      regime: training regime (`data.regime`) such as "paired"; None: not known.
      notes: notes for the user, one sentence each.
      facts: plain JSON for model cards: "config", "data", "metrics" and "licence", if known.
      head: whether the language-model head is the model's own; else its parameters are zero, and
        only hidden states, attention and routes can be asked for.
    """

    spec: EncoderSpec
    params: nnx.State
    layout: Layout
    length: int
    source: str
    regime: str | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    head: bool = True

    @property
    def layout_name(self) -> str:
        """Name of the layout among `data.tokenizer.LAYOUTS`."""
        return next(name for name, layout in LAYOUTS.items() if layout == self.layout)

    def params_counts(self) -> tuple[int, int]:
        """Parameters in all, and those active for a token."""
        return flops.params_total(self.spec), flops.params_active(self.spec)

    def digest(self) -> str:
        """SHA-256 of the parameters, the encoder, its layout and its length."""
        about = repr((configs.encoder_to_mapping(self.spec), self.layout, self.length))
        return params_sha256(self.params, about, str)

    def require_head(self, what: str, error: type[UserError] = UserError) -> None:
        """Raises `error` where the model has no language-model head, which `what` needs."""
        if not self.head:
            raise error(f"{what}: {self.source} has no language-model head: it only embeds")


def flat_arrays(params: nnx.State) -> dict[str, np.ndarray]:
    """Parameters as float32 arrays by path, such as "layers/0/attention/qkv/kernel"."""
    return {
        path_name(path): np.asarray(v.get_value(), np.float32)
        for path, v in nnx.to_flat_state(params)
    }


def fill(shapes: nnx.State, value: Callable[[str], np.ndarray]) -> nnx.State:
    """Parameters of the given shapes, with the values that `value` returns for their paths.

    Raises:
      ValueError: a value has another shape.
    """
    flat = {}
    for path, variable in nnx.to_flat_state(shapes):
        name = path_name(path)
        array = np.asarray(value(name), np.float32)
        if array.shape != variable.get_value().shape:
            raise ValueError(f"{name}: found {array.shape}, expected {variable.get_value().shape}")
        flat[path] = variable.replace(jnp.asarray(array))
    return nnx.from_flat_state(flat)


@contextmanager
def new_directory(out: Path, flag: str = "--out"):
    """A temporary directory beside `out`, renamed to `out` when the block ends without an error.

    Args:
      out: must be absent, or an empty directory.
      flag: flag that gave `out`, for messages.

    Raises:
      UserError: `out` exists and is not an empty directory, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{flag} {out} is there already: choose a new name or remove it")
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    made = False  # only what was made here is removed
    try:
        temporary.mkdir(parents=True)
        made = True
        yield temporary
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        named = error.filename is not None and Path(error.filename)
        if made and named and not any(named.is_relative_to(p) for p in (temporary, out)):
            raise  # of something that the block reads
        raise UserError(f"{flag} {out} cannot be written: {error.strerror or error}") from error
    finally:
        if made:
            shutil.rmtree(temporary, ignore_errors=True)


def save_model(model: Model, out: Path) -> None:
    """Writes a model to a new directory; a failure leaves nothing behind.

    Raises:
      UserError: a setting of the encoder is out of range, or `out` cannot be written.
    """
    with new_directory(out) as directory:
        write_model(model, directory)


def write_model(model: Model, directory: Path, storage: Storage = AS_COMPUTED) -> None:
    """Writes the files of a model into a directory that is there.

    Raises:
      UserError: a setting of the encoder is out of range.
    """
    encoder = configs.stored_encoder(model.spec)
    configs.encoder_from_mapping(encoder)  # raises if it could not be read back
    write_weights(directory / PARAMS_FILE, flat_arrays(model.params), storage)
    content = {
        "schema": SCHEMA,
        "encoder": encoder,
        "layout": model.layout_name,
        "length": model.length,
        "source": model.source,
        "regime": model.regime,
        "notes": list(model.notes),
        "facts": dict(model.facts),
        **({} if model.head else {"head": False}),
    }
    write_json(directory / MODEL_FILE, content)


def read_model(directory: Path) -> Model:
    """Reads what `save_model` wrote.

    Raises:
      UserError: a file is missing, damaged, or of a schema that this version does not know.
    """
    content = read_json(directory / MODEL_FILE)
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{directory / MODEL_FILE}: schema {content.get('schema')!r}, expected {SCHEMA!r}: "
            "made by another version of moe_ablm; import the model again"
        )
    try:
        spec = configs.encoder_from_mapping(content["encoder"])
        model = {
            "layout": LAYOUTS[content["layout"]],
            "length": int(content["length"]),
            "source": str(content["source"]),
            "regime": content["regime"],
            "notes": tuple(map(str, content["notes"])),
            "facts": dict(content["facts"]),
            "head": content.get("head", True) is True,
        }
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{directory / MODEL_FILE} is damaged ({error}): import the model again"
        ) from error
    shapes = parameter_shapes(spec)
    with open_tensors(directory, PARAMS_FILE) as tensors:
        file = tensors.path
        names = {path_name(path) for path, _ in nnx.to_flat_state(shapes)}
        if names != set(tensors):
            differing = sorted(names ^ set(tensors))
            raise UserError(
                f"{file} does not fit {MODEL_FILE}: {differing[0]} and {len(differing) - 1} more "
                "are in only one of them; import the model again"
            )
        try:
            params = fill(shapes, tensors.__getitem__)
        except ValueError as error:
            raise UserError(f"{file} does not fit {MODEL_FILE}: {error}") from error
    return Model(spec, jax.device_put(params), **model)


def read_json(file: Path) -> dict:
    """The object in a JSON file; UserError if the file cannot be read or has no object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"no valid JSON ({error})"
        raise UserError(f"{file} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: found {type(content).__name__}, expected a JSON object")
    return content
