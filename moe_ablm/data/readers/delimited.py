"""Delimited text as record batches of strings that know their row and line numbers."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from moe_ablm.data.readers.columns import LINE, ROW, ROWS_PER_BATCH, Choose
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.readers.stream import first_lines, line_blocks
from moe_ablm.errors import UserError

_COMMENT = "##"  # begins the lines above the header of tables of BD Rhapsody


class _Table(NamedTuple):
    """Column names, delimiter, and {column to deliver: column of the file}."""

    header: list[str]
    delimiter: str
    columns: Mapping[str, str]


def header_of_text(path: Path) -> list[str]:
    """Column names of a delimited file; an OAS metadata line is passed over."""
    lines = [line for line in first_lines(path, 2, _COMMENT) if metadata_of(line) is None]
    if not lines:
        raise UserError(f"--input {path}: no header line")
    line = lines[0].encode()
    return _header(line, delimiter_of(line), str(path))


def metadata_of(line: str) -> dict | None:
    """The JSON of the first line of OAS files (bare, or quoted as a CSV field), else None."""
    if not line.startswith(("{", '"{')):
        return None
    try:
        texts = (line, *next(csv.reader([line]), [])[:1])
    except csv.Error:
        return None
    for text in texts:
        if text.startswith("{"):
            try:
                content = json.loads(text[: text.rfind("}") + 1])
            except ValueError:
                continue
            if isinstance(content, dict):
                return content
    return None


def read_delimited(path: Path, report: Report, choose: Choose) -> Iterator[pa.RecordBatch]:
    """Streams a CSV or TSV file (plain or gzip); a row is a line.

    A first line of JSON, as OAS writes it, goes to `report.metadata`; lines above the header that
    begin with ## are passed over.

    Args:
      path: the file; the delimiter (comma, tab, semicolon) is the most frequent one of the header.
      report: counts the rows read and the malformed ones (wrong number of columns, quoting, NUL
        bytes, undecodable text).
      choose: gives the columns to deliver for a header.

    Yields:
      Batches with the chosen columns as strings, `_row` (from 1, without the header) and `_line`.
    """
    table: _Table | None = None
    for line, block in line_blocks(path, report):
        while table is None and block:
            first, _, block = block.partition(b"\n")
            line += 1
            metadata = metadata_of(first.decode("utf-8", "replace"))
            if metadata is not None and not report.metadata:
                report.metadata = metadata
                continue
            if not first.strip() or first.startswith(_COMMENT.encode()):
                continue
            delimiter = delimiter_of(first)
            header = _header(first, delimiter, report.source)
            table = _Table(header, delimiter, choose(header))
        if table and block:
            yield from _parse_block(block, line, table, report)
    if table is None or report.read == 0:
        raise UserError(f"{report.source}: no rows below the header")


def delimiter_of(header: bytes) -> str:
    """The delimiter of a header line: tab, comma or semicolon, whichever occurs most."""
    return max("\t,;", key=lambda d: header.count(d.encode()))


def _header(line: bytes, delimiter: str, source: str) -> list[str]:
    if b"\0" in line:
        raise UserError(
            f"{source}: NUL byte in the header: not a text table (UTF-16? save as UTF-8)"
        )
    try:
        names = next(csv.reader([line.decode()], delimiter=delimiter, strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: the header cannot be read ({error}); save as UTF-8") from error
    return [name.strip() for name in names]


def _parse_block(
    block: bytes, line: int, table: _Table, report: Report
) -> Iterator[pa.RecordBatch]:
    """Fast where every line is a row; line by line where one is not, to name or count it."""
    parsed = None
    if b"\0" not in block and b"\n\n" not in block and not block.startswith(b"\n"):
        parsed = _parse_clean(block, table)
    if parsed is None:
        parsed = _parse_lines(block, line, table, report)
    else:
        first = report.read + 1
        report.read += parsed.num_rows
        rows = np.arange(parsed.num_rows)
        parsed = parsed.append_column(ROW, pa.array(first + rows))
        parsed = parsed.append_column(LINE, pa.array(line + rows))
    if parsed.num_rows:
        yield from parsed.to_batches(max_chunksize=ROWS_PER_BATCH)


def _parse_clean(block: bytes, table: _Table) -> pa.Table | None:
    header, delimiter, columns = table
    wanted = list(dict.fromkeys(columns.values()))
    # Columns are called by their position: a name may be there twice among those not wanted.
    number = {name: f"{header.index(name)}" for name in wanted}
    try:
        parsed = pacsv.read_csv(
            pa.BufferReader(block),
            read_options=pacsv.ReadOptions(
                column_names=[f"{i}" for i in range(len(header))],
                use_threads=False,
                block_size=len(block) + 1,
            ),
            parse_options=pacsv.ParseOptions(delimiter=delimiter, ignore_empty_lines=False),
            convert_options=pacsv.ConvertOptions(
                include_columns=list(number.values()),
                column_types={n: pa.string() for n in number.values()},
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        return None
    if parsed.num_rows != block.count(b"\n"):  # a quoted field ran over a line end
        return None
    return pa.table({name: parsed[number[column]] for name, column in columns.items()})


def _parse_lines(block: bytes, line: int, table: _Table, report: Report) -> pa.Table:
    header, delimiter, columns = table
    where = {name: header.index(column) for name, column in columns.items()}
    kept: dict[str, list] = {name: [] for name in (*columns, ROW, LINE)}
    for number, text in enumerate(block.split(b"\n")[:-1], start=line):
        if not text.strip():
            continue
        report.read += 1
        fields = _fields(text, delimiter, len(header), place(report.read, number), report)
        if fields is None:
            continue
        for name, i in where.items():
            kept[name].append(fields[i])
        kept[ROW].append(report.read)
        kept[LINE].append(number)
    integers = {ROW: pa.int64(), LINE: pa.int64()}
    return pa.table({n: pa.array(v, integers.get(n, pa.string())) for n, v in kept.items()})


def _fields(
    text: bytes, delimiter: str, expected: int, where: str, report: Report
) -> list[str] | None:
    if b"\0" in text:
        column = text[: text.index(0)].count(delimiter.encode()) + 1
        report.bad_row(where, "NUL byte", f"NUL byte in column {column}")
        return None
    try:
        fields = next(csv.reader([text.decode()], delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        column = text[: error.start].count(delimiter.encode()) + 1
        report.bad_row(where, "not UTF-8", f"column {column} is not UTF-8 ({error.reason})")
        return None
    except csv.Error as error:
        reason = "field too large" if "larger than" in str(error) else "wrong quoting"
        report.bad_row(where, reason, f"{reason} ({error})")
        return None
    if len(fields) != expected:
        detail = f"found {len(fields)} columns, expected {expected} as in the header"
        report.bad_row(where, "wrong number of columns", detail)
        return None
    return fields
