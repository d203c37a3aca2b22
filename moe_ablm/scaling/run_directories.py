"""Directories of our runs to raw rows: `run.json`, settings of `config.json`, curves."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.results import is_extended
from moe_ablm.scaling.runs import TUNED
from moe_ablm.scaling.schedules import KEYS, history, path_of, rates
from moe_ablm.scaling.sheet import Row, Sheet

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


def read_run_directories(path: Path, curves: bool, drop_bad: bool) -> Sheet:
    """The runs in a directory and below; see `readers.read_sheet`.

    Raises:
      UserError: there is none, or one is damaged and `drop_bad` is not set.
    """
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
