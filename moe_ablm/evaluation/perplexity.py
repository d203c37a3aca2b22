"""Masked-language-model loss, accuracy and perplexity on pairs, heavy and light chains.

Uniform masks as in training (15 %, of which 80/10/10 masked, replaced, kept), drawn several times;
loss is the mean over all masked residues of all draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.data.antibody import Row, row_of
from moe_ablm.data.masking import (
    UNIFORM,
    corrupt,
    position_bits,
    record_bits,
    record_rates,
    select,
)
from moe_ablm.data.regions import CHAINS, region_names
from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated
from moe_ablm.evaluation.estimates import Sample
from moe_ablm.evaluation.outcome import Outcome, Table
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.logits import EveryPosition

TITLE = "Perplexity"
MASK_RATE = 0.15


@dataclass(frozen=True)
class Settings:
    """Antibodies drawn from the test split, and how often each is masked anew."""

    antibodies: int = 2000
    repeats: int = 3


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Loss, accuracy and perplexity of test sets, by region of the pairs, and by chain.

    Chains that the model's training antibodies have, letter by letter, are told apart from others:
    a loss on them is of memory, too.
    """
    everyone, notes = subject.antibodies(settings.antibodies)
    samples: list[Sample] = []
    seen, note = subject.seen(everyone)
    notes.append(note)
    of_key = {a.key: each for a, each in zip(everyone, seen, strict=True)}
    for name, members in test_sets(everyone).items():
        if not members:
            notes.append(f"no antibody with what the test set {name} needs: left out")
            continue
        sums = masked_sums(subject, members, settings.repeats)
        samples += _samples(members, sums, {"test set": name})
        its = np.array([of_key[a.key] for a in members])
        samples += _by_chain(members, sums, its, {"test set": name})
    metrics = ("loss", "accuracy", "perplexity")
    tables = (
        Table("Test sets", metrics, ("test set",), where=(("region", "all"),)),
        Table("Chains that training has (seen) and has not", metrics, ("test set", "chain")),
        Table("Pairs, by region", metrics, ("region",), where=(("test set", "paired"),)),
    )
    regime = subject.engine.model.regime
    notes.append(f"training regime of the model: {regime or 'not known'}")
    return Outcome(samples, tables=tables, notes=notes)


def test_sets(everyone: Sequence[Annotated]) -> dict[str, list[Annotated]]:
    """Pairs, and chains alone of all antibodies."""
    return {
        "paired": [a for a in everyone if a.paired],
        "heavy": [replace(a, light=NO_CHAIN) for a in everyone if a.heavy.letters],
        "light": [replace(a, heavy=NO_CHAIN) for a in everyone if a.light.letters],
    }


def masked_sums(subject: Subject, members: Sequence[Annotated], repeats: int) -> np.ndarray:
    """Sums over the masked residues of each antibody by region.

    Returns:
      float64 `[n, 15, 3]`: loss in nats, hits, residues; the last region is that of residues
      without one.
    """
    layout = subject.engine.model.layout
    rows = [row_of(a.antibody, layout) for a in members]
    cells = [a.region_index() for a in members]
    keys = np.array([a.key for a in members], np.uint64)
    sums = np.zeros((len(members), len(region_names()) + 1, 3))
    for repeat in range(repeats):
        chosen, corrupted = masked(rows, keys, subject.seed, repeat)
        for i, log_probabilities in subject.engine.run(EveryPosition(), corrupted):
            at = rows[i].places[chosen[i]]
            truth = rows[i].tokens[at]
            predicted = log_probabilities[at]
            loss = -np.take_along_axis(predicted, truth[:, None].astype(int), axis=1)[:, 0]
            values = np.stack([loss, predicted.argmax(1) == truth, np.ones(len(at))], 1)
            np.add.at(sums[i], cells[i][chosen[i]], values)
    return sums


def masked(
    rows: Sequence[Row], keys: np.ndarray, seed: int, repeat: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks of a draw.

    Args:
      rows: antibodies.
      keys: uint64 `[n]`, identity of each.
      seed, repeat: of the draw.

    Returns:
      For each antibody the residues to be predicted (indices among its residues), and its tokens
      with 80/10/10 of them masked, replaced, kept.
    """
    residues = [row.tokens[row.places] for row in rows]
    counts = np.array([len(r) for r in residues])
    start, tokens = np.cumsum(counts) - counts, np.concatenate(residues)
    bits = position_bits(record_bits(seed, keys, np.full(len(rows), repeat)), start, len(tokens))
    everywhere = np.ones(len(tokens), bool)
    rates = record_rates(UNIFORM, MASK_RATE, everywhere, None, start)
    selected, rate = select(bits, everywhere, rates, start)
    corrupted = np.split(corrupt(tokens, selected, bits, rate), start[1:])
    out = []
    for row, new in zip(rows, corrupted, strict=True):
        copy = row.tokens.copy()
        copy[row.places] = new
        out.append(copy)
    return [np.flatnonzero(part) for part in np.split(selected, start[1:])], out


def _by_chain(
    members: Sequence[Annotated], sums: np.ndarray, seen: np.ndarray, labels: dict
) -> list[Sample]:
    """Of each chain all, those seen in training (bool `[n, 2]`) and the others, where there are."""
    samples = []
    of_chain = len(region_names()) // len(CHAINS)
    for i, chain in enumerate(CHAINS):
        # residues without a region, the last of the sums, are of the chain that stands alone
        alone = np.array([not getattr(a, c).letters for a in members for c in CHAINS if c != chain])
        part = sums[:, i * of_chain : (i + 1) * of_chain].sum(1)
        part += np.where(alone[:, None], sums[:, -1], 0)
        for name, kept in (("", slice(None)), ("seen ", seen[:, i]), ("unseen ", ~seen[:, i])):
            some = np.zeros_like(part)
            some[kept] = part[kept]
            samples += _means(members, some, labels | {"chain": f"{name}{chain}"})
    return samples


def _samples(members: Sequence[Annotated], sums: np.ndarray, labels: dict) -> list[Sample]:
    samples = []
    parts = {"all": sums.sum(1)}
    if labels["test set"] == "paired":
        parts |= {name: sums[:, i] for i, name in enumerate(region_names())}
    for region, part in parts.items():
        samples += _means(members, part, labels | {"region": region})
    return samples


def _means(members: Sequence[Annotated], sums: np.ndarray, labels: dict) -> list[Sample]:
    """Of sums `[n, 3]` (nats, hits, residues) the three metrics; none without residues."""
    if not sums[:, 2].any():
        return []
    units, (loss, hits, residues) = [a.unit for a in members], sums.T
    return [
        Sample("loss", units, loss, residues, labels, unit="nats"),
        Sample("accuracy", units, hits, residues, labels, unit="share"),
        Sample("perplexity", units, loss, residues, labels, scale="exp"),
    ]
