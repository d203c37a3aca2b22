"""Rows to a checked table of runs; every dropped or changed row is reported with its reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.readers import read_sheet
from moe_ablm.scaling.run_directories import NOVEL_LOSS, RUN_FIELDS
from moe_ablm.scaling.runs import Runs, best_settings
from moe_ablm.scaling.sheet import Row, Sheet
from moe_ablm.scaling.units import check_flops, few_tokens, mixed_units, smooth_prediction
from moe_ablm.scaling.values import BadValue, label, number

NUMBERS = (
    "params",
    "total_params",
    "tokens",
    "unique_tokens",
    "unique_pairs",
    "flops",
    "experts",
    "granularity",
    "sparsity",
    "loss",
    "train_loss",
    "step",
    "seed",
    "lr",
    "batch",
    "weight_decay",
    "dropout",
    "lr_area",
    "lr_recent",
)
# the columns of roles that have several names, where they are not mapped
OTHER_NAMES = {
    "train_loss": ("train_loss", "train_loss_final"),
    "lr": ("lr", "learning_rate"),
    "batch": ("batch", "bs", "batch_size"),
    "weight_decay": ("weight_decay", "wd"),
}
LABELS = ("router", "run")
ROLES = NUMBERS + LABELS
OF_SCHEDULES = "lr_history"  # an array a row, of folders of runs


@dataclass(frozen=True)
class Reading:
    """How to read the input: see the flags of `python -m moe_ablm fit`."""

    columns: Mapping[str, str] | None = None
    where: Mapping[str, str] | None = None
    drop_bad_rows: bool = False
    drop_largest_losses: int = 0
    tokens_per_pair: float | None = None
    keep_duplicates: bool = False  # equal rows are replicates with equal (rounded) losses
    curves: bool = False  # keep every step of a run, for the envelope
    need_loss: bool = True  # False for a planned grid
    settings: bool = False  # keep every learning rate, batch ..., not the best ones
    gaps: bool = False  # read the training losses too; a row without one has no gap
    covariates: tuple[str, ...] = ()  # settings that laws know, of which every one is kept


def read_runs(inputs: Sequence[Path | str], reading: Reading = Reading()) -> Runs:
    """Run directories and tables to one checked `Runs`.

    Raises:
      UserError: names the file, the row and the column of what is wrong.
    """
    columns = dict(reading.columns or {})
    for role in columns:
        if role not in ROLES:
            raise UserError(
                f"--columns {role}=...: unknown role; expected one of {', '.join(ROLES)}"
            )
    dropped: list[tuple[str, str]] = []
    notes: list[str] = []
    table: list[Row] = []
    for item in inputs:
        sheet = read_sheet(Path(item), reading.curves, reading.drop_bad_rows)
        dropped += sheet.skipped
        notes += sheet.notes
        names = _names(sheet, columns)
        if not reading.gaps:
            names.pop("train_loss", None)
        if sheet.is_runs and "loss" not in columns:
            names |= _loss_of_runs(sheet, notes)
        rows = _where(sheet, reading.where or {}, notes)
        table += _parse(rows, names, sheet, reading, dropped, notes)
    table = table if reading.curves else _last_step(table, dropped, notes)
    table = table if reading.keep_duplicates else _without_duplicates(table, dropped)
    if not table:
        reasons = f"; first reason: {dropped[0][0]}: {dropped[0][1]}" if dropped else ""
        reasons = reasons or (": every row was left out by --where" if reading.where else "")
        reasons = reasons or ": nothing below the header"
        raise UserError(f"--input {', '.join(map(str, inputs))}: no usable row{reasons}")
    table = _without_largest(table, reading.drop_largest_losses, dropped)
    runs = _assemble(table, dropped, notes, reading)
    runs = runs if reading.settings or reading.curves else best_settings(runs)
    return _check_loss_units(runs, reading) if reading.need_loss else runs


def _names(sheet: Sheet, columns: Mapping[str, str]) -> dict[str, str]:
    """The sheet's column of each role: as mapped, else of the same name, else of `run.json`."""
    out = {}
    for role in ROLES:
        name = columns.get(role)
        if name is None:
            default = RUN_FIELDS.get(role, role) if sheet.is_runs else role
            names = OTHER_NAMES.get(role, (default,))
            present = [n for n in names if n in sheet.header]
            if present:
                out[role] = present[0]
        elif name in sheet.header:
            out[role] = name
        else:
            raise UserError(
                f"--columns {role}={name}: {sheet.path} has no such column; it has "
                f"{', '.join(sheet.header)}"
            )
    return out


