"""Files and run directories to raw rows, and checks of their values."""

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.results import is_extended
from moe_ablm.scaling.inputs import BELOW_ONE, FROM_ZERO
from moe_ablm.scaling.runs import TUNED
from moe_ablm.scaling.schedules import KEYS, history, path_of, rates

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
    "train_loss": "train_loss_final",
}
# of the chains that no training antibody has: the loss where every run has it
NOVEL_LOSS = "valid_loss_novel"
# rates of `config.model`, whose mean is the role dropout
DROPOUTS = ("attention_dropout", "hidden_dropout", "embedding_dropout")
FINISHED = ("complete", "done", "finished")
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
COUNTS = ("params", "total_params", "tokens", "unique_tokens", "unique_pairs", "flops")
# A smaller count is in a larger unit: 35 for 35 million.
SMALLEST_COUNT = 1e3
LARGEST_COUNT = 1e40
LOSSES = (1e-9, 1e9)  # range of nats, bits and perplexities
THOUSANDFOLD = 1e3  # a count that is off by this factor is in another unit
LN_BITS = math.log(1.0 / math.log(2.0))  # ln of (bits per token / nats per token)


class Row(NamedTuple):
    """One row of a table: its place, and its values by column name (text or numbers)."""

    source: str
    values: dict[str, Any]


@dataclass
class Sheet:
    """All rows of one input, and what was left out with the reason."""

    path: Path
    header: list[str]
    rows: list[Row]
    is_runs: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    for file in files:
        if is_extended(file) and (curves or _never_cooled(file)):
            sheet.skipped.append((str(file), "the run that goes on from it has its curve"))
            continue
        try:
            values = _read_json(file)
            status = str(values.get("status", "")).lower()
            if status not in FINISHED:
                sheet.skipped.append((str(file), f"status is '{status}', not '{FINISHED[0]}'"))
                continue
            values["run"] = str(file.parent)
            values |= settings_of(file.with_name("config.json"))
            rows = list(_curve_rows(file, values)) if curves else [Row(str(file), values)]
        except UserError as error:
            if not drop_bad:
                raise UserError(f"{error}; mend it, or use --drop-bad-rows") from None
            sheet.skipped.append((str(file), str(error)))
            continue
        sheet.rows += rows
    _all_or_none(sheet, TUNED)
    sheet.header = list(dict.fromkeys(name for row in sheet.rows for name in row.values))
    _count_alike(sheet)
    return sheet


def _never_cooled(file: Path) -> bool:
    """Whether a shorter run ended at a constant rate: it is a checkpoint of the longer one."""
    config = file.with_name("config.json")
    train = _read_json(config).get("config", {}).get("train", {}) if config.exists() else {}
    return train.get("schedule") == "constant"


def _count_alike(sheet: Sheet) -> None:
    """Unique tokens of all runs by one rule, with a note where it is that of before.

    Runs of before different chains were counted once have no `corpus_tokens`, and in its place a
    `unique_tokens` that counts a chain as often as records have it.
    """
    old = [row for row in sheet.rows if "corpus_tokens" not in row.values]
    if not any("unique_tokens" in row.values for row in old):
        return
    for row in sheet.rows:
        if "corpus_tokens" in row.values:
            row.values["unique_tokens"] = row.values["corpus_tokens"]
    sheet.notes.append(
        f"{sheet.path}: unique tokens are those of the corpus, a chain counted as often as records "
        f"have it: {len(old)} of {len(sheet.rows)} runs are of before different ones were counted"
    )


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _curve_rows(file: Path, values: dict) -> Iterator[Row]:
    """A row for each evaluation of the run, with the tokens and FLOPs up to it."""
    results = file.with_name("results.jsonl")
    try:
        lines = results.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{results}: cannot be read: {error}") from None
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{results}, row {i}: not JSON: {error}") from None
        if not isinstance(record, dict) or record.get("kind") != "eval" or "loss" not in record:
            continue
        row = {**values, "step": record.get("step"), RUN_FIELDS["loss"]: record["loss"]}
        row[NOVEL_LOSS] = record.get("loss_novel")
        seen, total = record.get("tokens_seen"), values.get("tokens_seen")
        if seen is not None:
            row["tokens_seen"] = seen
            if total and values.get("flops"):
                row["flops"] = values["flops"] * seen / total
        rows.append(Row(f"{results}, row {i}", row))
    _add_schedule([row.values for row in rows], _rates_of(file.with_name("config.json")))
    yield from rows


