"""Labelled antibodies from files, and cross-validation in which no clone is in two folds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moe_ablm.data.annotate import annotate_batch
from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers import open_sources
from moe_ablm.data.regions import CDR3, CHAINS, regions_from_cdr_mask
from moe_ablm.data.split import hash64, link, record_keys
from moe_ablm.errors import UserError
from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated, Chain, hashed_order
from moe_ablm.evaluation.supervised.head_inputs import Head, HeadInputs
from moe_ablm.evaluation.supervised.heads import Training, fit
from moe_ablm.inference.buckets import Engine


def read_labelled(paths: Sequence[Path]) -> tuple[list[Annotated], list[str]]:
    """Antibodies with the label of the column `label`, cut to their V domains, in file order.

    Genes, regions and mutations are those of the file where they are there, else computed.

    Returns:
      The antibodies, and notes on rows that were left out: malformed, without annotation, seen
      before, or seen with another label.

    Raises:
      UserError: no such file, an unknown format, or no label.
    """
    by_key: dict[int, Annotated] = {}
    labels: dict[int, set[str]] = {}
    read = kept = 0
    for source in open_sources([str(path) for path in paths], on_bad_row="skip"):
        for batch in source.batches():
            if "label" not in batch.schema.names:
                raise UserError(
                    f"--data specificity={source.report.source}: no column label; expected the "
                    "columns h_sequence, l_sequence, label"
                )
            for antibody in _annotated(batch):
                kept += 1
                by_key.setdefault(antibody.key, antibody)
                labels.setdefault(antibody.key, set()).add(antibody.label)
        read += source.report.read
    certain = [a for key, a in by_key.items() if len(labels[key]) == 1 and a.label]
    lost = {
        "malformed or without annotation": read - kept,
        "equal to another one": kept - len(by_key),
        "without a label, or with several": len(by_key) - len(certain),
    }
    notes = [f"{n:,} of {read:,} rows are {what}: left out" for what, n in lost.items() if n]
    return certain, notes


def _annotated(batch: pa.RecordBatch) -> list[Annotated]:
    done, _ = annotate_batch(batch)
    heavy, light = (_chains(done, chain) for chain in CHAINS)
    letters = [[c.letters.encode() for c in chains] for chains in (heavy, light)]
    keys = record_keys(*letters)[0].tolist()
    names = done["sequence_id"].to_pylist() if "sequence_id" in done.schema.names else keys
    labels = (label or "" for label in done["label"].cast(pa.string()).to_pylist())
    return [
        Annotated(str(name), str(key), key, heavy_chain, light_chain, label)
        for name, key, heavy_chain, light_chain, label in zip(
            names, keys, heavy, light, labels, strict=True
        )
    ]


def _chains(batch: pa.RecordBatch, chain: str) -> list[Chain]:
    names = ("sequence_aa", "germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
    columns = [batch[f"{name}_{chain}"].to_pylist() for name in names]
    return [_chain(*values) if values[0] else NO_CHAIN for values in zip(*columns, strict=True)]


def _chain(letters: str, germline: str, cdr: str, mutated: str, v_gene: str, j_gene: str) -> Chain:
    codes = np.frombuffer(cdr.encode(), np.uint8)
    region = regions_from_cdr_mask(codes, np.array([0, len(codes)]))
    mutations = np.frombuffer(mutated.encode(), np.uint8) - np.uint8(ord("0"))
    return Chain(letters, germline, region, mutations, np.zeros_like(region), v_gene, j_gene)


def annotated(antibodies: Sequence[Antibody]) -> list[Annotated]:
    """Antibodies with what annotation finds, in their order; without where it finds no V domain."""
    n = len(antibodies)
    columns = {
        "sequence_id": [str(i) for i in range(n)],
        "sequence_aa_heavy": [a.heavy for a in antibodies],
        "sequence_aa_light": [a.light for a in antibodies],
        "label": [""] * n,
    }
    batch = pa.record_batch({k: pa.array(v, pa.string()) for k, v in columns.items()})
    found = {int(a.name): a for a in _annotated(batch)}
    return [found.get(i) or _plain(a, i) for i, a in enumerate(antibodies)]


def _plain(antibody: Antibody, number: int) -> Annotated:
    heavy, light = (
        Chain(letters, letters, *(np.zeros(len(letters), np.uint8),) * 3, "", "")
        for letters in (antibody.heavy, antibody.light)
    )
    return Annotated(str(number), str(number), number, heavy, light)


def drawn(antibodies: Sequence[Annotated], most: int, seed: int) -> list[Annotated]:
    """Up to `most` of them by a hash of sequence and seed, ordered by it: no matter how the file
    is ordered, and fewer are the first of more."""
    keys = np.array([a.key for a in antibodies], np.uint64)
    return [antibodies[i] for i in hashed_order(keys, seed)[:most]]


IDENTITY = 0.8  # of the CDRH3s of a clone


def cdr3_of(chain: Chain) -> str:
    """The CDR3's letters; "" without annotation."""
    at = np.flatnonzero(chain.region == CDR3)
    return "".join(chain.letters[i] for i in at)


