"""Zero-shot fitness: how well likelihoods order variants by what was measured of them.

Spearman's correlation between a score of the model and the measured fitness, with bootstrap
intervals over variants. Tables of FLAb (Chungyoun et al. 2024), antibodies without a common wild
type: the mean pseudo-log-likelihood of a residue, which is minus the logarithm of the
pseudo-perplexity (Salazar et al. 2020, eq. 1). Tables of ProteinGym (Notin et al. 2023),
substitutions in a wild type: masked marginals (Meier et al. 2021), the sum over the substituted
residues of log p(mutant) - log p(wild type), each with that residue alone masked in the wild type;
wild-type marginals, the same with nothing masked; and, as what needs no model, minus the number of
substitutions. A higher score means fitter; fitness is taken as the table gives it, so that a
measure that is better when low (a dissociation constant, a retention time) should correlate
negatively.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ablm.data.antibody import Antibody, row_of, tokens_of
from moe_ablm.data.tokenizer import FIRST_AMINO_ACID, MASK
from moe_ablm.errors import UserError
from moe_ablm.evaluation.dots import dots
from moe_ablm.evaluation.estimates import spearman_number, why_undefined
from moe_ablm.evaluation.formats.fitness_tables import Antibodies, Assay, Substitutions, read_assays
from moe_ablm.evaluation.outcome import Outcome, Picture, Skipped, Table
from moe_ablm.evaluation.subject import Subject
from moe_ablm.files import json_text
from moe_ablm.inference.antibodies import windows
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.logits import OnePosition
from moe_ablm.inference.output import Output
from moe_ablm.inference.scan import AMINO_ACIDS, scan
from moe_ablm.inference.score import score

TITLE = "Fitness, zero-shot"
RULES = ("exact", "one-pass")
FEWEST = 3


@dataclass(frozen=True)
class Settings:
    """Most antibodies or variants of a table, and how antibodies are scored.

    `rule`: "exact", every residue masked in turn, or "one-pass", nothing masked: some 200 times
    quicker, and too optimistic. Of substitutions both marginals are computed always.
    """

    antibodies: int = 2000
    variants: int = 2000
    rule: str = "exact"


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Correlation of every score with the fitness of every table.

    Raises:
      UserError: a malformed table, or an unknown rule.
    """
    if settings.rule not in RULES:
        raise UserError(f"fitness.rule={settings.rule!r}: expected one of {', '.join(RULES)}")
    assays, notes = [], []
    for assay in read_assays(subject.files_of("fitness"), subject.on_bad_row):
        fitting, assay_notes = drawn(subject, assay, settings)
        assays += [fitting] if fitting else []
        notes += [*assay.left_out, *assay_notes]
    if not assays:
        raise Skipped("; ".join(notes))
    likelihoods = antibody_scores(subject, assays, settings.rule)
    numbers = []
    for assay in assays:
        if isinstance(assay, Substitutions):
            scores, units = substitution_scores(subject.engine, assay), _names(assay)
        else:
            units = [_key(antibody) for antibody in assay.antibodies]
            values = np.array([likelihoods[unit] for unit in units])
            scores = {f"pseudo-log-likelihood ({settings.rule})": values}
        for name, values in scores.items():
            about = {"assay": assay.name, "score": name}
            numbers.append(spearman_number(values, assay.fitness, units, about))
    notes += why_undefined(numbers)
    notes.append(
        "score: higher is fitter; fitness as in the tables: where low values are the good ones, a "
        "negative correlation is the good one"
    )
    table = Table("Spearman's correlation with fitness", ("spearman",), ("assay",), "score")
    picture = Picture(
        "fitness",
        "Spearman's correlation of scores with measured fitness, 95 % intervals over variants.",
        lambda: dots(numbers, ("assay",), "score", "Spearman's correlation"),
    )
    return Outcome(numbers=numbers, tables=(table,), pictures=(picture,), notes=notes)


