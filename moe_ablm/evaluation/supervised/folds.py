"""Cross-validation in which relatives stay together: no clone is in two folds."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moe_ablm.data.regions import CDR3
from moe_ablm.data.split import hash64, link
from moe_ablm.errors import UserError
from moe_ablm.evaluation.cohort import Annotated, Chain
from moe_ablm.evaluation.supervised.head_inputs import Head, Inputs
from moe_ablm.evaluation.supervised.heads import Training, fit
from moe_ablm.inference.buckets import Engine

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
    found = [cdr3_of(a.heavy) for a in antibodies]
    for i, (antibody, cdr3) in enumerate(zip(antibodies, found, strict=True)):
        if antibody.heavy.v_gene and cdr3:
            members.setdefault(len(cdr3), []).append(i)
        else:
            label[i] = (antibody.heavy.letters, antibody.light.letters)
    for length, rows in members.items():
        keys = [(antibodies[i].heavy.v_gene, found[i]) for i in rows]
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
    """Predictions for every observation by what was trained without its fold, `[n, C]`.

    Args:
      predict: from indices for training and indices held out to predictions for the latter.
      folds: `[n]`.
    """
    found: np.ndarray | None = None
    for fold in np.unique(folds).tolist():
        held = np.flatnonzero(folds == fold)
        part = predict(np.flatnonzero(folds != fold), held)
        if found is None:
            found = np.zeros((len(folds), part.shape[1]))
        found[held] = part
    return found


def cross_validated(
    engine: Engine, inputs: Inputs, classes: np.ndarray, folds: np.ndarray, training: Training
) -> np.ndarray:
    """Out-of-fold class probabilities of heads with attention pooling, float64 `[n, C]`."""
    head = Head("classification", int(classes.max()) + 1)

    def predict(train: np.ndarray, held: np.ndarray) -> np.ndarray:
        predictor = fit(engine, inputs.take(train), classes[train], head, training)
        return np.exp(predictor(inputs.take(held)).astype(np.float64))

    return out_of_fold(predict, folds)
