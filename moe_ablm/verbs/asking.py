"""What the verbs that ask a model share: flags, the way from sequences to results, progress."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_ablm.data.readers import FORMATS, Source, open_sources, parse_columns
from moe_ablm.data.readers.report import why_nothing
from moe_ablm.errors import UserError
from moe_ablm.model.spec import PRECISIONS

if TYPE_CHECKING:  # jax only when there is something to compute
    import pyarrow as pa

    from moe_ablm.inference.antibodies import Antibody
    from moe_ablm.inference.buckets import Engine


@dataclass(frozen=True)
class Question:
    """What a verb asks of the model.

    Attributes:
      options: what decides the answer beside model and input, plain JSON.
      answer: from some antibodies to a table of their results.
      cost: rows through the encoder, and bytes of the result, of an antibody.
      letters: allowed in sequences; None: those of `inference.antibodies`.
      refuse: what is wrong with an antibody, or None.
    """

    options: dict[str, Any]
    answer: Callable[["Engine", Sequence["Antibody"]], "pa.Table"]
    cost: Callable[["Engine", "Antibody"], tuple[int, int]]
    letters: str | None = None
    refuse: Callable[["Antibody"], str | None] = lambda antibody: None


def add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, of the sequences, and of where results go."""
    parser.epilog = "formats: " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--run", type=Path, required=True, help="a trained run, or an import")
    parser.add_argument(
        "--input",
        action="append",
        metavar="FILE",
        help="a file of sequences, or heavy=H.fasta,light=L.fasta; repeat it for several",
    )
    parser.add_argument("--heavy", metavar="SEQUENCE", help="a heavy chain, instead of files")
    parser.add_argument("--light", metavar="SEQUENCE", help="its light chain, or one alone")
    parser.add_argument("--format", metavar="NAME", help="instead of what the content says")
    parser.add_argument("--columns", metavar="heavy=A,light=B", help="columns of chains and id")
    parser.add_argument(
        "--on-bad-row",
        choices=("fail", "skip"),
        default="fail",
        help="stop at a row that is malformed or too long (default), or leave it out and count it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".csv, .parquet, .jsonl or .npz; the same command again goes on where it stopped "
        "(default: CSV on the terminal)",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="of the computation; bfloat16_operands is quicker on CPUs with AMX",
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="share out the rows")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="at most so many tokens at once, padding included (default: what suits the device)",
    )


def ask(args: argparse.Namespace, question: Question) -> None:
    """Answers the question for every antibody, window by window.

    Raises:
      UserError: whatever is wrong with flags, model, sequences, or the place for results.
    """
    sources = None if args.input else _typed(args)
    if args.input and (args.heavy or args.light):
        raise UserError("--input with --heavy or --light: give files, or chains, not both")
    if args.input:
        sources = _sources(args, question)
    import jax

    if args.devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", args.devices)  # where there is no accelerator
    from moe_ablm.inference.buckets import Engine
    from moe_ablm.interop.load import load_model

    engine = Engine(load_model(args.run), args.precision, args.devices, args.batch_tokens)
    antibodies = _antibodies(sources, engine, question)
    if args.out is None:
        _print(engine, question, antibodies)
    else:
        _write(args, engine, question, sources, antibodies)
    for source in sources if args.input else ():
        _tell_what_was_left_out(source)


def _typed(args: argparse.Namespace) -> list[tuple[str, str]]:
    if not (args.heavy or args.light):
        raise UserError("nothing to read: give --input FILE, or --heavy and --light")
    return [(args.heavy or "", args.light or "")]


def _sources(args: argparse.Namespace, question: Question) -> list[Source]:
    from moe_ablm.inference.antibodies import LETTERS

    sources = open_sources(
        args.input,
        format=args.format,
        columns=parse_columns(args.columns),
        on_bad_row=args.on_bad_row,
        letters=question.letters or LETTERS,
    )
    if any(source.is_protein for source in sources):
        raise UserError("--input: general proteins; give antibody chains, or --format fasta")
    return sources


def _antibodies(sources: list, engine: "Engine", question: Question) -> Iterator["Antibody"]:
    from moe_ablm.inference import antibodies

    model = engine.model
    if isinstance(sources[0], Source):
        yield from antibodies.read(sources, model.layout, model.length, question.refuse)
        if not any(source.report.kept for source in sources):
            why = why_nothing(source.report for source in sources)
            raise UserError(f"no antibody is left: {why}")
        return
    letters = question.letters or antibodies.LETTERS
    for antibody in antibodies.given(sources, model.layout, model.length, letters):
        if reason := question.refuse(antibody):
            raise UserError(reason)
        yield antibody


def _windows(engine: "Engine", question: Question, antibodies: Iterator["Antibody"]) -> Iterator:
    from moe_ablm.inference.antibodies import windows

    return windows(antibodies, lambda antibody: question.cost(engine, antibody))


def _print(engine: "Engine", question: Question, antibodies: Iterator["Antibody"]) -> None:
    from moe_ablm.inference.output import write_csv

    for number, window in enumerate(_windows(engine, question, antibodies)):
        write_csv(question.answer(engine, window), sys.stdout.buffer, header=number == 0)
        sys.stdout.flush()


def _write(
    args: argparse.Namespace,
    engine: "Engine",
    question: Question,
    sources: list,
    antibodies: Iterator["Antibody"],
) -> None:
    from moe_ablm.inference.output import Output

    started = time.monotonic()
    with Output(args.out, _command(args, engine, question, sources)) as output:
        if output.complete:
            print(f"{args.out} is complete: remove it to compute it again")
            return
        if output.done:
            print(f"{args.out}: going on after {output.done:,} antibodies", file=sys.stderr)
        before = output.done
        # what is kept is read again, but not computed
        left = itertools.islice(antibodies, output.done, None)
        with _progress(args.verb) as bar:
            task = bar.add_task("", total=None, completed=before)
            for window in _windows(engine, question, left):
                output.add(question.answer(engine, window), len(window))
                bar.update(task, completed=output.done)
        lines = output.finish()
    seconds = time.monotonic() - started
    print(
        f"{args.out}: {output.done:,} antibodies, {lines:,} lines, {seconds:,.1f} s "
        f"({(output.done - before) / seconds:,.1f} antibodies/s)"
    )


def _command(
    args: argparse.Namespace, engine: "Engine", question: Question, sources: list
) -> dict[str, Any]:
    """All that decides the content of the output."""
    from moe_ablm.inference.output import file_identity

    if isinstance(sources[0], Source):
        read: Any = [file_identity(path) for source in sources for path in source.paths]
    else:
        read = sources
    return {
        "verb": args.verb,
        "model": engine.model.digest(),
        "input": read if args.input else [list(pair) for pair in read],
        "reading": [args.format, args.columns, args.on_bad_row],
        "precision": args.precision,
        "options": question.options,
    }


def _progress(verb: str) -> Progress:
    """A bar on a terminal, nothing elsewhere; the number of antibodies is not known before."""
    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _tell_what_was_left_out(source: Source) -> None:
    report = source.report
    for reason, rows in report.rejected.most_common():
        first = report.first[reason]
        print(f"{report.origin}: left out {rows:,}: {reason} (first: {first})", file=sys.stderr)
