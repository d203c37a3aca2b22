"""`python -m moe_ablm fit`: fits scaling laws to tables of runs."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ablm.errors import UserError
from moe_ablm.files import all_or_none, write_json
from moe_ablm.verbs.writing import out_directory

if TYPE_CHECKING:  # loaded when the verb runs
    from rich.console import Console
    from rich.table import Table

    from moe_ablm.scaling.inputs import Target
    from moe_ablm.scaling.published import Study
    from moe_ablm.scaling.reading import Reading
    from moe_ablm.scaling.runs import Runs
    from moe_ablm.scaling.selection import Analysis, Score

COMPARE = "compare"
PIPE_WIDTH = 180


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb; scripts rely on their names."""
    from moe_ablm.scaling.published import STUDIES

    add = parser.add_argument
    add(
        "--input",
        action="append",
        required=True,
        metavar="FILE|RUNS",
        help="CSV, TSV, parquet or a directory of runs; repeatable",
    )
    add(
        "--columns",
        default="",
        metavar="ROLE=NAME,...",
        help="columns by role: params, tokens, unique_tokens, unique_pairs, loss, total_params, "
        "experts, router, granularity, sparsity, flops, run, step, seed, lr, batch, weight_decay, "
        "dropout, train_loss",
    )
    add(
        "--where",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="keep rows whose column has this value; repeatable",
    )
    add(
        "--law",
        action="append",
        metavar="LAW",
        help="a law's name, repeatable; 'compare' is all laws that the columns allow (default)",
    )
    add(
        "--huber-delta", type=float, help="of ln L; inf is least squares (default: seed sd or 1e-3)"
    )
    add("--bootstrap", type=int, default=1000, metavar="N", help="draws (default 1000)")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--seed-sd", type=float, help="known sd of one run's loss, for parabolas and designs")
    add("--fix", default="", metavar="NAME=VALUE,...", help="hold coefficients at these values")
    add(
        "--target",
        default="",
        metavar="INPUT=VALUE,...",
        help="inputs at which derived quantities are wanted, as flops=1e21 or params=650e6",
    )
    add(
        "--rule",
        default="",
        metavar="k=K,by_params=P,by_tokens=Q",
        help="with --law learning_rate or batch_size: what K N^P D^Q costs in each cell",
    )
    add(
        "--covariates",
        default="",
        metavar="NAME,...",
        help="weight_decay, dropout: factors on the over-fitting term of the law",
    )
    add("--drop-bad-rows", action="store_true", help="drop unusable rows instead of stopping")
    add(
        "--keep-duplicates",
        action="store_true",
        help="equal rows are replicates whose rounded losses agree, not copies",
    )
    add("--drop-largest-losses", type=int, default=0, metavar="N", help="leave out N outliers")
    add("--tokens-per-pair", type=float, help="turns unique_pairs into unique_tokens")
    add("--published", choices=sorted(STUDIES), help="print a study's numbers beside ours")
    add("--advise", action="store_true", help="the best model under the limits below")
    add("--max-flops", type=float, help="training FLOPs; a token costs what the runs' flops say")
    add("--max-params", type=float, help="total parameters that fit in memory")
    add("--max-unique", type=float, help="unique tokens at hand")
    add("--max-inference-flops", type=float, help="of a token, forward; a third of training")
    add("--next-run", metavar="GRID", help="table of candidate cells to rank")
    add("--design", action="store_true", help="check a planned grid (no losses) and stop")
    add(
        "--power",
        type=int,
        metavar="DRAWS",
        help="with --design --law joint: simulate whether the grid tells tau = 0 from 1",
    )
    add(
        "--out", type=out_directory, required=True, metavar="DIR", help="fit.json, report.html, ..."
    )


def run(args: argparse.Namespace) -> int:
    """Reads, then fits or checks a design; 1 where the fit did not converge.

    Raises:
      UserError: the input is wrong.
    """
    from rich.console import Console

    from moe_ablm.scaling.catalogue import LAWS
    from moe_ablm.scaling.laws import Law
    from moe_ablm.scaling.reading import Reading, read_runs

    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for whole tables
        console = Console(width=PIPE_WIDTH)
    laws = args.law or [COMPARE]
    if args.rule and not (len(laws) == 1 and LAWS.get(laws[0], Law).of_settings):
        raise UserError("--rule needs --law learning_rate or batch_size")
    if args.power is not None and not args.design:
        raise UserError(f"--power {args.power} needs --design")
    _check_numbers(args)
    reading = Reading(
        columns=_pairs("--columns", [args.columns]),
        where=_pairs("--where", args.where),
        drop_bad_rows=args.drop_bad_rows,
        drop_largest_losses=args.drop_largest_losses,
        tokens_per_pair=args.tokens_per_pair,
        keep_duplicates=args.keep_duplicates,
        curves=len(laws) == 1 and LAWS.get(laws[0], Law).needs_curves,
        settings=len(laws) == 1 and LAWS.get(laws[0], Law).of_settings,
        gaps=not args.design and any(LAWS.get(law, Law).of_gap for law in laws),
        covariates=_covariates(args.covariates, laws),
        need_loss=not args.design,
    )
    runs = read_runs(args.input, reading)
    with all_or_none(args.out) as out:
        if args.design:
            _design(console, runs, laws, args, out)
            return 0
        return _fit(console, runs, laws, args, out, reading)


