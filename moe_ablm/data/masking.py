"""Which residues are masked: a function of (seed, record, epoch, position) and a policy.

Draws come from a counter-based hash, not from a generator with state: any batch can be made again
from its step alone, on any host, and adding records never changes another record's masks.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID, MASK

# BERT (Devlin et al. 2019): of the selected tokens 80 % become <mask>, 10 % a random amino acid
REPLACED_BY_MASK = 0.8
REPLACED_BY_RANDOM = 0.1

# SpanBERT (Joshi et al. 2020): lengths of spans are geometric, cut at 10
SPAN_STOP = 0.2
LONGEST_SPAN = 10

MASKS = ("uniform", "cdr3:RATE", "nongermline:RATE", "span")
_PREFERRED = re.compile(r"(cdr3|nongermline):(0?\.\d+)")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SPAN_SALT = np.uint64(0xD1B54A32D192ED03)
_CHANCE_BITS = 24  # a chance is a multiple of 2^-24, exact in float32


@dataclass(frozen=True)
class MaskPolicy:
    """Which residues are masked more often.

    `kind` is uniform, cdr3, nongermline or span; `rate` is the masking rate of the preferred ones.

    Whatever the policy, the expected share of an antibody's residues that is masked is the mean
    rate of the run.
    """

    kind: str
    rate: float | None = None


UNIFORM = MaskPolicy("uniform")


def parse_policy(text: str) -> MaskPolicy:
    """Policy from its name, one of `MASKS` (RATE such as 0.25); ValueError if it is malformed."""
    if text in ("uniform", "span"):
        return MaskPolicy(text)
    match = _PREFERRED.fullmatch(text)
    if not match or float(match[2]) == 0:
        raise ValueError(f"expected one of {', '.join(MASKS)} with RATE such as 0.25")
    return MaskPolicy(match[1], float(match[2]))


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele et al. 2014): uint64 to well-mixed uint64, any shape."""
    return _mix_in_place(np.array(x, np.uint64))


