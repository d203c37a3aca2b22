"""Verbs that ask a model about antibodies: embed, score, infill, scan, route, attention, predict.

They share their flags and the way from sequences to results (`ask`); each adds a `Question`.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from moe_ablm.data.positions import Selection, selection
from moe_ablm.data.readers import Reading, Source, open_sources
from moe_ablm.data.readers.report import why_nothing
from moe_ablm.data.tokenizer import MASKED
from moe_ablm.errors import UserError, counted
from moe_ablm.model.spec import PRECISIONS
from moe_ablm.progress import WatchedBar
from moe_ablm.verbs.reading import ASKED, Course, add_format_arguments, add_numbering, reading_of
from moe_ablm.verbs.writing import out_directory, out_file

if TYPE_CHECKING:  # jax only when there is something to compute
    import pyarrow as pa

    from moe_ablm.data.antibody import Antibody
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
    parser: argparse.ArgumentParser, suffixes: tuple[str, ...] = SUFFIXES
) -> None:
    """Flags of the model, of the sequences, and of where results go, in files of these suffixes."""
    parser.add_argument("--run", type=Path, required=True, help=ASKED)
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
      UserError: flags, model or sequences are wrong, or the output cannot be written.
    """
    if not (args.input or args.heavy or args.light):
        raise UserError("nothing to read: give --input FILE, or --heavy and --light")
    if args.input and (args.heavy or args.light):
        raise UserError("--input with --heavy or --light: give files, or chains, not both")
    sources = _sources(args, question) if args.input else []
    import jax

    if args.devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # where there is no accelerator; more devices than cores would compute one after the other
        jax.config.update("jax_num_cpu_devices", min(args.devices, os.cpu_count() or 1))
    from moe_ablm.inference.engines import engine_of

    engine = engine_of(args.run, args.precision, args.devices, args.batch_tokens)
    antibodies = _antibodies(args, sources, engine, question)
    if args.out is None:
        _print(engine, question, antibodies)
    else:
        _write(args, engine, question, sources, antibodies)
    for source in sources:
        _print_left_out(source)


def _sources(args: argparse.Namespace, question: Question) -> list[Source]:
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
    args: argparse.Namespace, sources: list[Source], engine: "Engine", question: Question
) -> Iterator["Antibody"]:
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
    sources: list[Source],
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
        f"({(output.done - before) / seconds:,.1f} antibodies/s)"
    )


def _command(
    args: argparse.Namespace, engine: "Engine", question: Question, sources: list[Source]
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
    """What is not as by default of how files are read; outputs of before have none of these."""
    reading = reading_of(args)
    return [
        [name, str(getattr(reading, name))]
        for name in ("nucleotides", "keep_flagged", "dominance", "contigs")
        if getattr(reading, name) != getattr(Reading, name)
    ]


def _print_left_out(source: Source) -> None:
    report = source.report
    for reason, rows in report.rejected.most_common():
        first = report.first[reason]
        print(f"{report.origin}: left out {rows:,}: {reason} (first: {first})", file=sys.stderr)


def _level(parser: argparse.ArgumentParser, levels: tuple[str, ...], text: str) -> None:
    parser.add_argument("--level", choices=levels, default="antibody", help=text)


def _of_residues(args: argparse.Namespace) -> dict[str, str]:
    """Options of lines that have numbers: none where there is a line for each antibody."""
    return {"numbering": args.numbering} if getattr(args, "level", "residue") == "residue" else {}


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", metavar="CDRH3,...", help="residues of these regions (IMGT)")
    parser.add_argument(
        "--positions", metavar="H105-H117,...", help="residues at these numbers of --numbering"
    )


def _selection(args: argparse.Namespace) -> tuple[Selection | None, dict[str, Any]]:
    """What --regions and --positions choose, and the options that say so."""
    chosen = selection(args.regions, args.positions, args.numbering)
    said = {"regions": args.regions, "positions": args.positions, "numbering": args.numbering}
    return chosen, said if chosen else {}


def _refusing(chosen: Selection | None) -> Callable[["Antibody"], str | None]:
    """Why nothing is chosen of an antibody, or None."""

    def refuse(antibody: "Antibody") -> str | None:
        from moe_ablm.inference.numbers import nothing_chosen

        return None if chosen is None else nothing_chosen(antibody, chosen)

    return refuse


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `embed`."""
    add_asking_arguments(parser, (*SUFFIXES, ANNDATA))
    levels = ("antibody", "chain", "residue")
    _level(parser, levels, "a vector each; of antibodies and chains the mean over their residues")
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="0 is the token embedding, -1 (default) the last layer, after its norm",
    )


def embed(args: argparse.Namespace) -> None:
    """Writes `embedding` of every antibody, chain or residue."""
    if args.out is not None and args.out.suffix == ANNDATA:
        from moe_ablm.inference.annotated_matrix import require_anndata

        require_anndata(f"--out {args.out}")
    from moe_ablm.inference.embed import table

    def cost(engine: "Engine", antibody: "Antibody") -> tuple[int, int]:
        vectors = antibody.residues if args.level == "residue" else 2
        return 1, vectors * (4 * engine.model.spec.d_model + 64)

    question = Question(
        {"level": args.level, "layer": args.layer},
        lambda engine, antibodies: table(engine, antibodies, args.level, args.layer),
        cost,
    )
    ask(args, question)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `score`."""
    add_asking_arguments(parser)
    _level(parser, ("antibody", "residue"), "a line each; by residue its log-likelihood")
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="mask nothing: some 200 times quicker, and too optimistic",
    )
    parser.add_argument("--by-region", action="store_true", help="frameworks and CDRs apart (IMGT)")
    add_numbering(parser)


