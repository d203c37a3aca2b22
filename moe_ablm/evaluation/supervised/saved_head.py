"""A trained head on disk, beside the encoder that it reads: `head.json` and `head.safetensors`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody
from moe_ablm.errors import UserError
from moe_ablm.evaluation.supervised.head_inputs import Head
from moe_ablm.evaluation.supervised.heads import Predictor, predictor_of
from moe_ablm.files import write_json
from moe_ablm.inference.antibodies import labels, windows
from moe_ablm.inference.buckets import Engine
from moe_ablm.interop.saved import read_json
from moe_ablm.interop.tensors import TensorFile, write_tensors
from moe_ablm.model.spec import PRECISIONS

SCHEMA = "moe_ablm.head/1"
HEAD_FILE, TENSORS_FILE = "head.json", "head.safetensors"
_SCALE = ("target_mean", "target_sd")


@dataclass(frozen=True, eq=False)
class SavedHead:
    """What is needed to predict, beside the encoder.

    Attributes:
      head: what is predicted.
      classes: their names; none of a regression.
      target: name of what was measured.
      model: digest of the encoder's parameters.
      batch: antibodies that a head computes at once.
      tensors: weights by name, float32, with mean and standard deviation of the targets.
      precision: of the states that it was trained on.
    """

    head: Head
    classes: tuple[str, ...]
    target: str
    model: str
    batch: int
    tensors: dict[str, np.ndarray]
    precision: str = "float32"

    @classmethod
    def of(cls, predictor: Predictor, classes: Sequence[str], target: str) -> "SavedHead":
        """Of a predictor whose encoder is not trained any more (`heads.settled`)."""
        tensors = {name: np.asarray(x) for name, x in predictor.params["head"].items()}
        tensors |= dict(zip(_SCALE, predictor.scale, strict=True))
        digest, precision = predictor.engine.model.digest(), predictor.engine.precision
        head = predictor.network.head
        return cls(head, tuple(classes), target, digest, predictor.batch, tensors, precision)

    def predictor(self, engine: Engine) -> Predictor:
        """The predictor on the encoder that it was trained on.

        Raises:
          UserError: it is another one.
        """
        if engine.model.digest() != self.model:
            raise UserError(
                f"{HEAD_FILE} was trained on other weights than those beside it ("
                f"{engine.model.source}): run finetune again"
            )
        weights = {k: jnp.asarray(v) for k, v in self.tensors.items() if k not in _SCALE}
        scale = self.tensors[_SCALE[0]], self.tensors[_SCALE[1]]
        return predictor_of(engine, self.head, weights, self.batch, scale)

    def digest(self) -> str:
        """SHA-256 of all that decides a prediction."""
        # as before precisions were told; that of a prediction is an option of the verb
        about = repr((self.head, self.classes, self.model, self.batch))
        found = hashlib.sha256(about.encode())
        for name in sorted(self.tensors):
            found.update(name.encode() + self.tensors[name].tobytes())
        return found.hexdigest()


def columns(head: Head, classes: Sequence[str], outputs: np.ndarray, name: str) -> dict:
    """Predictions as columns.

    Args:
      head, classes: what is predicted.
      outputs: of a `Predictor`: values `[n]`, or log-probabilities `[n, classes]`; of residues
        those of all, `stacked`.
      name: of the column of the value or of the most probable class.

    Returns:
      Arrays by name; of a classification the probabilities, too, as "NAME CLASS".
    """
    if head.kind == "regression":
        return {name: pa.array(outputs, pa.float32())}
    found = {name: pa.array([classes[i] for i in outputs.argmax(1).tolist()], pa.string())}
    for each, column in zip(classes, np.exp(outputs).T, strict=True):
        found[f"{name} {each}"] = pa.array(np.ascontiguousarray(column))
    return found


def cost(engine: Engine, antibody: Antibody) -> tuple[int, int]:
    """Rows through the encoder and bytes that are held of an antibody, as in `inputs_of`."""
    return 1, 4 * engine.model.spec.d_model * antibody.residues


def fitted(predictor: Predictor, antibodies: Sequence[Antibody]) -> np.ndarray:
    """Predictions in the windows in which `predict` makes them: the same, bit for bit.

    Of residues those of all antibodies, `stacked`.
    """
    some = windows(antibodies, lambda antibody: cost(predictor.engine, antibody))
    return np.concatenate([stacked(predictor(window)) for window in some])


def stacked(outputs: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Outputs of a `Predictor` in one array; of residues `[residues, classes]` of all."""
    return outputs if isinstance(outputs, np.ndarray) else np.concatenate(outputs)


def names(head: Head, antibodies: Sequence[Antibody]) -> dict:
    """Columns that say what each prediction is of: antibodies, or their residues."""
    if head.kind == "residue":
        return labels(antibodies)
    return {"sequence_id": [antibody.name for antibody in antibodies]}


def table(saved: SavedHead, engine: Engine, antibodies: Sequence[Antibody]) -> pa.Table:
    """A line with the `prediction` for each antibody, or each of its residues."""
    known = names(saved.head, antibodies)
    outputs = stacked(saved.predictor(engine)(antibodies))
    return pa.table(known | columns(saved.head, saved.classes, outputs, "prediction"))


def write_head(saved: SavedHead, directory: Path) -> None:
    """Writes both files."""
    write_tensors(directory / TENSORS_FILE, saved.tensors)
    content = {
        "schema": SCHEMA,
        "kind": saved.head.kind,
        "outputs": saved.head.outputs,
        "pooling": saved.head.pooling,
        "classes": list(saved.classes),
        "target": saved.target,
        "model": saved.model,
        "batch": saved.batch,
        "precision": saved.precision,
    }
    write_json(directory / HEAD_FILE, content)


def read_head(directory: Path) -> SavedHead:
    """Reads what `write_head` wrote.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = directory / HEAD_FILE
    if not directory.exists():
        raise UserError(f"--run {directory}: no such directory")
    if not file.exists():
        raise UserError(
            f"--run {directory} holds no {HEAD_FILE}: expected a directory that python -m moe_ablm "
            "finetune wrote"
        )
    content = read_json(file)
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{file}: schema {content.get('schema')!r}, expected {SCHEMA!r}: run finetune again"
        )
    try:
        head = Head(content["kind"], content["outputs"], content["pooling"])
        classes = tuple(map(str, content["classes"]))
        target, model = str(content["target"]), str(content["model"])
        batch = int(content["batch"])
        precision = str(content.get("precision", "float32"))  # of before it was kept
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}")
        if head.kind != "regression" and len(classes) != head.outputs:
            raise ValueError(f"{len(classes)} classes, {head.outputs} outputs")
        with TensorFile(directory / TENSORS_FILE) as tensors:
            found = {name: tensors[name] for name in tensors}
        missing = {*WEIGHTS, *_SCALE} - set(found)
        if missing:
            raise ValueError(f"{TENSORS_FILE} lacks {min(missing)}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): run finetune again") from error
    return SavedHead(head, classes, target, model, batch, found, precision)


WEIGHTS = ("centre", "spread", "query", "inner", "inner_bias", "outer", "outer_bias")
