"""Text files that come in archives, read in memory, never written to disk, with bounds."""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple, TextIO

from moe_ablm.errors import UserError

LARGEST = 2 << 30  # bytes that a file may give when decompressed
LONGEST_LINE = 1 << 20  # characters
_DAMAGED = (
    *(EOFError, OSError, RuntimeError, NotImplementedError),
    *(zlib.error, zipfile.BadZipFile, tarfile.TarError),
)
_LMDB = b"\xde\xc0\xef\xbe"  # at byte 16 of its first page
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in (2, 3, 4, 5))


class Member(NamedTuple):
    """A text file.

    Attributes:
      where: its name for messages.
      stem: its name without suffixes.
      head: its first characters.
      text: its content, to be read before the next member is requested.
    """

    where: str
    stem: str
    head: str
    text: TextIO

    def lines(self) -> Iterator[str]:
        """Lines with their ends.

        Raises:
          UserError: one is longer than `LONGEST_LINE`.
        """
        while line := self.text.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE and not line.endswith(("\n", "\r")):
                raise UserError(f"{self.where}: a line of more than {LONGEST_LINE} characters")
            yield line


def members(path: Path, largest: int = LARGEST) -> Iterator[Member]:
    """The text files in a zip or tar archive, or the file itself, plain or gzip.

    Args:
      path: the file.
      largest: most bytes of all members together.

    Raises:
      UserError: a damaged archive, one that grows beyond `largest`, or what is not text.
    """
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        budget = _Budget(path, largest)
        if magic == b"PK\x03\x04":
            yield from _zipped(path, raw, budget)
            return
        plain = gzip.GzipFile(fileobj=raw) if magic.startswith(b"\x1f\x8b") else raw
        stream = io.BufferedReader(_Bounded(plain, budget), 1 << 16)
        if stream.peek(512)[257:262] == b"ustar":
            yield from _tarred(path, stream, _Budget(path, largest))
        else:
            yield _member(path, "", stream)


def _zipped(path: Path, raw: BinaryIO, budget: "_Budget") -> Iterator[Member]:
    try:
        archive = zipfile.ZipFile(raw)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    for info in archive.infolist():
        if _wanted(info.filename, info.is_dir()):
            try:
                inner = archive.open(info)
            except _DAMAGED as error:
                raise _damaged(path, error) from error
            stream = io.BufferedReader(_Bounded(inner, budget), 1 << 16)
            yield _member(path, info.filename, stream)


def _tarred(path: Path, stream: BinaryIO, budget: "_Budget") -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                if _wanted(info.name, not info.isfile()) and (file := archive.extractfile(info)):
                    inner = _Bounded(file, budget)
                    yield _member(path, info.name, io.BufferedReader(inner, 1 << 16))
    except tarfile.TarError as error:
        raise _damaged(path, error) from error


def _wanted(name: str, directory: bool) -> bool:
    parts = PurePosixPath(name).parts
    return not directory and not any(p.startswith((".", "__MACOSX")) for p in parts)


def _member(path: Path, inside: str, stream: "io.BufferedReader[_Bounded]") -> Member:
    where = f"{path}: {inside}" if inside else str(path)
    head = stream.peek(4096)[:4096]
    if head[16:20] == _LMDB or head.startswith(_PICKLES):
        raise UserError(
            f"{where}: an LMDB database or a Python pickle; pickles can run code and are not read: "
            "give TAPE's raw data (JSON), or write the records of tape.datasets.LMDBDataset as "
            "JSON lines, arrays by .tolist()"
        )
    if b"\0" in head:
        raise UserError(f"{where}: not a text file; expected CSV, FASTA or JSON in UTF-8")
    name = PurePosixPath(inside or path.name).name
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
    return Member(where, name.partition(".")[0], head.decode("utf-8-sig", "replace"), text)


class _Budget:
    def __init__(self, path: Path, left: int):
        self.path, self.left = path, left

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.path}: gives too many bytes when decompressed: refused as a decompression "
                "bomb; unpack it yourself if you trust it, and give single files"
            )


class _Bounded(io.RawIOBase):
    """A stream that may give so many bytes, and whose damage is the user's to mend."""

    def __init__(self, stream: io.BufferedIOBase | IO[bytes], budget: _Budget):
        self._stream, self._budget = stream, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except _DAMAGED as error:
            raise _damaged(self._budget.path, error) from error
        self._budget.spend(len(piece))
        buffer[: len(piece)] = piece
        return len(piece)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or truncated ({error}): fetch the file again")
