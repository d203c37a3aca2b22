"""Whether a model tells native pairs from re-paired ones, and prefers a chain's native partner.

Light chains are dealt out again among the pairs, so that each chain is in one native and in one
re-paired antibody and no chain alone gives the answer. Random negatives, those of the literature,
have a shortcut: mutated chains meet unmutated ones, unlike in native pairs of a memory or a naive
cell. Matched negatives close it: chains are exchanged only among pairs with equally many mutations
in each chain. A head on the frozen encoder is trained on some groups and tested on others; a group
shares heavy clones or light chains of one V gene and CDRL3. Zero-shot, each chain's one-pass
pseudo-log-likelihood with its native partner is compared with that in the re-paired antibody: how
often the native one wins (no preference: 0.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.dots import picture
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.outcome import Outcome, Skipped, Table
from moe_ablm.evaluation.scores import METRICS, accuracy_sample, score_numbers
from moe_ablm.evaluation.subject import Subject
from moe_ablm.evaluation.supervised import baselines
from moe_ablm.evaluation.supervised.folds import (
    cdr3_of,
    clonal_folds,
    cross_validated,
    joined,
    numbered,
)
from moe_ablm.evaluation.supervised.head_inputs import Head, inputs_of
from moe_ablm.evaluation.supervised.heads import Training
from moe_ablm.inference.score import score

TITLE = "Native pairing recognition"
RANDOM, MATCHED, SAME_GENE = "random", "matched", "matched, same light V gene"
HEAD = "frozen encoder, head"


@dataclass(frozen=True)
class Settings:
    """Pairs drawn from the test split, folds, repeats, and how the head is trained.

    Each of the `repeats` has another seed of the head; folds, within which light chains are dealt,
    are one draw.
    `same_gene` adds negatives that keep the V gene of the light chain, too.
    """

    antibodies: int = 2000
    folds: int = 5
    repeats: int = 3
    epochs: int = 30
    batch: int = 32
    lr: float = 3e-3
    same_gene: bool = False


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Recognition by a head and by a baseline, and the zero-shot win rate, by kind of negatives."""
    baselines.require_sklearn()
    everyone, notes = subject.antibodies(settings.antibodies, paired=True)
    groups = groups_of(everyone)
    if len(np.unique(groups)) < 2 * settings.folds:
        raise Skipped(
            f"{len(everyone):,} pairs of {len(np.unique(groups)):,} groups are too few for "
            f"{settings.folds} folds"
        )
    rng = subject.generator("pairing folds")
    folds = clonal_folds(groups, np.zeros(len(everyone), np.int64), settings.folds, rng)
    kinds = [RANDOM, MATCHED] + [SAME_GENE] * settings.same_gene
    if not any(chain.mutated.any() for a in everyone for _, chain in a.chains()):
        kinds = [RANDOM]
        notes.append("the dataset has no germline: negatives are not matched on mutations")
    samples, numbers = [], []
    natives = score(subject.engine, [a.antibody for a in everyone], one_pass=True)
    for kind in kinds:
        partner = deal(everyone, strata_of(everyone, folds, kind), subject.generator(kind))
        kept = np.flatnonzero(partner >= 0)
        notes.append(
            f"negatives {kind}: {len(kept):,} of {len(everyone):,} pairs; for the others there is "
            "no other light chain to deal"
        )
        if len(np.unique(folds[kept])) < settings.folds:
            notes.append(f"negatives {kind}: too few: left out")
            continue
        case = Case(everyone, partner, groups, folds, {"negatives": kind})
        recognised, more_numbers = recognition(subject, case, settings)
        samples += [*recognised, *preference(subject, case, natives)]
        numbers += more_numbers
    if not samples:
        raise Skipped("no light chain can be dealt out again: the pairs are too few or too alike")
    gains = tuple(f"{metric} over baseline" for metric in METRICS)
    rows = ("negatives", "predictor")
    tables = (
        Table("Native against re-paired, out of fold", METRICS, rows),
        Table("Gain over the baseline", gains, rows),
        Table("Zero-shot: native partner preferred", PREFERENCES, ("negatives", "chain")),
    )
    caption = "Native against re-paired: area under the ROC curve, 95 % intervals; 0.5 is guessing."
    return Outcome(
        samples, numbers, tables, (picture("auc", caption, numbers, "AUC", "negatives"),), notes
    )


def groups_of(pairs: Sequence[Annotated]) -> np.ndarray:
    """What must not be divided between training and test, int64 `[n]`.

    Pairs of one clone, or whose light chains share V gene and CDRL3 (else: all letters), directly
    or through others.
    """
    lights = [
        (a.light.v_gene, cdr3_of(a.light)) if a.light.v_gene else a.light.letters for a in pairs
    ]
    return joined(numbered([a.unit for a in pairs]), numbered(lights))


def strata_of(pairs: Sequence[Annotated], folds: np.ndarray, kind: str) -> np.ndarray:
    """Within which pairs light chains are exchanged, int64 `[n]`; never between folds."""

    def keys(antibody: Annotated) -> tuple:
        bins = tuple(baselines.mutation_bin(c.mutations) for _, c in antibody.chains())
        return {RANDOM: (), MATCHED: bins, SAME_GENE: (*bins, antibody.light.v_gene)}[kind]

    return numbered([(f, *keys(a)) for f, a in zip(folds.tolist(), pairs, strict=True)])


