"""Supervised tasks on proteins, with a head on the model's hidden states.

A value of a sequence (GB1, fluorescence, stability), its class (remote homology) or a class of
each residue (secondary structure), in the formats of FLIP (Dallago et al. 2021) and TAPE (Rao et
al. 2019) and with their splits: Spearman's correlation, or accuracy, on the test sets, with
bootstrap intervals over proteins. Beside each stands a baseline that needs no language model and
learns from the same proteins: ridge regression on residues, logistic regression on composition or
on a window of 15 residues. A protein is shown to the encoder as one chain.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.evaluation import protein_baselines as baselines
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.heads import IGNORED, Head, Inputs, Training, fit, inputs_of
from moe_ablm.evaluation.outcome import Outcome, Skipped, Table
from moe_ablm.evaluation.protein_files import read_tasks
from moe_ablm.evaluation.protein_tasks import UNKNOWN, Protein, Split, Task, drawn
from moe_ablm.evaluation.ranks import spearman_number
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.antibodies import tokens_of

TITLE = "Protein tasks, supervised"
FEWEST = 3
UNSEEN = -2  # a class that is not in the training set: never predicted, always missed


@dataclass(frozen=True)
class Settings:
    """Most proteins of a training and of a test set, and how the head is trained.

    `splits`: "all", or names with commas between; `full`: the encoder is trained, too.
    """

    train: int = 2000
    test: int = 1000
    splits: str = "all"
    epochs: int = 20
    full: bool = False


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Head and baseline on every test set of every task.

    Raises:
      UserError: a malformed file, or a split that no task has.
    """
    results, notes = [], []
    for task in chosen(read_tasks(subject.files_of("proteins")), settings.splits):
        try:
            found, told = evaluate_task(subject, task, settings)
        except Skipped as skipped:
            found, told = [], [f"{task.name}: {skipped}"]
        results += found
        notes += told
    if not results:
        raise Skipped("; ".join(notes))
    how = "encoder and head trained" if settings.full else "a head on the frozen encoder"
    notes.append(f"model: {how}, {settings.epochs} epochs, the best on the validation set kept")
    if not has_baselines():
        notes.append("no baselines: they need scikit-learn (pip install 'moe_ablm[eval]')")
    rows = ("task", "split")
    titles = {
        "spearman": "Spearman's correlation on test sets",
        "accuracy": "Accuracy on test sets",
    }
    tables = [Table(titles[metric], (metric,), rows, "predictor") for metric in titles]
    numbers = [r for r in results if isinstance(r, Number)]
    samples = [r for r in results if isinstance(r, Sample)]
    present = {r.metric for r in results}
    return Outcome(samples, numbers, [t for t in tables if t.metrics[0] in present], notes=notes)


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


def evaluate_task(
    subject: Subject, task: Task, settings: Settings
) -> tuple[list[Number | Sample], list[str]]:
    """Results of a task and notes.

    Raises:
      Skipped: no split of it can be evaluated.
    """
    splits, notes = [], []
    for split in task.splits:
        found, told = fitting(subject, split, settings)
        splits += [found] if found else []
        notes += [f"{task.name}: {each}" for each in told]
    if not splits:
        raise Skipped("; ".join(notes) or "no split")
    head = Head(task.kind, 1)
    known = {p.sequence: p.antibody for split in splits for p in split.everyone()}
    inputs = inputs_of(subject.engine, list(known.values()), head, settings.full)
    places = {sequence: i for i, sequence in enumerate(known)}
    results = []
    for split in splits:
        found, told = evaluate_split(subject, task, split, settings, inputs, places)
        results += found
        notes += [f"{task.name}: {each}" for each in told]
    return results, notes


def fitting(subject: Subject, split: Split, settings: Settings) -> tuple[Split | None, list[str]]:
    """Up to so many proteins of a split that the model can read; None where too few are left."""
    layout, longest = subject.engine.model.layout, subject.engine.model.length
    name, left_out = ", ".join(split.tests), 0
    parts = {"train": split.train, "valid": split.valid, **split.tests}
    for part, proteins in parts.items():
        fits = [p for p in proteins if tokens_of(p.antibody, layout) <= longest]
        left_out += len(proteins) - len(fits)
        most = settings.train if part == "train" else settings.test
        parts[part] = drawn(fits, most, subject.seed)
    notes = []
    if left_out:
        notes.append(
            f"{name}: {left_out:,} of {len(split.everyone()):,} proteins are longer than the "
            f"{longest} tokens that the model was trained for: left out"
        )
    train, valid = parts.pop("train"), parts.pop("valid")
    tests = {part: proteins for part, proteins in parts.items() if len(proteins) >= FEWEST}
    if len({p.target for p in train}) < 2 or not tests:
        told = f"{len(train)} proteins to train on and {sum(map(len, parts.values()))} to test on"
        return None, [*notes, f"{name}: {told}, or one target only: skipped"]
    return Split(train, valid, tests), notes


