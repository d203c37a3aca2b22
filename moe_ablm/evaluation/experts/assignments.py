"""Sums of what routers decide, over cells of residues and groups of clones."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.regions import region_names
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.experts.traits import Contrast
from moe_ablm.inference.antibodies import windows
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.route import Choices, Weights, bytes_of, route

GROUPS = (32, 128)  # of clones: fewest and most
BYTES = 512 << 20  # of the sums, where the fewest groups stay below
WINDOW = (256, 64 << 20)  # antibodies routed together, and bytes of their routing


@dataclass(frozen=True, eq=False)
class Assignments:
    """Sums over residues; of soft-MoE an assignment is the share of an expert in the output.

    Attributes:
      group: int64 `[antibodies]`; the antibodies of a clone are in one group.
      tables: one a contrast, float32 `[groups, cells, M, E]`.
      gates: float32 `[groups, classes, M, E]` of the first contrast: weights instead of counts.
      load, weight: float64 `[antibodies, M, E]`, assignments and their gates.
      by_region: float64 `[antibodies, M, 14]`, assignments.
      alone: float64 `[antibodies, M]`, residues for which no expert computes.
    """

    group: np.ndarray
    tables: list[np.ndarray]
    gates: np.ndarray
    load: np.ndarray
    weight: np.ndarray
    by_region: np.ndarray
    alone: np.ndarray
    _contrasts: Sequence[Contrast]
    _antibodies: Sequence[Annotated]
    _first: np.ndarray

    @classmethod
    def empty(
        cls,
        antibodies: Sequence[Annotated],
        contrasts: Sequence[Contrast],
        layers: int,
        experts: int,
    ) -> "Assignments":
        """Nothing added yet."""
        cells = sum(len(c.label) for c in contrasts)
        most = int(np.clip(BYTES // (4 * cells * layers * experts), *GROUPS))
        group = groups_of([a.unit for a in antibodies], most)
        count, shape, n = group.max() + 1, (layers, experts), len(antibodies)
        return cls(
            group,
            [np.zeros((count, len(c.label), *shape), np.float32) for c in contrasts],
            np.zeros((count, len(contrasts[0].names), *shape), np.float32),
            np.zeros((n, *shape)),
            np.zeros((n, *shape)),
            np.zeros((n, layers, len(region_names()))),
            np.zeros((n, layers)),
            contrasts,
            antibodies,
            np.cumsum([0] + [a.antibody.residues for a in antibodies]),
        )

    def add(self, index: int, assigned: np.ndarray, gates: np.ndarray) -> None:
        """Adds an antibody: float32 `assigned`, `gates` `[residues, M, E]`."""
        group = self.group[index]
        here = slice(self._first[index], self._first[index + 1])
        add_cells(self.tables, self._contrasts, group, here, assigned)
        contrast = self._contrasts[0]
        cell = contrast.cell[here]
        used = cell >= 0
        np.add.at(self.gates[group], contrast.label[cell[used]], gates[used])
        self.load[index], self.weight[index] = assigned.sum(0), gates.sum(0)
        region = self._antibodies[index].region_index()
        for r in np.unique(region[region >= 0]):
            self.by_region[index, :, r] = assigned[region == r].sum((0, 2))
        self.alone[index] = (assigned.sum(-1) == 0).sum(0)


def add_cells(
    tables: Sequence[np.ndarray],
    contrasts: Sequence[Contrast],
    group: int,
    here: slice,
    assigned: np.ndarray,
) -> None:
    """Adds assignments `[n, M, E]` of the residues `here` of the cohort to a table a contrast."""
    for contrast, table in zip(contrasts, tables, strict=True):
        cell = contrast.cell[here]
        used = cell >= 0
        np.add.at(table[group], cell[used], assigned[used])


def groups_of(units: Sequence[str], most: int) -> np.ndarray:
    """Deals units, in the order of a hash, into up to `most` groups; int64 `[n]`."""
    names, index = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    texts = names.tolist()
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
    group = np.empty(len(names), np.int64)
    group[order] = np.arange(len(names)) % most
    return group[index]


def routed(
    engine: Engine, antibodies: Sequence[Annotated]
) -> Iterator[tuple[int, Choices | Weights]]:
    """(number, routing of its residues) of each antibody, in order; few are held at a time."""
    first = 0
    plain = [a.antibody for a in antibodies]
    for window in windows(plain, lambda a: (1, bytes_of(engine, a)), WINDOW):
        yield from enumerate(route(engine, window), start=first)
        first += len(window)


def assigned(routing: Choices | Weights, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Which experts compute for residues, and their gates, float32 `[residues, M, E]`.

    Of soft-MoE both are the share of an expert in the output.
    """
    if isinstance(routing, Weights):
        share = routing.combine.sum(-1)
        return share, share
    shape = (*routing.experts.shape[:2], experts + 1)  # the last: no expert
    counts, gates = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    np.put_along_axis(counts, routing.experts, np.float32(1), axis=-1)
    np.put_along_axis(gates, routing.experts, routing.gates, axis=-1)
    return counts[..., :experts], gates[..., :experts]
