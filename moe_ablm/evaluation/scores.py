"""Scores of classifiers, with intervals over clones, and against a baseline on the same draws.

Accuracy; F1, the mean over classes; AUC (area under the ROC curve, ties counted half) and AUPR
(average precision: the sum of precision times the gain of recall over distinct thresholds, without
interpolation), of the second class of two, else the mean over classes against the rest; MCC
(Gorodkin 2004, eq. 8). The definitions are scikit-learn's, computed for all draws of a bootstrap at
once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.evaluation.estimates import Number, Sample, repeated_interval, resampled


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores in order, made once for many weightings.

    Attributes:
      truth: bool `[n]`.
      group: int64 `[n]`, rank of the score among distinct ones, the highest first.
      groups: how many distinct ones there are.
    """

    truth: np.ndarray
    group: np.ndarray
    groups: int

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> "Ranking":
        """Args: truth bool `[n]`; scores `[n]`, higher for what is more likely true."""
        distinct, rank = np.unique(scores, return_inverse=True)
        return cls(np.asarray(truth, bool), len(distinct) - 1 - rank, len(distinct))

    def _counts(self, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        weights = np.ones(len(self.truth)) if weights is None else np.asarray(weights, float)
        true, false = (
            np.bincount(self.group[at], weights[at], self.groups)
            for at in (self.truth, ~self.truth)
        )
        return true, false

    def auroc(self, weights: np.ndarray | None = None) -> float:
        """Probability that a true one scores higher than another; NaN if there is one kind only."""
        true, false = self._counts(weights)
        pairs = true.sum() * false.sum()
        beaten = false.sum() - false.cumsum() + false / 2
        return float(true @ beaten / pairs) if pairs else float("nan")

    def average_precision(self, weights: np.ndarray | None = None) -> float:
        """Mean precision over the true ones; NaN where there are none."""
        true, false = self._counts(weights)
        chosen = (true + false).cumsum()
        precision = true.cumsum() / np.where(chosen > 0, chosen, 1)
        return float(true @ precision / true.sum()) if true.sum() else float("nan")


METRICS = ("accuracy", "F1", "AUC", "AUPR", "MCC")
_AT_ONCE = 100  # draws; bounds the memory


def scores(
    truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Scores under each of several weightings of the observations.

    Args:
      truth: classes, int `[n]`.
      probabilities: of the classes (or any increasing function of them), `[n, C]`.
      weights: not negative, `[W, n]`; None: all observations once.

    Returns:
      float64 `[W]` by the name of the metric; NaN where a class that it needs has no weight.
    """
    weights = np.ones((1, len(truth))) if weights is None else np.asarray(weights, float)
    classes = probabilities.shape[1]
    positives = [1] if classes == 2 else range(classes)
    ranked = [ranking_scores(truth == c, probabilities[:, c], weights) for c in positives]
    auc, aupr = (np.mean([pair[i] for pair in ranked], axis=0) for i in range(2))
    cells = truth * classes + probabilities.argmax(1)
    confusion = (weights @ np.eye(classes**2)[cells]).reshape(-1, classes, classes)
    accuracy, f1, mcc = _confusion_scores(confusion)
    return dict(zip(METRICS, (accuracy, f1, auc, aupr, mcc), strict=True))


def _confusion_scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy, macro F1 and MCC of confusion matrices `[W, truth, predicted]`."""
    total, hits = confusion.sum((1, 2)), np.trace(confusion, axis1=1, axis2=2)
    true, predicted = confusion.sum(2), confusion.sum(1)
    diagonal = np.diagonal(confusion, axis1=1, axis2=2)
    either = true + predicted
    # a class that is neither there nor predicted has no F1, and no part in the mean
    f1 = np.where(either > 0, 2 * diagonal / np.where(either > 0, either, 1), 0).sum(1)
    f1 = _divided(f1, (either > 0).sum(1))
    spread = [total**2 - (margin**2).sum(1) for margin in (true, predicted)]
    product = np.sqrt(spread[0] * spread[1])
    covariance = hits * total - (true * predicted).sum(1)
    mcc = np.where(product > 0, covariance / np.where(product > 0, product, 1), 0.0)
    return _divided(hits, total), f1, mcc


def ranking_scores(
    positive: np.ndarray, score: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUC and average precision of a score, float64 `[W]` each; equal scores are one threshold.

    Args:
      positive: bool `[n]`.
      score: `[n]`.
      weights: `[W, n]`.
    """
    ranking = Ranking.of(positive, score)
    by_draw = [(ranking.auroc(each), ranking.average_precision(each)) for each in weights]
    auc, precision = np.array(by_draw, float).reshape(-1, 2).T
    return auc, precision


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / np.where(b > 0, b, math.nan)


def score_numbers(
    truth: np.ndarray,
    predicted: Mapping[str, np.ndarray],
    baseline: str,
    units: Sequence[str],
    folds: np.ndarray,
    labels: Mapping[str, str],
) -> list[Number]:
    """Scores of predictions, those of folds, and what is gained over the baseline.

    Scores are means over repeats of the cross-validation. Their intervals have two levels: units
    are drawn again, the same ones for all repeats, and the mean of so few repeats has the error of
    Student's t with the standard deviation between them.

    Args:
      truth: classes `[n]`.
      predicted: probabilities by the name of the predictor, `[T, n, C]` of T repeats, which differ
        in seeds of heads and in folds.
      baseline: name of the predictor that the others are compared with.
      units: what is drawn again, `[n]`.
      folds: the fold in which each observation was held out, `[T, n]`.
      labels: of all numbers; "predictor" is added.

    Returns:
      For each predictor the metrics but accuracy, of which `accuracy_sample` keeps every part,
      "METRIC, sd of folds", and for all but the baseline "METRIC over baseline" (paired draws).
    """
    index, counts = resampled(units)
    value: dict[str, dict[str, np.ndarray]] = {}  # `[T]`
    drawn: dict[str, dict[str, np.ndarray]] = {}  # `[draws]`
    for name, repeats in predicted.items():
        each = [scores(truth, p) for p in repeats]
        value[name] = {k: np.array([metrics[k][0] for metrics in each]) for k in METRICS}
        parts = [
            [scores(truth, p, counts[i : i + _AT_ONCE][:, index]) for p in repeats]
            for i in range(0, len(counts), _AT_ONCE)
        ]
        drawn[name] = {
            k: np.concatenate([np.mean([p[k] for p in part], 0) for part in parts] or [np.zeros(0)])
            for k in METRICS
        }
    numbers = []
    for name, repeats in predicted.items():
        about = {**labels, "predictor": name}
        held = [
            [scores(truth[of == f], p[of == f]) for f in np.unique(of).tolist()]
            for p, of in zip(repeats, folds, strict=True)
        ]
        for metric in METRICS:
            if metric != "accuracy":
                numbers.append(
                    _number(metric, value[name][metric], drawn[name][metric], about, units)
                )
            if len(held[0]) > 1:
                spread = [np.std([f[metric][0] for f in each], ddof=1) for each in held]
                sd = float(np.mean(spread))
                numbers.append(Number(f"{metric}, sd of folds", sd, about, n=len(held[0])))
            if name != baseline:
                gain, of_draws = (x[name][metric] - x[baseline][metric] for x in (value, drawn))
                numbers.append(_number(f"{metric} over baseline", gain, of_draws, about, units))
    return numbers


def _number(
    metric: str, repeats: np.ndarray, drawn: np.ndarray, labels: Mapping[str, str], units
) -> Number:
    ends = repeated_interval(drawn, repeats.tolist())
    return Number(metric, float(repeats.mean()), labels, *ends, len(units))


def accuracy_sample(
    truth: np.ndarray, probabilities: np.ndarray, units: Sequence[str], labels: Mapping[str, str]
) -> Sample:
    """Accuracy with every antibody's part, the mean over repeats; probabilities `[T, n, C]`."""
    hits = (probabilities.argmax(-1) == truth).astype(float)
    repeats = tuple(hits.mean(1).tolist())
    ones = np.ones(len(truth))
    return Sample("accuracy", units, hits.mean(0), ones, labels, unit="share", repeats=repeats)
