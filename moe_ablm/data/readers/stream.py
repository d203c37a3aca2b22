"""Bytes of a text file as blocks of whole lines: decompressed, bounded, with one line end."""

import gzip
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from moe_ablm.data.readers.report import Report
from moe_ablm.errors import UserError

BLOCK = 4 << 20
LONGEST_LINE = 1 << 20
# Repertoires compress 5 to 40 times. A file beyond this ratio is no repertoire; it is refused
# before it fills the disk (memory is bounded by BLOCK + LONGEST_LINE in any case).
LARGEST_RATIO = 200
_RATIO_APPLIES_FROM = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_UNPACK = "archive; unpack it, or compress with gzip"
_WORKBOOK = "an Excel workbook; save the sheet as CSV UTF-8, or with pandas: read_excel, to_csv"
_EXCEL = (".xlsx", ".xlsm", ".xls", ".ods")
_REFUSED = {
    b"PK\x03\x04": f"zip {_UNPACK}",
    b"BZh": f"bzip2 {_UNPACK}",
    b"\xfd7zXZ": f"xz {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"zstd {_UNPACK}",
    b"\xd0\xcf\x11\xe0": _WORKBOOK,
    b"\x89HDF": (
        "an HDF5 file (AnnData, .h5ad, .h5); write its contigs as an AIRR table: "
        "scirpy.io.write_airr(adata, 'contigs.tsv'), or give Cell Ranger's contig annotations"
    ),
}


def open_bytes(path: Path):
    """The file's raw and its decompressed binary stream (the same object when not compressed)."""
    raw = path.open("rb")
    magic = raw.read(6)
    raw.seek(0)
    for start, what in _REFUSED.items():
        if magic.startswith(start):
            raw.close()
            if path.suffix.lower() in _EXCEL:
                what = _WORKBOOK
            raise UserError(f"--input {path}: {what}")
    return raw, gzip.GzipFile(fileobj=raw) if magic.startswith(b"\x1f\x8b") else raw


def line_blocks(
    path: Path, report: Report, *, longest_line: int = LONGEST_LINE, block: int = BLOCK
) -> Iterator[tuple[int, bytes]]:
    r"""Streams a text file, plain or gzip, as blocks of whole lines.

    CR LF and CR become LF, and the last line ends in LF. A byte-order mark is removed.

    Yields:
      `(number of the block's first line counted from 1, block)`.

    Raises:
      UserError: truncated or damaged gzip, a line longer than `longest_line`, or more than
        `LARGEST_RATIO` decompressed bytes for each byte of the file.
    """
    raw, stream = open_bytes(path)
    line, rest, total = 1, b"", 0
    with raw, stream:
        while True:
            pieces: list[bytes] = []
            try:
                _fill(pieces, stream, block)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                read = line - 1 + sum(piece.count(b"\n") for piece in pieces)
                raise UserError(
                    f"{path}: gzip data damaged or truncated after line {read} ({error}): fetch "
                    "the file again"
                ) from error
            chunk = b"".join(pieces)
            total += len(chunk)
            consumed = raw.tell()
            report.progress(consumed)
            if total > max(_RATIO_APPLIES_FROM, LARGEST_RATIO * consumed):
                raise UserError(
                    f"{path}: {consumed} compressed bytes gave more than {total} (over "
                    f"{LARGEST_RATIO}:1): refused as a decompression bomb; unpack it yourself if "
                    "you trust it"
                )
            if not chunk:
                break
            rest = rest + chunk
            held = b"\r" if rest.endswith(b"\r") else b""  # its LF may open the next chunk
            rest = rest[: len(rest) - len(held)]
            if b"\r" in rest:
                rest = rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            cut = rest.rfind(b"\n") + 1
            whole, rest = rest[:cut], rest[cut:] + held
            before = _lines_before_a_longer(whole, longest_line)
            if before is None and len(rest) > longest_line:
                before = whole.count(b"\n")
            if before is not None:
                raise UserError(
                    f"{path}: line {line + before} is longer than {longest_line} bytes: not a "
                    "table or FASTA of sequences"
                )
            if whole and line == 1:
                whole = whole.removeprefix(_BYTE_ORDER_MARK)
            if whole:
                yield line, whole
                line += whole.count(b"\n")
    rest = rest.replace(b"\r", b"\n")
    if line == 1:
        rest = rest.removeprefix(_BYTE_ORDER_MARK)
    if rest:
        yield line, rest if rest.endswith(b"\n") else rest + b"\n"


def _fill(pieces: list[bytes], stream, size: int) -> None:
    """Appends up to `size` bytes; what was read before an error is in `pieces`."""
    while size > 0 and (piece := stream.read1(size)):
        pieces.append(piece)
        size -= len(piece)


def _lines_before_a_longer(whole: bytes, limit: int) -> int | None:
    """Lines before the first one of more than `limit` bytes; None where there is no such line.

    Looks at one newline in each `limit` bytes instead of at all of them.
    """
    start = 0
    while len(whole) - start > limit:
        end = whole.rfind(b"\n", start, start + limit + 1)
        if end < 0:
            return whole.count(b"\n", 0, start)
        start = end + 1
    return None


def first_lines(path: Path, count: int, comment: str | None = None) -> list[str]:
    """Up to `count` first lines that are neither blank nor a comment, to recognise the format.

    Undecodable bytes become U+FFFD.
    """
    kept: list[str] = []
    for _, block in line_blocks(path, Report(str(path)), block=64 << 10):
        lines = (
            line
            for line in block.split(b"\n")
            if line.strip() and not (comment and line.startswith(comment.encode()))
        )
        kept += [line.decode("utf-8", "replace") for line in islice(lines, count - len(kept))]
        if len(kept) == count:
            break
    return kept
