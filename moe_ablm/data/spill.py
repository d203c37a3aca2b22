"""Scratch space on disk for data about all rows that would not fit in memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.errors import UserError
from moe_ablm.files import locked

PARTITIONS = 64
_ROWS_AT_ONCE = 65_536


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that only this process uses; removed at the end.

    Scratch files that a killed process left for the same `out` are removed first.

    Raises:
      UserError: another process is writing `out`.
    """
    lock = out.parent / f".{out.name}.lock"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror} ({error.filename}): choose a directory that can be "
            "written"
        ) from error
    with _locked(lock, out):
        for kind in ("partial", "scratch"):
            for stale in out.parent.glob(f".{out.name}.{kind}-*"):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.scratch-", dir=out.parent))
            try:
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(lock: Path, out: Path) -> Iterator[None]:
    while True:
        stack = ExitStack()
        try:
            f = stack.enter_context(locked(lock))
        except BlockingIOError as error:
            owner = lock.read_text().strip() or "unknown"
            raise UserError(
                f"--out {out}: another process (pid {owner}) is writing it; wait for it or "
                "choose another name"
            ) from error
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be locked ({error.strerror}): use a file system with flock"
            ) from error
        with stack:
            # The owner before us may have removed the file after we opened it.
            if lock.exists() and os.fstat(f.fileno()).st_ino == lock.stat().st_ino:
                f.truncate(0)
                with suppress(OSError):  # on a full disk it is locked without a name
                    os.write(f.fileno(), f"{os.getpid()}\n".encode())
                yield
                return


class Partitions:
    """Rows on disk, divided by a hash so that equal keys come back together, a part at a time."""

    def __init__(self, directory: Path, name: str, schema: pa.Schema):
        self._paths = [directory / f"{name}-{p:03d}.arrow" for p in range(PARTITIONS)]
        self._schema = schema
        self._files: list[pa.OSFile] = []
        self._writers: list[pa.ipc.RecordBatchStreamWriter] = []
        self._pending: list[pa.RecordBatch] = []
        self._keys: list[np.ndarray] = []
        self._held: list[pa.Table] = []  # the parts, where all rows fit into one buffer

    def add(self, batch: pa.RecordBatch, key: np.ndarray) -> None:
        """Appends rows; `key` (uint64 `[rows]`) says which part each belongs to."""
        self._pending.append(batch)
        self._keys.append(key)
        if sum(map(len, self._keys)) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        if not self._files:
            self._files = [pa.OSFile(str(path), "wb") for path in self._paths]
            self._writers = [pa.ipc.new_stream(f, self._schema) for f in self._files]
        for writer, rows in zip(self._writers, self._divided(), strict=True):
            if rows.num_rows:
                writer.write_table(rows)

    def _divided(self) -> list[pa.Table]:
        """The pending rows, which are pending no longer, by part."""
        rows = pa.Table.from_batches(self._pending, self._schema).combine_chunks()
        part = (np.concatenate(self._keys) % np.uint64(PARTITIONS)).astype(np.int64)
        rows = rows.take(pa.array(np.argsort(part, kind="stable")))
        ends = np.cumsum(np.bincount(part, minlength=PARTITIONS)).tolist()
        self._pending, self._keys = [], []
        return [
            rows.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]

    def close(self) -> None:
        """Ends writing; `parts` may then be called, as often as wanted."""
        if not self._files and self._pending:
            self._held = self._divided()
        self._flush()
        for closing in (*self._writers, *self._files):
            closing.close()

    def parts(self) -> Iterator[pa.Table]:
        """The non-empty parts; rows of a part are in the order in which they were added."""
        yield from (part for part in self._held if part.num_rows)
        for path in self._paths:
            if path.exists():
                with pa.OSFile(str(path)) as f, pa.ipc.open_stream(f) as stream:
                    part = stream.read_all()
                if part.num_rows:
                    yield part
