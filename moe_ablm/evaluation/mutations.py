"""Whether the partner chain helps to predict mutations, and whether the germline foretells them.

Pairs with mutations in both chains (Burbach & Briney 2024, Figure 3): all mutated residues of one
chain are masked at once, beside the native partner, the partner with its mutations reverted to
germline, the partner of another such pair, and without a partner. Cross-entropy is minus the
log-probability of the residue that is there; likelihoods are probabilities of that residue, of the
germline residue, and of the 18 others. The gain is the cross-entropy with another partner minus
that with the native one: above 0 the native partner helps. Mutation prediction: one pass over the
antibody reverted to germline ranks positions by 1 - probability of the germline residue (wild-type
marginals, nothing masked); at mutated residues the most probable other residue, and class of
residues (AGILMV, CSTPNQ, DE, KRH, FYW), are compared with what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ablm.data.regions import CHAINS
from moe_ablm.evaluation.cohort import Annotated, mutation_counts, sample_rows
from moe_ablm.evaluation.estimates import Number, Sample, quotient
from moe_ablm.evaluation.from_germline import from_germline
from moe_ablm.evaluation.outcome import Outcome, Picture, Skipped, Table
from moe_ablm.evaluation.partners import (
    PARTNERS,
    SUMS,
    masked_sums,
    partner_letters,
    random_partners,
    room,
)
from moe_ablm.evaluation.subject import Subject

TITLE = "Mutations across chains"
NATIVE = PARTNERS[0]
MUTATED, OTHER, ANY = "mutated", "other non-germline", "non-germline"


@dataclass(frozen=True)
class Settings:
    """Which pairs are used.

    Attributes:
      antibodies: most pairs, of those that qualify.
      least: mutated residues in each of their chains.
      candidates: antibodies of the test split that are looked through for them; 0: all.
    """

    antibodies: int = 500
    least: int = 3
    candidates: int = 0


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Likelihoods and gains by masked chain and partner, and mutation prediction."""
    everyone, notes = mutated_pairs(subject, settings)
    samples, numbers = [], []
    for masked in CHAINS:
        drawn = random_partners(everyone, masked, room(subject), subject.seed)
        if None in drawn:
            notes.append(
                f"{drawn.count(None):,} {masked} chains have no random partner: no other pair has "
                "another sequence and clonal cluster"
            )
        by_partner = {
            p: masked_sums(subject, everyone, masked, partner_letters(everyone, masked, p, drawn))
            for p in PARTNERS
        }
        across = across_chains([a.unit for a in everyone], masked, by_partner)
        samples += across
        numbers += ratios(across)
    predictions = from_germline(subject, everyone)
    shown = tuple(samples)
    samples += predictions[0]
    numbers += predictions[1]
    regime = subject.engine.model.regime
    notes.append(
        f"training regime of the model: {regime or 'not known'}; a model that never saw single "
        "chains is outside of its training without a partner"
    )
    pictures = [
        Picture("across_chains", _CAPTION, lambda: draw_across([s.number() for s in shown]))
    ]
    return Outcome(samples, numbers, TABLES, pictures, notes)


TABLES = (
    Table(
        "Gain of the native partner over another one, nats a masked mutation",
        ("gain",),
        ("masked",),
        "partner",
    ),
    Table("Cross-entropy (nats) of masked mutations", ("cross_entropy",), ("masked",), "partner"),
    Table("Likelihood at masked mutations", ("likelihood",), ("masked", "residue"), "partner"),
    Table(
        "Likelihood with the native partner, as a multiple of that with another",
        ("likelihood_ratio",),
        ("masked", "residue"),
        "partner",
    ),
    Table(
        "Where mutations are, from germline",
        ("auroc", "average_precision", "auroc_within", "average_precision_within"),
        ("chain", "predictor"),
    ),
    Table(
        "What they become, top-1 accuracy without the germline residue",
        ("class_accuracy", "residue_accuracy"),
        ("chain", "predictor"),
    ),
)
_CAPTION = (
    "Mutated residues of one chain masked, by partner: cross-entropy, and likelihood of the "
    "mutated residue and of other non-germline residues; bars are 95 % intervals."
)