def _add_schedule(rows: Sequence[dict], eta: np.ndarray | None) -> None:
    """What laws of whole curves need of the schedule up to each row, where that is known."""
    if eta is None:
        return
    known = [r for r in rows if isinstance(r["step"], int) and 0 < r["step"] <= eta.size]
    area, recent = path_of(eta)
    steps = np.array([r["step"] for r in known], int)
    for row, t, nodes in zip(known, steps, history(eta, steps), strict=True):
        row |= {"lr_area": float(area[t - 1]), "lr_recent": float(recent[t - 1])}
        row["lr_history"] = nodes


def settings_of(config: Path) -> dict[str, float]:
    """What is tuned of a run, by its `config.json`: the roles `TUNED`; {} where it is not known.

    `dropout` is the mean of the three rates of a model; runs of before there were any had none.

    Raises:
      UserError: the file is not JSON.
    """
    if not config.exists():
        return {}
    content = _read_json(config).get("config")
    if not isinstance(content, dict) or not isinstance(train := content.get("train"), dict):
        return {}
    found = {role: train[role] for role in TUNED if train.get(role) is not None}
    model = content.get("model")
    shares = [model.get(n, 0.0) for n in DROPOUTS] if isinstance(model, dict) else []
    if shares and all(isinstance(share, int | float) for share in shares):
        # three of .1 have a mean of .1, not of .10000000000000002, by which --where finds nothing
        found["dropout"] = round(sum(shares) / len(DROPOUTS), 9)
    return found


def _all_or_none(sheet: Sheet, roles: Sequence[str]) -> None:
    """Takes off what some rows lack: their loss counts all the same."""
    for role in roles:
        if not all(role in row.values for row in sheet.rows):
            for row in sheet.rows:
                row.values.pop(role, None)


def _rates_of(config: Path) -> np.ndarray | None:
    """Learning rates of the run's schedule; None where it is not known."""
    if not config.exists():
        return None
    try:
        train = _read_json(config)["config"]["train"]
        return rates(train)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{config}: the schedule is not readable ({error!r}); expected config.train with "
            f"{', '.join(KEYS)}"
        ) from None


