"""The flags of `python -m moe_ablm fit`, and what their text means."""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_ablm.errors import UserError
from moe_ablm.verbs.writing import out_directory

if TYPE_CHECKING:  # loaded when the verb runs
    from moe_ablm.scaling.inputs import Target
    from moe_ablm.scaling.reading import Reading
    from moe_ablm.scaling.runs import Runs

COMPARE = "compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb; scripts rely on their names."""
    _of_input(parser)
    _of_law(parser)
    _of_rows(parser)
    _of_advice(parser)
    parser.add_argument(
        "--out", type=out_directory, required=True, metavar="DIR", help="fit.json, report.html, ..."
    )


def _of_input(parser: argparse.ArgumentParser) -> None:
    """Which runs, and what their columns are."""
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


def _of_law(parser: argparse.ArgumentParser) -> None:
    """Which law, and how it is fitted."""
    add = parser.add_argument
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


def _of_rows(parser: argparse.ArgumentParser) -> None:
    """Which rows count, in which unit, and beside which study."""
    from moe_ablm.scaling.published import STUDIES

    add = parser.add_argument
    add("--drop-bad-rows", action="store_true", help="drop unusable rows instead of stopping")
    add(
        "--keep-duplicates",
        action="store_true",
        help="equal rows are replicates whose rounded losses agree, not copies",
    )
    add("--drop-largest-losses", type=int, default=0, metavar="N", help="leave out N outliers")
    add("--tokens-per-pair", type=float, help="turns unique_pairs into unique_tokens")
    add("--published", choices=sorted(STUDIES), help="print a study's numbers beside ours")


def _of_advice(parser: argparse.ArgumentParser) -> None:
    """What to train next: the best model, the best run, a planned grid."""
    add = parser.add_argument
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


def reading_of(args: argparse.Namespace, laws: Sequence[str]) -> "Reading":
    """How the input is read for these laws; raises UserError for wrong flags."""
    from moe_ablm.scaling.catalogue import LAWS
    from moe_ablm.scaling.laws import Law
    from moe_ablm.scaling.reading import Reading

    return Reading(
        columns=_pairs("--columns", [args.columns]),
        where=_pairs("--where", args.where),
        drop_bad_rows=args.drop_bad_rows,
        drop_largest_losses=args.drop_largest_losses,
        tokens_per_pair=args.tokens_per_pair,
        keep_duplicates=args.keep_duplicates,
        curves=all(LAWS.get(law, Law).needs_curves for law in laws),
        settings=len(laws) == 1 and LAWS.get(laws[0], Law).of_settings,
        gaps=not args.design and any(LAWS.get(law, Law).of_gap for law in laws),
        covariates=_covariates(args.covariates, laws),
        need_loss=not args.design,
    )


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


def check_numbers(args: argparse.Namespace) -> None:
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


def target_of(args: argparse.Namespace, runs: "Runs") -> "Target":
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


def numbers_of(flag: str, text: str) -> dict[str, float]:
    return {k: _number(flag, k, v) for k, v in _pairs(flag, [text]).items()}


def _number(flag: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{flag} {name}={value}: expected a number") from None