def mutated_pairs(subject: Subject, settings: Settings) -> tuple[list[Annotated], list[str]]:
    """Pairs of the test split with mutations in both chains, and notes.

    Raises:
      Skipped: there are none; the message says why.
    """
    dataset = subject.dataset
    if dataset is None:
        raise Skipped("no dataset was given (--input DIR)")
    count = settings.candidates or len(dataset)
    rows = sample_rows(dataset, "test", count, subject.seed)
    if not len(rows):
        raise Skipped(f"split test of {dataset.path} is empty")
    paired = np.all([dataset.lengths[chain][rows] > 0 for chain in CHAINS], axis=0)
    if not paired.any():
        raise Skipped("the dataset has single chains only: partners need pairs")
    counts = mutation_counts(dataset, rows)
    if not counts.any():
        raise Skipped(
            "no residue is mutated: the dataset has no germline (prepare it with annotation), or "
            "its antibodies are all unmutated"
        )
    least = max(settings.least, 1)
    qualified = rows[paired & (counts >= least).all(0)]
    if not len(qualified):
        raise Skipped(f"none of {len(rows):,} antibodies has {least} mutations in each chain")
    everyone, notes = subject.antibodies(settings.antibodies, paired=True, within=qualified)
    notes.append(
        f"{len(qualified):,} of {len(rows):,} antibodies have {least} or more mutated residues of "
        f"V and J in each chain; {len(everyone):,} are used"
    )
    return everyone, notes


def across_chains(
    units: Sequence[str], masked: str, by_partner: dict[str, np.ndarray]
) -> list[Sample]:
    """Cross-entropy and likelihoods by partner, and gains.

    Args:
      units: clonal cluster of each antibody.
      masked: the chain whose mutations are masked.
      by_partner: `partners.masked_sums` by partner.
    """
    samples = []
    for partner, sums in by_partner.items():
        of = dict(zip(SUMS, sums.T, strict=True))
        about = {"masked": masked, "partner": partner}
        likelihoods = {
            MUTATED: of["mutated"],
            OTHER: of["other"],
            ANY: of["mutated"] + of["other"],
            "germline": of["germline"],
        }
        weight = of["residues"]
        samples.append(
            Sample("cross_entropy", units, of["cross_entropy"], weight, about, unit="nats")
        )
        samples += [
            Sample("likelihood", units, total, weight, about | {"residue": name}, unit="share")
            for name, total in likelihoods.items()
        ]
        if partner != NATIVE:
            # the same residues are masked: the difference of means is the mean of differences
            gain = np.where(weight > 0, of["cross_entropy"] - by_partner[NATIVE][:, 0], 0)
            samples.append(Sample("gain", units, gain, weight, about, unit="nats"))
    return samples


def ratios(samples: Sequence[Sample]) -> list[Number]:
    """Likelihood of mutated and of other residues with the native partner, over another's."""
    likelihoods = {
        (s.labels["partner"], s.labels["residue"]): s for s in samples if s.metric == "likelihood"
    }
    return [
        replace(
            quotient(likelihoods[NATIVE, residue], likelihoods[partner, residue]),
            metric="likelihood_ratio",
            labels=likelihoods[partner, residue].labels,
        )
        for partner in PARTNERS[1:]
        for residue in (MUTATED, OTHER, ANY)
    ]


NAMES = {"native": "native", "reverted": "germline-\nreverted", "random": "random", "none": "none"}
SHOWN = {"mutated": "#4477aa", "other non-germline": "0.7"}


def draw_across(numbers: Sequence[Number]) -> Figure:
    """Cross-entropy above, likelihoods below; a column for each masked chain.

    Args:
      numbers: "cross_entropy" and "likelihood", labelled by "masked", "partner", "residue".
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, masked in enumerate(CHAINS):
        own = [n for n in numbers if n.labels["masked"] == masked]
        losses = [n for n in own if n.metric == "cross_entropy"]
        _bars(axes[0, column], losses, 0, 0.7, color="#4477aa")
        for i, (residue, colour) in enumerate(SHOWN.items()):
            chosen = [n for n in own if n.labels.get("residue") == residue]
            _bars(axes[1, column], chosen, (i - 0.5) * 0.4, 0.36, color=colour, label=residue)
        axes[0, column].set_title(f"{masked} chain masked")
        for axis in axes[:, column]:
            axis.set_xticks(range(len(PARTNERS)), [NAMES[p] for p in PARTNERS])
    axes[0, 0].set_ylabel("cross-entropy (nats)")
    axes[1, 0].set_ylabel("likelihood (share)")
    axes[1, 0].legend()
    return figure


def _bars(axis: Axes, numbers: Sequence[Number], shift: float, width: float, **style) -> None:
    x = np.array([PARTNERS.index(n.labels["partner"]) for n in numbers]) + shift
    value, low, high = (
        np.array([getattr(n, k) for n in numbers]) for k in ("value", "low", "high")
    )
    axis.bar(x, value, width, **style)
    reach = np.nan_to_num(np.maximum([value - low, high - value], 0))
    axis.errorbar(x, value, reach, fmt="none", ecolor="0.2", capsize=2, linewidth=1)
