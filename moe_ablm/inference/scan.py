"""All single mutants of an antibody, scored against the wild type."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, Row, row_of
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.positions import Selection
from moe_ablm.data.tokenizer import AMINO_ACID_TOKENS, AMINO_ACIDS, FIRST_AMINO_ACID
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.logits import OnePosition
from moe_ablm.inference.numbers import chosen, numbered_labels
from moe_ablm.inference.score import (
    masked_log_probabilities,
    scored_places,
    unmasked_log_probabilities,
)

METHODS = ("masked-marginal", "wild-type-marginal", "mutant-marginal")


def scan(
    engine: Engine,
    antibodies: Sequence[Antibody],
    method: str = "masked-marginal",
    selection: Selection | None = None,
) -> list[np.ndarray]:
    """Log-odds of every amino acid against the wild type at every position.

    The scoring rules are those of ESM-1v (Meier et al. 2021, section 3): log p(mutant) - log p(wild
    type) at the position, given the sequence with the position masked ("masked-marginal"),
    unchanged ("wild-type-marginal"), or mutated ("mutant-marginal", 19 passes per residue).

    Args:
      engine: the model.
      antibodies: any number of them.
      method: one of `METHODS`.
      selection: the residues to mutate; None: all.

    Returns:
      float32 `[residues, 20]` for each antibody, in the order of `AMINO_ACIDS`; 0 for the wild
      type, NaN where the wild type is none of the 20, and where a residue is not selected.
    """
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    places = [scored_places(row) for row in rows]
    if selection is not None:
        wanted = [np.flatnonzero(chosen(antibody, selection)) for antibody in antibodies]
        places = [np.intersect1d(*both) for both in zip(places, wanted, strict=True)]
    if method == "mutant-marginal":
        return _mutant_marginals(engine, rows, places)
    if method == "masked-marginal":
        tables = masked_log_probabilities(engine, rows, places)
    else:
        tables = unmasked_log_probabilities(engine, rows)
    log_odds = []
    for row, here, log_probabilities in zip(rows, places, tables, strict=True):
        wild = row.tokens[row.places[here], None].astype(int)
        odds = np.full((len(row.places), len(AMINO_ACIDS)), np.nan, np.float32)
        odds[here] = log_probabilities[here, AMINO_ACID_TOKENS]
        odds[here] -= np.take_along_axis(log_probabilities[here], wild, axis=1)
        log_odds.append(odds)
    return log_odds


def _mutant_marginals(
    engine: Engine, rows: Sequence[Row], places: Sequence[np.ndarray]
) -> list[np.ndarray]:
    log_odds = [np.full((len(row.places), len(AMINO_ACIDS)), np.nan, np.float32) for row in rows]
    copies, at, owner = [], [], []
    for i, row in enumerate(rows):
        for place in places[i].tolist():
            position = row.places[place]
            wild = int(row.tokens[position]) - FIRST_AMINO_ACID
            log_odds[i][place, wild] = 0
            for mutant in sorted(set(range(len(AMINO_ACIDS))) - {wild}):
                copy = row.tokens.copy()
                copy[position] = FIRST_AMINO_ACID + mutant
                copies.append(copy)
                at.append(position)
                owner.append((i, place, wild, mutant))
    for number, log_probabilities in engine.run(OnePosition(), copies, at):
        i, place, wild, mutant = owner[number]
        odds = log_probabilities[AMINO_ACID_TOKENS]
        log_odds[i][place, mutant] = odds[mutant] - odds[wild]
    return log_odds


def passes(antibody: Antibody, method: str, selection: Selection | None = None) -> int:
    """Number of rows that pass through the encoder for one antibody."""
    each = {"masked-marginal": 1, "wild-type-marginal": 0, "mutant-marginal": len(AMINO_ACIDS) - 1}
    residues = antibody.residues if selection is None else int(chosen(antibody, selection).sum())
    return max(1, residues * each[method])


def table(
    antibodies: Sequence[Antibody],
    scores: Sequence[np.ndarray],
    numbering: str = "imgt",
    germlines: Sequence[str] = (HUMAN,),
) -> pa.Table:
    """A table with a line per mutant: wild type `residue`, `mutant`, and its log-odds `score`."""
    labels = numbered_labels(antibodies, numbering, germlines)
    columns = {name: np.array(values) for name, values in labels.items()}
    log_odds = np.concatenate(scores)
    letters = np.array(list(AMINO_ACIDS))
    # NaN: the wild type is none of the 20 amino acids, or not selected, so there are no mutants
    mutants = (columns["residue"][:, None] != letters) & ~np.isnan(log_odds)
    residue, mutant = np.nonzero(mutants)
    columns = {name: values[residue] for name, values in columns.items()}
    return pa.table(columns | {"mutant": letters[mutant], "score": log_odds[mutants]})
