"""`python -m moe_ablm evaluate`: all evaluations of the studies, in one report."""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_ablm.config_file import load
from moe_ablm.errors import UserError, suggestion
from moe_ablm.model.spec import PRECISIONS
from moe_ablm.verbs.reading import ASKED
from moe_ablm.verbs.writing import add_results_directory

FILES = {
    "specificity": "antibodies with a label (CSV or parquet: h_sequence, l_sequence, label)",
    "therapeutic": "named antibodies whose attention is drawn",
    "fitness": "a table of variants with a measured value (FLAb, ProteinGym)",
    "proteins": "a task in FLIP or TAPE format",
}

MOST_SEEDS = 1 << 63
ROUTING = "routing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb; the names are relied on by scripts."""
    parser.epilog = "--data: " + "; ".join(f"{name}: {text}" for name, text in FILES.items())
    add = parser.add_argument
    add("--run", type=Path, required=True, help=ASKED)
    add("--input", type=Path, metavar="DIR", help="a dataset; its test split is held out")
    add(
        "--suite",
        default="all",
        metavar="NAME",
        help="all, names of evaluations separated by commas, or a config file "
        "(configs/evaluation.py); default: all",
    )
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another input; repeatable",
    )
    add_results_directory(parser)
    add(
        "--on-bad-row",
        choices=("fail", "skip"),
        default="fail",
        help="stop at a malformed row of a --data file (default), or leave it out with a note",
    )
    add("--seed", type=int, default=0, help="seed of all draws (default 0)")
    add(
        "--null",
        choices=("position-only", "shuffled", "untrained"),
        help="evaluate a null model of the run's shape instead: a router by position alone, the "
        "router with other antibodies' positions, or the encoder untrained",
    )
    add(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="precision of the computation",
    )
    add(
        "--devices", type=int, default=1, metavar="N", help="devices that share a batch (default 1)"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluates, or goes on; writes results and report.

    Raises:
      UserError: the model, the inputs or the suite are wrong; nothing is written.
    """
    if not 0 <= args.seed < MOST_SEEDS:
        raise UserError(f"--seed {args.seed}: expected 0 or more, less than 2^63")
    (suite, claims), files = read_suite(args.suite), named_files(args.data)
    if not args.input and not files:
        raise UserError("nothing to evaluate on: give --input DIR (a dataset), or --data NAME=FILE")
    from moe_ablm.data.dataset import Dataset
    from moe_ablm.evaluation.nulls import ROUTED, UNTRAINED, untrained
    from moe_ablm.evaluation.reporting.results import same_command, write_results
    from moe_ablm.evaluation.subject import Subject
    from moe_ablm.evaluation.suite import run_suite, with_earlier
    from moe_ablm.inference.engines import engine_of

    dataset = Dataset(args.input) if args.input else None
    engine = engine_of(args.run, args.precision, args.devices)
    null = args.null or ""
    if null == UNTRAINED:
        engine = untrained(engine)
    if null in ROUTED:
        suite = _routed_only(suite, null)
    work = args.out / "work"
    with _nothing_left_of_a_refusal(args.out):
        about = same_command(args.out, engine, dataset, files, args.seed, claims, null)
        subject = Subject(engine, dataset, work, files, args.seed, args.on_bad_row, null)
        found = run_suite(subject, suite, args.out, lambda line: print(line, flush=True))
    found = with_earlier(found, args.out)
    for file in write_results(args.out, about, found, command_of(args)):
        print(file)
    for line in skipped_lines(found):
        print(line)


@contextlib.contextmanager
def _nothing_left_of_a_refusal(out: Path) -> Iterator[None]:
    """Removes the directory that this command made, unless it holds what an evaluation found."""
    made = not out.exists()
    try:
        yield
    except UserError:
        if made and not any(out.glob("*/result.json")):
            shutil.rmtree(out, ignore_errors=True)
        raise


def skipped_lines(found: Mapping[str, dict]) -> list[str]:
    """What was not done, and why, to be said last; a reason that several share only once."""
    names: dict[str, list[str]] = {}
    for name, kept in found.items():
        if kept["status"] == "skipped":
            names.setdefault(kept["reason"], []).append(name)
    told = [f"  {', '.join(each)}: {reason}" for reason, each in names.items()]
    return ["not done (the same command does these alone, later):", *told] if told else []


def _routed_only(suite: Mapping[str, Any], null: str) -> dict[str, Any]:
    """What a null of a router can be asked, as it has no predictions; says what it cannot.

    Raises:
      UserError: nothing is left.
    """
    for name in suite:
        if name != ROUTING:
            print(f"{name}: skipped: {null} is a null of a router, it has no predictions")
    if ROUTING not in suite:
        raise UserError(f"--null {null}: expected a suite with {ROUTING}, all that it is a null of")
    return {ROUTING: suite[ROUTING]}


def command_of(args: argparse.Namespace) -> list[str]:
    """The command line without its suite and output."""
    line = ["python", "-m", "moe_ablm", "evaluate", "--run", str(args.run)]
    line += ["--input", str(args.input)] if args.input else []
    line += [part for text in args.data for part in ("--data", text)]
    line += ["--on-bad-row", args.on_bad_row] if args.on_bad_row != "fail" else []
    line += ["--null", args.null] if args.null else []
    return [*line, "--seed", str(args.seed), "--precision", args.precision]


def read_suite(name: str) -> tuple[dict[str, Any], list[str]]:
    """Settings by the name of the evaluation, in the order of the suite, and claims it declares.

    Raises:
      UserError: no such evaluation, setting, claim or file.
    """
    from moe_ablm.evaluation.declared import CLAIMS
    from moe_ablm.evaluation.suite import EVALUATIONS, module_of

    if name.endswith(".py"):
        chosen = _read_file(name)
    else:
        names = EVALUATIONS if name == "all" else name.split(",")
        chosen = {each.strip(): {} for each in names}
    suite, claims = {}, _claims(chosen.pop(CLAIMS, []), f"--suite {name}: {CLAIMS}")
    for each, values in chosen.items():
        if each not in EVALUATIONS:
            raise UserError(
                f"--suite {name}: {each!r} is no evaluation{suggestion(each, EVALUATIONS)}; "
                f"expected all, a config file, or some of {', '.join(EVALUATIONS)}"
            )
        suite[each] = _settings(module_of(each).Settings, values, f"--suite {name}: {each}")
    return suite, claims


def _claims(names: Any, where: str) -> list[str]:
    """Claims that a suite declares, each once."""
    from moe_ablm.evaluation.declared import RESTS_ON

    if not isinstance(names, list):
        raise UserError(f"{where}={names!r}: expected a list of some of {', '.join(RESTS_ON)}")
    for name in names:
        if name not in RESTS_ON:
            raise UserError(
                f"{where}: {name!r} is no claim{suggestion(str(name), RESTS_ON)}; expected some of "
                f"{', '.join(RESTS_ON)}"
            )
    return list(dict.fromkeys(names))


def _settings(kind: type, values: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={values!r}: expected a mapping of settings, {{}} for defaults")
    for key, value in values.items():
        if key not in fields:
            raise UserError(
                f"{where}.{key} is no setting{suggestion(key, fields)}; expected "
                f"{', '.join(fields)}"
            )
        default: Any = fields[key].default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise UserError(
                f"{where}.{key}={value!r}: expected {type(default).__name__}, as {default!r}"
            )
        least = min(default, 1) if type(value) is int else 0  # a layer may count from the last
        if type(value) is int and value < least and default >= 0:
            raise UserError(f"{where}.{key}={value}: expected {least} or more")
        if type(value) is float and not 0 < value < math.inf:
            raise UserError(f"{where}.{key}={value}: expected more than 0")
    return kind(**values)


def _read_file(name: str) -> dict[str, Any]:
    """What `get_config` of a config file returns, as plain mappings."""
    found = load(name, "--suite", "configs/evaluation.py")
    try:
        return json.loads(found.to_json())
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"--suite={name}: get_config returned {type(found).__name__}, expected a ConfigDict of "
            "settings by evaluation, as configs/evaluation.py"
        ) from error


def named_files(texts: list[str]) -> dict[str, tuple[Path, ...]]:
    """`NAME=FILE` of every `--data`.

    Raises:
      UserError: another form, an unknown name, or no such file.
    """
    files: dict[str, tuple[Path, ...]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in FILES:
            raise UserError(
                f"--data {text}: expected NAME=FILE with NAME one of {', '.join(FILES)}"
                f"{suggestion(name, FILES)}"
            )
        if not Path(path).is_file():
            found = "a directory; expected a file" if Path(path).is_dir() else "no such file"
            raise UserError(f"--data {text}: there is {found}")
        files[name] = (*files.get(name, ()), Path(path))
    return files
