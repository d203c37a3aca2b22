"""Stability of specialisation across seeds: experts of two runs matched by what they take.

Experts have no order, so those of one run are matched to those of another, layer by layer, such
that the sum of the correlations of their profiles is the largest (Hungarian algorithm, Kuhn 1955).
A best matching correlates by chance, too. The null distribution is the same matching after the
classes of one run's profiles are permuted, the same way for all of its experts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_ablm.evaluation.estimates import Number, interval

PROFILE = ("region", "residue")  # traits whose enrichments are an expert's profile
RENAMED = 1000


class Match(NamedTuple):
    """A matching.

    Attributes:
      pairs: int64 `[n, 2]`, expert of the one run, expert of the other; n is the lesser number.
      correlation: `[n]`, Pearson's, of the profiles of matched experts.
      unmatched: mean correlation of all pairs of experts, which a random matching has.
      chance: `[RENAMED]`, mean correlation of best matchings after classes were renamed.
    """

    pairs: np.ndarray
    correlation: np.ndarray
    unmatched: float
    chance: np.ndarray

    @property
    def p_value(self) -> float:
        """Share of chance's matchings that are as good, the one observed counted among them."""
        as_good = (self.chance >= self.correlation.mean() - 1e-12).sum()
        return float((1 + as_good) / (1 + len(self.chance)))


def match(a: np.ndarray, b: np.ndarray, blocks: np.ndarray, renamed: int = RENAMED) -> Match:
    """Matches experts by their profiles.

    Args:
      a, b: `[experts, classes]`, the same classes in the same order.
      blocks: int `[classes]`: classes are renamed within their block (regions, residues).
      renamed: how often.
    """
    similar = correlations(a, b)
    pairs = best(similar)
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(renamed):
        order = np.arange(len(blocks))
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            order[here] = rng.permutation(here)
        drawn = correlations(a, b[:, order])
        chance.append(drawn[tuple(best(drawn).T)].mean())
    found = similar[tuple(pairs.T)]
    return Match(pairs, found, float(similar.mean()), np.array(chance))


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
      For each layer that both have: `matched_correlation`; `chance_correlation`, the mean of what
      matchings after renaming have, with their middle 95 %; `random_correlation`, of experts
      paired at random; and `matched_p`. Nothing where an evaluation was skipped.
    """
    a, b = profiles(results_a), profiles(results_b)
    found = []
    for layer in sorted(a.keys() & b.keys(), key=int):
        classes = sorted(set.intersection(*(set(p) for x in (a, b) for p in x[layer].values())))
        if len(classes) < 3:
            continue
        names = sorted({trait for trait, _ in classes})
        blocks = np.array([names.index(trait) for trait, _ in classes])
        one, other = (
            np.array([[p[c] for c in classes] for p in x[layer].values()]) for x in (a, b)
        )
        found += _numbers(layer, match(one, other, blocks))
    return found


def _numbers(layer: str, found: Match) -> list[Number]:
    labels, n = {"layer": layer}, len(found.pairs)
    low, high = interval(found.chance)
    return [
        Number("matched_correlation", float(found.correlation.mean()), labels, n=n),
        Number("chance_correlation", float(found.chance.mean()), labels, low, high, n),
        Number("random_correlation", found.unmatched, labels, n=n),
        Number("matched_p", found.p_value, labels, n=n),
    ]


def profiles(results: Mapping) -> dict[str, dict[int, dict[tuple[str, str], float]]]:
    """Enrichments by layer, expert and class (trait, name), from an evaluation's numbers."""
    found: dict = {}
    for number in results["numbers"]:
        labels = number["labels"]
        if number["metric"] != "enrichment" or labels["trait"] not in PROFILE:
            continue
        expert = found.setdefault(labels["layer"], {}).setdefault(int(labels["expert"]), {})
        expert[labels["trait"], labels["class"]] = number["value"]
    return {layer: dict(sorted(experts.items())) for layer, experts in found.items()}
