"""FASTA: antibody chains (`id|H` and `id|L` in a file, or a file for each chain) and proteins."""

import re
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from moe_ablm.data.readers.cells import join_cells
from moe_ablm.data.readers.columns import LINE, ROW, ROWS_PER_BATCH
from moe_ablm.data.readers.missing import is_missing
from moe_ablm.data.readers.nucleotides import are_nucleotides, translated
from moe_ablm.data.readers.options import Reading
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.readers.stream import LONGEST_LINE, line_blocks
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError

_HEAVY_NAMES, _LIGHT_NAMES = "V?H|HC|IGH|heavy", "V?L|V?K|LC|IGK|IGL|light|kappa|lambda"
_CHAIN_SUFFIX = re.compile(
    rf"(?:(.+)[|_:])?(?:(?P<heavy>{_HEAVY_NAMES})|{_LIGHT_NAMES})", re.IGNORECASE
)
_ANY_SUFFIX = re.compile(rf"[|_\-./ :]({_HEAVY_NAMES}|{_LIGHT_NAMES})$", re.IGNORECASE)
_LOOKED_AT = 100  # records that tell whether a file is of nucleotides
_PROTEIN = re.compile(r"^>(UniRef\d+_|sp\||tr\||UPI[0-9A-F]{10})")
_LETTERS_AT_ONCE = 4 << 20


class Record(NamedTuple):
    """A FASTA record; `row` counts records from 1, `line` is that of its header."""

    id: str
    sequence: str
    row: int
    line: int


def is_protein_header(line: str) -> bool:
    """Whether a header line is of UniProt or UniRef."""
    return bool(_PROTEIN.match(line))


def records(path: Path, report: Report) -> Iterator[Record]:
    """Streams the records of a FASTA file, plain or gzip; malformed ones are reported and left out.

    Raises:
      UserError: what `line_blocks` raises; text before the first header.
    """
    header: bytes | None = None
    parts: list[bytes] = []
    size = row = header_line = 0
    for first, block in line_blocks(path, report):
        for number, line in enumerate(block.split(b"\n")[:-1], start=first):
            if line.startswith(b">"):
                if header is not None:
                    yield from _record(header, parts, size, row, header_line, report)
                header, parts, size, row, header_line = line[1:], [], 0, row + 1, number
                report.read += 1
            elif header is None:
                if line.strip():
                    raise UserError(f"{path}: line {number}: text before the first '>' of a FASTA")
            elif size <= LONGEST_LINE:  # beyond that the record is malformed, its rest not needed
                parts.append(line)
                size += len(line)
    if header is not None:
        yield from _record(header, parts, size, row, header_line, report)
    if row == 0:
        raise UserError(f"{path}: no FASTA record found")


def _record(
    header: bytes, parts: list[bytes], size: int, row: int, line: int, report: Report
) -> Iterator[Record]:
    where = place(row, line)
    if size > LONGEST_LINE:
        report.bad_row(where, "sequence too long", f"more than {LONGEST_LINE} letters")
        return
    written = b" ".join(parts)
    sequence = b"".join(written.split())
    try:
        name = header.decode().strip().split(maxsplit=1)[:1]
        text, whole = sequence.decode(), written.decode()
    except UnicodeDecodeError:
        report.bad_row(where, "not UTF-8", "the record is not UTF-8")
        return
    if b"\0" in header or b"\0" in sequence:
        report.bad_row(where, "NUL byte", "NUL byte in the record")
    elif not name:
        report.bad_row(where, "no id", "nothing stands behind '>'")
    elif is_missing(whole):
        report.reject("no sequence", where)
    else:
        yield Record(name[0], text, row, line)


def read_proteins(path: Path, report: Report) -> Iterator[pa.RecordBatch]:
    """General proteins, one a record, under `sequence_aa_heavy` (the dataset's first chain)."""
    yield from _batched(({"sequence_aa_heavy": r.sequence}, r) for r in records(path, report))