def deal(pairs: Sequence[Annotated], strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whose light chain each pair is given, int64 `[n]`; -1 for pairs that are left out.

    A permutation of those that are not, within strata; no result is a native pair, as sequences.
    """
    light = numbered([a.light.letters for a in pairs])
    heavy = numbered([a.heavy.letters for a in pairs])
    native = set(zip(heavy.tolist(), light.tolist(), strict=True))
    partner = np.full(len(pairs), -1)
    for stratum in range(strata.max() + 1):
        members = np.flatnonzero(strata == stratum)
        while len(members) > 1:
            # equal light chains side by side, in random order; moved on by as many as are equal
            names, which, counts = np.unique(
                light[members], return_inverse=True, return_counts=True
            )
            order = np.lexsort((rng.random(len(members)), rng.permutation(len(names))[which]))
            ring = members[order]
            given = np.roll(ring, -int(counts.max()))
            dealt = zip(heavy[ring].tolist(), light[given].tolist(), strict=True)
            good = np.array([pair not in native for pair in dealt])
            if good.all():
                partner[ring] = given
                break
            members = ring[good]
    return partner


@dataclass(frozen=True, eq=False)
class Case:
    """Native pairs and the re-paired ones made of them.

    Attributes:
      pairs: native ones.
      partner: int64 `[n]`, see `deal`.
      groups, folds: int64 `[n]` of the native pairs; a re-paired one is of its heavy chain's.
      labels: of all results.
    """

    pairs: Sequence[Annotated]
    partner: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    labels: dict[str, str]

    @cached_property
    def kept(self) -> np.ndarray:
        """Pairs that were dealt out again, ascending."""
        return np.flatnonzero(self.partner >= 0)

    @cached_property
    def repaired(self) -> list[Annotated]:
        """The re-paired antibodies, in the order of `kept`."""
        return [
            replace(self.pairs[i], light=self.pairs[self.partner[i]].light)
            for i in self.kept.tolist()
        ]


def baseline_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Classes (native: 1), first all native then all re-paired, and the baseline's predictions."""
    kept = case.kept
    known = [baselines.pair_features(case.pairs[i]) for i in kept]
    known += [baselines.pair_features(a) for a in case.repaired]
    classes = np.repeat([1, 0], len(kept))
    return classes, baselines.predictions(known, classes, np.tile(case.folds[kept], 2))


def recognition(
    subject: Subject, case: Case, settings: Settings
) -> tuple[list[Sample], list[Number]]:
    """Scores of a head on the frozen encoder and of the baseline."""
    both = [case.pairs[i] for i in case.kept] + case.repaired
    folds, groups = (np.tile(x[case.kept], 2) for x in (case.folds, case.groups))
    classes, baseline = baseline_of(case)
    head = Head("classification", 2)
    inputs = inputs_of(subject.engine, [a.antibody for a in both], head, False)
    by_repeat = [
        cross_validated(subject.engine, inputs, classes, folds, training)
        for repeat in range(settings.repeats)
        for training in [
            Training(settings.epochs, settings.batch, settings.lr, seed=subject.seed + repeat)
        ]
    ]
    # the baseline has no seed: the same in every repeat
    predicted = {
        HEAD: np.stack(by_repeat),
        baselines.PAIRED_BASELINE: np.stack([baseline] * len(by_repeat)),
    }
    units = [f"group {g}" for g in groups]
    samples = [
        accuracy_sample(classes, each, units, case.labels | {"predictor": name})
        for name, each in predicted.items()
    ]
    numbers = score_numbers(
        classes,
        predicted,
        baselines.PAIRED_BASELINE,
        units,
        np.stack([folds] * len(by_repeat)),
        case.labels,
    )
    return samples, numbers


PREFERENCES = ("win rate of the native partner", "log-likelihood gain by the native partner")


def preference(subject: Subject, case: Case, natives: Sequence[np.ndarray]) -> list[Sample]:
    """How often, and by how much, a chain is likelier with its native partner.

    Args:
      subject: the model.
      case: pairs.
      natives: log-likelihoods of the residues of each native pair, float32 `[residues]`.
    """
    scores = score(subject.engine, [a.antibody for a in case.repaired], one_pass=True)
    native, repaired = chain_sums(case.pairs, natives), chain_sums(case.repaired, scores)
    samples = []
    for c, owner in enumerate((case.kept, case.partner[case.kept])):
        # the chain of pair `owner`, with its own partner and in the re-paired antibody
        gain, residues = native[owner, c, 0] - repaired[:, c, 0], native[owner, c, 1]
        wins = (gain > 0) + 0.5 * (gain == 0)
        units = [f"group {g}" for g in case.groups[owner]]
        labels = case.labels | {"chain": CHAINS[c]}
        samples += [
            Sample(PREFERENCES[0], units, wins, np.ones(len(wins)), labels, unit="share"),
            Sample(PREFERENCES[1], units, gain, residues, labels, unit="nats a residue"),
        ]
    return samples


def chain_sums(pairs: Sequence[Annotated], scores: Sequence[np.ndarray]) -> np.ndarray:
    """Sum and number of the residues' log-likelihoods, float64 `[n, chain, 2]`, heavy first."""
    sums = np.zeros((len(pairs), len(CHAINS), 2))
    for i, (pair, residues) in enumerate(zip(pairs, scores, strict=True)):
        for c, part in enumerate(np.split(residues.astype(np.float64), [len(pair.heavy)])):
            sums[i, c] = np.nansum(part), np.isfinite(part).sum()
    return sums
