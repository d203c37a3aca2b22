"""Supervised tasks on proteins, with a head on the model's hidden states.

A value of a sequence (GB1, fluorescence, stability), its class (remote homology) or a class of
each residue (secondary structure), in the formats of FLIP (Dallago et al. 2021) and TAPE (Rao et
al. 2019) and with their splits: Spearman's correlation, or accuracy, on the test sets, with
bootstrap intervals over proteins, which hold the error of a mean over heads of several seeds, too.
Beside each stands a baseline that needs no language model and learns from the same proteins: ridge
regression on residues, logistic regression on composition or on a window of 15 residues. A protein
is shown to the encoder as one chain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moe_ablm.evaluation.dots import dots
from moe_ablm.evaluation.estimates import Number, Sample, ratio, spearman_number, why_undefined
from moe_ablm.evaluation.formats.protein_choice import chosen, fitting
from moe_ablm.evaluation.formats.protein_files import read_tasks
from moe_ablm.evaluation.formats.protein_tasks import UNKNOWN, Protein, Split, Task
from moe_ablm.evaluation.outcome import Outcome, Picture, Skipped, Table
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised import baselines
from moe_ablm.evaluation.supervised.head_inputs import IGNORED, Head, HeadInputs, inputs_of
from moe_ablm.evaluation.supervised.heads import Training, fit

TITLE = "Protein tasks, supervised"
BATCH = 32
UNSEEN = -2  # a class that is not in the training set: never predicted, always missed


@dataclass(frozen=True)
class Settings:
    """Most proteins of a training and of a test set, and how the head is trained.

    `splits`: "all", or names with commas between; `steps`: at least so many, in whole passes over
    the training set; `full`: the encoder is trained, too; `repeats`: heads, each of another seed.
    """

    train: int = 2000
    test: int = 1000
    splits: str = "all"
    steps: int = 1000
    lr: float = 3e-3
    full: bool = False
    repeats: int = 3


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Head and baseline on every test set of every task.

    Raises:
      UserError: a malformed file, or a split that no task has.
    """
    results, notes = [], []
    tasks = read_tasks(subject.files_of("proteins"), subject.on_bad_row)
    for task in chosen(tasks, settings.splits):
        notes += [f"{task.name}: {note}" for note in task.left_out]
        try:
            found, more_notes = evaluate_task(subject, task, settings)
        except Skipped as skipped:
            found, more_notes = [], [str(skipped)]
        results += found
        notes += more_notes
    if not results:
        raise Skipped("; ".join(notes))
    how = "encoder and head trained" if settings.full else "a head on the frozen encoder"
    notes.append(f"model: {how}, the epoch of least loss on the validation set, if there is one")
    if settings.repeats > 1:
        notes.append(f"mean of {settings.repeats} heads of other seeds, which intervals include")
    if not baselines.has_sklearn():
        notes.append("no baselines: they need scikit-learn (pip install 'moe_ablm[eval]')")
    return shown(results, [*notes, *why_undefined(results)])


def shown(results: Sequence[Number | Sample], notes: Sequence[str]) -> Outcome:
    """Results with a table and a figure for each metric."""
    numbers = [r for r in results if isinstance(r, Number)]
    samples = [r for r in results if isinstance(r, Sample)]
    parts = {"Spearman's correlation": numbers, "Accuracy": [s.number() for s in samples]}
    rows, tables, pictures = ("task", "split"), [], []
    for title, found in parts.items():
        if found:
            metric = found[0].metric
            tables.append(Table(f"{title}, test sets", (metric,), rows, "predictor"))
            pictures.append(
                Picture(
                    metric,
                    f"{title} on test sets, 95 % intervals over proteins.",
                    partial(dots, found, rows, "predictor", title),
                )
            )
    return Outcome(samples, numbers, tables, pictures, notes)


def evaluate_task(
    subject: Subject, task: Task, settings: Settings
) -> tuple[list[Number | Sample], list[str]]:
    """Results of a task and notes.

    Raises:
      Skipped: no split of it can be evaluated.
    """
    splits, notes = fitting(subject, task, settings.train, settings.test)
    notes = [f"{task.name}: {each}" for each in notes]
    if not splits:
        raise Skipped("; ".join(notes))
    head = Head(task.kind, 1)
    known = {p.sequence: p.antibody for split in splits for p in split.everyone()}
    inputs = inputs_of(subject.engine, list(known.values()), head, settings.full)
    places = {sequence: i for i, sequence in enumerate(known)}
    results = []
    for split in splits:
        found, more_notes = evaluate_split(subject, task, split, settings, inputs, places)
        results += found
        notes += [f"{task.name}: {each}" for each in more_notes]
    return results, notes