class BadValue(Exception):
    """An unusable row; `what` names the column, the value found and the value expected."""

    def __init__(self, what: str, missing_loss: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.missing_loss = missing_loss


def number(row: Row, role: str, name: str) -> float:
    """A finite number in the range of its role; counts may carry a suffix, as 35M or 1.5B.

    Raises:
      BadValue: names the column, the value found and the value expected.
    """
    raw = row.values.get(name)
    text = "" if raw is None else str(raw).strip()
    if text == "":
        raise BadValue(f"column '{name}': empty", missing_loss=role in ("loss", "train_loss"))
    factor = 1.0
    if role in COUNTS and text[-1].lower() in SUFFIXES:
        factor, text = SUFFIXES[text[-1].lower()], text[:-1]
    try:
        value = float(text) * factor
    except ValueError:
        raise BadValue(f"column '{name}': found {str(raw)[:40]!r}, expected a number") from None
    if not math.isfinite(value):
        raise BadValue(f"column '{name}': found {text}, expected a finite number")
    if role in ("step", "seed"):
        return value
    if role in BELOW_ONE and not 0.0 <= value < 1.0:
        raise BadValue(f"column '{name}': found {value:g}, expected 0 <= {role} < 1")
    if role in FROM_ZERO and value == 0.0:
        return value
    if role == "experts" and value == 0.0:
        return 1.0  # our dense runs have no experts
    if value <= 0.0:
        raise BadValue(f"column '{name}': found {value:g}, expected a positive number")
    if role == "experts" and value < 1.0:
        raise BadValue(f"column '{name}': found {value:g}, expected at least one expert")
    if role in ("loss", "train_loss") and not LOSSES[0] <= value <= LOSSES[1]:
        raise BadValue(f"column '{name}': found {value:g}, which is no loss")
    if role in COUNTS and value > LARGEST_COUNT:
        raise BadValue(f"column '{name}': found {value:g} for {role}, which is too many")
    if role in COUNTS and value < SMALLEST_COUNT:
        raise BadValue(
            f"column '{name}': found {value:g} for {role}, which is too few to be a count; if it "
            f"is in millions write {value:g}M"
        )
    return value


def check_flops(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises BadValue where training FLOPs are a thousandfold off 6 N D."""
    if not all(role in values for role in ("flops", "params", "tokens")):
        return
    expected = 6.0 * values["params"] * values["tokens"]
    if not 1 / THOUSANDFOLD < values["flops"] / expected < THOUSANDFOLD:
        raise BadValue(
            f"column '{names['flops']}': found {values['flops']:g} FLOPs, and 6 times "
            f"'{names['params']}' times '{names['tokens']}' is {expected:g}: is one of them in "
            "another unit?"
        )


def few_tokens(columns: Mapping[str, np.ndarray]) -> str | None:
    """A note where tokens are so few per parameter that a unit may be wrong."""
    if "params" not in columns or "tokens" not in columns:
        return None
    ratio = float(np.median(columns["tokens"] / columns["params"]))
    if ratio >= 0.1:
        return None
    return (
        f"there are {ratio:.2g} tokens for each parameter: are tokens in thousands or millions, or "
        "the columns swapped?"
    )


def label(row: Row, name: str) -> str:
    """A text cell; empty where there is none."""
    raw = row.values.get(name)
    return "" if raw is None else str(raw).strip()


def mixed_units(log_loss: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows whose loss is in another unit than the others' (bits for nats, or perplexity).

    Compares each ln L `[n]` with a robust prediction. A change from nats to bits moves it by
    ln(1/ln 2) = .367, and a perplexity is exp(loss). Small models and short runs also lie off a
    trend, but not all by one factor. So rows are reported only where the rest scatters by less
    than 2 % and *every* outlier is off by what the unit implies.
    """
    residual = log_loss - predicted
    sd = max(1.4826 * float(np.median(np.abs(residual))), 1e-3)
    far = np.abs(residual) > max(5.0 * sd, 0.1)
    none = np.array([], int), ""
    if sd > 0.02 or not far.any():
        return none
    near = max(3.0 * sd, 0.02)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        is_perplexity = np.abs(np.log(np.maximum(log_loss, 1e-9)) - predicted) < near
        is_log = np.abs(np.exp(log_loss) / predicted - 1.0) < near
    candidates = (
        ("perplexities where the others are losses", (residual > 0) & is_perplexity),
        ("losses where the others are perplexities", (residual < 0) & is_log),
        ("bits where the others are nats", np.abs(residual - LN_BITS) < near),
        ("nats where the others are bits", np.abs(residual + LN_BITS) < near),
    )
    for unit, explained in candidates:
        if np.all(explained[far]):
            return np.flatnonzero(far), unit
    return none


def smooth_prediction(columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Least absolute deviations of ln L `[n]` on the logs of the inputs; None where rows are few.

    Squares and products of the logs are used where there are at least three rows per term.
    """
    log_loss = np.log(columns["loss"])
    logs = []
    for role in ("params", "tokens", "unique_tokens", "experts"):
        if role in columns and np.ptp(columns[role]) > 0:
            x = np.log(columns[role].astype(float))
            logs.append((x - x.mean()) / x.std())
    products = [a * b for i, a in enumerate(logs) for b in logs[i:]]
    ones = np.ones_like(log_loss)
    if log_loss.size >= 3 * (1 + len(logs) + len(products)):
        matrix = np.stack([ones, *logs, *products], axis=1)
    elif log_loss.size >= len(logs) + 5:
        matrix = np.stack([ones, *logs], axis=1)
    else:
        return None
    weights = ones
    for _ in range(50):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(matrix * root[:, None], log_loss * root, rcond=None)[0]
        residual = log_loss - matrix @ solution
        weights = 1.0 / np.maximum(np.abs(residual), 1e-4)
    return matrix @ solution
