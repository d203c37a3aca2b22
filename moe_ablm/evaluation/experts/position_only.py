"""Routers that know position only: what specialisation they have, and how alike two of them are.

A region is a stretch of positions, so that any router whose decisions change slowly along a chain
has an expert "of" every region. Here are such routers: each expert's logit is a random smooth
function of the place in the heavy, and another in the light chain - a Gaussian process with a
squared exponential kernel - and knows neither residue nor region. Functions of several length
scales are drawn, as nobody knows how smooth a router would be; a claim is held against the scale
that is hardest to exceed.

As their decisions are functions of the place, no antibody is routed: residues are counted once by
cell and place, and the counts times a plan are the sums of that router.

Axes: R routers at once, M layers, C cells, P places, E experts, X classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.experts.specialisation import log_ratio, matched, observed, quotient
from moe_ablm.evaluation.experts.specialists import DECIMALS, exclusive, over_others
from moe_ablm.evaluation.experts.traits import Contrast
from moe_ablm.model.families import Router

SCALES = (4, 10, 25, 60)  # residues over which a router's decisions change
ROUTERS = 100  # of a scale
TOGETHER = 10  # routers at once; bounds the memory


class Places(NamedTuple):
    """Places in chains: `codes`, int64 `[residues]`, and how many there are in each chain.

    Places of the heavy chain come first.
    """

    codes: np.ndarray
    counts: tuple[int, ...]

    @classmethod
    def of(cls, antibodies: Sequence[Annotated]) -> "Places":
        """Of all residues of antibodies, end to end, heavy chains first."""
        chains = [(CHAINS.index(n), len(c)) for a in antibodies for n, c in a.chains()]
        counts = tuple(max((n for c, n in chains if c == i), default=0) for i in range(len(CHAINS)))
        return cls(np.concatenate([c * counts[0] + np.arange(n) for c, n in chains]), counts)


def plans(
    router: Router, places: Places, scale: float, shape: tuple[int, ...], choices: float, rng
) -> np.ndarray:
    """Shares of the experts at each place, float32 `[*shape, P, E]`, of random smooth routers.

    Args:
      router: whose family decides what follows from logits: tokens take their best experts, experts
        their best places, or (soft-MoE) all experts have a share by softmax.
      places: where.
      scale: of the kernel, in residues.
      shape: how many routers, as (R, M).
      choices: mean experts a residue; soft-MoE has no such number.
      rng: random numbers.
    """
    logits = smooth(places.counts, scale, (*shape, router.experts), rng)
    if router.slots_of_expert:
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        return (odds / odds.sum(-1, keepdims=True)).astype(np.float32)
    axis, most = -1, round(choices)
    if not router.token_choice:  # experts choose
        axis, most = -2, round(choices * logits.shape[-2] / router.experts)
    ranks = np.argsort(np.argsort(-logits, axis=axis), axis=axis)
    return (ranks < max(most, 1)).astype(np.float32)


def smooth(counts: Sequence[int], scale: float, shape: tuple[int, ...], rng) -> np.ndarray:
    """Standard Gaussian processes along each chain, float64 `[*shape[:-1], P, shape[-1]]`.

    White noise through a Gaussian filter: the kernel's width is the filter's times the root of 2
    (Rasmussen & Williams 2006, section 4.2).
    """
    width = scale / np.sqrt(2)
    parts = []
    for count in counts:
        margin = int(4 * width) + 1
        noise = rng.standard_normal((*shape[:-1], count + 2 * margin, shape[-1]))
        filtered = gaussian_filter1d(noise, width, axis=-2)[..., margin : margin + count, :]
        parts.append(filtered * np.sqrt(2 * width * np.sqrt(np.pi)))
    return np.concatenate(parts, -2)


def counted(contrast: Contrast, places: Places, owner: np.ndarray) -> np.ndarray:
    """Residues of each half of the clones by cell and place, float32 `[2, C, P]`.

    Args:
      contrast: of the cells.
      places: of all residues.
      owner: int `[residues]`, the group of clones of each; odd ones are the second half.
    """
    table = np.zeros((2, len(contrast.label), sum(places.counts)), np.float32)
    used = contrast.cell >= 0
    np.add.at(table, (owner[used] % 2, contrast.cell[used], places.codes[used]), 1)
    return table


def specialists_of(
    counts: np.ndarray, drawn: np.ndarray, contrast: Contrast
) -> dict[str, np.ndarray]:
    """What `specialists.specialists` finds of routers by position, `[R, X]` by metric.

    Args:
      counts: `[2, C, P]`, of `counted`.
      drawn: `[R, M, P, E]`, of `plans`.
      contrast: of the cells.
    """
    gains: list[np.ndarray] = []
    excesses: list[np.ndarray] = []
    for half in counts:
        table = (half @ drawn.reshape(-1, *drawn.shape[-2:])).astype(np.float64)
        taken, expected = observed(table, contrast), matched(table, contrast)
        for values, each in (
            (gains, quotient(taken - expected, taken.sum(-1, keepdims=True))),
            (excesses, log_ratio(taken, expected)),
        ):
            # the specialist is sought in all layers: `[R, X, M x E]`
            each = np.moveaxis(each.reshape(*drawn.shape[:2], *each.shape[1:]), 1, 2)
            values.append(each.reshape(*each.shape[:2], -1))
    most, by_half = exclusive(contrast), []
    for choosing, judging in ((0, 1), (1, 0)):
        best = np.round(gains[choosing], DECIMALS).argmax(-1)[..., None]
        by_half.append(np.take_along_axis(excesses[judging], best, -1)[..., 0])
    values_of = {"excess": np.mean(by_half, 0)}
    if np.isfinite(most).all():
        values_of["over_others"] = np.mean([over_others(each / most) for each in by_half], 0)
    return values_of


def profiles_of(counts: Sequence[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    """Enrichments of the classes of traits, `[R, E, classes]`, of single layers.

    Args:
      counts: residues by class and place, `[X, P]` of each trait.
      drawn: `[R, P, E]`.
    """
    parts = []
    for each in counts:
        table = (each @ drawn).astype(np.float64)
        load = table.sum(1, keepdims=True)
        parts.append(
            log_ratio(table, table.sum(-1, keepdims=True) * quotient(load, load.sum(-1)[..., None]))
        )
    return np.moveaxis(np.concatenate(parts, 1), 1, 2)
