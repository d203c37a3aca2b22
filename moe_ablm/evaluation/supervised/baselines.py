"""Baselines without a language model: what a head has to beat.

Of antibodies, a classifier that sees no sequence, only what V genes, mutation counts and CDRH3
length give away; of proteins, regressions on the sequence alone.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.supervised.folds import cdr3_of, out_of_fold
from moe_ablm.evaluation.supervised.head_inputs import IGNORED

BASELINE = "V genes, mutations, CDRH3 length"
PAIRED_BASELINE = "V genes and mutations of both chains"
BINS = (1, 2, 4, 8, 16)  # lower ends of the bins of mutation counts, the first being 0
LENGTHS = (5, 30)  # of CDRH3; what is shorter or longer counts as that


def mutation_bin(mutations: int) -> int:
    """0, 1, 2-3, 4-7, 8-15, or 16 and more mutations, as 0 to 5."""
    return int(np.searchsorted(BINS, mutations, side="right"))


def features(antibody: Annotated) -> dict[str, str]:
    """What the baseline knows of an antibody; everything is a category."""
    heavy, light = antibody.heavy, antibody.light
    known = {"CDRH3": str(np.clip(len(cdr3_of(heavy)), *LENGTHS))}
    for name, chain in antibody.chains():
        known[f"{name} V"] = chain.v_gene
        known[f"{name} mutations"] = str(mutation_bin(chain.mutations))
    return known if len(light) else known | {"light V": "none"}


def pair_features(antibody: Annotated) -> dict[str, str]:
    """What the baseline of pairing knows: genes, families and mutations of the chains together.

    A single chain is no evidence: each is in a native and in a re-paired antibody.
    """
    heavy, light = antibody.heavy, antibody.light
    families = [gene.split("-")[0] for gene in (heavy.v_gene, light.v_gene)]
    bins = [mutation_bin(chain.mutations) for chain in (heavy, light)]
    return {
        "V genes": f"{heavy.v_gene} {light.v_gene}",
        "V families": f"{families[0]} {families[1]}",
        "mutations": f"{bins[0]} {bins[1]}",
    }


def predictions(
    known: Sequence[Mapping[str, str]], classes: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Out-of-fold class probabilities of logistic regression on one-hot features, `[n, C]`.

    Raises:
      Skipped: scikit-learn is not installed.
    """
    require_sklearn()
    count = int(classes.max()) + 1

    def predict(train: np.ndarray, held: np.ndarray) -> np.ndarray:
        learned, asked = ([known[i] for i in rows] for rows in (train, held))
        return by_genes(learned, classes[train], asked, count)

    return out_of_fold(predict, folds)


def by_genes(
    train: Sequence[Mapping[str, str]],
    classes: np.ndarray,
    test: Sequence[Mapping[str, str]],
    count: int,
) -> np.ndarray:
    """Probabilities of `count` classes by logistic regression on one-hot features, `[n, count]`."""
    _, extraction = require_sklearn()
    table = extraction.DictVectorizer()
    x = table.fit_transform(train)
    model = _logistic(classes).fit(x, classes)
    return _shares(model, table.transform(test), count)


def values_by_genes(
    train: Sequence[Mapping[str, str]], targets: np.ndarray, test: Sequence[Mapping[str, str]]
) -> np.ndarray:
    """Ridge regression on one-hot features, its penalty chosen by leave-one-out, float64 `[n]`."""
    linear_model, extraction = require_sklearn()
    table = extraction.DictVectorizer(sparse=False)
    x = table.fit_transform(train)
    return linear_model.RidgeCV(PENALTIES).fit(x, targets).predict(table.transform(test))


def _logistic(classes: np.ndarray, steps: int = 1000) -> Any:
    """Logistic regression; of one class, all that a fold may hold, that class."""
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=steps) if len(set(classes)) > 1 else DummyClassifier()


def _shares(model: Any, x: Any, count: int) -> np.ndarray:
    """Probabilities of all classes, 0 of those that a model has not seen."""
    found = np.zeros((x.shape[0], count))
    found[:, model.classes_] = model.predict_proba(x)
    return found


def has_sklearn() -> bool:
    """Whether scikit-learn is there."""
    return importlib.util.find_spec("sklearn") is not None


def require_sklearn() -> tuple[Any, Any]:
    """Its modules `linear_model` and `feature_extraction`.

    Raises:
      Skipped: scikit-learn is not installed.
    """
    try:
        from sklearn import feature_extraction, linear_model
    except ImportError as error:
        raise Skipped("the baseline needs scikit-learn: pip install 'moe_ablm[eval]'") from error
    return linear_model, feature_extraction


NAMES = {
    "regression": "ridge on residues",
    "classification": "logistic on composition",
    "residue": "logistic on a window of 15 residues",
}
EMBEDDINGS = "ridge on embeddings"  # of the language model: what a head has to beat, too
REGION = "chain and region"
PENALTIES = np.logspace(-3, 3, 13)  # of ridge regressions
_AROUND = 7  # residues on either side of one
_MOST_RESIDUES = 20_000  # of the training set
_AT_ONCE = 1 << 16
_INDEX = np.full(256, len(AMINO_ACIDS), np.int64)
_INDEX[list(AMINO_ACIDS.encode())] = np.arange(len(AMINO_ACIDS))


