"""Clonal clusters, the train/valid/test split and nested fractions.

Two sequences belong to one clonal cluster when they share V gene, J gene and CDRH3 length and their
CDRH3s are at least `identity` identical, directly or through others (single linkage).

By default the split is drawn for the *clonal group* (V gene, J gene, CDRH3 length), which holds
whole clusters: a hash of the group's name says whether it is held out. So no cluster is divided,
and a record's split depends on that record alone: adding, removing or reordering sources moves
nothing. A finer rule cannot promise both: whether two CDRH3s of a group are linked depends on which
other sequences are present, and one new sequence can join a training cluster to a test cluster.
Drawing for the cluster itself gives up the second promise for held-out sets that resemble the whole
more.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

# Upper bounds of train, valid, test on the hash, as shares of 2**64.
SHARES = (0.90, 0.95, 1.0)
# Any value would do. Groups are few and unequal (the 319,124 pairs of Jaffe et al. have 5,627,
# which count as 884 equal ones), so some values hold out a more typical set than others. This one
# was the best of 8,000 on those pairs: `benchmarks/split.py` measures it.
SALT = b"ablm-split-2449"
# Rows of a bucket that are compared with all others before the bucket is divided further.
_PATIENCE = 256


def hash64(text: str, salt: bytes = SALT) -> int:
    """The first 8 bytes of BLAKE2b as an integer: the same everywhere and always."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=salt).digest())


