"""Which antigen an antibody is specific for: coronavirus (CoV), influenza (Flu), or neither (HD).

The tasks of the native-pairing paper (Burbach & Briney 2024, Fig. 5), with equal classes: HD-CoV,
CoV-Flu, three-way. A head with attention pooling on the frozen encoder, and on request all weights,
is trained on all folds but one and tested on that one. A clone is never in two folds. The baseline
sees V genes, mutation counts and the length of CDRH3, but no sequence: a score that it reaches,
too, shows no understanding of specificity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.antibody import tokens_of
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.dots import picture
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.outcome import Outcome, Skipped, Table
from moe_ablm.evaluation.scores import METRICS, accuracy_sample, score_numbers
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised import baselines
from moe_ablm.evaluation.supervised.folds import (
    clonal_folds,
    clones,
    cross_validated,
    drawn,
    read_labelled,
)
from moe_ablm.evaluation.supervised.head_inputs import Head, HeadInputs, inputs_of
from moe_ablm.evaluation.supervised.heads import Training

TITLE = "Specificity classification"
TASKS = {
    "HD-CoV": ("HD", "CoV"),
    "CoV-Flu": ("CoV", "Flu"),
    "CoV-Flu-HD": ("CoV", "Flu", "HD"),
}
FROZEN, TUNED = "frozen encoder, head", "fine-tuned encoder, head"
CLASSES = ("CoV", "Flu", "HD")


@dataclass(frozen=True)
class Settings:
    """Antibodies of a class at most, folds, repeats, and how heads are trained.

    Each of the `repeats` has other folds and another seed of the head.
    `full` trains the encoder, too (slow); `lr` is that of the head, `encoder_lr` of the encoder.
    """

    most: int = 1000
    folds: int = 5
    repeats: int = 3
    epochs: int = 30
    batch: int = 32
    lr: float = 3e-3
    encoder_lr: float = 5e-5
    full: bool = False


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Scores of all tasks whose classes are there."""
    baselines.require_sklearn()
    everyone, notes = read_labelled(subject.files_of("specificity"))
    by_class, left_out = _by_class(subject, everyone, settings.most)
    notes += left_out
    pooled = [a for name in CLASSES for a in by_class.get(name, ())]
    bench = TaskBench(subject, settings, pooled)
    samples: list[Sample] = []
    numbers: list[Number] = []
    for name, task in TASKS.items():
        members = [by_class.get(label, []) for label in task]
        reason = bench.too_few(task, members)
        if reason:
            notes.append(f"task {name}: {reason}: left out")
            continue
        more_samples, more_numbers, more_notes = bench.task(name, members)
        samples, numbers, notes = samples + more_samples, numbers + more_numbers, notes + more_notes
    if not numbers:
        counts = ", ".join(f"{name} {len(rows):,}" for name, rows in sorted(by_class.items()))
        raise Skipped(
            f"no task has its classes, each from at least {settings.folds} clones: expected "
            f"{', '.join(CLASSES)} in the column label, found {counts or 'none'}"
        )
    notes.append(
        "HD is one donor (Jaffe et al. 2022), CoV and Flu are collected from the literature: a "
        "model may tell laboratories and donors apart instead of specificities"
    )
    gains = tuple(f"{metric} over baseline" for metric in METRICS)
    tables = (
        Table("Scores, out of fold", METRICS, ("task", "predictor")),
        Table("Gain over the baseline", gains, ("task", "predictor")),
    )
    caption = "Area under the ROC curve, with 95 % intervals over clones; 0.5 is guessing."
    figures = (picture("auc", caption, numbers, "AUC", "task"),)
    return Outcome(samples, numbers, tables, figures, notes)


def _by_class(
    subject: Subject, everyone: Sequence[Annotated], most: int
) -> tuple[dict[str, list[Annotated]], list[str]]:
    """Antibodies that the model can read by label, in the order in which they are drawn."""
    layout, longest = subject.engine.model.layout, subject.engine.model.length
    fitting = [a for a in everyone if tokens_of(a.antibody, layout) <= longest]
    notes = []
    if len(fitting) < len(everyone):
        notes.append(f"{len(everyone) - len(fitting):,} are too long for the model: left out")
    labels = sorted({a.label for a in fitting})
    members = {label: [a for a in fitting if a.label == label] for label in labels}
    return {k: drawn(rows, most, subject.seed) for k, rows in members.items()}, notes


class TaskBench:
    """Antibodies of all tasks; hidden states are computed once."""

    def __init__(self, subject: Subject, settings: Settings, antibodies: Sequence[Annotated]):
        self._subject, self._settings = subject, settings
        self._antibodies, self._clones = antibodies, clones(antibodies)
        self._row = {a.key: i for i, a in enumerate(antibodies)}
        plain, head = [a.antibody for a in antibodies], Head("classification", 2)
        ways = {FROZEN: False} | ({TUNED: True} if settings.full else {})
        self._inputs = {
            name: inputs_of(subject.engine, plain, head, full) for name, full in ways.items()
        }

    def too_few(self, task: Sequence[str], members: Sequence[Sequence[Annotated]]) -> str | None:
        """Which class of a task is not there, or is of fewer clones than there are folds."""
        for label, part in zip(task, members, strict=True):
            clones_of = {self._clones[self._row[a.key]] for a in part}
            if len(clones_of) < self._settings.folds:
                return f"class {label} has {len(part):,} antibodies of {len(clones_of):,} clones"
        return None

    def task(
        self, name: str, members: Sequence[Sequence[Annotated]]
    ) -> tuple[list[Sample], list[Number], list[str]]:
        """Results of a task, its classes in order, equally many of each."""
        settings, size = self._settings, min(map(len, members))
        rows = np.array([self._row[a.key] for part in members for a in part[:size]])
        classes = np.repeat(np.arange(len(members)), size)
        groups = self._clones[rows]
        rng = self._subject.generator(f"classification {name}")
        folds = np.stack(
            [clonal_folds(groups, classes, settings.folds, rng) for _ in range(settings.repeats)]
        )
        known = [baselines.features(self._antibodies[i]) for i in rows]
        predicted = {}
        for predictor, inputs in self._inputs.items():
            taken = inputs.take(rows)
            predicted[predictor] = np.stack(
                [
                    self._out_of_fold(taken, classes, of, predictor, repeat)
                    for repeat, of in enumerate(folds)
                ]
            )
        predicted[baselines.BASELINE] = np.stack(
            [baselines.predictions(known, classes, of) for of in folds]
        )
        units, about = [f"clone {g}" for g in groups], {"task": name}
        samples = [
            accuracy_sample(classes, guessed, units, about | {"predictor": predictor})
            for predictor, guessed in predicted.items()
        ]
        numbers = score_numbers(classes, predicted, baselines.BASELINE, units, folds, about)
        note = (
            f"task {name}: {size:,} antibodies of each class, {len(set(units)):,} clones, folds of "
            f"{', '.join(map(str, np.bincount(folds[0])))}; {settings.repeats} repeats with other "
            "folds and seeds of the head, which intervals include"
        )
        return samples, numbers, [note]

    def _out_of_fold(
        self,
        inputs: HeadInputs,
        classes: np.ndarray,
        folds: np.ndarray,
        predictor: str,
        repeat: int,
    ) -> np.ndarray:
        settings, full = self._settings, predictor == TUNED
        training = Training(
            settings.epochs, settings.batch, settings.lr, settings.encoder_lr, full=full,
            seed=self._subject.seed + repeat,
        )  # fmt: skip
        return cross_validated(self._subject.engine, inputs, classes, folds, training)