def evaluate_split(
    subject: Subject,
    task: Task,
    split: Split,
    settings: Settings,
    inputs: HeadInputs,
    places: Mapping[str, int],
) -> tuple[list[Number | Sample], list[str]]:
    """Trains the head and the baseline, and tests them on each test set.

    Args:
      subject, task, settings: what is evaluated.
      split: what is left of a split of the task.
      inputs: of all proteins of the task.
      places: the place of a sequence among them.
    """
    names = classes_of(task.kind, split.train)
    head = Head(task.kind, max(len(names), 1))
    epochs = -(-settings.steps // -(-len(split.train) // BATCH))
    training = Training(epochs, BATCH, settings.lr, full=settings.full)

    def of(proteins: Sequence[Protein]) -> HeadInputs:
        return inputs.take([places[p.sequence] for p in proteins])

    targets = targets_of(task.kind, split.train, names)
    valid = learnable(task.kind, split.valid, names)
    checked = (of(valid), targets_of(task.kind, valid, names)) if valid else None
    tested = [p for test in split.tests.values() for p in test]

    def predicted_by(seed: int):
        """What a head of a seed says of the tested."""
        seeded = replace(training, seed=seed)
        predictor = fit(subject.engine, of(split.train), targets, head, seeded, checked)
        return best(task.kind, predictor(of(tested)))

    found = {"model": [predicted_by(subject.seed + i) for i in range(settings.repeats)]}
    if baselines.has_sklearn():
        name = baselines.NAMES[task.kind]
        found[name] = [baseline(task.kind, split.train, targets, tested, subject.seed)]
    results, first = [], 0
    for name, proteins in split.tests.items():
        truth = targets_of(task.kind, proteins, names)
        for predictor_name, repeats in found.items():
            about = {"task": task.name, "split": name, "predictor": predictor_name}
            parts = [predicted[first : first + len(proteins)] for predicted in repeats]
            results.append(compared(task.kind, proteins, truth, parts, about))
        first += len(proteins)
    sizes = ", ".join(f"{name} {len(test):,}" for name, test in split.tests.items())
    more_notes = (
        f"{len(split.train):,} proteins to train on, {len(valid):,} to validate; tests: {sizes}"
    )
    return results, [more_notes]


def classes_of(kind: str, train: Sequence[Protein]) -> list[str]:
    """Names of the classes of a training set; none of a regression."""
    if kind == "regression":
        return []
    parts = [str(p.target) for p in train]
    found = set("".join(parts)) - {UNKNOWN} if kind == "residue" else set(parts)
    return sorted(found)


def targets_of(kind: str, proteins: Sequence[Protein], names: Sequence[str]):
    """Targets as a head takes them: float64 `[n]`, int64 `[n]`, or of residues a list of them."""
    if kind == "regression":
        return np.array([p.target for p in proteins], float)
    index = {name: i for i, name in enumerate(names)}
    if kind == "classification":
        return np.array([index.get(str(p.target), UNSEEN) for p in proteins], int)
    index[UNKNOWN] = IGNORED
    return [np.array([index.get(c, UNSEEN) for c in str(p.target)], int) for p in proteins]


def learnable(kind: str, proteins: Sequence[Protein], names: Sequence[str]) -> list[Protein]:
    """Those whose classes are all known: a validation set must not hold others."""
    if kind == "regression":
        return list(proteins)
    known = {*names, UNKNOWN}
    return [
        p
        for p in proteins
        if ({str(p.target)} if kind == "classification" else set(str(p.target))) <= known
    ]


def best(kind: str, outputs):
    """Values, or the most probable classes of what a head says."""
    if kind == "residue":
        return [each.argmax(1) for each in outputs]
    return outputs.argmax(1) if kind == "classification" else outputs


def baseline(kind: str, train: Sequence[Protein], targets, test: Sequence[Protein], seed: int):
    """Predictions of the baseline of a kind of task, from sequences alone."""
    known, tested = ([p.sequence for p in proteins] for proteins in (train, test))
    if kind == "residue":
        return baselines.residue(known, targets, tested, seed)
    learn = baselines.regression if kind == "regression" else baselines.classification
    return learn(known, targets, tested)


def compared(
    kind: str, proteins: Sequence[Protein], truth, found: Sequence, about: Mapping[str, str]
) -> Number | Sample:
    """Spearman's correlation, or accuracy a protein or residue; means over the repeats `found`."""
    units = [p.sequence for p in proteins]
    if kind == "regression":
        return spearman_number(np.asarray(found, float), truth, units, about)
    if kind == "classification":
        hits, counts = np.asarray([each == truth for each in found], float), np.ones(len(truth))
    else:
        counts = np.array([(t != IGNORED).sum() for t in truth], float)
        hits = np.array(
            [
                [(t == f)[t != IGNORED].sum() for t, f in zip(truth, each, strict=True)]
                for each in found
            ],
            float,
        )
    repeats = tuple(ratio(hits.sum(1), counts.sum()).tolist())
    return Sample("accuracy", units, hits.mean(0), counts, about, unit="share", repeats=repeats)
