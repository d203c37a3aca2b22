"""`python -m moe_ablm finetune`: a head on a model for a laboratory's assay, tested and kept."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moe_ablm.errors import ArgumentError, UserError
from moe_ablm.files import write_json
from moe_ablm.model.spec import PRECISIONS
from moe_ablm.verbs.reading import ASKED, add_format_arguments, reading_of
from moe_ablm.verbs.writing import out_directory

if TYPE_CHECKING:  # jax only when there is something to compute
    import numpy as np

    from moe_ablm.evaluation.estimates import Number
    from moe_ablm.evaluation.formats.assays import Assay
    from moe_ablm.evaluation.supervised.saved_head import SavedHead
    from moe_ablm.evaluation.supervised.tuning import Settings, Tuned
    from moe_ablm.inference.buckets import Engine

SCHEMA = "moe_ablm.finetune/1"
HEAD, LORA, WHOLE = "head", "lora", "whole"
# what is trained -> learning rate of the encoder or its adapters
ENCODER_LR = {HEAD: 0.0, LORA: 1e-3, WHOLE: 1e-4}
# least and most of what is a whole number
RANGES = {
    "rank": (1, 1024),
    "folds": (2, 1000),
    "steps": (1, 10**6),
    "batch": (1, 4096),
    "seed": (0, 2**63 - 1),
}
PACKAGES = ("moe_ablm", "jax", "flax", "numpy", "scikit-learn")  # what computes
OF_OTHERS = ("torch", "transformers")  # what computes a model of theirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add("--run", type=Path, required=True, help=f"{ASKED} (of which a head alone is trained)")
    add("--input", required=True, metavar="FILE", help="a table of antibodies")
    add("--target", required=True, metavar="COLUMN", help="what was measured")
    add("--out", type=out_directory, required=True, metavar="DIR", help="new directory to write")
    add("--task", choices=("regression", "classification", "residue"),
        help="default: what the values say; residue: a letter (its class) a residue")  # fmt: skip
    add("--tune", choices=tuple(ENCODER_LR), default=HEAD,
        help="head (default): on the frozen encoder; lora: with adapters of its attention, FFNs, "
        "experts and routers; whole: with all of it")  # fmt: skip
    add("--rank", type=int, default=8, help="of the adapters (default 8)")
    add("--folds", type=int, help="of the cross-validation (default 5)")
    add("--fold", metavar="COLUMN",
        help="in which fold each row is held out, instead (default of GDPa1: its own)")  # fmt: skip
    add("--groups", default="clone", metavar="clone|sequence|COLUMN",
        help="what is never divided among folds (default: clone)")  # fmt: skip
    add("--split", metavar="COLUMN",
        help="train, valid or test of each row, instead of folds")  # fmt: skip
    add("--steps", type=int, default=1000, help="updates at least (default 1000)")
    add("--batch", type=int, default=32, help="antibodies of an update (default 32)")
    add("--lr", type=float, default=3e-3, help="of the head (default 0.003)")
    add("--encoder-lr", type=float,
        help="of the encoder or its adapters (default: lora 0.001, whole 0.0001)")  # fmt: skip
    add("--freeze-routers", action="store_true",
        help="of a model with experts: its routers stay as they are")  # fmt: skip
    add("--expert-dropout", type=float, default=0.0, metavar="P",
        help="share of each expert's hidden units that an update goes without")  # fmt: skip
    add("--losses", action="store_true",
        help="write losses.csv: of training set and held-out rows after each pass")  # fmt: skip
    add("--seed", type=int, default=0, help="of folds, head and adapters")
    add("--precision", choices=tuple(PRECISIONS), default="float32", help="of a frozen encoder")
    add_format_arguments(
        parser,
        "stop at a row that is malformed, too long or without a target (default), or leave it out "
        "and count it",
    )


def run(args: argparse.Namespace) -> None:
    """Reads, tests, trains and writes; a failure leaves nothing behind.

    Raises:
      UserError: flags, model or table are wrong.
    """
    _check(args)
    from moe_ablm.data.readers import open_sources
    from moe_ablm.inference.antibodies import LETTERS

    (source,) = open_sources(
        [args.input],
        format=args.format,
        on_bad_row=args.on_bad_row,
        letters=LETTERS,
        reading=reading_of(args),
    )
    from moe_ablm.evaluation.formats.assays import official_folds, read_assay
    from moe_ablm.evaluation.outcome import Skipped
    from moe_ablm.evaluation.supervised.tuning import CLONE, tune
    from moe_ablm.inference.engines import engine_of
    from moe_ablm.interop.saved import new_directory

    with new_directory(args.out) as directory:
        engine = engine_of(args.run, args.precision)
        _require_own(args, engine)
        _require_experts(args, engine)
        settings, fold = _settings(args), args.fold
        if fold is args.split is args.folds is None and args.groups == CLONE:
            fold = official_folds(source)
        assay = read_assay(
            *(source, args.target, engine.model.layout, engine.model.length),
            *(args.task, args.split, _column_of_groups(settings), fold),
        )
        try:
            tuned = tune(engine, assay, settings, lambda line: print(line, flush=True))
        except Skipped as skipped:
            raise UserError(f"--input {args.input}: {skipped}") from skipped
        notes = [f"left out {rows:,}: {why}" for why, rows in source.report.rejected.items()]
        tuned = dataclasses.replace(tuned, notes=[*notes, *tuned.notes])
        _write(args, directory, settings, assay, tuned)
    _print(args.out, assay, tuned)


def _check(args: argparse.Namespace) -> None:
    for name, (least, most) in RANGES.items():
        found = getattr(args, name)
        if found is not None and not least <= found <= most:
            raise ArgumentError(name, found, f"expected {least} to {most:,}")
    if args.fold is not None and not args.split is args.folds is None:
        raise UserError("--fold with --split or --folds: all say what is held out; give one")
    for name in ("lr", "encoder_lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(name, value, "expected a number above 0")
    if args.encoder_lr is not None and args.tune == HEAD:
        raise UserError(
            "--encoder-lr: the encoder is frozen; expected it with --tune lora or whole"
        )
    if not 0 <= args.expert_dropout < 1:
        raise ArgumentError("expert_dropout", args.expert_dropout, "expected 0 to below 1")
    if _of_experts(args) and args.tune == HEAD:
        raise UserError(
            f"{_of_experts(args)}: the encoder is frozen; expected it with --tune lora or whole"
        )


def _of_experts(args: argparse.Namespace) -> str:
    """The flag that only experts can follow, or none."""
    if args.freeze_routers:
        return "--freeze-routers"
    return "--expert-dropout" if args.expert_dropout else ""


def _require_own(args: argparse.Namespace, engine: "Engine") -> None:
    from moe_ablm.interop.pretrained import Pretrained

    if args.tune != HEAD and isinstance(engine.model, Pretrained):
        raise UserError(
            f"--tune {args.tune}: {engine.model.directory} is computed by transformers and not "
            "trained; expected --tune head, or weights that python -m moe_ablm import converts"
        )


def _require_experts(args: argparse.Namespace, engine: "Engine") -> None:
    flag = _of_experts(args)
    if flag and not engine.model.spec.moe_layers:
        raise UserError(
            f"{flag}: {engine.model.source} is a dense model; expected one with experts"
        )


def _settings(args: argparse.Namespace) -> "Settings":
    from moe_ablm.evaluation.supervised.heads import Training
    from moe_ablm.evaluation.supervised.tuning import Settings

    training = Training(
        batch=args.batch,
        lr=args.lr,
        encoder_lr=args.encoder_lr or ENCODER_LR[args.tune],
        full=args.tune == WHOLE,
        rank=args.rank if args.tune == LORA else 0,
        seed=args.seed,
        freeze_routers=args.freeze_routers,
        expert_dropout=args.expert_dropout,
    )
    folds = args.folds or Settings.folds
    return Settings(training, args.steps, folds, args.groups, args.losses)


def _column_of_groups(settings: "Settings") -> str | None:
    from moe_ablm.evaluation.supervised.tuning import CLONE, SEQUENCE

    return None if settings.groups in (CLONE, SEQUENCE) else settings.groups


def _write(
    args: argparse.Namespace, directory: Path, settings: "Settings", assay: "Assay", tuned: "Tuned"
) -> None:
    """The model, its head, results, losses and predictions."""
    from moe_ablm.evaluation.supervised.saved_head import SavedHead, write_head

    packages = _write_model(args, directory, tuned)
    saved = SavedHead.of(tuned.predictor, assay.classes, args.target)
    write_head(saved, directory)
    _write_results(args, directory, settings, assay, tuned, packages)
    called: Sequence[Any] = sorted(set(assay.folds)) or range(1 + max(tuned.folds.tolist()))
    if tuned.losses:
        _write_losses(directory, tuned, called)
    _write_predictions(directory, saved, assay, tuned, called)


def _write_model(args: argparse.Namespace, directory: Path, tuned: "Tuned") -> tuple[str, ...]:
    """The weights, or where those of others are; returns the packages that computed them."""
    from moe_ablm.interop.pretrained import Pretrained, write_base
    from moe_ablm.interop.saved import save_model

    model = tuned.predictor.engine.model
    if isinstance(model, Pretrained):
        write_base(model, directory)
        return PACKAGES + OF_OTHERS
    how = {HEAD: "as it was", LORA: "with adapters", WHOLE: "tuned"}[args.tune]
    source = f"{model.source}; {how}, with a head for {args.target} of {Path(args.input).name}"
    # the losses of a run are not those of weights that have been tuned since
    facts = {k: v for k, v in model.facts.items() if args.tune == HEAD or k != "metrics"}
    save_model(dataclasses.replace(model, source=source, facts=facts), directory)
    return PACKAGES


def _write_results(
    args: argparse.Namespace,
    directory: Path,
    settings: "Settings",
    assay: "Assay",
    tuned: "Tuned",
    packages: Sequence[str],
) -> None:
    """Numbers, settings, and what was read by which versions."""
    from moe_ablm.evaluation.suite import as_json
    from moe_ablm.inference.output import file_identity
    from moe_ablm.results import versions

    content = {
        "schema": SCHEMA,
        "run": str(args.run),
        "model": tuned.predictor.engine.model.source,
        "input": file_identity(Path(args.input)),
        "target": args.target,
        "task": assay.task,
        "classes": list(assay.classes),
        "tune": args.tune,
        "split": args.split,
        "folds": sorted(set(assay.folds)),
        "settings": dataclasses.asdict(settings),
        "numbers": [as_json(number) for number in tuned.numbers],
        "notes": tuned.notes,
        "versions": versions(*packages),
    }
    write_json(directory / "results.json", content)


def _write_losses(directory: Path, tuned: "Tuned", called: Sequence[Any]) -> None:
    """Losses after each pass, by fold as it is `called`."""
    import pyarrow as pa

    from moe_ablm.inference.output import in_float32, write_csv

    lines = [line | {"fold": called[int(line["fold"])]} for line in tuned.losses]
    with (directory / "losses.csv").open("wb") as stream:
        write_csv(in_float32(pa.Table.from_pylist(lines)), stream, header=True)


def _write_predictions(
    directory: Path, saved: "SavedHead", assay: "Assay", tuned: "Tuned", called: Sequence[Any]
) -> None:
    """A line an antibody, or a residue: target, fold, what was predicted held out and by all."""
    import numpy as np
    import pyarrow as pa

    from moe_ablm.evaluation.supervised.saved_head import columns, fitted, names, stacked
    from moe_ablm.inference.output import write_csv

    targets, folds, outputs = assay.targets, tuned.folds, tuned.held_out
    if assay.of_residues:
        targets, outputs = stacked(list(targets)), stacked(list(outputs))
        folds = np.repeat(folds, [antibody.residues for antibody in assay.antibodies])
    held_out = columns(saved.head, assay.classes, outputs, "held_out")
    values: list[Any] = targets.tolist()
    if assay.classes:
        values = [assay.classes[i] if i >= 0 else None for i in values]
    found = fitted(tuned.predictor, assay.antibodies)
    shown = {
        **names(saved.head, assay.antibodies),
        "target": values,
        "fold": [None if fold < 0 else called[fold] for fold in folds.tolist()],
        **_held_out(held_out, folds),
        **columns(saved.head, assay.classes, found, "prediction"),
    }
    with (directory / "predictions.csv").open("wb") as stream:
        write_csv(pa.table(shown), stream, header=True)


def _held_out(predicted: dict, folds: "np.ndarray") -> dict:
    """Predictions of what was held out; empty for the others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held = pa.array(folds >= 0)
    return {k: pc.if_else(held, v, pa.scalar(None, v.type)) for k, v in predicted.items()}


def _print(out: Path, assay: "Assay", tuned: "Tuned") -> None:
    by_metric: dict[str, dict[str, Number]] = {}
    for number in tuned.numbers:
        if not number.metric.endswith((", sd of folds", " over baseline")):
            by_metric.setdefault(number.metric, {})[number.labels["predictor"]] = number
    table = Table(title="on what was held out [95 % interval]")
    for name in ("predictor", *by_metric):
        table.add_column(name)
    for predictor in next(iter(by_metric.values())):
        table.add_row(predictor, *(_cell(found[predictor]) for found in by_metric.values()))
    Console().print(table)
    for note in tuned.notes:
        print(note)
    print(f"{out}: predict with it by python -m moe_ablm predict --run {out} --input FILE")


def _cell(number: "Number") -> str:
    return f"{number.value:.3f} [{number.low:.3f}, {number.high:.3f}]"