def _covariates(text: str, laws: Sequence[str]) -> tuple[str, ...]:
    """The names of --covariates; raises UserError for an unknown one or a law that has no place."""
    from moe_ablm.scaling.catalogue import SMOOTH, overfits
    from moe_ablm.scaling.covariates import COVARIATES

    names = tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    for name in names:
        if name not in COVARIATES:
            raise UserError(f"--covariates {name}: expected some of {', '.join(COVARIATES)}")
        for law in laws:
            if law != COMPARE and not overfits(law):
                raise UserError(
                    f"--covariates {name}: law {law} has no over-fitting term; use one of "
                    f"{', '.join(filter(overfits, SMOOTH))}"
                )
    return names


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of range, before anything is read or fitted."""
    for flag in ("bootstrap", "seed", "drop_largest_losses"):
        value = getattr(args, flag)
        if value < 0:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected 0 or more")
    for flag in ("seed_sd", "tokens_per_pair", "max_flops", "max_params", "max_unique",
                 "max_inference_flops"):  # fmt: skip
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {value}: expected a positive number")


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
    from moe_ablm.scaling.catalogue import applicable, overfits
    from moe_ablm.scaling.plots import draw_all, save_all
    from moe_ablm.scaling.selection import Question, analyse, verdict
    from moe_ablm.scaling.tables import approaches_table, comparison_table, show, write_report

    question = Question(
        law="",
        huber_delta=args.huber_delta,
        fixed=_numbers("--fix", args.fix),
        target=_target(args, runs),
        draws=args.bootstrap,
        seed=args.seed,
        seed_sd=args.seed_sd,
        rule=_numbers("--rule", args.rule),
    )
    named = [law for law in laws if law != COMPARE]
    candidates = [*named, *(applicable(runs.columns) if COMPARE in laws else [])]
    if runs.covariates:
        candidates = [law for law in candidates if overfits(law)]
    if not candidates:
        raise UserError(f"no law has all its columns; the input has {', '.join(runs.columns)}")
    scores = _scores(runs, candidates, args) if len(candidates) > 1 else []
    tables = [comparison_table(scores)] if scores else []
    sentences = [verdict(scores)] if scores else []
    if scores:
        write_json(out / "comparison.json", _scores_json(scores, sentences[0]))
    chosen = named[0] if named else scores[0].law if scores else candidates[0]
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
    from moe_ablm.scaling import design, tables
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
    noise = design.noise_of(fit)
    shown: list[Table] = []
    said: list[str] = []
    if args.advise:
        if args.max_flops is None:
            raise UserError("--advise needs --max-flops C")
        limits = design.Limits(
            args.max_flops, args.max_params, args.max_unique, args.max_inference_flops
        )
        best = design.advise(fit, boot, limits)
        shown.append(tables.advice_table(best))
        if best.at_bound.any():
            said.append(
                f"{best.at_bound.mean():.0%} of the draws want a size at the edge of those tried "
                f"({design.BEYOND:g} times beyond the runs): that is extrapolation."
            )
        values, sentence = design.worth_of_data(fit, boot, limits, noise, args.tokens_per_pair)
        if values:
            shown.append(tables.data_table(values, args.tokens_per_pair))
        said.append(sentence)
    if args.next_run:
        grid = read_runs(
            [args.next_run],
            replace(reading, need_loss=False, gaps=False, where=None, drop_largest_losses=0),
        )
        quantity = design.pick_quantity(quantities(fit))
        ranked = design.next_runs(fit, boot, grid, quantity, noise)
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
        fixed=_numbers("--fix", args.fix),
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


def _pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    """`a=b,c=d` (or several such) to a mapping."""
    out = {}
    for part in (p for item in items for p in item.split(",") if p.strip()):
        name, sign, value = part.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise UserError(f"{flag} {part!r}: expected NAME=VALUE")
        if name.strip() in out:
            raise UserError(f"{flag} {name.strip()}=...: given twice")
        out[name.strip()] = value.strip()
    return out


def _target(args: argparse.Namespace, runs: "Runs") -> "Target":
    """The inputs of the target; pairs become the unit of the runs' data sizes."""
    from moe_ablm.scaling.inputs import make_target

    pairs = _pairs("--target", [args.target])
    router = {"router": pairs.pop("router")} if "router" in pairs else {}
    target = {k: _number("--target", k, v) for k, v in pairs.items()}
    if "unique_pairs" in target:
        if runs.data_unit != "pairs" and not args.tokens_per_pair:
            raise UserError("--target unique_pairs=...: the runs are in tokens; --tokens-per-pair?")
        scale = 1.0 if runs.data_unit == "pairs" else args.tokens_per_pair
        target["unique_tokens"] = target.pop("unique_pairs") * scale
    return make_target("--target", {**target, **router})


def _numbers(flag: str, text: str) -> dict[str, float]:
    return {k: _number(flag, k, v) for k, v in _pairs(flag, [text]).items()}


def _number(flag: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{flag} {name}={value}: expected a number") from None
