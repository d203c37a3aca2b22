"""The gate that every sequence passes: amino-acid letters, lengths, masks that fit."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import tokenizer
from moe_ablm.data.dataset import flat
from moe_ablm.data.readers.columns import LINE, RESIDUE_STRINGS, ROW
from moe_ablm.data.readers.report import Report, place
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

    Spaces around sequences are removed and lower case becomes upper case (both are noted). A row
    is malformed when a sequence holds anything but the allowed letters or is longer than
    `longest`, when both chains are empty, or when a mask has another length or other letters. An
    empty mask means that the row is not annotated.

    Args:
      batch: columns of the study as strings, `_row` and `_line`; a chain's column may be missing.
      report: counts changed and malformed rows; where it is set to fail, a malformed row raises
        UserError.
      longest: most residues of a chain.
      letters: allowed in sequences; with `tokenizer.MASKED` among them masks may be spelled `*`
        or `<mask>`.
    """
    n = batch.num_rows
    for chain in CHAINS:
        name = f"sequence_aa_{chain}"
        if name not in batch.schema.names:
            batch = batch.append_column(name, pa.array([""] * n, pa.string()))
        batch = _tidied(batch, name, report, tokenizer.MASKED in letters)
    good = np.ones(n, bool)
    lengths = {}
    for chain in CHAINS:
        residues, offsets = flat(batch[f"sequence_aa_{chain}"])
        lengths[chain] = np.diff(offsets)
        wrong = tokenizer.invalid(residues) & ~np.isin(residues, list(letters.encode()))
        _check_letters(batch, f"sequence_aa_{chain}", wrong, offsets, good, report)
        for row in np.flatnonzero((lengths[chain] > longest) & good):
            good[row] = False
            detail = f"sequence_aa_{chain} has {lengths[chain][row]} residues, at most {longest}"
            report.bad_row(place_of(batch, row), "sequence too long", detail)
    for row in np.flatnonzero((lengths["heavy"] + lengths["light"] == 0) & good):
        good[row] = False
        report.bad_row(place_of(batch, row), "no sequence", "both chains are empty")
    for chain in CHAINS:
        for column in RESIDUE_STRINGS:
            _check_residue_string(batch, column, chain, lengths[chain], good, report)
    return batch if good.all() else batch.filter(pa.array(good))


def place_of(batch: pa.RecordBatch, row: int | np.integer) -> str:
    """Where a row of a reader's batch stands in its file."""
    return place(batch[ROW][int(row)].as_py(), batch[LINE][int(row)].as_py())


def _tidied(batch: pa.RecordBatch, name: str, report: Report, masks: bool) -> pa.RecordBatch:
    sequences = batch[name]
    if masks:
        sequences = pc.replace_substring_regex(sequences, r"\*|(?i:<mask>)", tokenizer.MASKED)
        batch = batch.set_column(batch.schema.get_field_index(name), name, sequences)
    upper = pc.ascii_upper(pc.utf8_trim_whitespace(sequences))
    changed = pc.not_equal(sequences, upper).to_numpy(zero_copy_only=False)
    if changed.any():
        first = place_of(batch, np.flatnonzero(changed)[0])
        report.note(f"{name}: lower case or spaces tidied", first, int(changed.sum()))
        batch = batch.set_column(batch.schema.get_field_index(name), name, upper)
    return batch


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
