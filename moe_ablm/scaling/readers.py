"""Files and directories of runs to raw rows."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

from moe_ablm.errors import UserError
from moe_ablm.scaling.run_directories import read_run_directories
from moe_ablm.scaling.sheet import Row, Sheet


def read_sheet(path: Path, curves: bool = False, drop_bad: bool = False) -> Sheet:
    """A `.csv`, `.tsv` (also `.gz`) or `.parquet` file, or a directory that holds runs.

    With `curves`, a run directory gives a row for every evaluation in its `results.jsonl`. With
    `drop_bad`, damaged run directories are skipped with a reason.

    Raises:
      UserError: the path is absent, of another kind, empty or damaged.
    """
    if path.is_dir():
        return read_run_directories(path, curves, drop_bad)
    if not path.is_file():
        raise UserError(f"--input {path}: no such file or directory")
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return _read_parquet(path)
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    if suffixes[-1:] in ([".csv"], [".tsv"]):
        return _read_delimited(path, "\t" if suffixes[-1] == ".tsv" else ",")
    raise UserError(
        f"--input {path}: expected .csv, .tsv, .csv.gz, .tsv.gz, .parquet or a directory of runs"
    )


def _read_delimited(path: Path, delimiter: str) -> Sheet:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            rows = list(_delimited_rows(path, reader, header))
    except UnicodeDecodeError as error:
        raise UserError(
            f"--input {path}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"--input {path}, row {reader.line_num}: damaged CSV: {error}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"--input {path}: cannot be read: {error}") from None
    return Sheet(path, header, rows)


def _check_header(path: Path, header: list[str]) -> None:
    if not any(header):
        raise UserError(f"--input {path}, row 1: no header; expected the names of the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"--input {path}, row 1: column '{twice[0]}' appears twice; rename one")


def _delimited_rows(path: Path, reader, header: list[str]) -> Iterator[Row]:
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, row {reader.line_num}"
        if len(cells) != len(header):
            raise UserError(
                f"{where}: {len(cells)} cells where the header has {len(header)} columns"
            )
        yield Row(where, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path) -> Sheet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        message = str(error).splitlines()[0]
        raise UserError(f"--input {path}: not a readable parquet file: {message}") from None
    _check_header(path, table.column_names)
    rows = [Row(f"{path}, row {i}", values) for i, values in enumerate(table.to_pylist(), 1)]
    return Sheet(path, table.column_names, rows)
