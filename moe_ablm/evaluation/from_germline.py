"""Predicts mutations from the germline sequence: where they are, and what they become.

The chains with all mutations of V and J reverted are read once, nothing masked (wild-type
marginals, Meier et al. 2021): probabilities of residues are those beside their own germline
residue, which is optimistic about germline and 200 times quicker than masking each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.data.antibody import row_of
from moe_ablm.data.regions import CDR3, CHAINS
from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID
from moe_ablm.evaluation.cohort import Annotated, Chain
from moe_ablm.evaluation.estimates import Number, Sample, interval, resampled
from moe_ablm.evaluation.partners import encode_letters, mutated_places
from moe_ablm.evaluation.scores import Ranking
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.logits import EveryPosition

CHEMISTRY = ("AGILMV", "CSTPNQ", "DE", "KRH", "FYW")
CLASS_OF = np.array([next(i for i, c in enumerate(CHEMISTRY) if aa in c) for aa in AMINO_ACIDS])
MODEL, COMMON, BY_RESIDUE = "model", "most frequent", "most frequent by germline residue"
DRAWS = 200  # each ranks all residues again


@dataclass(frozen=True, eq=False)
class Predicted:
    """One chain of all antibodies.

    Attributes:
      owner: int64 `[n]`, number of the antibody of each residue outside CDR3.
      mutated: bool `[n]`.
      region: int64 `[n]`, code.
      score: float64 `[n]`, 1 - probability of the germline residue.
      whose: int64 `[m]`, number of the antibody of each mutated residue.
      germline, truth, residue: int64 `[m]`, indices in `AMINO_ACIDS`: in germline, there, and the
        most probable one but the germline's.
      chemistry: int64 `[m]`, index in `CHEMISTRY` of the most probable class, without germline's
        residue.
    """

    owner: np.ndarray
    mutated: np.ndarray
    region: np.ndarray
    score: np.ndarray
    whose: np.ndarray
    germline: np.ndarray
    truth: np.ndarray
    residue: np.ndarray
    chemistry: np.ndarray


def from_germline(
    subject: Subject, everyone: Sequence[Annotated]
) -> tuple[list[Sample], list[Number]]:
    """Ranking of positions, and top-1 accuracy of class and residue, beside baselines."""
    samples, numbers, units = [], [], [a.unit for a in everyone]
    for chain, predictions in predicted(subject, everyone).items():
        within, pooled = _positions(predictions, units, {"chain": chain})
        samples += [*within, *_substitutes(predictions, units, {"chain": chain})]
        numbers += pooled
    return samples, numbers


def predicted(subject: Subject, everyone: Sequence[Annotated]) -> dict[str, Predicted]:
    """Predictions for all antibodies, by chain."""
    rows = [row_of(_reverted(a).antibody, subject.engine.model.layout) for a in everyone]
    parts: dict[str, dict[int, tuple]] = {name: {} for name in CHAINS}
    for i, log_probabilities in subject.engine.run(EveryPosition(), [r.tokens for r in rows]):
        residues = log_probabilities[rows[i].places].astype(np.float64)
        probabilities = np.exp(residues[:, FIRST_AMINO_ACID:][:, : len(AMINO_ACIDS)])
        first = 0
        for name, chain in everyone[i].chains():
            parts[name][i] = _of_chain(i, chain, probabilities[first : first + len(chain)])
            first += len(chain)
    return {
        name: Predicted(*map(np.concatenate, zip(*(of[i] for i in sorted(of)), strict=True)))
        for name, of in parts.items()
        if of
    }


def _reverted(a: Annotated) -> Annotated:
    heavy, light = (replace(chain, letters=chain.germline) for chain in (a.heavy, a.light))
    return replace(a, heavy=heavy, light=light)


def _of_chain(number: int, chain: Chain, probabilities: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fields of `Predicted` of a chain from float64 `[n, 20]`."""
    germline = encode_letters(chain.germline).astype(int) - FIRST_AMINO_ACID
    truth = encode_letters(chain.letters).astype(int) - FIRST_AMINO_ACID
    # mutations in CDR3 are not annotated
    known = np.flatnonzero((chain.region > 0) & (chain.region != CDR3))
    score = 1 - probabilities[np.arange(len(germline)), germline]
    at = mutated_places(chain)
    left = probabilities[at]
    left[np.arange(len(at)), germline[at]] = 0
    classes = left @ np.eye(len(CHEMISTRY))[CLASS_OF]
    is_mutated = np.isin(known, at)
    owner, whose = np.full(len(known), number), np.full(len(at), number)
    return (
        *(owner, is_mutated, chain.region[known].astype(int), score[known]),
        *(whose, germline[at], truth[at], left.argmax(1), classes.argmax(1)),
    )