def record_keys(heavy: Sequence[bytes], light: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Identity and fraction key of records, functions of their sequences alone.

    Args:
      heavy, light: amino-acid sequences as ASCII, empty where a chain is missing.

    Returns:
      `(key uint64 [n], fraction_key uint32 [n])`; a record is in a fraction when its `fraction_key`
      is below the bound in `dataset.FRACTIONS`, so that quarter is inside half is inside full.
    """
    digests = b"".join(
        hashlib.blake2b(h + b"|" + x, digest_size=12, person=b"ablm-record").digest()
        for h, x in zip(heavy, light, strict=True)
    )
    words = np.frombuffer(digests, ">u4").reshape(-1, 3).astype(np.uint32)
    key = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1].astype(np.uint64)
    return key, words[:, 2]


def group_hashes(
    v_gene: Sequence[str], j_gene: Sequence[str], length: np.ndarray, salt: bytes = SALT
) -> np.ndarray:
    """Hashes (uint64 `[n]`) of the clonal groups of heavy chains."""
    seen: dict[tuple, int] = {}
    out = np.empty(len(length), np.uint64)
    for i, group in enumerate(zip(v_gene, j_gene, length.tolist(), strict=True)):
        value = seen.get(group)
        if value is None:
            value = seen[group] = hash64("{}|{}|{}".format(*group), salt)
        out[i] = value
    return out


def split_of(hashes: np.ndarray) -> np.ndarray:
    """Split codes (uint8 `[n]`, indices of `dataset.SPLITS`) of uint64 hashes: 90/5/5."""
    bounds = np.array([int(share * 2**64) for share in SHARES[:-1]], np.uint64)
    return np.searchsorted(bounds, hashes, side="right").astype(np.uint8)


def mismatches_allowed(length: int, identity: float) -> int:
    """Most substitutions in a CDRH3 of `length` residues at which identity is still reached."""
    return int(np.floor(length * (1 - identity) + 1e-9))


def link(cdr3: np.ndarray, group: np.ndarray, identity: float) -> np.ndarray:
    """Single-linkage clusters of CDRH3s of one length.

    Candidates come in time linear in n: a CDR3 of `L` residues is cut into interleaved pieces, so
    many that two sequences with `m` allowed mismatches agree on one piece up to a single residue;
    leaving out each residue of a piece in turn gives `L` keys a sequence, and only sequences that
    share a key are compared, residue by residue.

    Args:
      cdr3: residues uint8 `[n, L]`, each (group, CDR3) once.
      group: uint64 `[n]`; only sequences of one group are linked.
      identity: least share of equal residues of linked sequences.

    Returns:
      Labels `[n]`: the number of a sequence of the cluster, the same one for all of it.
    """
    n, length = cdr3.shape
    allowed = mismatches_allowed(length, identity)
    if n == 0 or allowed == 0:
        return np.arange(n)
    edges = _edges(np.arange(n), np.arange(length), cdr3, group, allowed)
    left, right = np.concatenate([np.zeros((2, 0), np.int64), *edges], axis=1)
    # here: it takes longer to import than all else that most commands need
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(n, n))
    number = connected_components(graph, directed=False)[1]
    return np.unique(number, return_index=True)[1][number]


def _edges(
    rows: np.ndarray,
    positions: np.ndarray,
    cdr3: np.ndarray,
    group: np.ndarray,
    allowed: int,
    again: bool = True,
) -> list[np.ndarray]:
    """Verified edges (int64 `[2, m]` each) that connect what is connected among `rows`.

    `rows` may differ anywhere, but candidates are found by their residues at `positions`. Large
    buckets of sequences that are not near each other are divided `again` by the other pieces.
    """
    pieces = allowed // 2 + 1
    random = np.random.Generator(np.random.Philox(key=len(positions)))
    table = random.integers(0, 2**64, (len(positions), 256), np.uint64)
    hashed = table[np.arange(len(positions)), cdr3[rows][:, positions]]
    piece = np.arange(len(positions)) % pieces
    sums = [hashed[:, piece == p].sum(axis=1, dtype=np.uint64) for p in range(pieces)]
    edges = []
    for i in range(len(positions)):
        key = (sums[piece[i]] - hashed[:, i]) ^ group[rows]
        order = np.argsort(key, kind="stable")
        same = key[order][1:] == key[order][:-1]
        in_order = rows[order]
        pairs = np.stack([in_order[:-1][same], in_order[1:][same]])
        edges.append(_verified(pairs, cdr3, group, allowed))
        if len(positions) == cdr3.shape[1] and allowed == 1:
            continue  # equal but for the residue left out: the pairs connect the whole bucket
        starts = np.flatnonzero(np.concatenate([[True], ~same]))
        sizes = np.diff(np.append(starts, len(rows)))
        rest = positions[piece != piece[i]]
        divisible = again and len(rest) >= pieces
        for start, size in zip(starts[sizes > 2], sizes[sizes > 2], strict=True):
            bucket = in_order[start : start + size]
            patience = _PATIENCE if divisible else size
            new_edges, remaining = _search(bucket, cdr3, group, allowed, patience)
            edges += new_edges
            if len(remaining):
                edges += _edges(remaining, rest, cdr3, group, allowed, again=False)
    return edges


def _verified(pairs: np.ndarray, cdr3: np.ndarray, group: np.ndarray, allowed: int) -> np.ndarray:
    a, b = pairs
    close = (cdr3[a] != cdr3[b]).sum(axis=1) <= allowed
    return pairs[:, close & (group[a] == group[b])]


def _search(
    rows: np.ndarray, cdr3: np.ndarray, group: np.ndarray, allowed: int, patience: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Breadth-first search: each row is compared with all that are not reached yet.

    Returns:
      The edges found, and the rows that have not been compared when `patience` rows have.
    """
    edges, unreached = [], rows
    frontier: list[int] = []
    for _ in range(patience):
        if not frontier:
            if not len(unreached):
                break
            frontier, unreached = [int(unreached[0])], unreached[1:]
        here = frontier.pop()
        near = (cdr3[unreached] != cdr3[here]).sum(axis=1) <= allowed
        near &= group[unreached] == group[here]
        reached, unreached = unreached[near], unreached[~near]
        edges.append(np.stack([np.full(len(reached), here), reached]))
        frontier += reached.tolist()
    if not len(unreached):  # the rows of the frontier are connected already
        return edges, unreached
    return edges, np.append(np.array(frontier, np.int64), unreached)
