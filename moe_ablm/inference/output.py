"""Results on disk: a table in the format of its suffix, written atomically and resumable.

Parts are kept beside the file until all are complete. The same command continues after the last.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from moe_ablm.errors import UserError
from moe_ablm.files import json_text, locked, replacing, write_json

_PART = re.compile(r"(\d{12})-(\d{12})\.parquet")


def vectors(array: np.ndarray) -> pa.FixedSizeListArray:
    """A column of vectors from `[n, D]`."""
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, array.shape[1])


def in_float32(columns: Any) -> pa.Table:
    """A table of columns, float32 in place of float64: for sums and means of what was float32.

    All formats then write the digits that mean something, and no more.
    """
    table = pa.table(columns)
    narrow = [f.with_type(pa.float32()) if pa.types.is_float64(f.type) else f for f in table.schema]
    return table.cast(pa.schema(narrow))


def _has_float64(schema: pa.Schema) -> bool:
    return any(pa.types.is_float64(field.type) for field in schema)


class Output:
    """The file of one command.

    Use it as a context manager. `finish` writes the file. If it is not called, the next `Output`
    of the same command resumes.

    Attributes:
      done: number of antibodies whose results are already kept.
      complete: whether the file exists and was written by the same command.
    """

    def __init__(self, out: Path, command: Mapping[str, Any]):
        """Args: out, the file; command, plain JSON of everything that decides its content.

        Raises:
          UserError: the suffix is unknown, or the file exists or is a directory. On entering: it
            is being written by another process or command, or cannot be written.
        """
        if out.suffix not in WRITERS:
            raise UserError(f"--out {out}: expected a name that ends in {', '.join(WRITERS)}")
        if out.is_dir():
            raise UserError(f"--out {out} is a directory: name a file in it")
        self.out, self._command = out, dict(command)
        self._parts = out.with_name(f".{out.name}.parts")
        self._record = out.with_name(f".{out.name}.command.json")
        self._lock = ExitStack()
        self.complete = self._is_complete()
        self.done = 0

    def __enter__(self) -> "Output":
        if self.complete:
            return self
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self._parts / "lock"))
        except BlockingIOError as error:
            raise UserError(f"--out {self.out} is being written by another process") from error
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written: {error.strerror}") from error
        try:
            self._check_same()
            write_json(self._parts / "command.json", self._command)
        except UserError:
            self._lock.close()
            raise
        except OSError as error:
            self.__exit__()
            raise UserError(f"--out {self.out} cannot be written: {error.strerror}") from error
        self.done = self._found()[-1][1] if self._found() else 0
        return self

    def __exit__(self, *_) -> None:
        if self.complete:
            return
        if not self._found():  # nothing to resume
            shutil.rmtree(self._parts, ignore_errors=True)
        self._lock.close()

    def add(self, table: pa.Table, antibodies: int) -> None:
        """Keeps the results of the next `antibodies` antibodies.

        Raises:
          UserError: they cannot be written, for example because the disk is full.
        """
        end = self.done + antibodies
        try:
            with replacing(self._parts / f"{self.done:012d}-{end:012d}.parquet") as temporary:
                pq.write_table(table, temporary)
        except OSError as error:
            raise UserError(
                f"--out {self.out} cannot be written ({error.strerror or error}) after {self.done} "
                "antibodies: fix that and run the same command again, it goes on from there"
            ) from error
        self.done = end

    def finish(self) -> int:
        """Writes the file from its parts; returns the number of its lines.

        Raises:
          UserError: there is no line to write.
        """
        paths = [path for *_, path in self._found()]
        if not paths:
            raise UserError(f"no antibody is left to write to {self.out}")
        _narrow(paths)
        with replacing(self.out) as temporary:
            WRITERS[self.out.suffix](paths, temporary)
        size = self.out.stat().st_size
        record = {"command": self._command, "antibodies": self.done, "bytes": size}
        write_json(self._record, record)
        lines = sum(pq.read_metadata(path).num_rows for path in paths)
        self._lock.close()
        shutil.rmtree(self._parts)
        self.complete = True
        return lines

    def _found(self) -> list[tuple[int, int, Path]]:
        """Parts (first antibody, end, path) that follow each other without a gap from the first."""
        parts, end = [], 0
        for path in sorted(self._parts.glob("*.parquet")):
            match = _PART.fullmatch(path.name)
            if match and int(match[1]) == end:
                end = int(match[2])
                parts.append((int(match[1]), end, path))
        return parts

    def _is_complete(self) -> bool:
        if not self.out.exists():
            return False
        before = _read_json(self._record)
        if before.get("bytes") != self.out.stat().st_size:
            before = {}
        if before.get("command") == self._command:
            return True
        differing = _differing(before.get("command"), self._command)
        raise UserError(
            f"--out {self.out} is there already{differing}: choose a new name or remove it"
        )

    def _check_same(self) -> None:
        file = self._parts / "command.json"
        if not file.exists():
            return
        before = _read_json(file)
        if before != self._command:
            raise UserError(
                f"--out {self.out}: unfinished results of another command"
                f"{_differing(before, self._command)}: choose a new name or remove {self._parts}"
            )


def _narrow(paths: list[Path]) -> None:
    """Brings parts of an earlier version, which kept sums in float64, to the types of the last."""
    if _has_float64(pq.read_schema(paths[-1])):
        return
    for path in paths:
        if _has_float64(pq.read_schema(path)):
            with replacing(path) as temporary:
                pq.write_table(in_float32(pq.read_table(path)), temporary)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _differing(before: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return ""
    keys = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    return f" (other {', '.join(keys)})" if keys else ""


def flat(table: pa.Table) -> pa.Table:
    """A table in which columns `name_0`, `name_1`, ... replace a column `name` of vectors."""
    columns = {}
    for field in table.schema:
        column = table[field.name].combine_chunks()
        if not pa.types.is_fixed_size_list(field.type):
            columns[field.name] = column
            continue
        matrix = matrix_of(column).reshape(-1, field.type.list_size)
        columns |= {f"{field.name}_{i}": values for i, values in enumerate(matrix.T.copy())}
    return pa.table(columns)


def write_csv(table: pa.Table, stream: Any, header: bool) -> None:
    """Writes the lines of a table as CSV, with "" for NaN; float32 as in `_plain`."""
    table = flat(table)
    columns = [
        pa.array(column.to_numpy(), from_pandas=True)  # NaN becomes null, which is written as ""
        if pa.types.is_floating(column.type)
        else column
        for column in table.columns
    ]
    options = csv.WriteOptions(include_header=header, quoting_style="needed")
    csv.write_csv(pa.table(columns, names=table.column_names), stream, options)


def _to_csv(paths: list[Path], out: Path) -> None:
    with out.open("wb") as stream:
        for number, table in enumerate(map(pq.read_table, paths)):
            write_csv(table, stream, header=number == 0)


def _to_jsonl(paths: list[Path], out: Path) -> None:
    with out.open("w") as stream:
        for table in map(pq.read_table, paths):
            for batch in table.to_batches(max_chunksize=1024):
                columns = [_plain(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    line = dict(zip(batch.schema.names, values, strict=True))
                    stream.write(json_text(line) + "\n")


def _plain(column: pa.Array) -> list:
    """Python values; of float32 the fewest digits that tell it from its neighbours."""
    if pa.types.is_float32(column.type):
        shortest = column.to_numpy(zero_copy_only=False).astype(str).astype(np.float64)
        return [
            value if valid else None
            for value, valid in zip(shortest.tolist(), column.is_valid().to_pylist(), strict=True)
        ]
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(kind(column.type) for kind in kinds) and pa.types.is_float32(column.type.value_type):
        return [_plain(item.values) if item.is_valid else None for item in column]
    return column.to_pylist()


def _to_parquet(paths: list[Path], out: Path) -> None:
    schema = pq.read_schema(paths[0])
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for table in map(pq.read_table, paths):
            writer.write_table(table.cast(schema))


def _to_npz(paths: list[Path], out: Path) -> None:
    """Writes one array per column, piece by piece: memory does not grow with the file."""
    lines = sum(pq.read_metadata(path).num_rows for path in paths)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for field in pq.read_schema(paths[0]):
            pieces = (matrix_of(pq.read_table(p, columns=[field.name])[field.name]) for p in paths)
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
                kind = np.dtype(f"<U{max(piece.dtype.itemsize // 4 for piece in pieces)}")
                pieces = (
                    matrix_of(pq.read_table(p, columns=[field.name])[field.name]).astype(kind)
                    for p in paths
                )
            _write_array(archive, field.name, pieces, lines)


def _write_array(
    archive: zipfile.ZipFile, name: str, pieces: Iterator[np.ndarray], lines: int
) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        for number, piece in enumerate(pieces):
            if number == 0:
                header = {
                    "descr": np.lib.format.dtype_to_descr(piece.dtype),
                    "fortran_order": False,
                    "shape": (lines, *piece.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(stream, header)
            stream.write(np.ascontiguousarray(piece).tobytes())


def matrix_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column as an array `[n]`, or `[n, D]` for vectors; strings have a fixed width."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    return column.to_numpy(zero_copy_only=False)


def _to_h5ad(paths: list[Path], out: Path) -> None:
    """Writes AnnData, which holds all vectors in memory."""
    from moe_ablm.inference.annotated_matrix import annotated

    annotated(pa.concat_tables(map(pq.read_table, paths))).write_h5ad(out)


WRITERS: dict[str, Callable[[list[Path], Path], None]] = {
    ".csv": _to_csv,
    ".parquet": _to_parquet,
    ".jsonl": _to_jsonl,
    ".npz": _to_npz,
    ".h5ad": _to_h5ad,  # of tables with vectors
}


def file_identity(path: Path) -> dict[str, Any]:
    """Path, size and modification time of an input, to see whether it changed."""
    stat = path.stat()
    return {"name": str(path.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns}
