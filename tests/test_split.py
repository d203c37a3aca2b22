"""Clusters against brute force; splits and fractions that do not move."""

import hashlib

import numpy as np
import pytest

from moe_ablm.data import split
from moe_ablm.data.dataset import FRACTIONS


def brute_force(cdr3: np.ndarray, group: np.ndarray, identity: float) -> set[frozenset[int]]:
    """Single linkage from all pairs: grow each cluster until nothing is near it any more."""
    n, length = cdr3.shape
    near = [
        [
            group[a] == group[b] and (cdr3[a] == cdr3[b]).sum() / length >= identity - 1e-9
            for b in range(n)
        ]
        for a in range(n)
    ]
    left, clusters = set(range(n)), set()
    while left:
        cluster, border = set(), {left.pop()}
        while border:
            here = border.pop()
            cluster.add(here)
            new = {b for b in left if near[here][b]}
            left -= new
            border |= new
        clusters.add(frozenset(cluster))
    return clusters


def as_sets(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == v).tolist()) for v in np.unique(labels)}


@pytest.mark.parametrize("patience", [2, 256])
def test_link_equals_brute_force(monkeypatch, patience):
    monkeypatch.setattr(split, "_PATIENCE", patience)
    rng = np.random.default_rng(5)
    for _ in range(60):
        length, n = int(rng.integers(2, 28)), int(rng.integers(0, 40))
        identity = float(rng.choice([0.5, 0.7, 0.8, 0.9, 0.95, 1.0]))
        parents = rng.integers(0, 5, (4, length))
        cdr3 = parents[rng.integers(0, 4, n)]
        cdr3 = np.where(rng.random((n, length)) < 0.15, rng.integers(0, 5, (n, length)), cdr3)
        rows = np.unique(np.c_[rng.integers(0, 2, n), cdr3].astype(np.uint8), axis=0)
        cdr3, group = np.ascontiguousarray(rows[:, 1:]), rows[:, 0].astype(np.uint64)
        labels = split.link(cdr3, group, identity)
        assert as_sets(labels) == brute_force(cdr3, group, identity), (length, n, identity)


def test_link_of_a_chain_and_its_threshold():
    def linked(sequences, identity):
        cdr3 = np.array([list(s.encode()) for s in sequences], np.uint8)
        return as_sets(split.link(cdr3, np.zeros(len(cdr3), np.uint64), identity))

    chain = ["AAAAAAAAAA", "AAAAAAAAAC", "AAAAAAAACC"]  # ends differ twice, neighbours once
    assert linked(chain, 0.9) == {frozenset({0, 1, 2})}
    assert linked(chain[::2], 0.9) == {frozenset({0}), frozenset({1})}
    assert linked(chain[::2], 0.8) == {frozenset({0, 1})}
    assert linked(["AAAAAAAAA", "AAAAAAAAC"], 0.9) == {frozenset({0}), frozenset({1})}


@pytest.mark.parametrize(
    ("length", "identity", "allowed"),
    [
        (9, 0.9, 0),
        (10, 0.9, 1),
        (19, 0.9, 1),
        (20, 0.9, 2),
        (15, 0.8, 3),
        (12, 1.0, 0),
        (30, 0.9, 3),
    ],
)
def test_mismatches_allowed(length, identity, allowed):
    assert split.mismatches_allowed(length, identity) == allowed
    assert (length - allowed) / length >= identity - 1e-9
    assert (length - allowed - 1) / length < identity


def test_group_hash_is_blake2b_of_the_name():
    (found,) = split.group_hashes(["IGHV3-23"], ["IGHJ4"], np.array([15]))
    digest = hashlib.blake2b(b"IGHV3-23|IGHJ4|15", digest_size=8, person=split.SALT).digest()
    assert int(found) == int.from_bytes(digest, "big")


def test_shares_of_the_split():
    hashes = np.array([split.hash64(f"x{i}") for i in range(20_000)], np.uint64)
    shares = np.bincount(split.split_of(hashes), minlength=3) / len(hashes)
    assert np.allclose(shares, [0.90, 0.05, 0.05], atol=0.006)  # 4 standard deviations
    edges = np.array([0, int(0.9 * 2**64) - 2048, int(0.9 * 2**64) + 2048, 2**64 - 1], np.uint64)
    assert split.split_of(edges).tolist() == [0, 0, 1, 2]


def test_record_keys_depend_on_the_record_alone_and_fractions_are_nested():
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    heavy = [rng.choice(letters, 20).tobytes() for _ in range(8000)]
    light = [rng.choice(letters, 18).tobytes() for _ in range(8000)]
    key, fraction = split.record_keys(heavy, light)
    order = rng.permutation(8000)
    key2, fraction2 = split.record_keys([heavy[i] for i in order], [light[i] for i in order])
    assert (key2 == key[order]).all() and (fraction2 == fraction[order]).all()
    assert len(np.unique(key)) == 8000
    members = {name: set(np.flatnonzero(fraction < bound)) for name, bound in FRACTIONS.items()}
    assert members["quarter"] < members["half"] < members["full"]
    for name, share in (("quarter", 0.25), ("half", 0.5), ("full", 1.0)):
        assert abs(len(members[name]) / 8000 - share) < 0.02
    # A chain must not flow into the other: (AB, C) and (A, BC) are different antibodies.
    moved, _ = split.record_keys([b"AB", b"A"], [b"C", b"BC"])
    assert moved[0] != moved[1]
