"""Antibodies as users pass them: files, or strings in Python."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from moe_ablm.data.annotate import chains_of
from moe_ablm.data.antibody import Antibody, tokens_of
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.readers import Report, Source
from moe_ablm.data.readers.check import check_batch
from moe_ablm.data.readers.columns import ANY_CHAIN, LINE, ROW, place_of
from moe_ablm.data.tokenizer import AMINO_ACIDS, Layout
from moe_ablm.errors import UserError

AMBIGUOUS = "XBUZO"  # tokens of ESM-2 that are context, but are neither scored nor mutated
LETTERS = AMINO_ACIDS + AMBIGUOUS
SORTED = 8192  # rows joined by cell are sorted into file order if there are fewer antibodies


@dataclass(frozen=True)
class SingleChain:
    """A chain with a name, "" for none; annotation decides whether it is heavy or light."""

    name: str
    letters: str


def labels(antibodies: Iterable[Antibody]) -> dict[str, list]:
    """Columns that label every residue: `sequence_id`, `chain`, `position` (from 1), `residue`."""
    columns: dict[str, list] = {"sequence_id": [], "chain": [], "position": [], "residue": []}
    for antibody in antibodies:
        for chain, letters in antibody.chains():
            columns["sequence_id"] += [antibody.name] * len(letters)
            columns["chain"] += [chain] * len(letters)
            columns["position"] += range(1, len(letters) + 1)
            columns["residue"] += letters
    return columns


def read(
    sources: Iterable[Source],
    layout: Layout,
    longest: int,
    refuse: Callable[[Antibody], str | None] = lambda antibody: None,
) -> Iterator[Antibody]:
    """Streams the antibodies of sources, in the order of the files.

    The exception are chains that are joined by their cell (`data.readers.cells`): from `SORTED`
    antibodies on these come in another order.

    Args:
      sources: opened with the letters that the verb allows.
      layout: the model's layout.
      longest: tokens of the longest row that the model was trained for; longer rows are bad rows.
      refuse: returns a reason to refuse an antibody, or None.

    Raises:
      UserError: a bad row, unless the source leaves such rows out.
    """
    for source in sources:
        rows = _rows(source)
        first = list(islice(rows, SORTED))
        if len(first) < SORTED:
            first.sort(key=lambda numbered: numbered[0])
        for ordered in (first, rows):
            for _, antibody in ordered:
                reason = _unfit(antibody, layout, longest) or refuse(antibody)
                if reason:
                    kind = reason.split(":")[0]
                    source.report.bad_row(antibody.where, kind, f"{antibody.name}: {reason}")
                else:
                    source.report.kept += 1
                    yield antibody
        source.report.settle(source.report.kept)


def _rows(source: Source) -> Iterator[tuple[int, Antibody]]:
    for batch in source.batches():
        antibodies = _antibodies(batch, source.report.germlines)
        yield from zip(batch[ROW].to_pylist(), antibodies, strict=True)


def _unfit(antibody: Antibody, layout: Layout, longest: int) -> str | None:
    for chain, letters in antibody.chains():
        if sum(letter not in AMBIGUOUS for letter in letters) < 2:
            return f"too short: the {chain} chain is {letters!r}, expected amino acids"
    tokens = tokens_of(antibody, layout)
    if tokens <= longest:
        return None
    return (
        f"too long for this model: {tokens} tokens with special ones, it was trained for at most "
        f"{longest}; give V domains only (python -m moe_ablm annotate cuts chains to them)"
    )


def _antibodies(batch: pa.RecordBatch, germlines: Sequence[str] = (HUMAN,)) -> list[Antibody]:
    n, names = batch.num_rows, batch.schema.names
    empty = [""] * n
    columns = [
        batch[name].to_pylist() if name in names else empty
        for name in (
            *("sequence_id", "sequence_aa_heavy", "sequence_aa_light"),
            *("cdr_mask_aa_heavy", "cdr_mask_aa_light"),
        )
    ]
    places = [place_of(batch, row) for row in range(n)]
    rows = batch[ROW].to_pylist()
    antibodies = [
        Antibody(name or str(row), heavy, light, where, (cdr_heavy, cdr_light))
        for name, heavy, light, cdr_heavy, cdr_light, where, row in zip(
            *columns, places, rows, strict=True
        )
    ]
    if ANY_CHAIN not in names:
        return antibodies
    either = np.flatnonzero(np.asarray(batch[ANY_CHAIN], bool))
    chains = chains_of([antibodies[i].heavy for i in either], germlines)
    for index, chain in zip(either, chains, strict=True):
        if chain == "light":
            old = antibodies[index]
            antibodies[index] = Antibody(old.name, "", old.heavy, old.where)
    return antibodies


def given(
    items: Iterable[str | tuple[str, str] | SingleChain | Antibody],
    layout: Layout,
    longest: int,
    letters: str = LETTERS,
    germlines: Sequence[str] = (HUMAN,),
) -> list[Antibody]:
    """Antibodies from Python: single chains as strings, pairs as (heavy, light).

    Args:
      items: one chain of a pair may be "" or None. Annotation decides whether a string, or a
        `SingleChain`, is a light chain; one that it recognises as neither counts as heavy.
      layout: the model's layout.
      longest: largest number of tokens of a row.
      letters: letters that are allowed; lower case becomes upper case.
      germlines: by which light chains are recognised.

    Raises:
      UserError: an item is none of these, has a letter that is not allowed, has too few residues,
        or is too long.
    """
    items = list(items) if not isinstance(items, str) else [items]
    named = [_antibody(item, number) for number, item in enumerate(items, start=1)]
    if not named:
        return []
    report = Report("antibodies")
    columns = {
        "sequence_id": [a.name for a in named],
        "sequence_aa_heavy": [a.heavy for a in named],
        "sequence_aa_light": [a.light for a in named],
        "cdr_mask_aa_heavy": [a.cdr_masks[0] for a in named],
        "cdr_mask_aa_light": [a.cdr_masks[1] for a in named],
        ROW: range(1, len(named) + 1),
        LINE: [0] * len(named),
        ANY_CHAIN: [isinstance(item, str | SingleChain) for item in items],
    }
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    antibodies = _antibodies(check_batch(batch, report, letters=letters), germlines)
    for reason, where in report.first.items():
        if reason in report.rejected:
            raise UserError(
                f"antibodies: {where}: {reason}: give a heavy chain, a light one or both"
            )
    for antibody in antibodies:
        if unfit := _unfit(antibody, layout, longest):
            raise UserError(f"antibodies: {antibody.where}: {unfit}")
    return antibodies


def _antibody(item, number: int) -> Antibody:
    if isinstance(item, Antibody):
        return item
    if isinstance(item, SingleChain):
        return Antibody(item.name, item.letters, "")
    if isinstance(item, str):
        return Antibody("", item, "")
    if not isinstance(item, Sequence) or len(item) != 2 or not all(
        chain is None or isinstance(chain, str) for chain in item
    ):  # fmt: skip
        raise UserError(f"antibodies: item {number}: found {item!r}, expected heavy, light or both")
    return Antibody("", item[0] or "", item[1] or "")


def windows(
    antibodies: Iterable[Antibody],
    cost: Callable[[Antibody], tuple[int, int]],
    most: tuple[int, int] = (4096, 128 << 20),
) -> Iterator[list[Antibody]]:
    """Groups antibodies so that the work and the memory of each group are bounded.

    Args:
      antibodies: any number of them.
      cost: returns the rows through the encoder and the bytes of the result of an antibody.
      most: limits of the rows and bytes of a group; a single antibody may exceed them.
    """
    window: list[Antibody] = []
    total = np.zeros(2, np.int64)
    for antibody in antibodies:
        price = cost(antibody)
        if window and (total + price > most).any():
            yield window
            window, total = [], np.zeros(2, np.int64)
        window.append(antibody)
        total += price
    if window:
        yield window
