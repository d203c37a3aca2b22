"""Rows of a table, whatever it is stored as."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moe_ablm.data.readers.columns import Choose
from moe_ablm.data.readers.delimited import header_of_text, read_delimited
from moe_ablm.data.readers.parquet import header_of_parquet, is_parquet, read_parquet
from moe_ablm.data.readers.report import Report


def header_of(path: Path) -> list[str]:
    """Column names of a table, parquet or text."""
    return header_of_parquet(path) if is_parquet(path) else header_of_text(path)


def read_rows(path: Path, report: Report, choose: Choose) -> Iterator[pa.RecordBatch]:
    """Streams a table, parquet or text (see `read_parquet`, `read_delimited`)."""
    read = read_parquet if is_parquet(path) else read_delimited
    yield from read(path, report, choose)
