"""Codes of a residue's region (IMGT) and gene segment, and how the study's masks become codes."""

import numpy as np

# 0 is a special token, padding, or a chain without annotation
REGIONS = ("none", "FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4")
FR4 = REGIONS.index("FR4")
CDR3 = REGIONS.index("CDR3")
SEGMENTS = ("unknown", "V", "N", "D", "J")
CHAINS = ("heavy", "light")


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
    cdr = mask.astype(np.int64) - ord("0")
    n = len(cdr)
    if n == 0:
        return np.zeros(0, np.uint8)
    here = np.where(cdr > 0, np.arange(n), n)
    following = np.minimum.accumulate(here[::-1])[::-1]
    end = np.repeat(offsets[1:], np.diff(offsets))
    inside = following < end
    next_cdr = np.where(inside, cdr[np.minimum(following, n - 1)], 0)
    framework = np.where(inside, 2 * next_cdr - 1, FR4)
    code = np.where(cdr > 0, 2 * cdr, framework)
    counts = np.concatenate([[0], np.cumsum(cdr > 0)])
    annotated = counts[offsets[1:]] > counts[offsets[:-1]]
    return np.where(np.repeat(annotated, np.diff(offsets)), code, 0).astype(np.uint8)


def segments_from_mask(mask: np.ndarray) -> np.ndarray:
    """Codes of `SEGMENTS` from the ASCII letters V, N, D, J of a `gene_segment_mask_aa` column."""
    lut = np.zeros(256, np.uint8)
    for code, letter in enumerate(SEGMENTS[1:], start=1):
        lut[ord(letter)] = code
    return lut[mask]
