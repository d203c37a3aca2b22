"""Codes of a residue's region (IMGT) and gene segment, and how the study's masks become codes."""

import numpy as np

# 0 is a special token, padding, or a chain without annotation
REGIONS = ("none", "FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4")
FR4 = REGIONS.index("FR4")
CDR3 = REGIONS.index("CDR3")
SEGMENTS = ("unknown", "V", "N", "D", "J")
CHAINS = ("heavy", "light")
OTHER_CHAIN = {"heavy": "light", "light": "heavy"}


def region_names() -> tuple[str, ...]:
    """Names of the 14 regions of a pair, heavy first: FRH1, CDRH1, ..., CDRL3, FRL4."""
    return tuple(f"{r[:-1]}{c[0].upper()}{r[-1]}" for c in CHAINS for r in REGIONS[1:])


def regions_from_cdr_mask(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Region codes from a `cdr_mask_aa` column.

    Args:
      mask: ASCII codes `[n]` of all rows end to end: '0' framework, '1', '2', '3' a CDR's number.
      offsets: `[rows + 1]` where each row starts and ends.

    Returns:
      uint8 codes `[n]`. A framework residue belongs to the framework before the next CDR of its
      row, or to FR4 when there is none; a row without any CDR is not annotated (all 0).
    """
    if len(mask) == 0:
        return np.zeros(0, np.uint8)
    cdr = mask - np.uint8(ord("0"))
    length = np.diff(offsets)
    # what follows a framework residue is the next CDR residue, or the end of the row if it is first
    stop = cdr > 0
    stop[offsets[1:][length > 0] - 1] = True
    at = np.flatnonzero(stop)
    following = np.repeat(cdr[at], np.diff(at, prepend=-1))
    framework = np.where(following > 0, 2 * following - 1, np.uint8(FR4))
    code = np.where(cdr > 0, 2 * cdr, framework)
    before = np.searchsorted(at[cdr[at] > 0], offsets)  # CDR residues before the start of a row
    return code * np.repeat(np.diff(before) > 0, length)


def segments_from_mask(mask: np.ndarray) -> np.ndarray:
    """Codes of `SEGMENTS` from the ASCII letters V, N, D, J of a `gene_segment_mask_aa` column."""
    lut = np.zeros(256, np.uint8)
    for code, letter in enumerate(SEGMENTS[1:], start=1):
        lut[ord(letter)] = code
    return lut[mask]
