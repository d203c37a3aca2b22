"""Verbs that ask a model about antibodies: `embed`, `score`, `infill`, `scan` and the others."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moe_ablm.data.germline import parse_germlines
from moe_ablm.data.positions import Selection, selection
from moe_ablm.data.tokenizer import MASKED
from moe_ablm.errors import UserError, counted
from moe_ablm.verbs.asking import ANNDATA, SUFFIXES, Question, add_asking_arguments, ask
from moe_ablm.verbs.reading import RUN, add_numbering
from moe_ablm.verbs.writing import out_directory

if TYPE_CHECKING:  # jax only when there is something to compute
    import pyarrow as pa

    from moe_ablm.data.antibody import Antibody
    from moe_ablm.inference.buckets import Engine


def _level(parser: argparse.ArgumentParser, levels: tuple[str, ...], text: str) -> None:
    parser.add_argument("--level", choices=levels, default="antibody", help=text)


def _of_residues(args: argparse.Namespace) -> dict[str, str]:
    """Options of lines that have numbers: none where there is a line for each antibody."""
    return {"numbering": args.numbering} if getattr(args, "level", "residue") == "residue" else {}


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--regions", metavar="CDRH3,...", help="only residues of these regions (IMGT)"
    )
    parser.add_argument(
        "--positions",
        metavar="H105-H117,...",
        help="only residues at these positions of --numbering",
    )


def _selection(args: argparse.Namespace) -> tuple[Selection | None, dict[str, Any]]:
    """What --regions and --positions choose, and the options that say so."""
    germlines = parse_germlines(args.germlines)
    chosen = selection(args.regions, args.positions, args.numbering, germlines)
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
    _level(
        parser, levels, "one vector each; for antibodies and chains the mean over their residues"
    )
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
    _level(parser, ("antibody", "residue"), "one line each; for residues their log-likelihoods")
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="score in one pass without masks: about 200 times faster, but too optimistic",
    )
    parser.add_argument(
        "--by-region", action="store_true", help="also score each framework and CDR (IMGT)"
    )
    add_numbering(parser)


def score(args: argparse.Namespace) -> None:
    """Writes the scores of every antibody or residue."""
    from moe_ablm.inference.score import table

    options = {"level": args.level, "one_pass": args.one_pass, "by_region": args.by_region}
    options |= _of_residues(args)
    germlines = parse_germlines(args.germlines)

    def answer(engine: "Engine", antibodies: Sequence["Antibody"]) -> "pa.Table":
        return table(engine, antibodies, **options, germlines=germlines)

    def cost(engine: "Engine", antibody: "Antibody") -> tuple[int, int]:
        # log-probabilities of all tokens are held for a while
        held = 4 * engine.model.spec.vocabulary + 128
        return (1 if args.one_pass else antibody.residues), antibody.residues * held

    ask(args, Question(options, answer, cost))


def add_infill_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `infill`."""
    add_asking_arguments(parser)
    levels = ("antibody", "residue")
    _level(
        parser,
        levels,
        "one line per antibody (completed chains), or per filled residue (candidates)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="draw N completions of each antibody by probability (default: the most probable one)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of the draws")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="candidates listed per residue"
    )
    _add_selection(parser)
    add_numbering(parser)


def infill(args: argparse.Namespace) -> None:
    """Writes completed antibodies, or the residues filled in."""
    from moe_ablm.inference.sampling import Sampling

    sampling = Sampling(args.samples, args.temperature, args.seed, args.top)
    (chosen, said), germlines = _selection(args), parse_germlines(args.germlines)
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
        return table(engine, antibodies, args.level, sampling, args.numbering, germlines)

    def change(antibody: "Antibody") -> "Antibody":
        return antibody if chosen is None else masked(antibody, chosen)

    options = {"level": args.level, **vars(sampling), **_of_residues(args), **said}
    ask(args, Question(options, answer, cost, INFILLED, _refusing(chosen), change))
    if whole:
        print(
            f"moe_ablm: {counted(whole, 'antibody', 'antibodies')} without anything to fill in: "
            "mask residues by _, * or <mask>, or by --regions or --positions",
            file=sys.stderr,
        )


def add_scan_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `scan`."""
    add_asking_arguments(parser)
    parser.add_argument(
        "--method",
        choices=("masked-marginal", "wild-type-marginal", "mutant-marginal"),
        default="masked-marginal",
        help="one pass per residue (default), one pass in all, or 19 passes per residue",
    )
    parser.add_argument(
        "--figures", type=out_directory, metavar="DIR", help="a heat map of every antibody, as PNG"
    )
    _add_selection(parser)
    add_numbering(parser)


def scan(args: argparse.Namespace) -> None:
    """Writes the log-odds of every mutant."""
    (chosen, said), germlines = _selection(args), parse_germlines(args.germlines)
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
        return scan.table(antibodies, scores, args.numbering, germlines)

    def cost(engine: "Engine", antibody: "Antibody") -> tuple[int, int]:
        return scan.passes(antibody, args.method, chosen), antibody.residues * 19 * 160

    options = {"method": args.method, **_of_residues(args), **said}
    if args.figures is not None:  # lines that are there already have none
        options["figures"] = True
    ask(args, Question(options, answer, cost, refuse=_refusing(chosen)))


def add_route_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `route`."""
    add_asking_arguments(parser, run=RUN)
    add_numbering(parser)


def route(args: argparse.Namespace) -> None:
    """Writes a line for each residue, layer and expert."""
    from moe_ablm.inference.route import bytes_of, table

    germlines = parse_germlines(args.germlines)
    question = Question(
        _of_residues(args),
        lambda engine, antibodies: table(engine, antibodies, args.numbering, germlines),
        lambda engine, antibody: (1, bytes_of(engine, antibody)),
    )
    ask(args, question)


def add_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `attention`."""
    add_asking_arguments(parser, run=RUN)
    parser.add_argument(
        "--layer", type=int, default=-1, help="0 is the first layer, -1 (default) the last one"
    )
    parser.add_argument("--heads", action="store_true", help="list every head beside their mean")


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


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    add_asking_arguments(parser, run=RUN)
    parser.set_defaults(precision=None)


def predict(args: argparse.Namespace) -> None:
    """Writes what the head of a fine-tuned model says of every antibody."""
    from moe_ablm.evaluation.supervised.saved_head import cost, read_head, table
    from moe_ablm.interop.hub import local_directory

    saved = read_head(local_directory(args.run, "--run"))
    args.precision = args.precision or saved.precision
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
    "predict": (add_predict_arguments, predict),
}
