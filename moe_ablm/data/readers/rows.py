"""Rows of a table, whatever it is stored as."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.columns import Choose
from moe_ablm.data.readers.delimited import header_of_text, read_delimited
from moe_ablm.data.readers.missing import without_words
from moe_ablm.data.readers.nucleotides import are_nucleotides
from moe_ablm.data.readers.parquet import header_of_parquet, is_parquet, read_parquet
from moe_ablm.data.readers.report import Report
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError


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

    Words for "missing" are made "" (see `without_words`).
    """
    read = read_parquet if is_parquet(path) else read_delimited
    for batch in read(path, report, choose):
        yield without_words(batch, report)
