"""Rows of a table, whatever it is stored as."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.germline import HUMAN
from moe_ablm.data.readers.columns import Choose, column_named, once, place_of
from moe_ablm.data.readers.delimited import header_of_text, read_delimited
from moe_ablm.data.readers.missing import without_words
from moe_ablm.data.readers.nucleotides import are_nucleotides
from moe_ablm.data.readers.parquet import header_of_parquet, is_parquet, read_parquet
from moe_ablm.data.readers.report import Report
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError

OTHER_SPECIES = "said to be of another species than man: germlines are human"
_SPECIES, _HUMAN = "_species", r"human|homo|^9606$"


def header_of(path: Path) -> list[str]:
    """Column names of a table, parquet or text."""
    return header_of_parquet(path) if is_parquet(path) else header_of_text(path)


def columns_with_chains(path: Path, most: int = 50) -> dict[str, list[str]]:
    """Columns of a table whose first values are amino-acid chains, with these values.

    Nucleotides, names and numbers are none; a value that is missing does not count.
    """
    names, found = header_of(path), {}
    unique = [name for name in dict.fromkeys(names) if names.count(name) == 1 and name]
    try:
        silent = Report(str(path), "skip")
        batches = read_rows(path, silent, lambda header: {name: name for name in unique})
        first = next(batches, None)
    except UserError:
        return {}
    if first is None:
        return {}
    for name in unique:
        values = pc.ascii_upper(pc.utf8_trim_whitespace(first[name][:most]))
        values = values.filter(pc.not_equal(values, ""))
        letters = pc.match_substring_regex(values, f"^[{AMINO_ACIDS}X*._-]{{40,}}$")
        chains = np.asarray(letters) & ~are_nucleotides(values)
        if len(values) and chains.mean() > 0.5:
            found[name] = values.filter(pa.array(chains)).to_pylist()
    return found


def read_rows(path: Path, report: Report, choose: Choose) -> Iterator[pa.RecordBatch]:
    """Streams a table, parquet or text (see `read_parquet`, `read_delimited`).

    Words for "missing" are made "" (see `without_words`). Rows of which a column, or the line of
    metadata of OAS, says that they are of another species than man are noted, where germlines are
    human.

    Raises:
      UserError: a chosen column is not there, or is twice.
    """
    read = read_parquet if is_parquet(path) else read_delimited

    def choose_too(header: Sequence[str]) -> dict[str, str]:
        mapping = dict(choose(header))
        for column in mapping.values():
            once(header, column, report.source)
        species = column_named(header, "species", "organism", "heavy_species")
        if report.germlines != (HUMAN,):  # the user knows of other species
            return mapping
        if species is None or header.count(species) > 1 or species in mapping.values():
            return mapping
        return mapping | {_SPECIES: species}

    for batch in read(path, report, choose_too):
        yield _species_noted(without_words(batch, report), report)


def _species_noted(batch: pa.RecordBatch, report: Report) -> pa.RecordBatch:
    if _SPECIES in batch.schema.names:
        species = batch[_SPECIES]
        batch = batch.drop_columns([_SPECIES])
    elif "Species" in report.metadata and report.germlines == (HUMAN,):
        species = pa.array([str(report.metadata["Species"])] * batch.num_rows, pa.string())
    else:
        return batch
    said = pc.not_equal(species, "")
    other = pc.and_not(said, pc.match_substring_regex(species, _HUMAN, ignore_case=True))
    rows = np.flatnonzero(np.asarray(other))
    if len(rows):
        name = species[int(rows[0])].as_py()[:40]
        report.examples.setdefault(OTHER_SPECIES, name)
        report.note(OTHER_SPECIES, place_of(batch, rows[0]), len(rows))
    return batch