def score(args: argparse.Namespace) -> None:
    """Writes the scores of every antibody or residue."""
    from moe_ablm.inference.score import table

    options = {"level": args.level, "one_pass": args.one_pass, "by_region": args.by_region}
    options |= _of_residues(args)

    def cost(engine: "Engine", antibody: "Antibody") -> tuple[int, int]:
        # log-probabilities of all tokens are held for a while
        held = 4 * engine.model.spec.vocabulary + 128
        return (1 if args.one_pass else antibody.residues), antibody.residues * held

    ask(
        args,
        Question(options, lambda engine, antibodies: table(engine, antibodies, **options), cost),
    )


def add_infill_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `infill`."""
    add_asking_arguments(parser)
    levels = ("antibody", "residue")
    _level(parser, levels, "completed chains, or each residue filled in with its candidates")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="draw N completions of each antibody by probability (default: the most probable one)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="candidates told with --level residue"
    )
    _add_selection(parser)
    add_numbering(parser)


def infill(args: argparse.Namespace) -> None:
    """Writes completed antibodies, or the residues filled in."""
    from moe_ablm.inference.sampling import Sampling

    sampling = Sampling(args.samples, args.temperature, args.seed, args.top)
    chosen, said = _selection(args)
    from moe_ablm.inference.infill import INFILLED, table
    from moe_ablm.inference.numbers import masked

    def cost(engine: "Engine", antibody: "Antibody") -> tuple[int, int]:
        masks = (antibody.heavy + antibody.light).count(MASKED)
        samples = max(args.samples, 1)
        return samples * max(masks, 1), samples * (masks * 1024 + 1024)

    whole = 0

    def answer(engine: "Engine", antibodies: Sequence["Antibody"]) -> "pa.Table":
        nonlocal whole
        whole += sum(MASKED not in antibody.heavy + antibody.light for antibody in antibodies)
        return table(engine, antibodies, args.level, sampling, args.numbering)

    def change(antibody: "Antibody") -> "Antibody":
        return antibody if chosen is None else masked(antibody, chosen)

    options = {"level": args.level, **vars(sampling), **_of_residues(args), **said}
    ask(args, Question(options, answer, cost, INFILLED, _refusing(chosen), change))
    if whole:
        print(
            f"moe_ablm: {whole:,} antibodies have nothing to fill in: mask residues by _, * or "
            "<mask>, or by --regions or --positions",
            file=sys.stderr,
        )


def add_scan_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `scan`."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--method",
        choices=("masked-marginal", "wild-type-marginal", "mutant-marginal"),
        default="masked-marginal",
        help="a pass a residue, one pass in all, or 19 passes a residue",
    )
    parser.add_argument(
        "--figures", type=out_directory, metavar="DIR", help="a heat map of every antibody, as PNG"
    )
    _add_selection(parser)
    add_numbering(parser)


def scan(args: argparse.Namespace) -> None:
    """Writes the log-odds of every mutant."""
    chosen, said = _selection(args)
    if args.figures is not None:
        try:
            args.figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--figures {args.figures}: {error.strerror}") from error
    from moe_ablm.inference import scan

    def answer(engine: "Engine", antibodies: Sequence["Antibody"]) -> "pa.Table":
        scores = scan.scan(engine, antibodies, args.method, chosen)
        if args.figures is not None:
            from moe_ablm.inference.heatmap import draw_scan, figure_path

            for antibody, log_odds in zip(antibodies, scores, strict=True):
                path = figure_path(args.figures, antibody)
                draw_scan(antibody, log_odds, args.method, path)
        return scan.table(antibodies, scores, args.numbering)

    def cost(engine: "Engine", antibody: "Antibody") -> tuple[int, int]:
        return scan.passes(antibody, args.method, chosen), antibody.residues * 19 * 160

    options = {"method": args.method, **_of_residues(args), **said}
    ask(args, Question(options, answer, cost, refuse=_refusing(chosen)))


def add_route_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `route`."""
    add_asking_arguments(parser)
    add_numbering(parser)


def route(args: argparse.Namespace) -> None:
    """Writes a line for each residue, layer and expert."""
    from moe_ablm.inference.route import bytes_of, table

    question = Question(
        _of_residues(args),
        lambda engine, antibodies: table(engine, antibodies, args.numbering),
        lambda engine, antibody: (1, bytes_of(engine, antibody)),
    )
    ask(args, question)


def add_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `attention`."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--layer", type=int, default=-1, help="0 is the first layer, -1 (default) the last one"
    )
    parser.add_argument(
        "--heads", action="store_true", help="every head, too; else their mean alone"
    )


def attention(args: argparse.Namespace) -> None:
    """Writes a line for each pair of residues of different chains."""
    from moe_ablm.inference.attention import bytes_of, needs_both, table

    question = Question(
        {"layer": args.layer, "heads": args.heads},
        lambda engine, antibodies: table(engine, antibodies, args.layer, args.heads),
        lambda engine, antibody: (1, bytes_of(engine, antibody)),
        refuse=needs_both,
    )
    ask(args, question)


def predict(args: argparse.Namespace) -> None:
    """Writes what the head of a fine-tuned model says of every antibody."""
    from moe_ablm.evaluation.supervised.saved_head import cost, read_head, table
    from moe_ablm.interop.hub import local_directory

    saved = read_head(local_directory(args.run, "--run"))
    question = Question(
        {"head": saved.digest()},
        lambda engine, antibodies: table(saved, engine, antibodies),
        cost,
    )
    ask(args, question)


VERBS = {
    "embed": (add_embed_arguments, embed),
    "score": (add_score_arguments, score),
    "infill": (add_infill_arguments, infill),
    "scan": (add_scan_arguments, scan),
    "route": (add_route_arguments, route),
    "attention": (add_attention_arguments, attention),
    "predict": (add_asking_arguments, predict),
}