def _mix_in_place(x: np.ndarray) -> np.ndarray:
    shifted = np.empty_like(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(x, np.uint64(shift), out=shifted)
        np.bitwise_xor(x, shifted, out=x)
        if factor:
            np.multiply(x, np.uint64(factor), out=x)
    return x


def record_bits(seed: int, key: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """Random bits (uint64 `[n]`) of records `key` (uint64 `[n]`) in their `epoch` (`[n]`)."""
    with np.errstate(over="ignore"):
        return mix(key + mix(np.uint64(seed) * _GOLDEN + epoch.astype(np.uint64)))


def position_bits(record: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
    """Random bits of every place, where record i covers the places from `start[i]` to the next.

    Args:
      record: uint64 `[n]`, from `record_bits`.
      start: int64 `[n]`, rising from 0.
      length: number of places N.

    Returns:
      uint64 `[N]`, a function of the record's bits and of the distance from its start.
    """
    with np.errstate(over="ignore"):
        base = record - start.astype(np.uint64) * _GOLDEN
        bits = np.arange(1, length + 1, dtype=np.uint64)
        bits *= _GOLDEN
        bits += np.repeat(base, extents(start, length))
    return _mix_in_place(bits)


def extents(start: np.ndarray, end: int) -> np.ndarray:
    """From each start (int64 `[n]`, rising) to the next, and from the last to `end`."""
    counts = np.empty_like(start)
    np.subtract(start[1:], start[:-1], out=counts[:-1])
    counts[-1:] = end - start[-1:]
    return counts


class Rates(NamedTuple):
    """Chance of every place to be selected: `low`, or `high` where `preferred`; float32 `[n]`.

    `n` counts records; `preferred` is bool `[N]` or None.
    """

    low: np.ndarray
    high: np.ndarray
    preferred: np.ndarray | None


def record_rates(
    policy: MaskPolicy,
    mean: float,
    residue: np.ndarray,
    preferred: np.ndarray | None,
    start: np.ndarray,
) -> Rates:
    """Chances such that `mean` of the residues of each record are selected.

    With f the share of preferred residues of a record and h the policy's rate, the others have the
    rate (mean - f h) / (1 - f) (preferential masking of CDR3, brineylab 2024; there mean = .15,
    h = .25). Where f h exceeds the mean, h falls to mean / f.

    Args:
      policy: uniform, cdr3 or nongermline.
      mean: expected share of the residues.
      residue: bool `[N]`, places that can be selected.
      preferred: bool `[N]`, places of residues the policy prefers; None if uniform.
      start: int64 `[n]`, first place of each record, rising from 0.
    """
    if policy.rate is None or preferred is None:  # uniform
        rate = np.full(len(start), mean, np.float32)
        return Rates(rate, rate, None)
    many = _sum_by_record(residue, start)
    few = _sum_by_record(preferred, start)
    share = few / np.maximum(many, 1)
    high = np.minimum(policy.rate, mean / np.maximum(share, 1e-9))
    low = (mean - share * high) / np.maximum(1 - share, 1e-9)
    return Rates(np.maximum(low, 0).astype(np.float32), high.astype(np.float32), preferred)


def _sum_by_record(what: np.ndarray, start: np.ndarray) -> np.ndarray:
    return np.add.reduceat(what, start, dtype=np.int64)


def select(
    bits: np.ndarray, residue: np.ndarray, rates: Rates, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places that are selected, each on its own.

    Args:
      bits: uint64 `[N]` of `position_bits`.
      residue: bool `[N]`.
      rates: chances.
      start: int64 `[n]`, first place of each record.

    Returns:
      bool `[N]`, and the rate (float32) of each selected place, in order.
    """
    # chance < rate without a float a place: rate * 2^24 <= 2^24 is exact in float64
    low, high = (
        np.ceil(r.astype(np.float64) * 2**_CHANCE_BITS).astype(np.uint64)
        << np.uint64(64 - _CHANCE_BITS)
        for r in (rates.low, rates.high)
    )
    if rates.preferred is None and (low == low[0]).all():
        chosen = bits < low[0]
        chosen &= residue
        return chosen, np.broadcast_to(rates.low[:1], int(chosen.sum()))
    preferred = np.zeros(len(bits), bool) if rates.preferred is None else rates.preferred
    of = np.repeat(np.arange(len(start)), extents(start, len(bits)))
    chosen = (bits < np.where(preferred, high[of], low[of])) & residue
    at = np.flatnonzero(chosen)
    return chosen, np.where(preferred[at], rates.high[of[at]], rates.low[of[at]])


def select_spans(
    record: np.ndarray, chain: np.ndarray, mean: float
) -> tuple[np.ndarray, np.ndarray]:
    """Residues selected in contiguous spans that do not leave their chain.

    A span starts at a residue, or at one of the 9 places before its chain, with a chance q; its
    length is geometric (p = .2, at most 10) as in SpanBERT, and overlapping spans merge. With
    P(l > j) = .8^j a residue stays unselected with chance prod_j (1 - q .8^j), j = 0..9; q makes
    this 1 - mean, the same for every residue.

    Args:
      record: uint64 `[c]`, bits of the record of each chain; other bits for each chain of a record.
      chain: int64 `[c]`, residues of each chain.
      mean: share of the residues.

    Returns:
      bool `[sum(chain)]`, and the index `[sum(chain)]` of these residues' chain.
    """
    before = LONGEST_SPAN - 1
    size = chain + before
    start = np.cumsum(size) - size
    bits = position_bits(mix(record ^ _SPAN_SALT), start, int(size.sum()))
    chance = (bits >> np.uint64(64 - _CHANCE_BITS)).astype(np.float32) * np.float32(2.0**-24)
    at = np.flatnonzero(chance < np.float32(_span_start_rate(mean)))
    uniform = ((bits[at] & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * 2.0**-32
    length = np.log(uniform) / np.log(1 - SPAN_STOP)
    reach = np.zeros(len(bits), np.int64)
    reach[at] = at + np.minimum(np.ceil(length).astype(np.int64), LONGEST_SPAN)
    # a span that leaves its chain ends before the first residue of the next
    covered = np.maximum.accumulate(reach) > np.arange(len(bits))
    of = np.repeat(np.arange(len(chain)), size)
    real = np.arange(len(bits)) - start[of] >= before
    return covered[real], of[real]


def _span_start_rate(mean: float) -> float:
    """q with prod_j (1 - q .8^j) = 1 - mean, by bisection."""
    survives = (1 - SPAN_STOP) ** np.arange(LONGEST_SPAN)
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if 1 - np.prod(1 - q * survives) < mean else (low, q)
    return (low + high) / 2


def corrupt(
    tokens: np.ndarray, selected: np.ndarray, bits: np.ndarray, rate: np.ndarray
) -> np.ndarray:
    """Tokens (uint8 `[N]`) with the selected ones replaced 80/10/10.

    Args:
      tokens: uint8 `[N]`.
      selected: bool `[N]`.
      bits: uint64 `[N]` of `position_bits`.
      rate: float32, of each selected place: its bits are known to be below this chance; 1 where
        the selection did not look at them.
    """
    at = np.flatnonzero(selected)
    bits = bits[at]
    chance = (bits >> np.uint64(64 - _CHANCE_BITS)).astype(np.float32) * np.float32(2.0**-24)
    share = chance / rate
    letter = ((bits & np.uint64(0xFFFFFFFF)) * np.uint64(len(AMINO_ACIDS))) >> np.uint64(32)
    random = FIRST_AMINO_ACID + letter.astype(np.uint8)
    new = np.where(share < REPLACED_BY_MASK + REPLACED_BY_RANDOM, random, tokens[at])
    corrupted = tokens.copy()
    corrupted[at] = np.where(share < REPLACED_BY_MASK, MASK, new)
    return corrupted
