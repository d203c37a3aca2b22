"""Predictions from sequences alone, without a language model: what a head has to beat."""

from collections.abc import Sequence

import numpy as np

from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.evaluation.supervised.head_inputs import IGNORED

NAMES = {
    "regression": "ridge on residues",
    "classification": "logistic on composition",
    "residue": "logistic on a window of 15 residues",
}
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
    return RidgeCV(np.logspace(-3, 3, 13)).fit(x[:, varied], targets).predict(y[:, varied])


def classification(train: Sequence[str], classes: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Multinomial logistic regression on composition and length, int64 `[n]`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(_composition(train), classes).predict(_composition(test))


def residue(
    train: Sequence[str], classes: Sequence[np.ndarray], test: Sequence[str], seed: int
) -> list[np.ndarray]:
    """Multinomial logistic regression on the residues around one, int64 `[residues]` each.

    Args:
      train, test: sequences.
      classes: of the residues of `train`, `heads.IGNORED` where there is none.
      seed: of the draw of up to 20,000 residues to learn from.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    x, y = np.concatenate([_windows(s) for s in train]), np.concatenate(classes)
    known = np.flatnonzero(y != IGNORED)
    if len(known) > _MOST_RESIDUES:
        known = np.sort(np.random.default_rng(seed).permutation(known)[:_MOST_RESIDUES])
    letters = [np.arange(len(AMINO_ACIDS) + 2)] * x.shape[1]
    model = make_pipeline(OneHotEncoder(categories=letters), LogisticRegression(max_iter=300))
    model.fit(x[known], y[known])
    around = np.concatenate([_windows(s) for s in test])
    pieces = [model.predict(around[i : i + _AT_ONCE]) for i in range(0, len(around), _AT_ONCE)]
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
