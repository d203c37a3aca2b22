"""How near the test rows are to what is trained on: the honest measure of a split."""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data.dataset import SPLITS

_SAMPLE = 1000
_COMPARED_AT_ONCE = 1 << 25  # bytes
LEVELS = (1.0, 0.9, 0.8)


def nearest_train(parts: Callable[[], Iterable[pa.Table]], split: np.ndarray) -> dict | None:
    """Identity of test CDRH3s with the nearest training CDRH3 of the same length, any gene.

    Args:
      parts: gives tables with `row`, `member` (uint64, a hash of clonal group and CDRH3) and `cdr3`
        (binary, empty where there is none); called twice.
      split: split code of every row.

    Returns:
      `{"sampled": n, "median": identity, "share": {"1": .., "0.9": .., "0.8": ..}}`, shares of
      the sampled test CDRH3s that reach an identity; the sample is the at most 1,000 distinct ones
      of the least hash. None where test or train hold no CDRH3.
    """
    sample = _sample(parts, split)
    best = np.zeros(sum(len(s) for s in sample.values()))
    found = False
    for part in parts():
        train = part.filter(pa.array(_of_split(part, split, "train")))
        found = found or len(train) > 0
        at = 0
        for length, wanted in sample.items():
            known = _matrix(train["cdr3"], length)
            for start in range(len(wanted)):
                near = _best_identity(wanted[start], known)
                best[at + start] = max(best[at + start], near)
            at += len(wanted)
    if not len(best) or not found:
        return None
    return {
        "sampled": len(best),
        "median": round(float(np.median(best)), 4),
        "share": {f"{level:g}": round(float((best >= level - 1e-9).mean()), 4) for level in LEVELS},
    }


def _of_split(part: pa.Table, split: np.ndarray, name: str) -> np.ndarray:
    mine = split[part["row"].to_numpy()] == SPLITS.index(name)
    return mine & (pc.binary_length(part["cdr3"]).to_numpy() > 0)


def _sample(parts: Callable[[], Iterable[pa.Table]], split: np.ndarray) -> dict[int, np.ndarray]:
    """Distinct test CDRH3s by length, uint8 `[n, length]`."""
    members, cdr3s = np.zeros(0, np.uint64), np.zeros(0, object)
    for part in parts():
        test = part.filter(pa.array(_of_split(part, split, "test")))
        members = np.append(members, test["member"].to_numpy())
        cdr3s = np.append(cdr3s, np.array(test["cdr3"].to_pylist(), object))
        members, first = np.unique(members, return_index=True)
        members, cdr3s = members[:_SAMPLE], cdr3s[first][:_SAMPLE]
    lengths = sorted({len(c) for c in cdr3s})
    return {n: _matrix(pa.array([c for c in cdr3s if len(c) == n]), n) for n in lengths}


def _matrix(cdr3: pa.Array | pa.ChunkedArray, length: int) -> np.ndarray:
    mine = cdr3.filter(pc.equal(pc.binary_length(cdr3), length))
    return np.frombuffer(b"".join(mine.to_pylist()), np.uint8).reshape(-1, length)


def _best_identity(one: np.ndarray, known: np.ndarray) -> float:
    step = max(1, _COMPARED_AT_ONCE // len(one))
    best = 0
    for start in range(0, len(known), step):
        equal = (known[start : start + step] == one).sum(axis=1)
        best = max(best, int(equal.max(initial=0)))
    return best / len(one)