def _loss_of_runs(sheet: Sheet, notes: list[str]) -> dict[str, str]:
    """The loss of novel chains, where every run has it: that of all mixes learning and memory."""
    found = [row.values.get(NOVEL_LOSS) is not None for row in sheet.rows]
    if not any(found):
        return {}
    if not all(found):
        notes.append(
            f"{sheet.path}: losses are of all chains: {found.count(False)} of {len(found)} rows "
            "have none of novel chains"
        )
        return {}
    notes.append(
        f"{sheet.path}: losses are of novel chains, which no training antibody has; --columns "
        f"loss={RUN_FIELDS['loss']} takes those of all"
    )
    return {"loss": NOVEL_LOSS}


def _where(sheet: Sheet, where: Mapping[str, str], notes: list[str]) -> list[Row]:
    rows = sheet.rows
    for name, wanted in where.items():
        if name not in sheet.header:
            raise UserError(
                f"--where {name}={wanted}: {sheet.path} has no such column; it has "
                f"{', '.join(sheet.header)}"
            )
        kept = [r for r in rows if _equal(r.values.get(name), wanted)]
        notes.append(f"{sheet.path}: --where {name}={wanted} kept {len(kept)} of {len(rows)} rows")
        rows = kept
    return rows


def _equal(found: Any, wanted: str) -> bool:
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return str(found).strip() == wanted.strip()


def _parse(
    rows: Sequence[Row],
    names: Mapping[str, str],
    sheet: Sheet,
    reading: Reading,
    dropped: list[tuple[str, str]],
    notes: list[str],
) -> list[Row]:
    """Rows with text turned into numbers; a bad row is an error, or dropped on request."""
    if reading.need_loss and "loss" not in names:
        raise UserError(
            f"--input {sheet.path}: no column for the loss; it has {', '.join(sheet.header)}; "
            "map it with --columns loss=NAME"
        )
    out, clamped = [], 0
    for row in rows:
        try:
            values: dict[str, Any] = {
                r: number(row, r, n) for r, n in names.items() if r in NUMBERS
            }
            values |= {r: label(row, n) for r, n in names.items() if r in LABELS}
            if OF_SCHEDULES in row.values and sheet.is_runs:
                values[OF_SCHEDULES] = row.values[OF_SCHEDULES]
            clamped += _complete(values, names, sheet.is_runs, reading)
        except BadValue as bad:
            if bad.missing_loss or sheet.is_runs or reading.drop_bad_rows:
                dropped.append((row.source, bad.what))
                continue
            raise UserError(f"{row.source}, {bad.what}; mend it, or use --drop-bad-rows") from None
        out.append(Row(row.source, values))
    if clamped:
        notes.append(
            f"{sheet.path}: {clamped} runs stopped before one epoch: their unique tokens are "
            "the tokens they saw"
        )
    return out


def _complete(values: dict, names: Mapping[str, str], is_runs: bool, reading: Reading) -> bool:
    """Fills in what follows from other columns; True where unique tokens were clamped."""
    params = values.get("params")
    if "tokens" not in values and "flops" in values and params:
        values["tokens"] = values["flops"] / (6.0 * params)
    elif "flops" in values:
        check_flops(values, names)
    if reading.tokens_per_pair and "unique_pairs" in values:
        values["unique_tokens"] = values["unique_pairs"] * reading.tokens_per_pair
    router = values.get("router", "")
    if router.lower() in ("none", "dense", ""):
        if "router" in values:
            values["router"] = "dense"
            values["experts"] = 1.0
    elif values.get("experts", 2.0) == 1.0:
        values["router"] = "dense"
    total = values.get("total_params")
    if total is not None and params is not None and total < params * (1 - 1e-6):
        raise BadValue(
            f"column '{names['total_params']}': {total:g} total parameters are fewer than the "
            f"{params:g} active ones of column '{names['params']}': are the columns swapped?"
        )
    tokens, unique = values.get("tokens"), values.get("unique_tokens")
    if tokens is not None and unique is not None and tokens < unique * (1 - 1e-6):
        if is_runs:
            values["unique_tokens"] = tokens
            return True
        raise BadValue(
            f"column '{names.get('tokens', 'flops')}': {tokens:g} tokens are fewer than the "
            f"{unique:g} unique tokens of column '{names.get('unique_tokens', 'unique_pairs')}': "
            "are the columns swapped? (a run shorter than an epoch has as many unique tokens as "
            "it saw)"
        )
    return False