def evaluate_split(
    subject: Subject,
    task: Task,
    split: Split,
    settings: Settings,
    inputs: Inputs,
    places: Mapping[str, int],
) -> tuple[list[Number | Sample], list[str]]:
    """Trains the head and the baseline once, and tests them on each test set.

    Args:
      subject, task, settings: what is evaluated.
      split: what is left of a split of the task.
      inputs: of all proteins of the task.
      places: the place of a sequence among them.
    """
    names = classes_of(task.kind, split.train)
    head = Head(task.kind, max(len(names), 1))
    training = Training(epochs=settings.epochs, full=settings.full, seed=subject.seed)

    def of(proteins: Sequence[Protein]) -> Inputs:
        return inputs.take([places[p.sequence] for p in proteins])

    targets = targets_of(task.kind, split.train, names)
    valid = learnable(task.kind, split.valid, names)
    checked = (of(valid), targets_of(task.kind, valid, names)) if valid else None
    predictor = fit(subject.engine, of(split.train), targets, head, training, checked)
    results = []
    for name, proteins in split.tests.items():
        about = {"task": task.name, "split": name}
        truth = targets_of(task.kind, proteins, names)
        found = predictor(of(proteins))
        if task.kind == "residue":
            found = [each.argmax(1) for each in found]
        elif task.kind == "classification":
            found = found.argmax(1)
        results.append(compared(task.kind, proteins, truth, found, about | {"predictor": "model"}))
        if has_baselines():
            found = baseline(task.kind, split.train, targets, proteins, subject.seed)
            about |= {"predictor": baselines.NAMES[task.kind]}
            results.append(compared(task.kind, proteins, truth, found, about))
    sizes = ", ".join(f"{name} {len(test):,}" for name, test in split.tests.items())
    told = f"{len(split.train):,} proteins to train on, {len(valid):,} to validate; tests: {sizes}"
    return results, [told]


def classes_of(kind: str, train: Sequence[Protein]) -> list[str]:
    """Names of the classes of a training set; none of a regression."""
    if kind == "regression":
        return []
    parts = (p.target for p in train)
    found = set("".join(parts)) - {UNKNOWN} if kind == "residue" else set(parts)
    return sorted(found)


def targets_of(kind: str, proteins: Sequence[Protein], names: Sequence[str]):
    """Targets as a head takes them: float64 `[n]`, int64 `[n]`, or of residues a list of them."""
    if kind == "regression":
        return np.array([p.target for p in proteins], float)
    index = {name: i for i, name in enumerate(names)}
    if kind == "classification":
        return np.array([index.get(p.target, UNSEEN) for p in proteins], int)
    index[UNKNOWN] = IGNORED
    return [np.array([index.get(c, UNSEEN) for c in p.target], int) for p in proteins]


def learnable(kind: str, proteins: Sequence[Protein], names: Sequence[str]) -> list[Protein]:
    """Those whose classes are all known: a validation set must not hold others."""
    if kind == "regression":
        return list(proteins)
    known = {*names, UNKNOWN}
    return [
        p for p in proteins if ({p.target} if kind == "classification" else set(p.target)) <= known
    ]


def has_baselines() -> bool:
    """Whether scikit-learn is there."""
    return importlib.util.find_spec("sklearn") is not None


def baseline(kind: str, train: Sequence[Protein], targets, test: Sequence[Protein], seed: int):
    """Predictions of the baseline of a kind of task, from sequences alone."""
    known, asked = ([p.sequence for p in proteins] for proteins in (train, test))
    if kind == "residue":
        return baselines.residue(known, targets, asked, seed)
    learn = baselines.regression if kind == "regression" else baselines.classification
    return learn(known, targets, asked)


def compared(
    kind: str, proteins: Sequence[Protein], truth, found, about: Mapping[str, str]
) -> Number | Sample:
    """Spearman's correlation, or accuracy a protein or residue."""
    units = [p.sequence for p in proteins]
    if kind == "regression":
        return spearman_number(np.asarray(found, float), truth, units, about)
    if kind == "classification":
        hits, counts = (found == truth).astype(float), np.ones(len(truth))
    else:
        pairs = [(t != IGNORED, t == f) for t, f in zip(truth, found, strict=True)]
        counts = np.array([known.sum() for known, _ in pairs], float)
        hits = np.array([(known & right).sum() for known, right in pairs], float)
    return Sample("accuracy", units, hits, counts, about, unit="share")