def drawn(subject: Subject, assay: Assay, settings: Settings) -> tuple[Assay | None, list[str]]:
    """Up to so many variants of an assay that the model can read, the same for every model.

    Returns:
      None where it cannot be evaluated; notes on what was left out and why.
    """
    layout, longest = subject.engine.model.layout, subject.engine.model.length
    most = settings.antibodies if isinstance(assay, Antibodies) else settings.variants
    count, notes = len(assay.fitness), []
    if count > most:
        order = subject.generator(f"fitness {assay.name}").permutation(count)
        assay = assay.take(np.sort(order[:most]))
        notes.append(f"{assay.name}: {most:,} of {count:,} variants drawn")
    if isinstance(assay, Antibodies):
        fits = np.array([tokens_of(a, layout) <= longest for a in assay.antibodies])
        if not fits.all():
            notes.append(
                f"{assay.name}: {(~fits).sum():,} of {len(fits):,} antibodies are longer than the "
                f"{longest} tokens that the model was trained for: left out"
            )
            assay = assay.take(np.flatnonzero(fits))
    elif tokens_of(assay.wild_type, layout) > longest:
        return None, [
            f"{assay.name}: its {assay.wild_type.residues} residues are more than the {longest} "
            "tokens that the model was trained for: skipped"
        ]
    if len(assay.fitness) < FEWEST or len(np.unique(assay.fitness)) < 2:
        counts = f"{len(assay.fitness)} variants, {len(np.unique(assay.fitness))} different values"
        return None, [*notes, f"{assay.name}: {counts} of fitness, too few to correlate: skipped"]
    return assay, notes


def substitution_scores(engine: Engine, assay: Substitutions) -> dict[str, np.ndarray]:
    """Scores of the variants by name, float64 `[n]` each."""
    sites = sorted({at for variant in assay.variants for at, *_ in variant})
    tables = {
        "masked marginal": masked_at(engine, assay.wild_type, sites),
        "wild-type marginal": scan(engine, [assay.wild_type], "wild-type-marginal")[0],
    }
    scores = {
        name: np.array(
            [
                sum(float(odds[at, AMINO_ACIDS.index(new)]) for at, _, new in v)
                for v in assay.variants
            ]
        )
        for name, odds in tables.items()
    }
    counts = np.array([len(variant) for variant in assay.variants], float)
    return scores | ({"fewer substitutions": -counts} if len(set(counts)) > 1 else {})


def masked_at(engine: Engine, wild_type: Antibody, sites: Sequence[int]) -> np.ndarray:
    """Masked marginals as `inference.scan` has them, at some residues alone.

    Returns:
      float32 `[residues, 20]`; NaN elsewhere.
    """
    row = row_of(wild_type, engine.model.layout)
    odds = np.full((len(row.places), len(AMINO_ACIDS)), np.nan, np.float32)
    copies = np.tile(row.tokens, (len(sites), 1))
    at = row.places[np.asarray(sites, int)]
    copies[np.arange(len(sites)), at] = MASK
    for i, logits in engine.run(OnePosition(), list(copies), at):
        amino_acids = logits[FIRST_AMINO_ACID : FIRST_AMINO_ACID + len(AMINO_ACIDS)]
        odds[sites[i]] = amino_acids - logits[row.tokens[at[i]]]
    return odds


def antibody_scores(subject: Subject, assays: Sequence[Assay], rule: str) -> dict[str, float]:
    """Mean log-likelihood of a residue of every antibody, by its chains, each computed once.

    What is computed is kept in `subject.work`: an interrupted evaluation goes on after it.
    """
    everyone = {_key(a): a for s in assays if isinstance(s, Antibodies) for a in s.antibodies}
    if not everyone:
        return {}
    command = {
        "model": subject.engine.model.digest(),
        "precision": subject.engine.precision,
        "rule": rule,
        "antibodies": hashlib.sha256("\n".join(everyone).encode()).hexdigest(),
    }
    name = hashlib.sha256(json_text(command).encode()).hexdigest()[:16]
    path = subject.work / f"fitness-{name}.parquet"
    held = 4 * subject.engine.model.spec.vocabulary
    with Output(path, command) as output:
        rest = [] if output.complete else list(everyone.values())[output.done :]
        for some in windows(rest, lambda a: (a.residues, a.residues * held)):
            by_antibody = score(subject.engine, some, one_pass=rule == "one-pass")
            means = [float(np.nanmean(values, dtype=np.float64)) for values in by_antibody]
            output.add(pa.table({"log_likelihood": means}), len(some))
        if not output.complete:
            output.finish()
    return dict(zip(everyone, pq.read_table(path)["log_likelihood"].to_pylist(), strict=True))


def _key(antibody: Antibody) -> str:
    return f"{antibody.heavy}|{antibody.light}"


def _names(assay: Substitutions) -> list[str]:
    return [":".join(f"{old}{at + 1}{new}" for at, old, new in sorted(v)) for v in assay.variants]
