"""Files and run directories to raw rows: what is on disk, before anything is believed."""

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moe_ablm.errors import UserError

# Fields of `run.json` by the role they play in a law.
RUN_FIELDS = {
    "params": "params_active",
    "total_params": "params_total",
    "tokens": "tokens_seen",
    "unique_tokens": "unique_tokens",
    "flops": "flops",
    "experts": "experts",
    "router": "router",
    "seed": "seed",
    "loss": "valid_loss_final",
}
FINISHED = ("complete", "done", "finished")


@dataclass(frozen=True)
class Row:
    """One row of a table: where it stands and its values by column name (text or numbers)."""

    source: str
    values: dict[str, object]


@dataclass
class Sheet:
    """All rows of one input, with what had to be left out and why."""

    path: Path
    header: list[str]
    rows: list[Row]
    is_runs: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_sheet(path: Path, curves: bool = False, drop_bad: bool = False) -> Sheet:
    """A `.csv`, `.tsv` (also `.gz`) or `.parquet` file, or a directory that holds runs.

    With `curves`, a run directory gives a row for every evaluation in its `results.jsonl`. With
    `drop_bad`, damaged run directories are skipped with a reason.

    Raises:
      UserError: the path is absent, of another kind, empty or damaged.
    """
    if path.is_dir():
        return _read_run_directories(path, curves, drop_bad)
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


def _read_run_directories(path: Path, curves: bool, drop_bad: bool) -> Sheet:
    files = sorted(path.rglob("run.json"))
    if not files:
        raise UserError(f"--input {path}: no run.json in it or below; expected directories of runs")
    sheet = Sheet(path, [], [], is_runs=True)
    names: dict[str, None] = {}
    for file in files:
        try:
            values = _read_json(file)
            status = str(values.get("status", "")).lower()
            if status not in FINISHED:
                sheet.skipped.append((str(file), f"status is '{status}', not '{FINISHED[0]}'"))
                continue
            values["run"] = str(file.parent)
            rows = list(_curve_rows(file, values)) if curves else [Row(str(file), values)]
        except UserError as error:
            if not drop_bad:
                raise UserError(f"{error}; mend it, or use --drop-bad-rows") from None
            sheet.skipped.append((str(file), str(error)))
            continue
        sheet.rows += rows
        for row in rows:
            names.update(dict.fromkeys(row.values))
    sheet.header = list(names)
    return sheet


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _curve_rows(file: Path, values: dict) -> Iterator[Row]:
    """A row for each evaluation of the run, its tokens and FLOPs counted up to there."""
    results = file.with_name("results.jsonl")
    try:
        lines = results.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{results}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{results}, row {number}: not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("kind") != "eval" or "loss" not in record:
            continue
        row = {**values, "step": record.get("step"), RUN_FIELDS["loss"]: record["loss"]}
        seen, total = record.get("tokens_seen"), values.get("tokens_seen")
        if seen is not None:
            row["tokens_seen"] = seen
            if total and values.get("flops"):
                row["flops"] = values["flops"] * seen / total
        yield Row(f"{results}, row {number}", row)
