"""The way of the verbs that ask a model about antibodies, from sequences to results.

They share the flags of `add_asking_arguments`, and `ask`. Each verb of questions.py adds a
`Question`.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from moe_ablm.data.germline import HUMAN, files_of_germlines, parse_germlines
from moe_ablm.data.readers import Reading
from moe_ablm.errors import UserError, counted
from moe_ablm.model.spec import PRECISIONS
from moe_ablm.progress import WatchedBar
from moe_ablm.verbs.reading import (
    ASKED,
    Course,
    add_format_arguments,
    add_germlines,
    reading_of,
)
from moe_ablm.verbs.writing import out_file

if TYPE_CHECKING:  # jax only when there is something to compute
    import pyarrow as pa

    from moe_ablm.data.antibody import Antibody
    from moe_ablm.data.readers import Source
    from moe_ablm.inference.buckets import Engine


# of `inference.output.WRITERS`; the last is for vectors
SUFFIXES = (".csv", ".parquet", ".jsonl", ".npz")
ANNDATA = ".h5ad"


@dataclass(frozen=True)
class Question:
    """The work of one verb.

    Attributes:
      options: all that decides the results beside model and input, plain JSON.
      answer: table of the results of some antibodies.
      cost: rows through the encoder, and bytes of the result, of an antibody.
      letters: allowed in sequences; None: `inference.antibodies.LETTERS`.
      refuse: the reason to refuse an antibody, or None.
      change: what is asked about instead of an antibody.
    """

    options: dict[str, Any]
    answer: Callable[["Engine", Sequence["Antibody"]], "pa.Table"]
    cost: Callable[["Engine", "Antibody"], tuple[int, int]]
    letters: str | None = None
    refuse: Callable[["Antibody"], str | None] = lambda antibody: None
    change: Callable[["Antibody"], "Antibody"] = lambda antibody: antibody


def add_asking_arguments(
    parser: argparse.ArgumentParser, suffixes: tuple[str, ...] = SUFFIXES, run: str = ASKED
) -> None:
    """Flags of the model, of the sequences, and of where results go.

    Args:
      parser: of the verb.
      suffixes: of the files that it can write.
      run: which models it takes.
    """
    parser.add_argument("--run", type=Path, required=True, help=run)
    parser.add_argument(
        "--input",
        action="append",
        metavar="FILE",
        help="a file of sequences, or heavy=H.fasta,light=L.fasta; repeat it for several",
    )
    parser.add_argument("--heavy", metavar="SEQUENCE", help="a heavy chain, instead of files")
    parser.add_argument("--light", metavar="SEQUENCE", help="its light chain, or one alone")
    add_format_arguments(
        parser,
        "stop at a row that is malformed or too long (default), or leave it out and count it",
    )
    add_germlines(parser)
    parser.add_argument(
        "--out",
        type=out_file(*suffixes),
        metavar="FILE",
        help=f"{', '.join(suffixes[:-1])} or {suffixes[-1]}; the same command again goes on where "
        "it stopped (default: CSV on the terminal)",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="precision of the computation (default: float32; of predict that of its head); "
        "bfloat16_operands is faster on CPUs with AMX",
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="devices that share a batch (default 1)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="at most so many tokens at once, padding included (default: what suits the device)",
    )


def ask(args: argparse.Namespace, question: Question) -> None:
    """Answers the question for every antibody, window by window.

    Raises:
      UserError: flags, model or sequences are wrong, or the output cannot be written.
    """
    if not (args.input or args.heavy or args.light):
        raise UserError("nothing to read: give --input FILE, or --heavy and --light")
    if args.input and (args.heavy or args.light):
        raise UserError("--input with --heavy or --light: give files, or chains, not both")
    parse_germlines(args.germlines)  # of chains on the command line, too
    sources = _sources(args, question) if args.input else []
    from moe_ablm.inference.engines import engine_of

    engine = engine_of(args.run, args.precision, args.devices, args.batch_tokens)
    antibodies = _antibodies(args, sources, engine, question)
    if args.out is None:
        _print(engine, question, antibodies)
    else:
        _write(args, engine, question, sources, antibodies)
    for source in sources:
        _print_left_out(source)


def _sources(args: argparse.Namespace, question: Question) -> "list[Source]":
    from moe_ablm.data.readers import open_sources
    from moe_ablm.inference.antibodies import LETTERS

    sources = open_sources(
        args.input,
        format=args.format,
        on_bad_row=args.on_bad_row,
        letters=question.letters or LETTERS,
        reading=reading_of(args),
    )
    if any(source.is_protein for source in sources):
        raise UserError("--input: general proteins; give antibody chains, or --format fasta")
    return sources


def _antibodies(
    args: argparse.Namespace, sources: "list[Source]", engine: "Engine", question: Question
) -> Iterator["Antibody"]:
    from moe_ablm.data.readers.report import why_nothing
    from moe_ablm.inference.antibodies import LETTERS, given, read

    model = engine.model
    if sources:
        yield from map(question.change, read(sources, model.layout, model.length, question.refuse))
        if not any(source.report.kept for source in sources):
            why = why_nothing(source.report for source in sources)
            raise UserError(f"no antibody is left: {why}")
        return
    pair = args.heavy or "", args.light or ""
    for antibody in given([pair], model.layout, model.length, question.letters or LETTERS):
        if reason := question.refuse(antibody):
            raise UserError(reason)
        yield question.change(antibody)


def _windows(
    engine: "Engine", question: Question, antibodies: Iterator["Antibody"]
) -> Iterator[list["Antibody"]]:
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
    sources: "list[Source]",
    antibodies: Iterator["Antibody"],
) -> None:
    from moe_ablm.inference.output import Output

    started = time.monotonic()
    with Output(args.out, _command(args, engine, question, sources)) as output:
        if output.complete:
            print(f"{args.out} is complete: remove it to compute it again")
            return
        if output.done:
            done = counted(output.done, "antibody", "antibodies")
            print(f"{args.out}: going on after {done}", file=sys.stderr)
        before = output.done
        # antibodies whose results are kept are read again, but not computed
        left = itertools.islice(antibodies, output.done, None)
        columns = (TextColumn(args.verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        course = Course(sources)

        def look() -> dict[str, int | None]:
            return {"completed": output.done, "total": course.antibodies() if sources else 1}

        with WatchedBar(look, *columns):
            for window in _windows(engine, question, left):
                output.add(question.answer(engine, window), len(window))
        lines = output.finish()
    seconds = time.monotonic() - started
    print(
        f"{args.out}: {counted(output.done, 'antibody', 'antibodies')}, "
        f"{counted(lines, 'line')}, {seconds:,.1f} s "
        f"({_rate((output.done - before) / seconds)} antibodies/s)"
    )


def _rate(number: float) -> str:
    """Two digits at least: 0.048, 3.1, 1,204."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _command(
    args: argparse.Namespace, engine: "Engine", question: Question, sources: "list[Source]"
) -> dict[str, Any]:
    """All that decides the content of the output."""
    from moe_ablm.inference.output import file_identity

    read: list[Any] = [file_identity(path) for source in sources for path in source.paths]
    return {
        "verb": args.verb,
        "model": engine.model.digest(),
        "input": read or [[args.heavy or "", args.light or ""]],
        "reading": [args.format, args.columns, args.on_bad_row, *_chosen(args)],
        "precision": args.precision,
        "options": question.options,
    }


def _chosen(args: argparse.Namespace) -> list[list]:
    """Reading options that differ from their defaults; older outputs have none of them."""
    from moe_ablm.inference.output import file_identity

    reading = reading_of(args)
    differing: list[list] = [
        [name, str(getattr(reading, name))]
        for name in ("nucleotides", "keep_flagged", "dominance", "contigs")
        if getattr(reading, name) != getattr(Reading, name)
    ]
    if reading.germlines != Reading.germlines:
        folders = [Path(name) for name in reading.germlines if name != HUMAN]
        files = [file_identity(path) for folder in folders for path in files_of_germlines(folder)]
        differing.append(["germlines", list(reading.germlines), *files])
    return differing


def _print_left_out(source: "Source") -> None:
    report = source.report
    for reason, rows in report.rejected.most_common():
        first = report.first[reason]
        print(f"{report.origin}: left out {rows:,}: {reason} (first: {first})", file=sys.stderr)
