"""Words that tables and people write where there is nothing: "ND", "NA", "nan", "None", "-"."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.readers.columns import KEPT_AS_WRITTEN, place_of
from moe_ablm.data.readers.report import Report

# In lower case; no antibody chain and no identifier that anybody chose is one of them.
WORDS = (
    *("nd", "n.d.", "n/d", "na", "n.a.", "n/a", "#n/a", "nan", "none", "null", "nil"),
    *("<na>", "-", "--", "---", ".", "?", "not determined", "not available", "not applicable"),
    *("unknown", "missing", "no sequence"),
)
_LONGEST = max(map(len, WORDS)) + 4  # with spaces around
# pa.array(list) would import pandas, a third of a second for every verb
_WORDS = pa.StringArray.from_buffers(
    len(WORDS),
    pa.py_buffer(np.cumsum([0, *map(len, WORDS)], dtype=np.int32)),
    pa.py_buffer("".join(WORDS).encode()),
)
# Written into a sequence by a program that joined its pieces: capitals around tell it from a
# sequence that is in lower case as a whole.
INSIDE = re.compile("nan|NaN|none|None|null|Null")


def is_missing(text: str) -> bool:
    """Whether a value says that there is none."""
    return not text.strip() or text.strip().lower() in WORDS


def word_inside(sequence: str) -> int | None:
    """Where in a sequence of capitals a word for "missing" begins, or None."""
    found = INSIDE.search(sequence)
    inside = found and any(c.isupper() for c in sequence[: found.start()] + sequence[found.end() :])
    return found.start() if found and inside else None


def without_words(batch: pa.RecordBatch, report: Report) -> pa.RecordBatch:
    """The batch with words for "missing" made "" in all text columns; those of chains are noted.

    Labels, per-residue strings and flags such as `productive` are left as they are.
    """
    for i, field in enumerate(batch.schema):
        name = field.name.partition("#")[0]  # of several columns for one purpose
        if not pa.types.is_string(field.type) or name in KEPT_AS_WRITTEN:
            continue
        column = batch.column(i)
        length = pc.binary_length(column)
        short = pc.and_(pc.greater(length, 0), pc.less_equal(length, _LONGEST))
        if not pc.any(short).as_py():
            continue
        values = pc.utf8_lower(pc.utf8_trim_whitespace(pc.if_else(short, column, "")))
        word = pc.is_in(values, value_set=_WORDS)
        if not pc.any(word).as_py():
            continue
        if name.startswith(("sequence", "cell")):
            rows = np.flatnonzero(word.to_numpy(zero_copy_only=False))
            report.note(
                f"{name}: a word for missing read as none", place_of(batch, rows[0]), len(rows)
            )
        batch = batch.set_column(i, field.name, pc.if_else(word, "", column))
    return batch
