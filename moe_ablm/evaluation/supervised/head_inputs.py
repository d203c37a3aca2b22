"""Antibodies with targets as batches for a head: hidden states, or tokens to be encoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_ablm.data.antibody import Antibody, Row, row_of
from moe_ablm.data.tokenizer import PAD
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.inference.antibodies import windows
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.embed import embed

KINDS = ("classification", "regression", "residue")
POOLINGS = ("attention", "mean")
MULTIPLE = 64  # of residues or tokens: lengths of batches
MOST_BYTES = 4 << 30  # of hidden states that are held
IGNORED = -1  # target of a residue that has none


@dataclass(frozen=True)
class Head:
    """What is predicted.

    Attributes:
      kind: "classification" of antibodies, "regression", or "residue": classes of each residue.
      outputs: classes, or values of a regression.
      pooling: "attention" or "mean"; of residues nothing is pooled.
    """

    kind: str
    outputs: int
    pooling: str = "attention"

    def __post_init__(self):
        if self.kind not in KINDS or self.pooling not in POOLINGS or self.outputs < 1:
            raise ValueError(f"{self}: expected a kind of {KINDS} and a pooling of {POOLINGS}")


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Antibodies as a head reads them; made once (`inputs_of`), used in many fits.

    Attributes:
      rows: tokens and places of residues.
      states: hidden states, float16 `[residues, D]` of each, or their mean, `[1, D]`; None where
        the encoder computes them anew in each step.
    """

    rows: Sequence[Row]
    states: Sequence[np.ndarray] | None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Sequence[int] | np.ndarray) -> "HeadInputs":
        """Some of the antibodies."""
        states = None if self.states is None else [self.states[i] for i in index]
        return HeadInputs([self.rows[i] for i in index], states)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each in a batch: a multiple of `MULTIPLE` (of means: 1), int64 `[n]`."""
        if self.states is not None and all(len(s) == 1 for s in self.states):
            return np.ones(len(self), np.int64)
        sizes = [len(row.tokens) for row in self.rows]
        return -(-np.array(sizes, np.int64) // MULTIPLE) * MULTIPLE


def inputs_of(engine: Engine, antibodies: Sequence[Antibody], head: Head, full: bool) -> HeadInputs:
    """What a head needs of antibodies: with a frozen encoder their hidden states.

    Raises:
      Skipped: hidden states of all residues would take more than `MOST_BYTES`.
    """
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    if full:
        return HeadInputs(rows, None)
    pooled = head.pooling == "mean" and head.kind != "residue"
    width = engine.model.spec.d_model
    needed = 2 * width * (len(rows) if pooled else sum(len(row.places) for row in rows))
    if needed > MOST_BYTES:
        raise Skipped(
            f"hidden states of {len(rows):,} sequences take {needed / 2**30:.1f} GiB, at most "
            f"{MOST_BYTES >> 30} GiB are held: set a smaller number of sequences"
        )
    states = []
    for window in windows(antibodies, lambda a: (1, 4 * width * a.residues)):
        for found in embed(engine, window, "antibody" if pooled else "residue"):
            states.append(found.astype(np.float16))
    return HeadInputs(rows, states)


def by_length(
    inputs: HeadInputs, size: int, goals: list | None = None
) -> Iterator[tuple[np.ndarray, dict]]:
    """Batches of antibodies of one length: what is computed for one depends on it alone."""
    lengths = inputs.lengths
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        for first in range(0, len(members), size):
            part = members[first : first + size]
            yield part, batch_of(inputs, part, size, goals)


def batch_of(inputs: HeadInputs, members: np.ndarray, size: int, goals: list | None = None) -> dict:
    """Arrays of `size` rows, of which the first are `members`; the others weigh nothing."""
    length = int(inputs.lengths[members].max())
    mask = np.zeros((size, length), bool)
    mask[:, 0] = True  # rows without an antibody, too: no pooling divides by 0
    if inputs.states is None:
        batch = {"tokens": np.full((size, length), PAD, np.uint8)}
        batch |= {"valid": np.zeros((size, length), bool), "mask": mask}
        batch["places"] = np.zeros((size, length), np.int32)
    else:
        width = inputs.states[0].shape[1]
        batch = {"states": np.zeros((size, length, width), np.float16), "mask": mask}
    for row, member in enumerate(members.tolist()):
        tokens, places = inputs.rows[member]
        if inputs.states is None:
            batch["tokens"][row, : len(tokens)], batch["valid"][row, : len(tokens)] = tokens, True
            batch["places"][row, : len(places)], mask[row, : len(places)] = places, True
        else:
            states = inputs.states[member]
            batch["states"][row, : len(states)], mask[row, : len(states)] = states, True
    return batch if goals is None else batch | _targets(goals, members, mask.shape)


def _targets(goals: list, members: np.ndarray, shape: tuple[int, int]) -> dict:
    """`target` and `weight` of a batch: `[B]`, of a regression `[B, outputs]`, `[B, R]`."""
    size, length = shape
    of_residues = goals[0].ndim == 1 and goals[0].dtype.kind == "i"
    each = (length,) if of_residues else goals[0].shape
    target = np.zeros((size, *each), goals[0].dtype)
    weight = np.zeros((size, *each[:1]) if of_residues else size, np.float32)
    for row, member in enumerate(members.tolist()):
        goal = goals[member]
        if of_residues:
            target[row, : len(goal)] = np.maximum(goal, 0)
            weight[row, : len(goal)] = goal != IGNORED
        else:
            target[row], weight[row] = goal, 1
    return {"target": target, "weight": weight}


def scale_of(targets: Sequence, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a regression's targets, float32 `[outputs]`; else 0 and 1."""
    if head.kind != "regression":
        return np.zeros(1, np.float32), np.ones(1, np.float32)
    values = np.asarray(targets, np.float64).reshape(-1, head.outputs)
    spread = values.std(0)
    return values.mean(0).astype(np.float32), np.where(spread > 0, spread, 1).astype(np.float32)


def goals_of(
    targets: Sequence, scale: tuple[np.ndarray, np.ndarray], head: Head
) -> list[np.ndarray]:
    """Targets one by one: int32 `[]` or `[residues]`, or standardised float32 `[outputs]`."""
    if head.kind != "regression":
        return [np.asarray(target, np.int32) for target in targets]
    values = np.asarray(targets, np.float32).reshape(-1, head.outputs)
    return list((values - scale[0]) / scale[1])
