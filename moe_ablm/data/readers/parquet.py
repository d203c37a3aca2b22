"""Parquet as record batches of strings that know their row numbers, in bounded memory."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_ablm.data.readers.columns import LINE, ROW, ROWS_PER_BATCH, Choose, listed
from moe_ablm.data.readers.report import Report
from moe_ablm.errors import UserError

_LARGEST_COLUMN_CHUNK = 1 << 30
_BYTES_AT_ONCE = 64 << 20
_LONGEST_VALUE = 1 << 20
_READ_AS_TEXT = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
# What pyarrow raises for damaged parquet files.
_DAMAGED = (pa.ArrowException, OSError, ValueError, MemoryError)


def is_parquet(path: Path) -> bool:
    """Whether the file starts as parquet files do."""
    with path.open("rb") as f:
        return f.read(4) == b"PAR1"


def header_of_parquet(path: Path) -> list[str]:
    """Column names of a parquet file."""
    return _parquet_file(path).schema_arrow.names


def read_parquet(path: Path, report: Report, choose: Choose) -> Iterator[pa.RecordBatch]:
    """Streams a parquet file; batches as `read_delimited` gives them (`_line` is 0).

    Raises:
      UserError: damaged file, column that is no text or number, or data that would decompress
        beyond bounds.
    """
    file = _parquet_file(path)
    columns = choose(file.schema_arrow.names)
    wanted = list(dict.fromkeys(columns.values()))
    for name in wanted:
        kind = file.schema_arrow.field(name).type
        if not (_is_text(kind) or any(of_type(kind) for of_type in _READ_AS_TEXT)):
            raise UserError(f"{path}: column {name} is {kind}, expected text; convert it first")
    size, groups = path.stat().st_size, file.num_row_groups
    dictionaries = _parquet_file(path, read_dictionary=wanted)
    for group in range(groups):
        try:
            rows = _rows_at_once(path, file, dictionaries, group, wanted)
            before, of = report.read, file.metadata.row_group(group).num_rows
            for batch in file.iter_batches(
                rows, row_groups=[group], columns=wanted, use_threads=False
            ):
                texts = _as_strings(batch, columns, report)
                share = (group + min((report.read - before) / of, 1)) / groups
                report.progress(round(size * share))
                yield texts
        except _DAMAGED as error:
            raise UserError(
                f"{path}: damaged after row {report.read} ({_one_line(error)})"
            ) from error
    if report.read == 0:
        raise UserError(f"{path}: no rows; found {listed(file.schema_arrow.names)}")


def _parquet_file(path: Path, **options) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, pre_buffer=False, **options)
        file.schema_arrow.names  # noqa: B018 - decodes the names, which may be damaged too
        return file
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged parquet file ({_one_line(error)})") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _rows_at_once(
    path: Path, file: pq.ParquetFile, dictionaries: pq.ParquetFile, group: int, wanted: list[str]
) -> int:
    """How many rows of a row group are read together, so that a column needs bounded memory.

    Encodings can make little of much: a dictionary stores a value once however often it occurs,
    and DELTA_BYTE_ARRAY only what differs from the value before. So the longest value is looked at
    before the rows are.
    """
    chunks = file.metadata.row_group(group)
    longest = 1
    # What the metadata of a column say may contradict the schema: then `column()` ends the process
    # (pyarrow 26), where reading raises. So a row is read first, unless that takes much memory.
    small = chunks.total_byte_size <= _LARGEST_COLUMN_CHUNK
    if small:
        longest = max(longest, _longest_in_dictionaries(path, dictionaries, group, wanted))
    for i in range(chunks.num_columns):
        if file.schema.column(i).path not in wanted:
            continue
        chunk = chunks.column(i)
        size = chunk.total_uncompressed_size
        if size > _LARGEST_COLUMN_CHUNK:
            raise UserError(
                f"{path}: column {chunk.path_in_schema} of row group {group} holds {size} bytes, "
                f"more than {_LARGEST_COLUMN_CHUNK}: write the file with smaller row groups"
            )
        delta = "DELTA_BYTE_ARRAY" in chunk.encodings
        longest = max(longest, size if delta else size // max(chunks.num_rows, 1))
    if not small:
        longest = max(longest, _longest_in_dictionaries(path, dictionaries, group, wanted))
    return max(1, min(ROWS_PER_BATCH, _BYTES_AT_ONCE // longest))


def _longest_in_dictionaries(
    path: Path, file: pq.ParquetFile, group: int, wanted: list[str]
) -> int:
    longest = 0
    rows = file.iter_batches(1, row_groups=[group], columns=wanted, use_threads=False)
    for batch in islice(rows, 1):
        for column in batch.columns:
            if pa.types.is_dictionary(column.type) and len(column.dictionary):
                values = column.dictionary.cast(pa.large_string())
                longest = max(longest, pc.max(pc.binary_length(values)).as_py() or 0)
    if longest > _LONGEST_VALUE:
        raise UserError(
            f"{path}: a column holds a value of {longest} bytes, more than {_LONGEST_VALUE}: no "
            "sequence"
        )
    return longest


def _as_strings(
    batch: pa.RecordBatch, columns: Mapping[str, str], report: Report
) -> pa.RecordBatch:
    arrays = {n: pc.fill_null(batch[c].cast(pa.string()), "") for n, c in columns.items()}
    for array in arrays.values():
        array.validate(full=True)  # parquet does not check that its text is UTF-8
    rows = np.arange(report.read + 1, report.read + 1 + batch.num_rows)
    report.read += batch.num_rows
    arrays |= {ROW: pa.array(rows), LINE: pa.array(np.zeros(len(rows), np.int64))}
    return pa.record_batch(arrays)


def _one_line(error: Exception) -> str:
    """An exception's text in one line of at most 200 characters."""
    return re.sub(r"\s+", " ", str(error))[:200]
