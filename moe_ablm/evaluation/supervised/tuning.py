"""A head for a laboratory's assay: cross-validated between clones, then trained on all of it.

Out-of-fold predictions of the head are compared with what was measured, with intervals over groups
(clones), beside predictions that need no language model: what they reach is no merit of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.evaluation.estimates import (
    Number,
    Sample,
    spearman_number,
    spearman_of_folds,
    why_undefined,
)
from moe_ablm.evaluation.formats.assays import Assay
from moe_ablm.evaluation.scores import accuracy_sample, score_numbers
from moe_ablm.evaluation.supervised import baselines
from moe_ablm.evaluation.supervised.enough import (
    require_given_folds,
    require_groups,
    require_parts,
    require_targets,
    strata,
    without_clone,
)
from moe_ablm.evaluation.supervised.folds import (
    annotated,
    clonal_folds,
    clones,
    joined,
    numbered,
    out_of_fold,
)
from moe_ablm.evaluation.supervised.head_inputs import IGNORED, Head, HeadInputs, inputs_of
from moe_ablm.evaluation.supervised.heads import Labelled, Predictor, Training, fit, settled
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.embed import embed
from moe_ablm.inference.numbers import regions

CLONE, SEQUENCE = "clone", "sequence"  # groups; else the name of a column
MODEL = "model"
# from indices to train on and indices held out to predictions of the latter
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How heads are trained and tested.

    Attributes:
      training: but for its epochs, which follow from `steps`.
      steps: at least so many, in whole passes over the training set.
      folds: of the cross-validation, where the assay has no parts.
      groups: `CLONE`, `SEQUENCE`, or a column: what is never in two folds.
      losses: whether those of the training set and of what is held out are taken after each pass.
    """

    training: Training
    steps: int = 1000
    folds: int = 5
    groups: str = CLONE
    losses: bool = False

    def training_of(self, antibodies: int) -> Training:
        """The training on so many antibodies."""
        passes = -(-self.steps // -(-antibodies // self.training.batch))
        return replace(self.training, epochs=passes)


@dataclass(frozen=True, eq=False)
class Tuned:
    """A trained head and how it was tested.

    Attributes:
      predictor: trained on all antibodies, or on the assay's training set; its encoder is settled.
      folds: where each antibody was held out, int64 `[n]`; -1 where it was not.
      held_out: predictions of what was trained without it: values `[n]`, or log-probabilities
        `[n, C]`, of residues an object array of `[residues, C]`; NaN where it was not held out.
      numbers: of the head and of the baselines.
      notes: sentences for the reader.
      losses: where they were asked for, a line for each fold and pass: `fold`, `pass`, and the mean
        loss (nats, or squared error over the training set's variance) of `train`, `held_out` and
        `valid` if there is such a part.
    """

    predictor: Predictor
    folds: np.ndarray
    held_out: np.ndarray
    numbers: list[Number]
    notes: list[str]
    losses: list[dict[str, float]]


def tune(engine: Engine, assay: Assay, settings: Settings, say: Callable[[str], None]) -> Tuned:
    """Tests a way of training by cross-validation, or on the assay's test set, and trains it.

    Args:
      engine: the model.
      assay: antibodies and targets.
      settings: how.
      say: told what is being done.

    Raises:
      UserError: too few antibodies, groups or classes.
      Skipped: hidden states do not fit into memory.
    """
    bench = Bench(engine, assay, settings)
    if assay.parts:
        folds, predictor, tested = bench.tested(say)
    else:
        folds, predictor, tested = bench.cross_validated(say)
    if not all(np.isfinite(each).all() for each in tested[MODEL]):
        raise UserError("--lr: training came to no finite predictions: lower it, or --encoder-lr")
    numbers = bench.numbers(folds, tested)
    bench.notes += why_undefined(numbers)
    if assay.of_residues:
        shape = len(assay.classes)
        held_out = _objects([np.full((len(t), shape), np.nan, np.float32) for t in assay.targets])
    else:
        held_out = np.full((len(folds), *tested[MODEL].shape[1:]), np.nan, np.float32)
    held_out[folds >= 0] = tested[MODEL]
    if bench.losses:
        bench.notes.append(_course(bench.losses))
    return Tuned(predictor, folds, held_out, numbers, bench.notes, bench.losses)


def _course(losses: Sequence[Mapping[str, float]]) -> str:
    """What became of the losses, as a sentence; means over folds, in passes that all have."""
    by_fold: dict[float, list[tuple[float, float]]] = {}
    for line in losses:
        by_fold.setdefault(line["fold"], []).append((line["train"], line["held_out"]))
    passes = min(map(len, by_fold.values()))
    train, held = np.mean([of[:passes] for of in by_fold.values()], axis=0).T
    return (
        f"loss after {passes} passes: {train[-1]:.3f} of what was trained on, {held[-1]:.3f} of "
        f"what was held out (least, {held.min():.3f}, after pass {held.argmin() + 1})"
    )


def _objects(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """An object array of arrays of any shapes."""
    found = np.empty(len(arrays), object)
    for i, array in enumerate(arrays):
        found[i] = array
    return found


class Bench:
    """An assay with its groups, and hidden states that are computed once."""

    def __init__(self, engine: Engine, assay: Assay, settings: Settings):
        """Raises: UserError where there is too little to learn from."""
        self._engine, self._assay, self._settings = engine, assay, settings
        self.notes: list[str] = []
        self.losses: list[dict[str, float]] = []
        require_targets(assay)
        found = annotated(assay.antibodies)
        pairs = numbered([(a.heavy, a.light) for a in assay.antibodies])
        if assay.groups:
            self._groups = joined(numbered(assay.groups), pairs)
        else:
            self._groups = pairs if settings.groups == SEQUENCE else clones(found)
        self._known = [baselines.features(a) for a in found]
        if not any(a.heavy.v_gene or a.light.v_gene for a in found):
            self._known = []
            self.notes.append("no V domain among the sequences: no clones, no baseline of V genes")
        elif settings.groups == CLONE and not (assay.groups or assay.folds or assay.parts):
            self.notes += without_clone(found)
        self._head = Head(assay.task, max(len(assay.classes), 1))
        self._frozen = settings.training.frozen
        if assay.parts:
            require_parts(assay)
        elif assay.folds:
            require_given_folds(assay)
        else:
            require_groups(assay, self._groups, settings.folds, settings.groups)
        self._inputs = inputs_of(engine, assay.antibodies, self._head, not self._frozen)

    def cross_validated(
        self, say: Callable[[str], None]
    ) -> tuple[np.ndarray, Predictor, dict[str, np.ndarray]]:
        """Folds, the predictor that has seen all, and out-of-fold predictions by predictor."""
        settings, folds = self._settings, self._folds()
        count, done = len(np.unique(folds)), 0

        def predict(train: np.ndarray, held: np.ndarray) -> np.ndarray:
            nonlocal done
            done += 1
            say(f"fold {done} of {count}: {len(train):,} to train on, {len(held):,} not")
            return self._outputs(self._fitted(train, held=held, fold=done - 1), held)

        tested = {MODEL: out_of_fold(predict, folds)}
        tested |= {k: out_of_fold(each, folds) for k, each in self._baselines().items()}
        say(f"all {len(folds):,} antibodies")
        sizes = ", ".join(map(str, np.bincount(folds)))
        groups = len(np.unique(self._groups))
        pairs = np.unique(np.stack([self._groups, folds]), axis=1)[0]
        divided = int((np.unique(pairs, return_counts=True)[1] > 1).sum())
        where = f"{divided:,} of them" if divided else "none of them"
        self.notes.append(
            f"{len(folds):,} antibodies in {groups:,} groups ({settings.groups}), {where} in two "
            f"folds; folds of {sizes}; intervals are over groups"
        )
        return folds, self._fitted(np.arange(len(folds))), tested

    def _folds(self) -> np.ndarray:
        """The fold in which each antibody is held out: that of the assay, or by groups."""
        if self._assay.folds:
            names = np.unique(self._assay.folds)
            self.notes.append(f"folds are those of the table: {', '.join(names.tolist())}")
            return np.searchsorted(names, self._assay.folds)
        rng = np.random.default_rng(self._settings.training.seed)
        return clonal_folds(self._groups, strata(self._assay), self._settings.folds, rng)

    def tested(
        self, say: Callable[[str], None]
    ) -> tuple[np.ndarray, Predictor, dict[str, np.ndarray]]:
        """The test set as the one fold (0), the predictor, and its predictions of the test set."""
        parts = np.array(self._assay.parts)
        train, valid, test = (np.flatnonzero(parts == part) for part in ("train", "valid", "test"))
        say(f"{len(train):,} to train on, {len(valid):,} to validate, {len(test):,} to test")
        predictor = self._fitted(train, valid, test)
        tested = {MODEL: self._outputs(predictor, test)}
        tested |= {name: each(train, test) for name, each in self._baselines().items()}
        folds = np.where(parts == "test", 0, -1)
        shared = np.isin(self._groups[test], self._groups[train]).sum()
        self.notes.append(
            f"{len(train):,} antibodies to train on, {len(valid):,} to validate, {len(test):,} to "
            f"test, of which {shared:,} are in a group ({self._settings.groups}) of the training "
            "set; intervals are over groups"
        )
        return folds, predictor, tested

    def _fitted(
        self,
        train: np.ndarray,
        valid: np.ndarray | None = None,
        held: np.ndarray | None = None,
        fold: int = 0,
    ) -> Predictor:
        """Trained on some; losses of these and of `held` are noted if asked for."""
        targets, checked = self._assay.targets, None

        def labelled(rows: np.ndarray) -> Labelled:
            return self._inputs.take(rows), targets[rows]

        if valid is not None and len(valid):
            checked = labelled(valid)
        watched = {}
        if self._settings.losses and held is not None:
            watched = {"train": labelled(train), "held_out": labelled(held)}
            watched |= {"valid": checked} if checked else {}
        training = self._settings.training_of(len(train))
        found = fit(self._engine, *labelled(train), self._head, training, checked, watched)
        for i, losses in enumerate(zip(*found.losses.values(), strict=True)):
            self.losses.append(
                {"fold": fold, "pass": i + 1, **dict(zip(watched, losses, strict=True))}
            )
        return settled(found)

    def _outputs(self, predictor: Predictor, rows: np.ndarray) -> np.ndarray:
        inputs: HeadInputs | list = self._inputs.take(rows)
        if not self._frozen:  # hidden states are those of a new encoder
            inputs = [self._assay.antibodies[i] for i in rows.tolist()]
        found = predictor(inputs)
        return _objects(found) if isinstance(found, list) else found

    def _vectors(self) -> np.ndarray:
        """Mean hidden state of each antibody, of the encoder as it is given, float32 `[n, D]`."""
        states = self._inputs.states
        if states is None:
            states = embed(self._engine, self._assay.antibodies, "antibody")
        return np.stack([each.mean(0, dtype=np.float64) for each in states]).astype(np.float32)

    def _baselines(self) -> dict[str, Predict]:
        if not baselines.has_sklearn():
            self.notes.append("no baselines: they need scikit-learn (pip install 'moe_ablm[eval]')")
            return {}
        assay, known = self._assay, self._known
        letters = [a.heavy + a.light for a in assay.antibodies]

        def some(values: list, rows: np.ndarray) -> list:
            return [values[i] for i in rows.tolist()]

        count = len(assay.classes)
        if assay.of_residues:
            return self._residue_baselines(letters)
        learn: Callable = baselines.regression
        by_genes: Callable = baselines.values_by_genes
        if assay.classes:
            learn = partial(baselines.composition, count=count)
            by_genes = partial(baselines.by_genes, count=count)
        found: dict[str, Predict] = {}
        if not assay.classes:
            vectors = self._vectors()
            found[baselines.EMBEDDINGS] = lambda train, held: baselines.on_vectors(
                vectors[train], assay.targets[train], vectors[held]
            )
        if known:
            found[baselines.BASELINE] = lambda train, held: by_genes(
                some(known, train), assay.targets[train], some(known, held)
            )
        found[baselines.NAMES[assay.task]] = lambda train, held: learn(
            some(letters, train), assay.targets[train], some(letters, held)
        )
        return found

    def _residue_baselines(self, letters: list[str]) -> dict[str, Predict]:
        targets, count = self._assay.targets, len(self._assay.classes)
        places = regions(self._assay.antibodies)

        def by_region(train: np.ndarray, held: np.ndarray) -> np.ndarray:
            known = [places[i] for i in train.tolist()]
            asked = [places[i] for i in held.tolist()]
            return _objects(baselines.by_region(known, targets[train], asked, count))

        def by_window(train: np.ndarray, held: np.ndarray) -> np.ndarray:
            known, asked = ([letters[i] for i in rows.tolist()] for rows in (train, held))
            seed = self._settings.training.seed
            return _objects(baselines.residue_shares(known, targets[train], asked, seed, count))

        return {baselines.REGION: by_region, baselines.NAMES[self._assay.task]: by_window}

    def numbers(self, folds: np.ndarray, tested: Mapping[str, np.ndarray]) -> list[Number]:
        """Scores of all predictors on what was held out."""
        held = folds >= 0
        truth, units = self._assay.targets[held], [f"group {g}" for g in self._groups[held]]
        if self._assay.of_residues:
            return _residue_numbers(truth, units, folds[held], tested)
        if not self._assay.classes:
            found = []
            for name, values in tested.items():
                about, error = {"predictor": name}, np.abs(values - truth)
                found.append(spearman_number(values, truth, units, about))
                if self._assay.folds:  # as benchmarks with folds of their own report it
                    found.append(spearman_of_folds(values, truth, units, folds[held], about))
                sample = Sample("mean absolute error", units, error, np.ones(len(error)), about)
                found.append(sample.number())
            return found
        shares = {MODEL: np.exp(tested[MODEL].astype(np.float64))[None]}
        shares |= {name: found[None] for name, found in tested.items() if name != MODEL}
        found = [
            accuracy_sample(truth, p, units, {"predictor": name}).number()
            for name, p in shares.items()
        ]
        last = list(shares)[-1]
        return found + score_numbers(truth, shares, last, units, folds[held][None], {})


def _residue_numbers(
    truth: np.ndarray, units: list[str], folds: np.ndarray, tested: Mapping[str, np.ndarray]
) -> list[Number]:
    """Scores of predictions of residues that have a class; residues of an antibody are one unit."""
    sizes = [len(each) for each in truth]
    classes = np.concatenate(truth)
    known = classes != IGNORED
    classes = classes[known]
    of = [unit for unit, is_known in zip(np.repeat(units, sizes), known, strict=True) if is_known]
    shares = {name: np.concatenate(found)[known][None] for name, found in tested.items()}
    shares[MODEL] = np.exp(shares[MODEL].astype(np.float64))
    found = [
        accuracy_sample(classes, p, of, {"predictor": name}).number() for name, p in shares.items()
    ]
    held = np.repeat(folds, sizes)[known][None]
    return found + score_numbers(classes, shares, list(shares)[-1], of, held, {})