def clones(antibodies: Sequence[Annotated], identity: float = IDENTITY) -> np.ndarray:
    """Clones by single linkage of CDRH3s, int64 `[n]`, numbered by first appearance.

    Related are antibodies of one heavy V gene whose CDRH3s are equally long and at least `identity`
    identical; one without annotated CDRH3 only to those of the same sequences.
    """
    members: dict[int, list[int]] = {}
    label: list = [None] * len(antibodies)
    cdr3s = [cdr3_of(a.heavy) for a in antibodies]
    for i, (antibody, cdr3) in enumerate(zip(antibodies, cdr3s, strict=True)):
        if antibody.heavy.v_gene and cdr3:
            members.setdefault(len(cdr3), []).append(i)
        else:
            label[i] = (antibody.heavy.letters, antibody.light.letters)
    for length, rows in members.items():
        keys = [(antibodies[i].heavy.v_gene, cdr3s[i]) for i in rows]
        distinct = sorted(set(keys))
        letters = np.frombuffer("".join(c for _, c in distinct).encode(), np.uint8)
        group = np.array([hash64(gene) for gene, _ in distinct], np.uint64)
        clone = link(letters.reshape(-1, length), group, identity)
        of = dict(zip(distinct, clone.tolist(), strict=True))
        for i, key in zip(rows, keys, strict=True):
            label[i] = length, of[key]
    return numbered(label)


def numbered(labels: Sequence) -> np.ndarray:
    """Equal labels as equal numbers, int64 `[n]`, from 0 by first appearance."""
    number: dict = {}
    return np.array([number.setdefault(label, len(number)) for label in labels], np.int64)


def joined(*partitions: np.ndarray) -> np.ndarray:
    """Groups of what is together in any of several partitions, directly or through others.

    Args:
      partitions: int64 `[n]` each, group numbers.
    """
    n = len(partitions[0])
    edges = []
    for partition in partitions:
        _, first, inverse = np.unique(partition, return_index=True, return_inverse=True)
        edges.append((np.arange(n), first[inverse]))
    left, right = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def clonal_folds(
    groups: np.ndarray, classes: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """The fold of each observation, int64 `[n]`; a group is never in two.

    Groups are dealt out from the largest, equals in random order, each to the fold that has least
    of its classes: folds come out nearly equal, class by class, unless a group is larger than one.

    Args:
      groups: int `[n]`.
      classes: int `[n]`.
      count: folds.
      rng: of the order.

    Raises:
      UserError: fewer than two folds.
    """
    if count < 2:
        raise UserError(f"folds={count}: expected 2 or more, one to be held out at a time")
    _, groups = np.unique(groups, return_inverse=True)
    content = np.zeros((groups.max() + 1, classes.max() + 1))
    np.add.at(content, (groups, classes), 1)
    share = content / np.maximum(content.sum(0), 1)
    shuffled = rng.permutation(len(share))
    order = shuffled[np.argsort(-share[shuffled].sum(1), kind="stable")]
    filled, fold = np.zeros((count, share.shape[1])), np.zeros(len(share), np.int64)
    for group in order.tolist():
        # rounding must not decide between folds that are equally full
        fullness = np.round(filled @ share[group], 12)
        level = np.round(filled.sum(1), 12)
        fold[group] = np.lexsort((level, fullness))[0]
        filled[fold[group]] += share[group]
    return fold[groups]


def out_of_fold(
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray], folds: np.ndarray
) -> np.ndarray:
    """Predictions for every observation by what was trained without its fold, `[n]` or `[n, C]`.

    Of residues an object array `[n]` of arrays.

    Args:
      predict: from indices for training and indices held out to predictions for the latter.
      folds: `[n]`.
    """
    held = [np.flatnonzero(folds == fold) for fold in np.unique(folds).tolist()]
    parts = [predict(np.setdiff1d(np.arange(len(folds)), rows), rows) for rows in held]
    kind = object if parts[0].dtype == object else np.float64
    predictions = np.zeros((len(folds), *parts[0].shape[1:]), kind)
    predictions[np.concatenate(held)] = np.concatenate(parts)
    return predictions


def cross_validated(
    engine: Engine, inputs: HeadInputs, classes: np.ndarray, folds: np.ndarray, training: Training
) -> np.ndarray:
    """Out-of-fold class probabilities of heads with attention pooling, float64 `[n, C]`."""
    head = Head("classification", int(classes.max()) + 1)

    def predict(train: np.ndarray, held: np.ndarray) -> np.ndarray:
        predictor = fit(engine, inputs.take(train), classes[train], head, training)
        return np.exp(np.asarray(predictor(inputs.take(held)), np.float64))

    return out_of_fold(predict, folds)
