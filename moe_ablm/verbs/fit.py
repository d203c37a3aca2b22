"""`python -m moe_ablm fit`: fits scaling laws to tables of runs."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ablm.errors import UserError
from moe_ablm.files import all_or_none, write_json
from moe_ablm.verbs.fit_flags import (
    COMPARE,
    add_arguments,
    check_numbers,
    numbers_of,
    reading_of,
    target_of,
)

if TYPE_CHECKING:  # loaded when the verb runs
    from rich.console import Console
    from rich.table import Table

    from moe_ablm.scaling.published import Study
    from moe_ablm.scaling.reading import Reading
    from moe_ablm.scaling.runs import Runs
    from moe_ablm.scaling.selection import Analysis, Score

__all__ = ["add_arguments", "run"]
PIPE_WIDTH = 180


def run(args: argparse.Namespace) -> int:
    """Reads, then fits or checks a design; 1 where the fit did not converge.

    Raises:
      UserError: the input is wrong.
    """
    from rich.console import Console

    from moe_ablm.scaling.catalogue import LAWS
    from moe_ablm.scaling.laws import Law
    from moe_ablm.scaling.reading import read_runs

    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for whole tables
        console = Console(width=PIPE_WIDTH)
    laws = args.law or [COMPARE]
    if args.rule and not (len(laws) == 1 and LAWS.get(laws[0], Law).of_settings):
        raise UserError("--rule needs --law learning_rate or batch_size")
    if args.power is not None and not args.design:
        raise UserError(f"--power {args.power} needs --design")
    check_numbers(args)
    reading = reading_of(args, laws)
    runs = read_runs(args.input, reading)
    with all_or_none(args.out) as out:
        if args.design:
            _design(console, runs, laws, args, out)
            return 0
        return _fit(console, runs, laws, args, out, reading)


def _fit(
    console: "Console",
    runs: "Runs",
    laws: Sequence[str],
    args: argparse.Namespace,
    out: Path,
    reading: "Reading",
) -> int:
    """Fits, compares, draws and writes; the first law is saved. 1 where it did not converge."""
    from moe_ablm.scaling.approaches import approaches, disagreement
    from moe_ablm.scaling.plots import draw_all, save_all
    from moe_ablm.scaling.selection import Question, analyse, verdict
    from moe_ablm.scaling.tables import approaches_table, comparison_table, show, write_report

    question = Question(
        law="",
        huber_delta=args.huber_delta,
        fixed=numbers_of("--fix", args.fix),
        target=target_of(args, runs),
        draws=args.bootstrap,
        seed=args.seed,
        seed_sd=args.seed_sd,
        rule=numbers_of("--rule", args.rule),
    )
    candidates, unmoved = _candidates(runs, laws)
    scores = _scores(runs, candidates, args) if len(candidates) > 1 else []
    tables = [comparison_table(scores)] if scores else []
    sentences = [verdict(scores)] if scores else []
    if unmoved:
        sentences.append(
            f"Left out, as they have no term of over-fitting for {', '.join(runs.covariates)}: "
            f"{', '.join(unmoved)}."
        )
    if scores:
        write_json(out / "comparison.json", _scores_json(scores, sentences[0]))
    best = scores[0].law if scores else candidates[0]
    chosen = next((law for law in candidates if law in laws), best)
    study = _study(args.published, chosen)
    analysis = analyse(runs, replace(question, law=chosen))
    show(console, analysis, study)
    more, said = _advice(analysis, args, reading)
    tables += more
    sentences += said
    if analysis.fit.law.name in ("isoflop", "chinchilla", "envelope"):
        made = approaches(runs, question.target, min(args.bootstrap, 400), args.seed)
        if len(made) > 1:
            tables.append(approaches_table(made))
            sentences += [s for s in [disagreement(made)] if s]
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    replace(analysis.fit, provenance=_provenance(args, runs)).save(out)
    paths = save_all(draw_all(analysis), out / "figures")
    figures = {p.stem: p for p in paths if p.suffix == ".svg"}
    write_report(out, analysis, figures, tables, sentences, study)
    console.print(
        f"wrote {args.out}/fit.json, report.html and {len(paths)} figures", highlight=False
    )
    return int(analysis.fit.status == "not_converged")


def _candidates(runs: "Runs", laws: Sequence[str]) -> tuple[list[str], list[str]]:
    """The laws to fit, and those that are left out: to them covariates mean nothing.

    Raises:
      UserError: none is left.
    """
    from moe_ablm.scaling.catalogue import applicable, overfits

    named = [law for law in laws if law != COMPARE]
    candidates = [*named, *(applicable(runs.columns) if COMPARE in laws else [])]
    unmoved = [law for law in candidates if runs.covariates and not overfits(law)]
    candidates = [law for law in candidates if law not in unmoved]
    if not candidates:
        raise UserError(f"no law has all its columns; the input has {', '.join(runs.columns)}")
    return candidates, unmoved


def _scores(runs: "Runs", candidates: Sequence[str], args: argparse.Namespace) -> "Sequence[Score]":
    """The candidates that could be fitted, the best first."""
    from moe_ablm.scaling.selection import compare

    scores = compare(runs, candidates, args.huber_delta, args.seed)
    if not scores:
        raise UserError(f"{len(runs)} runs are too few for every one of {', '.join(candidates)}")
    return scores


def _study(name: str | None, law: str) -> "Study | None":
    """The study of --published, if its law is the one that is fitted."""
    from moe_ablm.scaling.catalogue import resolve
    from moe_ablm.scaling.published import STUDIES

    study = STUDIES[name] if name else None
    if study and resolve(law) != study.law:
        raise UserError(
            f"--published {name}: these are coefficients of {study.law} and the law is {law}; "
            f"use --law {study.law}"
        )
    return study


def _provenance(args: argparse.Namespace, runs: "Runs") -> dict[str, object]:
    """Version, flags that were given, seed, draws and the hash of the rows."""
    from moe_ablm.results import versions

    skipped = ("verb", "carry_out", "out", "seed", "bootstrap")
    flags = {k: v for k, v in vars(args).items() if k not in skipped and v not in (None, "", False)}
    return {
        "version": versions("moe_ablm").get("moe_ablm", "not installed"),
        "flags": flags,
        "seed": args.seed,
        "draws": args.bootstrap,
        "rows_sha256": runs.digest(),
    }


def _advice(
    analysis: "Analysis", args: argparse.Namespace, reading: "Reading"
) -> tuple[list["Table"], list[str]]:
    """Tables and sentences for --advise and --next-run."""
    from moe_ablm.scaling import advice, ranking, tables
    from moe_ablm.scaling.quantities import quantities
    from moe_ablm.scaling.reading import read_runs
    from moe_ablm.scaling.result import SmoothFit

    if not args.advise and not args.next_run:
        return [], []
    fit, boot = analysis.fit, analysis.boot
    if boot is None or not isinstance(fit, SmoothFit):
        raise UserError(
            f"--advise and --next-run need bootstrap draws; law {fit.law.name} ({fit.status}) has "
            "too few: use a larger --bootstrap N and a law of N and D that is not an exact fit"
        )
    noise = ranking.noise_of(fit)
    shown: list[Table] = []
    said: list[str] = []
    if args.advise:
        if args.max_flops is None:
            raise UserError("--advise needs --max-flops C")
        limits = advice.Limits(
            args.max_flops, args.max_params, args.max_unique, args.max_inference_flops
        )
        best = advice.advise(fit, boot, limits)
        shown.append(tables.advice_table(best))
        if best.at_bound.any():
            said.append(
                f"{best.at_bound.mean():.0%} of the draws want a size at the edge of those tried "
                f"({advice.BEYOND:g} times beyond the runs): that is extrapolation."
            )
        values, sentence = advice.worth_of_data(fit, boot, limits, noise, args.tokens_per_pair)
        if values:
            shown.append(tables.data_table(values, args.tokens_per_pair))
        said.append(sentence)
    if args.next_run:
        grid = read_runs(
            [args.next_run],
            replace(reading, need_loss=False, gaps=False, where=None, drop_largest_losses=0),
        )
        quantity = ranking.pick_quantity(quantities(fit))
        ranked = ranking.next_runs(fit, boot, grid, quantity, noise)
        shown.append(tables.next_table(ranked, quantity.name))
    return shown, said


def _design(
    console: "Console", runs: "Runs", laws: Sequence[str], args: argparse.Namespace, out: Path
) -> None:
    from moe_ablm.scaling.catalogue import SMOOTH, resolve
    from moe_ablm.scaling.design import check_design
    from moe_ablm.scaling.tables import design_table

    names = [resolve(law) for law in laws if law != COMPARE]
    if len(names) != 1 or names[0] not in SMOOTH:
        raise UserError(f"--design needs one --law of {', '.join(SMOOTH)}")
    design = check_design(
        runs,
        names[0],
        1e-3 if args.seed_sd is None else args.seed_sd,
        fixed=numbers_of("--fix", args.fix),
    )
    console.print(design_table(design))
    for warning in design.warnings:
        console.print(warning, markup=False, highlight=False)
    values = {k: v for k, v in vars(design).items() if k != "expected_errors"}
    values["expected_errors"] = {
        k: v if v < float("inf") else None for k, v in design.expected_errors.items()
    }
    values["condition"] = design.condition if design.condition < float("inf") else None
    write_json(out / "design.json", {"schema": "moe_ablm.design/1", **values})
    if args.power is not None:
        _power(console, runs, names[0], args, out)


def _power(console: "Console", runs: "Runs", law: str, args: argparse.Namespace, out: Path) -> None:
    from moe_ablm.scaling import power

    if law != "joint":
        raise UserError(f"--power: law {law} has no tau; use --law joint")
    seed_sd = 1e-3 if args.seed_sd is None else args.seed_sd
    table = power.power_table(runs, seed_sd, args.power, args.seed)
    console.print(power.shown(table, seed_sd))
    console.print(power.needed(table), markup=False, highlight=False)
    rows = [vars(p) | {"power": p.power} for p in table]
    content = {"schema": "moe_ablm.power/1", "seed_sd": seed_sd, "seed": args.seed, "rows": rows}
    write_json(out / "power.json", content)


def _scores_json(scores: Sequence["Score"], sentence: str) -> dict:
    def plain(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return {
        "schema": "moe_ablm.comparison/1",
        "verdict": sentence,
        "laws": [
            {
                "law": s.law,
                "status": s.fit.status,
                "parameters": s.parameters,
                "aicc": plain(s.aicc),
                "cv_error": plain(s.cv),
                "largest_error": plain(s.largest_error),
                "coefficients": dict(s.fit.coefficients),
            }
            for s in scores
        ],
    }
