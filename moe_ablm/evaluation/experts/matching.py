"""Stability of specialisation across seeds: experts of two runs matched by what they take.

Experts have no order, so those of one run are matched to those of another, layer by layer, such
that the sum of the correlations of their profiles is the largest (Hungarian algorithm, Kuhn 1955).
A best matching correlates by chance, too, and any two routers that change slowly along a chain send
neighbouring classes to the same expert. So the null is pairs of unrelated routers that know
position only (`position_only`), on the same antibodies. The p-value is the share of such pairs that
are as alike, at the length scale where it is largest. Permuting the names of classes instead would
destroy what such routers share, and call 39 to 96 % of them alike.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_ablm.evaluation.estimates import Number, interval

PROFILE = ("region", "residue")  # traits whose enrichments are an expert's profile
POSITION_CORRELATION = "position_only_correlation"


class Match(NamedTuple):
    """A matching.

    Attributes:
      pairs: int64 `[n, 2]`, expert of the one run, expert of the other; n is the lesser number.
      correlation: `[n]`, Pearson's, of the profiles of matched experts.
      unmatched: mean correlation of all pairs of experts, which a random matching has.
    """

    pairs: np.ndarray
    correlation: np.ndarray
    unmatched: float


def match(a: np.ndarray, b: np.ndarray) -> Match:
    """Matches experts by their profiles `[experts, classes]`, the same classes in both."""
    similar = correlations(a, b)
    pairs = best(similar)
    return Match(pairs, similar[tuple(pairs.T)], float(similar.mean()))


def position_correlations(profiles: np.ndarray, scale: float) -> list[Number]:
    """Mean matched correlation of each position-only router `[R, E, classes]` and the next."""
    following = np.roll(profiles, -1, axis=0)
    return [
        Number(
            POSITION_CORRELATION,
            float(match(a, b).correlation.mean()),
            {"length scale": f"{scale:g}", "pair": str(i)},
            n=len(a),
        )
        for i, (a, b) in enumerate(zip(profiles, following, strict=True))
    ]


def p_value(correlation: float, nulls: Sequence[np.ndarray]) -> float:
    """Share of unrelated pairs with at least this `correlation`, itself counted, of the worst null.

    Args:
      correlation: a mean matched correlation.
      nulls: those of pairs, an array a null.
    """
    return max((1 + (null >= correlation - 1e-12).sum()) / (1 + len(null)) for null in nulls)


def best(similar: np.ndarray) -> np.ndarray:
    """Pairs `[n, 2]` with the largest sum of `similar [a, b]`."""
    return np.stack(linear_sum_assignment(similar, maximize=True), 1)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r of all rows of `a` with all rows of `b`; 0 for a constant row."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.divide(a @ b.T, lengths, out=np.zeros(lengths.shape), where=lengths > 1e-12)


def stability(results_a: Mapping, results_b: Mapping) -> list[Number]:
    """How alike the experts of two runs are, layer by layer.

    Args:
      results_a, results_b: `["evaluations"]["routing"]` of two `results.json`.

    Returns:
      For each layer that both have: `matched_correlation`; `random_correlation`, of experts paired
      at random; `chance_correlation`, the mean of matchings of unrelated position-only routers (of
      the length scale where they are most alike), with their middle 95 %; and `matched_p`. The last
      two are left out where an older evaluation has no such routers. Nothing where an
      evaluation was skipped.
    """
    a, b = profiles(results_a), profiles(results_b)
    nulls = [*unrelated(results_a), *unrelated(results_b)]
    if not (unrelated(results_a) and unrelated(results_b)):
        nulls = []
    numbers = []
    for layer in sorted(a.keys() & b.keys(), key=int):
        classes = sorted(set.intersection(*(set(p) for x in (a, b) for p in x[layer].values())))
        if len(classes) < 3:
            continue
        one, other = (
            np.array([[p[c] for c in classes] for p in x[layer].values()]) for x in (a, b)
        )
        numbers += _numbers(layer, match(one, other), nulls)
    return numbers


def _numbers(layer: str, matched: Match, nulls: Sequence[np.ndarray]) -> list[Number]:
    labels, n = {"layer": layer}, len(matched.pairs)
    mean = float(matched.correlation.mean())
    numbers = [Number("matched_correlation", mean, labels, n=n)]
    if nulls:
        most = max(nulls, key=lambda null: float(null.mean()))
        ends = interval(most)
        numbers.append(Number("chance_correlation", float(most.mean()), labels, *ends, n))
    numbers.append(Number("random_correlation", matched.unmatched, labels, n=n))
    if nulls:
        numbers.append(Number("matched_p", p_value(mean, nulls), labels, n=n))
    return numbers


def unrelated(results: Mapping) -> list[np.ndarray]:
    """Correlations of pairs of position-only routers, an array a length scale."""
    scales: dict[str, list[float]] = {}
    for number in results["numbers"]:
        if number["metric"] == POSITION_CORRELATION:
            scales.setdefault(number["labels"]["length scale"], []).append(number["value"])
    return [np.array(values) for values in scales.values()]


def profiles(results: Mapping) -> dict[str, dict[int, dict[tuple[str, str], float]]]:
    """Enrichments by layer, expert and class (trait, name), from an evaluation's numbers."""
    by_layer: dict = {}
    for number in results["numbers"]:
        labels = number["labels"]
        if number["metric"] != "enrichment" or labels["trait"] not in PROFILE:
            continue
        expert = by_layer.setdefault(labels["layer"], {}).setdefault(int(labels["expert"]), {})
        expert[labels["trait"], labels["class"]] = number["value"]
    return {layer: dict(sorted(experts.items())) for layer, experts in by_layer.items()}