def regression(train: Sequence[str], targets: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Ridge regression, its penalty chosen by leave-one-out, float64 `[n]`.

    On one-hot residues where all sequences have one length, else on composition and length.
    """
    from sklearn.linear_model import RidgeCV

    if len({len(sequence) for sequence in [*train, *test]}) == 1:
        codes = [np.stack([_codes(s) for s in sequences]) for sequences in (train, test)]
        x, y = (np.eye(len(AMINO_ACIDS) + 1)[c].reshape(len(c), -1) for c in codes)
    else:
        x, y = _composition(train), _composition(test)
    varied = x.std(0) > 0
    if not varied.any():
        return np.full(len(y), targets.mean())
    return RidgeCV(PENALTIES).fit(x[:, varied], targets).predict(y[:, varied])


def on_vectors(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression on standardised vectors `[n, D]`, its penalty by leave-one-out, `[n]`."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(train, targets).predict(test)


def by_region(
    train: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    count: int,
) -> list[np.ndarray]:
    """How often residues of a region have each class, counts one up, `[residues, count]` each.

    Args:
      train, test: index of the region of each residue, -1 for none (`inference.numbers.regions`).
      classes: of the residues of `train`, `head_inputs.IGNORED` where there is none.
      count: classes.
    """
    at, of = np.concatenate(train), np.concatenate(classes)
    known = of != IGNORED
    # the last line is that of no region
    table = np.ones((max(int(x.max()) for x in (at, *test)) + 2, count))
    np.add.at(table, (at[known], of[known]), 1)
    table /= table.sum(1, keepdims=True)
    return [table[x] for x in test]


def classification(train: Sequence[str], classes: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Multinomial logistic regression on composition and length, int64 `[n]`."""
    return _of_composition(train, classes).predict(_composition(test))


def composition(
    train: Sequence[str], classes: np.ndarray, test: Sequence[str], count: int
) -> np.ndarray:
    """Probabilities of `count` classes by the same, float64 `[n, count]`."""
    return _shares(_of_composition(train, classes), _composition(test), count)


def _of_composition(train: Sequence[str], classes: np.ndarray) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), _logistic(classes))
    return model.fit(_composition(train), classes)


def residue(
    train: Sequence[str], classes: Sequence[np.ndarray], test: Sequence[str], seed: int
) -> list[np.ndarray]:
    """Multinomial logistic regression on the residues around one, int64 `[residues]` each.

    Args:
      train, test: sequences.
      classes: of the residues of `train`, `head_inputs.IGNORED` where there is none.
      seed: of the draw of up to 20,000 residues to learn from.
    """
    return _of_windows(_window_model(train, classes, seed).predict, test)


def residue_shares(
    train: Sequence[str],
    classes: Sequence[np.ndarray],
    test: Sequence[str],
    seed: int,
    count: int,
) -> list[np.ndarray]:
    """Probabilities of `count` classes by the same, float64 `[residues, count]` each."""
    model = _window_model(train, classes, seed)
    return _of_windows(lambda x: _shares(model, x, count), test)


def _window_model(train: Sequence[str], classes: Sequence[np.ndarray], seed: int) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    x, y = np.concatenate([_windows(s) for s in train]), np.concatenate(classes)
    known = np.flatnonzero(y != IGNORED)
    if len(known) > _MOST_RESIDUES:
        known = np.sort(np.random.default_rng(seed).permutation(known)[:_MOST_RESIDUES])
    letters = [np.arange(len(AMINO_ACIDS) + 2)] * x.shape[1]
    model = make_pipeline(OneHotEncoder(categories=letters), _logistic(y[known], 300))
    return model.fit(x[known], y[known])


def _of_windows(
    predict: Callable[[np.ndarray], np.ndarray], test: Sequence[str]
) -> list[np.ndarray]:
    around = np.concatenate([_windows(s) for s in test])
    pieces = [predict(around[i : i + _AT_ONCE]) for i in range(0, len(around), _AT_ONCE)]
    return np.split(np.concatenate(pieces), np.cumsum([len(s) for s in test])[:-1])


def _codes(sequence: str) -> np.ndarray:
    return _INDEX[np.frombuffer(sequence.encode(), np.uint8)]


def _composition(sequences: Sequence[str]) -> np.ndarray:
    """Shares of the amino acids, and the logarithm of the length, float64 `[n, 21]`."""
    shares = [
        np.bincount(_codes(s), minlength=len(AMINO_ACIDS) + 1)[:-1] / len(s) for s in sequences
    ]
    return np.column_stack([shares, np.log([len(s) for s in sequences])])


def _windows(sequence: str) -> np.ndarray:
    """Codes around each residue, int64 `[residues, 15]`; beyond the ends one of their own."""
    outside = np.full(_AROUND, len(AMINO_ACIDS) + 1)
    padded = np.concatenate([outside, _codes(sequence), outside])
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1)