def _positions(
    predictions: Predicted, units: Sequence[str], labels: dict[str, str]
) -> tuple[list[Sample], list[Number]]:
    """Where mutations are: over all residues, and the mean over antibodies of each one's own."""
    numbers = []
    # a baseline that knows of a residue its region only, and how often regions mutate here
    hits, all_of = (
        np.bincount(predictions.region, w)
        for w in (predictions.mutated, np.ones(len(predictions.owner)))
    )
    by_region = (hits / np.maximum(all_of, 1))[predictions.region]
    for predictor, scores in ((MODEL, predictions.score), ("region", by_region)):
        ranking = Ranking.of(predictions.mutated, scores)
        for metric, compute in _metrics(ranking):
            low, high = _interval(compute, units, predictions.owner)
            about = labels | {"predictor": predictor}
            n = len(predictions.owner)
            numbers.append(Number(metric, compute(), about, low, high, n, "share"))
    values = np.full((len(units), 2), np.nan)
    owners, first = np.unique(predictions.owner, return_index=True)  # owners ascend
    each = zip(
        owners,
        np.split(predictions.mutated, first[1:]),
        np.split(predictions.score, first[1:]),
        strict=True,
    )
    for owner, mutated, scores in each:
        values[owner] = [compute() for _, compute in _metrics(Ranking.of(mutated, scores))]
    known = np.isfinite(values).all(1)
    samples = [
        Sample(f"{metric}_within", units, np.where(known, column, 0), known.astype(float),
               labels | {"predictor": MODEL}, unit="share")
        for metric, column in zip(("auroc", "average_precision"), values.T, strict=True)
    ]  # fmt: skip
    return samples, numbers


def _metrics(ranking: Ranking) -> tuple:
    return ("auroc", ranking.auroc), ("average_precision", ranking.average_precision)


def _interval(compute, units: Sequence[str], owner: np.ndarray) -> tuple[float, float]:
    index, counts = resampled(units, DRAWS)
    return interval(np.array([compute(draw[index][owner]) for draw in counts]))


def _substitutes(
    predictions: Predicted, units: Sequence[str], labels: dict[str, str]
) -> list[Sample]:
    """What mutated residues become: share of them whose class, and whose residue, is right."""
    _, unit = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    whose, nowhere = unit[predictions.whose], np.zeros(len(predictions.whose), int)
    truth = {"class": CLASS_OF[predictions.truth], "residue": predictions.truth}
    guesses = {("class", MODEL): predictions.chemistry, ("residue", MODEL): predictions.residue}
    for what, size in (("class", len(CHEMISTRY)), ("residue", len(AMINO_ACIDS))):
        for predictor, context in ((COMMON, nowhere), (BY_RESIDUE, predictions.germline)):
            counts = counts_of_others(whose, context, truth[what], size)
            if what == "residue":
                counts[np.arange(len(counts)), predictions.germline] = -1
            guesses[what, predictor] = counts.argmax(1)
    weight = np.bincount(predictions.whose, minlength=len(units)).astype(float)
    return [
        Sample(
            f"{what}_accuracy",
            units,
            np.bincount(predictions.whose, guess == truth[what], len(units)),
            weight,
            labels | {"predictor": predictor},
            unit="share",
        )
        for (what, predictor), guess in guesses.items()
    ]


def counts_of_others(
    owner: np.ndarray, context: np.ndarray, target: np.ndarray, size: int
) -> np.ndarray:
    """How often each target is seen with an item's context, among items of other owners.

    Args:
      owner, context, target: int `[m]`.
      size: of targets.

    Returns:
      int64 `[m, size]`.
    """
    if not len(owner):
        return np.zeros((0, size), np.int64)
    contexts, owners = int(context.max()) + 1, int(owner.max()) + 1
    cell = context * size + target
    everyone = np.bincount(cell, minlength=contexts * size).reshape(contexts, size)
    own = np.bincount(owner * contexts * size + cell, minlength=owners * contexts * size)
    return everyone[context] - own.reshape(owners, contexts, size)[owner, context]