def _last_step(table: list[Row], dropped: list[tuple[str, str]], notes: list[str]) -> list[Row]:
    """The last step of each run, where both columns are given and nothing tells steps apart.

    Checkpoints with their own tokens are all kept: each is an observation of a law of tokens, and
    those of one run are resampled and held out together.
    """
    if not table or not all("run" in v and "step" in v for _, v in table):
        return table
    if all("tokens" in v for _, v in table):
        seen = {(v["run"], v["tokens"]) for _, v in table}
        count = len({v["run"] for _, v in table})
        if len(seen) > count:
            notes.append(
                f"{len(table)} checkpoints of {count} runs, all kept: a law of final losses needs "
                "learning rates that were cooled at each of them"
            )
            return table
    last: dict[str, int] = {}
    for i, (_, values) in enumerate(table):
        run = values["run"]
        if run not in last or values["step"] >= table[last[run]][1]["step"]:
            last[run] = i
    keep = set(last.values())
    for i, (source, values) in enumerate(table):
        if i not in keep:
            dropped.append((source, f"not the last step of run {values['run']}"))
    return [table[i] for i in sorted(keep)]


def _without_duplicates(table: list[Row], dropped: list[tuple[str, str]]) -> list[Row]:
    """Without rows that equal an earlier one in every mapped column, the loss too.

    The name of a run directory is its path, so a copied directory differs in `run` only and is
    a duplicate as well.
    """
    seen: dict[tuple, str] = {}
    out = []
    for source, values in table:
        copied = source.startswith(values.get("run") or "\0")
        apart = (OF_SCHEDULES, "run") if copied else (OF_SCHEDULES,)
        key = tuple(sorted((k, str(v)) for k, v in values.items() if k not in apart))
        if key in seen:
            dropped.append((source, f"duplicate of {seen[key]}"))
        else:
            seen[key] = source
            out.append(Row(source, values))
    return out


def _without_largest(table: list[Row], count: int, dropped: list[tuple[str, str]]) -> list[Row]:
    if count <= 0:
        return table
    if count >= len(table):
        raise UserError(f"--drop-largest-losses {count}: there are only {len(table)} rows")
    order = sorted(range(len(table)), key=lambda i: -table[i][1]["loss"])
    for i in order[:count]:
        source, values = table[i]
        dropped.append((source, f"loss {values['loss']:.6g} is one of the {count} largest"))
    return [table[i] for i in sorted(order[count:])]


def _assemble(
    table: list[Row],
    dropped: list[tuple[str, str]],
    notes: list[str],
    reading: Reading,
) -> Runs:
    """Columns that every row has; without `unique_tokens`, `unique_pairs` replace them."""
    roles = [r for r in (*ROLES, OF_SCHEDULES) if all(r in v for _, v in table)]
    columns = {r: np.array([v[r] for _, v in table]) for r in roles}
    unit = "tokens"
    if "unique_pairs" in columns and "unique_tokens" not in columns:
        columns["unique_tokens"] = columns["unique_pairs"]
        unit = "pairs"
        if "tokens" in columns:
            raise UserError(
                "--columns unique_pairs=... beside tokens: repeats need one unit; give "
                "--tokens-per-pair"
            )
    elif reading.tokens_per_pair and "unique_pairs" not in columns and "unique_tokens" in columns:
        columns["unique_pairs"] = columns["unique_tokens"] / reading.tokens_per_pair
    source = tuple(s for s, _ in table)
    doubt = few_tokens(columns)
    if doubt:
        notes.append(doubt)
    return Runs(columns, source, tuple(dropped), tuple(notes), unit, reading.covariates)


def _check_loss_units(runs: Runs, reading: Reading) -> Runs:
    predicted = smooth_prediction(runs.columns)
    if predicted is None:
        return runs
    odd, unit = mixed_units(np.log(runs["loss"]), predicted)
    if not odd.size:
        return runs
    where = "; ".join(runs.source[i] for i in odd[:3]) + (" ..." if odd.size > 3 else "")
    what = f"{odd.size} losses look like {unit}, unlike the others"
    if not reading.drop_bad_rows:
        name = (reading.columns or {}).get("loss", "loss")
        raise UserError(
            f"{where}, column '{name}': {what}: mixed loss units; convert them, or use "
            "--drop-bad-rows"
        )
    extra = tuple((runs.source[i], f"its loss looks like {unit}") for i in odd)
    kept = runs.take(np.setdiff1d(np.arange(len(runs)), odd))
    return replace(kept, dropped=kept.dropped + extra)