def read_chains(
    paths: tuple[Path, ...], report: Report, reading: Reading
) -> Iterator[pa.RecordBatch]:
    """Antibody chains: two files in one order, `id|H` and `id|L` in one file, or chains alone.

    A record without a chain in its id may be of either chain; annotation finds out. Nucleotides
    are translated where the first records of a file are nothing else.
    """
    translate = reading.nucleotides == "translate"
    if reading.nucleotides is None:
        translate = all(_are_nucleotides(path) for path in paths)
    if len(paths) == 2:
        for batch in _batched(_in_step(paths, report)):
            columns = [f"sequence_aa_{chain}" for chain in CHAINS]
            yield translated(batch, columns, report, reading) if translate else batch
        return

    def chains() -> Iterator[pa.RecordBatch]:
        for batch in _batched(_by_suffix(paths[0], report)):
            if translate:
                batch = translated(batch, ["sequence"], report, reading, "chain")
            yield batch

    yield from join_cells(chains(), report, reading)


def _are_nucleotides(path: Path) -> bool:
    first = [r.sequence for r in islice(records(path, Report(str(path), "skip")), _LOOKED_AT)]
    return bool(first) and bool(are_nucleotides(pa.array(first)).all())


def _by_suffix(path: Path, report: Report) -> Iterator[tuple[dict, Record]]:
    unnamed, seen = 0, {"heavy", "light"}  # records called H and L: the two of a cell in a row
    for r in records(path, report):
        suffixed = _CHAIN_SUFFIX.fullmatch(r.id)
        if not suffixed:
            yield {"cell": "", "chain": "", "sequence": r.sequence}, r
            continue
        chain, cell = "heavy" if suffixed["heavy"] else "light", suffixed[1]
        if not cell:
            if chain in seen:
                unnamed, seen = unnamed + 1, set()
            seen.add(chain)
            cell = str(unnamed)
        yield {"cell": cell, "chain": chain, "sequence": r.sequence}, r


def _in_step(paths: tuple[Path, ...], report: Report) -> Iterator[tuple[dict, Record]]:
    # Errors must name the file, and a malformed record must not shift one file against the other,
    # so each file has its own report that always fails.
    sides = [Report(str(path)) for path in paths]
    files = [records(path, side) for path, side in zip(paths, sides, strict=True)]
    for heavy, light in zip_longest(*files):
        if heavy is None or light is None:
            short = paths[0] if heavy is None else paths[1]
            raise UserError(
                f"{report.source}: {short} ends after {min(s.read for s in sides)} records and the "
                "other does not: the two files must hold the same antibodies in the same order"
            )
        names = [_ANY_SUFFIX.sub("", r.id) for r in (heavy, light)]
        if names[0] != names[1]:
            raise UserError(
                f"{report.source}: record {heavy.row}: {heavy.id!r} and {light.id!r} are different "
                "ids: the two files must hold the same antibodies in the same order"
            )
        report.read += 1
        chains = {"sequence_aa_heavy": heavy.sequence, "sequence_aa_light": light.sequence}
        yield chains, heavy._replace(id=names[0])


def same_first_ids(heavy: Path, light: Path, most: int = 100) -> bool:
    """Whether two FASTA files name the same antibodies, one a record, without `|H` or `|L`."""
    names = []
    for path in (heavy, light):
        silent = Report(str(path), "skip")
        names.append([r.id for r in islice(records(path, silent), most)])
    if any(len(set(n)) < len(n) for n in names):
        return False
    mixed = any(len({_ANY_SUFFIX.sub("", i) for i in n}) < len(n) for n in names)
    stripped = [[_ANY_SUFFIX.sub("", i) for i in n] for n in names]
    return not mixed and stripped[0] == stripped[1]


def _batched(rows: Iterator[tuple[dict, Record]]) -> Iterator[pa.RecordBatch]:
    """Gathers rows to batches, bounded in rows and in letters."""
    pending, letters = [], 0
    for columns, r in rows:
        pending.append(columns | {"sequence_id": r.id, ROW: r.row, LINE: r.line})
        letters += len(r.sequence)
        if len(pending) == ROWS_PER_BATCH or letters > _LETTERS_AT_ONCE:
            yield pa.RecordBatch.from_pylist(pending)
            pending, letters = [], 0
    if pending:
        yield pa.RecordBatch.from_pylist(pending)
