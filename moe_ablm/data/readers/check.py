"""The gate that every sequence passes: amino-acid letters, lengths, masks that fit."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import tokenizer
from moe_ablm.data.dataset import flat
from moe_ablm.data.readers.columns import RESIDUE_STRINGS, place_of
from moe_ablm.data.readers.missing import INSIDE, without_words, word_inside
from moe_ablm.data.readers.nucleotides import are_nucleotides
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CHAINS

# A V domain has about 130 residues, a whole heavy chain 450, an scFv 250.
LONGEST_CHAIN = 2000
LONGEST_PROTEIN = 50_000

_ALLOWED = {
    "germline_aa": tokenizer.AMINO_ACIDS,
    "cdr_mask_aa": "0123",
    "nongermline_mask_aa": "01",
    "gene_segment_mask_aa": "VNDJ",
}


def check_batch(
    batch: pa.RecordBatch,
    report: Report,
    *,
    longest: int = LONGEST_CHAIN,
    letters: str = tokenizer.AMINO_ACIDS,
) -> pa.RecordBatch:
    """Tidies and checks sequences and masks; malformed rows are reported and left out.

    Spaces around sequences and between all letters are removed, lower case becomes upper case
    (both are noted), words for "missing" become "". A row without any sequence is rejected. A row
    is malformed when a sequence holds anything but the allowed letters, is longer than `longest`,
    is one of nucleotides or has a word for "missing" inside, or when a mask has another length or
    other letters. An empty mask means that the row is not annotated.

    Args:
      batch: columns of the study as strings, `_row` and `_line`; a chain's column may be missing.
      report: counts changed and malformed rows; where it is set to fail, a malformed row raises
        UserError.
      longest: most residues of a chain.
      letters: allowed in sequences; with `tokenizer.MASKED` among them masks may be spelled `*`
        or `<mask>`.
    """
    n = batch.num_rows
    good, allowed = np.ones(n, bool), np.zeros(256, bool)
    allowed[list(letters.encode())] = True
    batch = without_words(batch, report)
    changed: dict[str, np.ndarray] = {}
    for chain in CHAINS:
        name = f"sequence_aa_{chain}"
        if name not in batch.schema.names:
            batch = batch.append_column(name, pa.array([""] * n, pa.string()))
        _check_words(batch, name, good, report)
        batch, changed[name] = _tidied(batch, name, tokenizer.MASKED in letters)
    lengths = {}
    for chain in CHAINS:
        _check_nucleotides(batch, f"sequence_aa_{chain}", good, report)
        residues, offsets = flat(batch[f"sequence_aa_{chain}"])
        lengths[chain] = np.diff(offsets)
        wrong = ~allowed[residues]
        _check_letters(batch, f"sequence_aa_{chain}", wrong, offsets, good, report)
        for row in np.flatnonzero((lengths[chain] > longest) & good):
            good[row] = False
            detail = f"sequence_aa_{chain} has {lengths[chain][row]} residues, at most {longest}"
            report.bad_row(place_of(batch, row), "sequence too long", detail)
    empty = np.flatnonzero((lengths["heavy"] + lengths["light"] == 0) & good)
    good[empty] = False
    if len(empty):
        report.reject("no sequence", place_of(batch, empty[0]), len(empty))
    for chain in CHAINS:
        for column in RESIDUE_STRINGS:
            _check_residue_string(batch, column, chain, lengths[chain], good, report)
    for name, rows in changed.items():
        if (rows & good).any():
            first = place_of(batch, np.flatnonzero(rows & good)[0])
            remark = f"{name}: lower case or spaces tidied"
            report.note(remark, first, int((rows & good).sum()))
    return batch if good.all() else batch.filter(pa.array(good))


def _tidied(batch: pa.RecordBatch, name: str, masks: bool) -> tuple[pa.RecordBatch, np.ndarray]:
    """The batch with a column in plain capitals, and where that changed it, bool `[rows]`."""
    sequences = batch[name]
    if masks:
        sequences = pc.replace_substring_regex(sequences, r"\*|(?i:<mask>)", tokenizer.MASKED)
        batch = batch.set_column(batch.schema.get_field_index(name), name, sequences)
    upper = pc.ascii_upper(pc.utf8_trim_whitespace(sequences))
    if (flat(upper)[0] == ord(" ")).any():
        spaced = pc.match_substring_regex(upper, r"^\S(?: \S)+$")  # as IgBert takes them
        upper = pc.if_else(spaced, pc.replace_substring(upper, " ", ""), upper)
    changed = pc.not_equal(sequences, upper).to_numpy(zero_copy_only=False)
    if changed.any():
        batch = batch.set_column(batch.schema.get_field_index(name), name, upper)
    return batch, changed


def _check_words(batch: pa.RecordBatch, name: str, good: np.ndarray, report: Report) -> None:
    """Refuses a word such as "nan" between the capitals of a sequence."""
    if not (flat(batch[name])[0] >= ord("a")).any():
        return
    suspect = pc.match_substring_regex(batch[name], INSIDE.pattern)
    for row in np.flatnonzero(suspect.to_numpy(zero_copy_only=False) & good):
        at = word_inside(batch[name][int(row)].as_py())
        if at is not None:
            good[row] = False
            detail = f"column {name}: a word for a missing value at residue {at + 1}"
            report.bad_row(place_of(batch, row), f"nan inside {name}", detail)


def _check_nucleotides(batch: pa.RecordBatch, name: str, good: np.ndarray, report: Report) -> None:
    for row in np.flatnonzero(are_nucleotides(batch[name]) & good):
        good[row] = False
        detail = f"column {name}: nucleotides, expected amino acids (--nucleotides translate)"
        report.bad_row(place_of(batch, row), f"nucleotides in {name}", detail)


def _check_letters(
    batch: pa.RecordBatch,
    name: str,
    invalid: np.ndarray,
    offsets: np.ndarray,
    good: np.ndarray,
    report: Report,
) -> None:
    wrong = np.flatnonzero(invalid)
    rows, firsts = np.unique(np.searchsorted(offsets, wrong, "right") - 1, return_index=True)
    for row, position in zip(rows, wrong[firsts] - offsets[rows], strict=True):
        if not good[row]:
            continue
        good[row] = False
        # Bytes before the first wrong letter are ASCII, so bytes count letters.
        letter = batch[name][int(row)].as_py()[int(position)]
        report.bad_row(
            place_of(batch, row),
            f"letter {letter if letter.isascii() else 'not ASCII'} in {name}",
            f"column {name}: {letter!r} at residue {position + 1} is none of the 20 amino acids",
        )


def _check_residue_string(
    batch: pa.RecordBatch,
    column: str,
    chain: str,
    expected: np.ndarray,
    good: np.ndarray,
    report: Report,
) -> None:
    name = f"{column}_{chain}"
    if name not in batch.schema.names:
        return
    letters, offsets = flat(batch[name])
    counts = np.diff(offsets)
    allowed = np.zeros(256, bool)
    allowed[list(_ALLOWED[column].encode())] = True
    outside = np.zeros(len(counts), bool)
    outside[np.searchsorted(offsets, np.flatnonzero(~allowed[letters]), "right") - 1] = True
    bad = (((counts != expected) & (counts > 0)) | outside) & good
    for row in np.flatnonzero(bad):
        good[row] = False
        detail = (
            f"column {name}: found {counts[row]} characters, expected {expected[row]} as in "
            f"sequence_aa_{chain}"
            if counts[row] != expected[row]
            else f"column {name}: letters other than {_ALLOWED[column]}"
        )
        report.bad_row(place_of(batch, row), f"{name} does not fit", detail)
