"""Safetensors files, single or sharded with an index, read lazily as float32 arrays. No pickle."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_ablm.errors import UserError
from moe_ablm.files import write_json

FLOATS = ("F32", "F16", "BF16", "F64")
SINGLE = "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name; a look-up reads a tensor and converts it to float32.

    Raises:
      UserError: the file is missing or damaged; at look-up, a tensor has no float dtype.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            self._names = set(self._file.keys())
        except FileNotFoundError as error:
            raise UserError(f"{path} is not there") from error
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({' '.join(str(error).split())}): "
                "copy or download it again"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        dtype = self.dtype(name)
        if dtype not in FLOATS:
            raise UserError(
                f"{self.path}: tensor {name} has dtype {dtype}, expected one of {', '.join(FLOATS)}"
            )
        return np.asarray(self._file.get_tensor(name), np.float32)

    def dtype(self, name: str) -> str:
        """Safetensors' name of the dtype on disk, such as "F32" or "BF16"."""
        return self._file.get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        del self._file


class Shards(Mapping[str, np.ndarray]):
    """The tensors of several files, as listed in their index.

    Raises:
      UserError: the index or a file is missing or damaged; at look-up as in `TensorFile`.
    """

    def __init__(self, index: Path):
        self.path = index
        try:
            places = json.loads(index.read_text())["weight_map"]
            names = {str(k): Path(str(v)) for k, v in places.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is damaged ({error}): expected an object with 'weight_map'; copy or "
                "download it again"
            ) from error
        for file in set(names.values()):
            if file.name != str(file):
                raise UserError(f"{index}: shard {str(file)!r} is not a file name beside it")
        files = {file: TensorFile(index.parent / file) for file in sorted(set(names.values()))}
        for name, file in names.items():
            if name not in files[file]:
                raise UserError(
                    f"{index.parent / file} lacks tensor {name}, which {index.name} says it holds: "
                    "copy or download it again"
                )
        self._at = {name: files[file] for name, file in names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._at[name][name]

    def dtype(self, name: str) -> str:
        """As in `TensorFile`."""
        return self._at[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As in `TensorFile`."""
        return self._at[name].shape(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._at))

    def __len__(self) -> int:
        return len(self._at)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_) -> None:
        self._at.clear()


Tensors = TensorFile | Shards


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that torch's readers accept, with its directory's permissions."""
    save_file(dict(tensors), path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it


@dataclass(frozen=True)
class Storage:
    """How weights are written.

    Attributes:
      dtype: a key of `DTYPES`; bfloat16 rounds to the nearest, ties to even.
      shard_bytes: most bytes of tensors in a file; a larger tensor has one of its own. None: all
        are in one file.
    """

    dtype: str = "float32"
    shard_bytes: int | None = None


AS_COMPUTED = Storage()


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], storage: Storage) -> None:
    """Writes a safetensors file, or shards beside it and their index, as Hugging Face names them.

    Args:
      path: of the single file; shards of model.safetensors are model-00001-of-00002.safetensors
        and so on, and their index model.safetensors.index.json.
      tensors: float32.
      storage: how they are written.
    """
    dtype = DTYPES[storage.dtype]
    shards: list[dict[str, np.ndarray]] = [{}]
    room = storage.shard_bytes
    for name, tensor in tensors.items():
        tensor = tensor.astype(dtype)
        if room is not None and shards[-1] and _bytes(shards[-1]) + tensor.nbytes > room:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_tensors(path, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = path.with_stem(f"{path.stem}-{number:05d}-of-{len(shards):05d}")
        write_tensors(file, shard)
        places |= dict.fromkeys(shard, file.name)
    total = sum(map(_bytes, shards))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(path.with_name(f"{path.name}.index.json"), index)


def _bytes(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def open_tensors(directory: Path, name: str = SINGLE) -> Tensors:
    """The weights of a directory in the file of a name, or in its shards.

    Raises:
      UserError: there are no weights, only pickled ones, or they are damaged.
    """
    index = directory / f"{name}.index.json"
    if (directory / name).exists():
        return TensorFile(directory / name)
    if index.exists():
        return Shards(index)
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickled:
        raise UserError(
            f"{directory} holds {pickled[0]} and no {name}: pickled weights can run code and are "
            'not read; convert them where you trust them: python -c "from transformers import '
            f"AutoModelForMaskedLM as M; M.from_pretrained('{directory}')"
            f".save_pretrained('{directory}-safetensors')\""
        )
    raise UserError(f"{directory} holds no weights: {name} is not there, nor {index.name}")
