"""Tables of antibody studies: a column for each chain, or both chains in one string."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.columns import (
    ABOUT_THE_CELL,
    ANY_CHAIN,
    LINE,
    OTHER_ARM,
    RESIDUE_STRINGS,
    ROW,
    ROWS_PER_BATCH,
    given_columns,
    identifier_of,
    once,
    place_of,
    study_mapping,
)
from moe_ablm.data.readers.missing import without_words
from moe_ablm.data.readers.nucleotides import translated
from moe_ablm.data.readers.options import Reading
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.readers.rows import read_rows
from moe_ablm.data.readers.stream import line_blocks
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import AMINO_ACIDS

# `<cls><cls>`, `</s>`, `[SEP]`, ... or one of `|` and `:`; never `<mask>`, which stands for a
# residue.
_SEPARATOR = re.compile(
    r"(?:<(?!mask>)[^<>]{1,8}>|\[(?!mask\])[^\[\]]{1,8}\])+|[|:]", re.IGNORECASE
)
# Residues of a line without header that make it a chain.
_SHORTEST_CHAIN = 60
_DELIMITERS = str.maketrans(",;\t", "|||")


def read_table(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Rows of a table with a column for each chain, under the study's names."""

    def choose(header: Sequence[str]) -> dict[str, str]:
        arms = [name for name in OTHER_ARM if name in header and not reading.columns]
        return study_mapping(header, report.source, reading.columns) | {f"_{n}": n for n in arms}

    for batch in read_rows(path, report, choose):
        yield _delivered(_with_one_arm(batch, report), report, reading)


def _with_one_arm(batch: pa.RecordBatch, report: Report) -> pa.RecordBatch:
    """The batch without the other arm of bispecific antibodies, which is noted."""
    arms = [f"_{name}" for name in OTHER_ARM if f"_{name}" in batch.schema.names]
    if not arms:
        return batch
    there = np.any([pc.not_equal(batch[name], "") for name in arms], axis=0)
    if there.any():
        remark = f"bispecific: the other arm ({OTHER_ARM[0]}) is not read"
        report.note(remark, place_of(batch, np.argmax(there)), int(there.sum()))
    return batch.drop_columns(arms)


def read_joined(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Rows of a table whose `sequence` holds heavy chain, separator, light chain (or one chain).

    Per-residue strings without a chain in their name are divided like the sequence, whether they
    cover the residues only or the separator too.
    """

    def choose(header: Sequence[str]) -> dict[str, str]:
        given = given_columns(header, report.source, reading.columns or {})
        if "sequence" not in given:
            once(header, "sequence", report.source)
        of_chains = [f"{name}_{chain}" for chain in CHAINS for name in RESIDUE_STRINGS]
        names = ("sequence", *RESIDUE_STRINGS, *ABOUT_THE_CELL)
        mapping = {name: name for name in names if name in header}
        mapping |= {name: name for name in of_chains if name in header}
        return mapping | identifier_of(header) | given

    for batch in read_rows(path, report, choose):
        yield _delivered(_divided(batch), report, reading)


def is_line_of_chains(line: str) -> bool:
    """Whether a line is an antibody: one chain or two, with a separator, and nothing else."""
    heavy, light, *_ = _cut(line.translate(_DELIMITERS))
    chains = ["".join(chain.split()).upper() for chain in (heavy, light) if chain]
    return bool(chains) and all(
        len(chain) >= _SHORTEST_CHAIN and not set(chain) - set(AMINO_ACIDS + "X")
        for chain in chains
    )


def read_lines(path: Path, report: Report, reading: Reading) -> Iterator[pa.RecordBatch]:
    """Lines without a header, each of them an antibody (see `is_line_of_chains`)."""
    for first, block in line_blocks(path, report):
        rows = [
            (number, line)
            for number, line in enumerate(block.split(b"\n")[:-1], start=first)
            if line.strip()
        ]
        for begin in range(0, len(rows), ROWS_PER_BATCH):
            texts, places = [], []
            for number, line in rows[begin : begin + ROWS_PER_BATCH]:
                report.read += 1
                try:
                    texts.append(line.decode().translate(_DELIMITERS))
                    places.append((report.read, number))
                except UnicodeDecodeError:
                    report.bad_row(place(report.read, number), "not UTF-8", "not UTF-8")
            numbers, lines = zip(*places, strict=True) if places else ((), ())
            columns = {"sequence": pa.array(texts, pa.string())}
            columns |= {ROW: pa.array(numbers, pa.int64()), LINE: pa.array(lines, pa.int64())}
            batch = without_words(pa.record_batch(columns), report)
            yield _delivered(_divided(batch), report, reading)


def _delivered(batch: pa.RecordBatch, report: Report, reading: Reading) -> pa.RecordBatch:
    batch = without_words(batch, report)  # a word may stand beside a separator, too
    if reading.nucleotides == "translate":
        batch = translated(batch, [f"sequence_aa_{chain}" for chain in CHAINS], report, reading)
    _note_single_chains(batch, report)
    return batch


def _note_single_chains(batch: pa.RecordBatch, report: Report) -> None:
    names = [f"sequence_aa_{chain}" for chain in CHAINS]
    if not batch.num_rows or not set(names) <= set(batch.schema.names):
        return
    missing = [pc.equal(pc.utf8_trim_whitespace(batch[name]), "") for name in names]
    for chain, here, other in zip(CHAINS, missing, reversed(missing), strict=True):
        alone = np.flatnonzero(pc.and_not(here, other).to_numpy(zero_copy_only=False))
        if len(alone):
            remark = f"row without {chain} chain: the other read alone"
            report.note(remark, place_of(batch, alone[0]), len(alone))


def _divided(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    cuts = [_cut(s) for s in columns.pop("sequence").to_pylist()]
    columns["sequence_aa_heavy"] = pa.array([heavy for heavy, *_ in cuts], pa.string())
    columns["sequence_aa_light"] = pa.array([light for _, light, *_ in cuts], pa.string())
    columns[ANY_CHAIN] = pa.array([not light for _, light, *_ in cuts], pa.bool_())
    for name in RESIDUE_STRINGS:
        if name not in columns:
            continue
        texts = columns.pop(name).to_pylist()
        parts = [_divide(text, cut) for text, cut in zip(texts, cuts, strict=True)]
        for chain, part in zip(CHAINS, zip(*parts, strict=True), strict=True):
            columns.setdefault(f"{name}_{chain}", pa.array(part, pa.string()))
    return pa.record_batch(columns)


def _cut(text: str) -> tuple[str, str, int, int]:
    """Heavy chain, light chain, start of the heavy one, distance from there to the light one."""
    pieces, last = [], 0
    for separator in _SEPARATOR.finditer(text):
        pieces.append((last, text[last : separator.start()]))
        last = separator.end()
    pieces.append((last, text[last:]))
    pieces = [(at, piece.strip()) for at, piece in pieces if piece.strip()]
    if not pieces:
        return "", "", 0, 0
    if len(pieces) == 1:
        return pieces[0][1], "", pieces[0][0], 0
    if len(pieces) > 2:  # no antibody has three chains: leave it to fail the check of its letters
        return text, "", 0, 0
    (first, heavy), (second, light) = pieces
    return heavy, light, first, second - first


def _divide(text: str, cut: tuple[str, str, int, int]) -> tuple[str, str]:
    heavy, light, start, to_light = cut
    h, n = len(heavy), len(light)
    if len(text) == h + n:
        return text[:h], text[h:]
    at = start + to_light
    if len(text) >= at + n and light:
        return text[start : start + h], text[at : at + n]
    return text[start:] if start else text, ""  # of no fitting length: check_batch says so
