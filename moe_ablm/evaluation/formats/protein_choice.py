"""Which proteins of a task are evaluated: chosen splits, draws, lengths that the model can read."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.protein_tasks import UNKNOWN, Protein, Split, Task
from moe_ablm.evaluation.subject import Subject

FEWEST = 3  # proteins of a test set


def chosen(tasks: Sequence[Task], splits: str) -> list[Task]:
    """The tasks with those of their test sets that a setting names.

    Raises:
      UserError: no task has such a test set.
    """
    if splits == "all":
        return list(tasks)
    names = [name.strip() for name in splits.split(",")]
    known = sorted({name for task in tasks for split in task.splits for name in split.tests})
    for name in names:
        if name not in known:
            raise UserError(f"proteins.splits={splits!r}: expected all, or of {', '.join(known)}")
    kept = [
        replace(task, splits=[_with_tests(split, names) for split in task.splits]) for task in tasks
    ]
    kept = [replace(task, splits=[s for s in task.splits if s.tests]) for task in kept]
    return [task for task in kept if task.splits]


def _with_tests(split: Split, names: Sequence[str]) -> Split:
    return replace(split, tests={n: test for n, test in split.tests.items() if n in names})


def drawn(proteins: Sequence[Protein], count: int, seed: int) -> list[Protein]:
    """Up to `count` of them, in their order.

    They are drawn by a hash of the sequence, so that splits that share proteins share draws.
    """
    if len(proteins) <= count:
        return list(proteins)
    salt = seed.to_bytes(8, "little")
    keys = [
        hashlib.blake2b(p.sequence.encode(), digest_size=8, salt=salt).digest() for p in proteins
    ]
    order = np.argsort(np.array([int.from_bytes(k) for k in keys], np.uint64), kind="stable")
    return [proteins[i] for i in np.sort(order[:count])]


def fitting(subject: Subject, task: Task, train: int, test: int) -> tuple[list[Split], list[str]]:
    """Draws of the splits of a task, the same for every model, and of them what this one can read.

    Args:
      subject: the model.
      task: with all its splits.
      train, test: most proteins of a training and of a test set; of a validation set as many as
        of a test set.

    Returns:
      Splits with enough proteins, and notes on what was left out and why.
    """
    layout, longest = subject.engine.model.layout, subject.engine.model.length
    splits = [
        each_part(s, lambda p, n: drawn(p, n, subject.seed), train, test) for s in task.splits
    ]
    room = longest - len(layout.before) - len(layout.after)
    notes: list[str] = []
    if task.kind != "residue":
        splits, notes = without_common_ends(splits, room)
    kept = []
    for split in splits:
        short = each_part(split, lambda ps, _: [p for p in ps if len(p.sequence) <= room])
        name, before = ", ".join(split.tests), len(split.everyone())
        left_out = before - len(short.everyone())
        if left_out:
            notes.append(
                f"{name}: {left_out:,} of {before:,} proteins are longer than the {longest} tokens "
                "that the model was trained for: left out"
            )
        tests = {name: test for name, test in short.tests.items() if len(test) >= FEWEST}
        targets: set[float | str] = {p.target for p in short.train}
        if task.kind == "residue":
            targets = {c for labels in targets for c in str(labels) if c != UNKNOWN}
        if tests and len(targets) > 1:
            kept.append(replace(short, tests=tests))
        else:
            notes.append(
                f"{name}: skipped: {len(short.train)} proteins to train on, with {len(targets)} "
                f"different targets, and {sum(map(len, short.tests.values()))} to test on"
            )
    return kept, notes


def each_part(split: Split, change, train: int = 0, test: int = 0) -> Split:
    """A split with `change(proteins, most)` in the place of each of its parts."""
    tests = {name: change(proteins, test) for name, proteins in split.tests.items()}
    return Split(change(split.train, train), change(split.valid, test), tests)


def without_common_ends(splits: Sequence[Split], room: int) -> tuple[list[Split], list[str]]:
    """Ends that all proteins share, cut as far as is needed to fit them into `room` residues.

    Variants of one protein differ in the middle of it: GB1 carries a partner of 209 residues that
    is always the same and carries no information.
    """
    sequences = {p.sequence for split in splits for p in split.everyone()}
    excess = max((len(s) for s in sequences), default=0) - room
    if excess <= 0 or len(sequences) < 2:
        return list(splits), []
    shortest = min(len(s) for s in sequences)
    end = len(os.path.commonprefix([s[::-1] for s in sequences]))
    behind = min(end, excess, shortest - 1)
    front = len(os.path.commonprefix(list(sequences)))
    before = min(front, excess - behind, shortest - 1 - behind)
    if not before + behind:
        return list(splits), []

    def cut(proteins: Sequence[Protein], _: int) -> list[Protein]:
        return [
            p._replace(sequence=p.sequence[before : len(p.sequence) - behind]) for p in proteins
        ]

    note = f"the first {before} and last {behind} residues, the same in all proteins, cut to fit"
    return [each_part(split, cut) for split in splits], [note]
